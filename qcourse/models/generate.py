"""Let a language model write: one token after another, each put behind the text before the next is predicted.

The idea: a step needs only the newest token, since the KV cache holds the keys and values of all before it. That is why
writing is slow for its arithmetic: each step reads every weight to multiply it with a single vector.

Source: Holtzman et al. 2020 for what choosing the likeliest token does to a text; temperature as everywhere.

How it differs from ``evaluate.py``: there a text is given, and all of its tokens are predicted at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from qcourse.models.evaluate import Model, device_of, room_of
from qcourse.models.llama import Cache, KVCache, Llama
from qcourse.numerics.validation import check_token_ids


@torch.no_grad()
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
    """Continue ids token by token: the most likely one, or one drawn from softmax(logits / temperature).

    Args:
        model: a Llama, or a model of transformers; either remembers keys and values, so each step reads one token.
        ids: the prompt (tokens,), at least one.
        max_new_tokens: most tokens to add; prompt and these must fit the model's max_position_embeddings.
        temperature: 0 takes the most likely token.
        generator: draws the tokens where temperature is above 0; seed it to get the same text again. By default torch's
            own.
        stop: an id that ends the text when it comes; it is kept.
        cache: takes the place of an empty KVCache; only for a Llama.

    Returns:
        The prompt and what was added to it.

    Raises:
        TypeError: ids is not of integers.
        ValueError: ids is not one row, or the text would be too long, or max_new_tokens or temperature is negative, or
            the model does not take the cache.

    >>> from qcourse.models.llama import LlamaConfig, random_llama
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> generate(model, torch.tensor([1, 2, 3]), 5).shape
    torch.Size([8])
    """
    check_token_ids(ids, "ids", least=1)
    if cache is not None and not isinstance(model, Llama):
        raise ValueError(
            f"cache must be None for a {type(model).__name__}: only a Llama takes one, got {cache!r}"
        )
    before = len(ids) + (0 if cache is None else cache.length)
    if max_new_tokens < 0 or before + max_new_tokens > room_of(model):
        raise ValueError(
            f"max_new_tokens must be at least 0 and leave the text within the model's {room_of(model)} positions,"
            f" got {max_new_tokens} after {before}"
        )
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    step, new = _stepper(model, cache), ids.long().to(device_of(model) or ids.device)
    text = [new]
    for _ in range(max_new_tokens):
        logits = step(new[None])[0, -1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(keepdim=True)
        text.append(new)
        if stop is not None and int(new) == stop:
            break
    return torch.cat(text)


def _stepper(model: Model, cache: Cache | None) -> Callable[[Tensor], Tensor]:
    if isinstance(model, Llama):
        cache = KVCache() if cache is None else cache
        return lambda ids: model(ids, cache).float()
    past: Any = None

    def step(ids: Tensor) -> Tensor:
        nonlocal past
        out = model(ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        return out.logits.float()

    return step
