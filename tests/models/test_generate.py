"""Generation: the tokens come one by one, and a cache goes on where it ended."""

import pytest
import torch

from qcourse.models.generate import generate, generate_tokens
from qcourse.models.llama import KVCache, Llama, LlamaConfig, random_llama

PROMPT = torch.tensor([5, 1, 9])


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0).eval()


def by_hand(model: Llama, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """Greedy continuation without a cache: each step reads the whole sequence."""
    for _ in range(steps):
        ids = torch.cat([ids, model(ids[None])[0, -1].argmax(keepdim=True)])
    return ids


def test_the_continuation_is_the_argmax_of_the_whole_sequence(model: Llama) -> None:
    expected = by_hand(model, PROMPT, 12)
    assert torch.equal(generate(model, PROMPT, 12), expected)
    assert list(generate_tokens(model, PROMPT, 12)) == expected[3:].tolist()


def test_no_token_is_the_prompt_alone(model: Llama) -> None:
    assert generate(model, PROMPT.int(), 0).tolist() == PROMPT.tolist()
    assert generate(model, PROMPT.int(), 0).dtype == torch.int64


def test_a_token_is_yielded_before_the_next_step(model: Llama) -> None:
    cache = KVCache()
    tokens = generate_tokens(model, PROMPT, 3, cache=cache)
    assert cache.length == 0
    next(tokens)
    assert cache.length == 3
    next(tokens)
    assert cache.length == 4


def test_a_cache_goes_on_after_the_last_token(model: Llama) -> None:
    expected = by_hand(model, PROMPT, 8).tolist()
    cache = KVCache()
    first = list(generate_tokens(model, PROMPT, 4, cache=cache))
    second = list(generate_tokens(model, torch.tensor(first[-1:]), 4, cache=cache))
    assert [*PROMPT.tolist(), *first, *second] == expected


def test_the_stop_token_is_the_last_one(model: Llama) -> None:
    expected = by_hand(model, PROMPT, 12)[3:].tolist()
    stop = expected[4]
    first = expected.index(stop)
    assert list(generate_tokens(model, PROMPT, 12, stop=stop)) == expected[: first + 1]


def test_draws_depend_on_the_generator_alone(model: Llama) -> None:
    def drawn(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        tokens = generate_tokens(model, PROMPT, 12, temperature=1.0, generator=generator)
        return list(tokens)

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_nothing_records_gradients(model: Llama) -> None:
    """Also between two tokens, the caller's own setting holds."""
    cache = KVCache()
    for _ in generate_tokens(model.requires_grad_(), PROMPT, 2, cache=cache):
        assert torch.is_grad_enabled()
    assert not cache.layers[0][0].requires_grad
    model.requires_grad_(False)


@pytest.mark.parametrize("call", [generate, generate_tokens])
def test_what_is_refused_is_refused_at_the_call(model: Llama, call: object) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        call(model, PROMPT, 2, temperature=-1.0)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 0"):
        call(model, PROMPT, -1)
