"""Generate tokens with a language model: predict one token, append it, and repeat (decode).

With a KV cache each step reads only the newest token. A step still reads every weight, to multiply
it with one vector: that is why decode is memory-bound.

Source: Holtzman et al. 2020, "The curious case of neural text degeneration", on greedy decoding.
`evaluate.py` predicts all tokens of a given sequence at once.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from qcourse.models.evaluation_windows import Model, device_of, max_positions
from qcourse.models.llama import Cache, KVCache, Llama
from qcourse.numerics.validation import check_token_ids


def generate(
    model: Model,
    ids: Shaped[Tensor, "..."],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    cache: Cache | None = None,
) -> Int[Tensor, " tokens"]:
    """Return ids (tokens,) and their continuation: argmax, or a draw at a temperature above 0.

    Args:
        model: a Llama, or a model of transformers.
        stop: the id that ends the sequence; it is kept.
        cache: replaces an empty KVCache; only for a Llama.

    Raises:
        TypeError, ValueError: ids is not one row of ids; the sequence or the cache does not suit
            the model; a number is negative.

    >>> from qcourse.models.llama import LlamaConfig, random_llama
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> generate(model, torch.tensor([1, 2, 3]), 5).shape
    torch.Size([8])
    """
    new = generate_tokens(
        model,
        ids,
        max_new_tokens,
        temperature=temperature,
        generator=generator,
        stop=stop,
        cache=cache,
    )
    prompt = ids.long().to(device_of(model) or ids.device)
    return torch.cat([prompt, prompt.new_tensor(list(new))])


def generate_tokens(
    model: Model,
    ids: Shaped[Tensor, "..."],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    stop: int | None = None,
    cache: Cache | None = None,
) -> Iterator[int]:
    """Yield each new id of ``generate`` as soon as it is chosen; the arguments are the same.

    Afterwards a given cache holds all tokens but the last new one: no step has read that one yet.

    >>> from qcourse.models.llama import LlamaConfig, random_llama
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> prompt = torch.tensor([1, 2, 3])
    >>> list(generate_tokens(model, prompt, 5)) == generate(model, prompt, 5)[3:].tolist()
    True
    """
    # Checked here, because a generator would raise only when its first token is taken.
    check_token_ids(ids, "ids", least=1)
    _check_options(model, len(ids), max_new_tokens, temperature, cache)
    prompt = ids.long().to(device_of(model) or ids.device)
    step = _stepper(model, cache)
    return _steps(step, prompt, max_new_tokens, temperature, generator, stop)


def _steps(
    step: Callable[[Tensor], Tensor],
    new: Tensor,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    stop: int | None,
) -> Iterator[int]:
    for _ in range(max_new_tokens):
        # The first step reads the prompt, each later one only the newest token. The caller's own
        # code runs between two steps, so gradients are off in a step only.
        with torch.no_grad():
            logits = step(new[None])[0, -1]  # (vocabulary,)
        if temperature:
            probabilities = (logits / temperature).softmax(-1)
            new = torch.multinomial(probabilities, 1, generator=generator)
        else:
            new = logits.argmax(keepdim=True)
        token = int(new)
        yield token
        if token == stop:
            break


def _check_options(
    model: Model, prompt: int, max_new_tokens: int, temperature: float, cache: Cache | None
) -> None:
    if cache is not None and not isinstance(model, Llama):
        raise ValueError(
            f"cache must be None for a {type(model).__name__}: only a Llama takes one,"
            f" got {cache!r}"
        )
    # The cache may hold tokens of an earlier call, which take positions too.
    before = prompt if cache is None else prompt + cache.length
    room = max_positions(model)
    if max_new_tokens < 0 or before + max_new_tokens > room:
        raise ValueError(
            "max_new_tokens must be at least 0 and leave the text within the model's"
            f" {room} positions, got {max_new_tokens} after {before}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")


def _stepper(model: Model, cache: Cache | None) -> Callable[[Tensor], Tensor]:
    """Return a function from new ids to logits that keeps the keys and values of earlier ids."""
    if isinstance(model, Llama):
        return _llama_stepper(model, KVCache() if cache is None else cache)
    # transformers returns the cache with the logits.
    past: Any = None

    def step(ids: Tensor) -> Tensor:
        nonlocal past
        output = model(ids, past_key_values=past, use_cache=True)
        past = output.past_key_values
        return output.logits.float()

    return step


def _llama_stepper(model: Llama, cache: Cache) -> Callable[[Tensor], Tensor]:
    def step(ids: Tensor) -> Tensor:
        return model(ids, cache).float()

    return step
