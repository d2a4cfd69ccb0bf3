"""Sheet 12, the KV cache: cases, references, tolerances, points and known mistakes.

Keys of 12.3 and 12.4 stay a twentieth of a step from a tie, as on sheet 01. In 12.1 no two factors that one can forget
or confuse are alike, so each mistake has a size of its own.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 12.1 -------------------------------------------------------------------------------------------------------------


def _size_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (2, 4, 2, 8, 10, 3, 8, 16),
        (32, 32, 32, 128, 4096, 3, 8, 32),
        (80, 64, 16, 128, 1000, 5, 4, 128),
    ]
    drawn = [
        (
            pick(generator, 6, 24, 48),
            pick(generator, 2, 4) * kv_heads,
            kv_heads,
            64,
            int(whole(generator, 100, 9000)),
            pick(generator, 3, 5, 7),
            pick(generator, 2, 4, 8),
            pick(generator, 32, 64),
        )
        for kv_heads in (2, 4, 8)
    ]
    return make_cases(by_hand, drawn)


def _size(numbers: float, bits: float, group_size: int) -> float:
    return numbers * bits / 8 + numbers / group_size * 2


def _numbers(layers: int, heads: int, head_dim: int, tokens: int, batch: int) -> int:
    return 2 * layers * heads * head_dim * tokens * batch


SIZE = Exercise(
    id="12.1",
    title="The size of a cache",
    function="cache_bytes",
    points=1,
    cases=_size_cases,
    reference=lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: _size(
        _numbers(layers, kv_heads, dim, tokens, batch), bits, group
    ),
    mistakes=(
        Mistake(
            "keys or values, not both",
            lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: _size(
                _numbers(layers, kv_heads, dim, tokens, batch) / 2, bits, group
            ),
            "A token leaves two things behind in each layer: which are they, and is there room for both?",
        ),
        Mistake(
            "the query heads are counted",
            lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: _size(
                _numbers(layers, query_heads, dim, tokens, batch), bits, group
            ),
            "Are queries kept? Several query heads share one key-value head: how many keys has a token then?",
        ),
        Mistake(
            "one text instead of the batch",
            lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: _size(
                _numbers(layers, kv_heads, dim, tokens, 1), bits, group
            ),
            "The weights serve all texts at once: can two texts share their keys as well?",
        ),
        *(
            Mistake(
                "bits for bytes",
                function,
                "How many bytes are 8 bits?",
            )
            for function in (
                lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: _size(
                    _numbers(layers, kv_heads, dim, tokens, batch), 8 * bits, group
                ),
                lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: (
                    8 * _size(_numbers(layers, kv_heads, dim, tokens, batch), bits, group)
                ),
                lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: (
                    _numbers(layers, kv_heads, dim, tokens, batch) * (bits + 16 / group)
                ),
            )
        ),
        Mistake(
            "the scales are left out",
            lambda layers, query_heads, kv_heads, dim, tokens, batch, bits, group: (
                _numbers(layers, kv_heads, dim, tokens, batch) * bits / 8
            ),
            "Nobody can read codes alone: what is kept for each group besides them, and how many groups are there?",
        ),
    ),
)


# 12.2 -------------------------------------------------------------------------------------------------------------


def _attention_case(generator: Generator, new: int, past: int, dim: int) -> tuple[Tensor, ...]:
    return tuple(
        torch.randn(tokens, dim, generator=generator) for tokens in (new, new, new, past, past)
    )


def _attention_cases(generator: Generator) -> list[Case]:
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    k, v = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    k_cache, v_cache = torch.tensor([[0.0, 0.0]]), torch.tensor([[8.0, 8.0]])
    sizes = [(1, 3, 4), (3, 2, 4), (2, 5, 9), (4, 1, 4), (3, 0, 4)]  # the last one has no past
    drawn = [_attention_case(generator, *size) for size in sizes]
    return make_cases([(q, k, v, k_cache, v_cache)], drawn)


def _attention(
    q: Any, k: np.ndarray, v: np.ndarray, diagonal: int | None, divisor: float | None = None
) -> np.ndarray:
    """softmax(q k^T / sqrt(dim)) v, where query i sees the first i + 1 + diagonal tokens; all where that is None."""
    fits = f64(q) @ k.T / (np.sqrt(k.shape[1]) if divisor is None else divisor)
    return (
        _softmax(fits if diagonal is None else np.where(_mask(fits, diagonal), fits, -np.inf)) @ v
    )


def _mask(fits: np.ndarray, diagonal: int) -> np.ndarray:
    return np.tri(len(fits), fits.shape[1], diagonal, dtype=bool)


def _softmax(fits: np.ndarray, axis: int = 1) -> np.ndarray:
    with np.errstate(
        invalid="ignore"
    ):  # NaN for a token that sees nothing, which is one of the mistakes
        weights = np.exp(fits - fits.max(axis=axis, keepdims=True))
        return weights / weights.sum(axis=axis, keepdims=True)


def _behind(cache: Any, new: Any) -> np.ndarray:
    return np.concatenate([f64(cache), f64(new)])


def _seen(beyond: int | None, divisor: float | None = None) -> Callable[..., np.ndarray]:
    """Attention over the cache and the new tokens, with so many tokens beyond a query's own; all of them for None."""

    def attend(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> np.ndarray:
        diagonal = None if beyond is None else len(k_cache) + beyond
        return _attention(q, _behind(k_cache, k), _behind(v_cache, v), diagonal, divisor)

    return attend


def _weighed(weights: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray]:
    """Attention whose weights are a function of the fits and of who sees whom."""

    def attend(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> np.ndarray:
        keys = _behind(k_cache, k)
        fits = f64(q) @ keys.T / np.sqrt(keys.shape[1])
        return weights(fits, _mask(fits, len(k_cache))) @ _behind(v_cache, v)

    return attend


ATTENTION = Exercise(
    id="12.2",
    title="Attention with a cache",
    function="attend",
    points=2,
    cases=_attention_cases,
    reference=_seen(0),
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "the mask forgets the cache",
            lambda q, k, v, k_cache, v_cache: _attention(
                q, _behind(k_cache, k), _behind(v_cache, v), 0
            ),
            "The first of the new tokens is not token 0 of the text: how many stand before it?",
        ),
        Mistake(
            "a token does not see itself",
            _seen(-1),
            "How many tokens may the first new one see, if the cache holds three? Count the token itself.",
        ),
        Mistake(
            "a token sees the one after it",
            _seen(1),
            "Count the tokens that the first new one may see: is the last of them the token itself?",
        ),
        Mistake(
            "a fit of 0 where a token is not seen",
            _weighed(lambda fits, seen: _softmax(fits * seen)),
            "What does the softmax make of a fit of 0: a weight of 0?",
        ),
        Mistake(
            "the softmax runs over the new tokens",
            _weighed(lambda fits, seen: _softmax(np.where(seen, fits, -np.inf), axis=0)),
            "Each new token shares out one weight among those that it sees: along which axis of the fits are they?",
        ),
    ),
)


# 12.3 -------------------------------------------------------------------------------------------------------------


def _keys(generator: Generator, tokens: int, channels: int, group_size: int, bits: int) -> Tensor:
    """Keys (tokens, channels) of which each group of a channel has an extreme code and none lies near a tie."""
    groups = -(-tokens // group_size)
    shape = groups, group_size, channels
    steps = whole(generator, 1 - qmax(bits), qmax(bits) - 1, *shape) + uniform(
        generator, -0.45, 0.45, *shape
    )
    steps[:, 0] = qmax(bits) * (2 * whole(generator, 0, 1, groups, channels) - 1)
    scales = uniform(generator, 0.05, 1.0, groups, 1, channels) * uniform(
        generator, 0.2, 3.0, channels
    )
    return (steps * scales).reshape(-1, channels)[:tokens].contiguous()


def _key_cases(generator: Generator) -> list[Case]:
    k = torch.tensor([[0.3, 8.1], [-0.4, 7.2], [0.24, -0.7], [0.1, 7.6]])
    drawn = [_keys(generator, *shape) for shape in ((8, 4, 4, 4), (6, 6, 3, 3), (12, 4, 2, 8))]
    sizes = [(4, 4), (3, 3), (2, 8)]
    return make_cases([(k, 2, 4)], ((x, *size) for x, size in zip(drawn, sizes, strict=True)))


def _rounded(
    x: np.ndarray, axis: int | tuple[int, ...], bits: int, size: Callable[..., Any] = np.abs
) -> np.ndarray:
    """x on the grids of ranges along an axis, which shares its scale."""
    amax = size(x).max(axis=axis, keepdims=True)
    scale = np.where(amax == 0, 1, amax) / qmax(bits)
    return scale * np.rint(x / scale).clip(-qmax(bits) - 1, qmax(bits))


def _by_channel(
    k: Any, group_size: int, bits: int, size: Callable[..., Any] = np.abs
) -> np.ndarray:
    return _rounded(f64(k).reshape(-1, group_size, np.shape(k)[1]), 1, bits, size).reshape(k.shape)


def _by_token_in_groups(k: Any, group_size: int, bits: int) -> np.ndarray:
    return _rounded(f64(k).reshape(len(k), -1, group_size), 2, bits).reshape(k.shape)


def _by_block(k: Any, group_size: int, bits: int) -> np.ndarray:
    return _rounded(f64(k).reshape(-1, group_size, np.shape(k)[1]), (1, 2), bits).reshape(k.shape)


KEYS = Exercise(
    id="12.3",
    title="Keys by channel",
    function="round_keys",
    points=2,
    cases=_key_cases,
    reference=_by_channel,
    mistakes=(
        *(
            Mistake(
                "keys by token",
                function,
                "A channel that is loud at every token sets the step for all who share its scale: who does, in yours?",
            )
            for function in (
                _by_token_in_groups,
                lambda k, group_size, bits: _rounded(f64(k), 1, bits),
            )
        ),
        Mistake(
            "one scale a channel for all tokens",
            lambda k, group_size, bits: _rounded(f64(k), 0, bits),
            "A cache grows: must the first tokens be rounded anew when a later one is larger? What is a group for?",
        ),
        Mistake(
            "the channels of a group share a scale",
            _by_block,
            "In a group, over which axis does your amax run: the tokens only, or the channels as well?",
        ),
        Mistake(
            "the largest number for the largest magnitude",
            lambda k, group_size, bits: _by_channel(k, group_size, bits, np.positive),
            "What is the amax of 0.3 and -0.4, and which of the two has the code 7 or -7?",
        ),
        Mistake(
            "reshaped where it should be transposed",
            lambda k, group_size, bits: _by_channel(k, group_size, bits).T.reshape(k.shape),
            "reshape keeps the order in memory: does row 1 of your answer hold the keys of token 1?",
        ),
    ),
)


# 12.4 -------------------------------------------------------------------------------------------------------------


def _window_cases(generator: Generator) -> list[Case]:
    k = torch.tensor([[0.32], [0.75], [-0.2], [1.4], [0.55], [-0.27], [0.45], [0.24]])
    by_hand = [(k[:7], 3, 1, 4), (k, 3, 0, 4), (k[:4], 4, 2, 4), (k[:6], 3, 7, 4)]
    sizes = [
        (9, 3, 1, 4),
        (8, 4, 3, 3),
        (11, 4, 2, 4),
        (10, 4, 2, 8),
        (6, 3, 8, 4),
    ]  # the last is all window
    drawn = [
        (_keys(generator, tokens, 3, group, bits), group, residual, bits)
        for tokens, group, residual, bits in sizes
    ]
    return make_cases(by_hand, drawn)


def _coded(k: Any, start: int, stop: int, group_size: int, bits: int) -> np.ndarray:
    """k with the tokens from start to stop coded, group by group; the last group may be short."""
    held = f64(k).copy()
    for t in range(start, stop, group_size):
        part = slice(t, min(t + group_size, stop))
        held[part] = _rounded(held[part], 0, bits)
    return held


def _leaving(tokens: int, group_size: int, residual: int) -> int:
    """How many tokens have left the window in whole groups."""
    return max(tokens - residual, 0) // group_size * group_size


def _held(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    return _coded(k, 0, _leaving(len(k), group_size, residual), group_size, bits)


def _held_stale(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    return _coded(k, len(k) - _leaving(len(k), group_size, residual), len(k), group_size, bits)


def _held_stale_first(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    start = min(residual, len(k))
    return _coded(k, start, start + _leaving(len(k), group_size, residual), group_size, bits)


def _held_rounded_up(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    groups = -(-max(len(k) - residual, 0) // group_size)
    return _coded(k, 0, min(groups * group_size, len(k)), group_size, bits)


def _held_below_zero(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    count = (len(k) - residual) // group_size * group_size
    return _coded(k, 0, len(k[:count]), group_size, bits)  # k[:-3]: all but the last three


WINDOW = Exercise(
    id="12.4",
    title="A window of the newest tokens",
    function="keys_held",
    points=3,
    cases=_window_cases,
    reference=_held,
    mistakes=(
        *(
            Mistake(
                "a stale window: the oldest tokens stay as they are",
                function,
                "Which tokens does attention look at most, the first or the last? Which are as they were in yours?",
            )
            for function in (_held_stale, _held_stale_first)
        ),
        Mistake(
            "the window is forgotten",
            lambda k, group_size, residual, bits: _held(k, group_size, 0, bits),
            "Are the newest `residual` tokens of your answer the very numbers that came in?",
        ),
        Mistake(
            "an incomplete group is coded",
            lambda k, group_size, residual, bits: _coded(
                k, 0, max(len(k) - residual, 0), group_size, bits
            ),
            "A group gets its scale once and for all: what if the largest of its tokens is still to come?",
        ),
        Mistake(
            "a group is coded while some of it is in the window",
            _held_rounded_up,
            "When has the LAST token of a group left the window? Before that, its group has to wait.",
        ),
        Mistake(
            "a negative number of tokens has left the window",
            _held_below_zero,
            "A text of six tokens, a window of seven: how many have left it, and what does k[:-3] take?",
        ),
    ),
)


SHEET = Sheet("12", "The KV cache", (SIZE, ATTENTION, KEYS, WINDOW))
