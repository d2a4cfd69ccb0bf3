"""Sheet 12, the KV cache: cases, references, tolerances, points and known mistakes.

Keys of 12.3 and 12.4 stay a twentieth of a step from a tie, as on sheet 01. In 12.1 all factors
that can be forgotten or confused differ, so each mistake gives another size.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, uniform, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 12.1 ---------------------------------------------------------------------------------------------


class Cache(NamedTuple):
    """The arguments of cache_bytes."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    batch: int
    bits: int
    group_size: int


def _size_cases(generator: Generator) -> list[Case]:
    # the card's example, a model without shared heads, and one with
    by_hand = [
        Cache(2, 4, 2, 8, tokens=10, batch=3, bits=8, group_size=16),
        Cache(32, 32, 32, 128, tokens=4096, batch=3, bits=8, group_size=32),
        Cache(80, 64, 16, 128, tokens=1000, batch=5, bits=4, group_size=128),
    ]
    drawn = []
    for kv_heads in (2, 4, 8):
        cache = Cache(
            layers=pick(generator, 6, 24, 48),
            query_heads=pick(generator, 2, 4) * kv_heads,
            kv_heads=kv_heads,
            head_dim=64,
            tokens=int(whole(generator, 100, 9000)),
            batch=pick(generator, 3, 5, 7),
            bits=pick(generator, 2, 4, 8),
            group_size=pick(generator, 32, 64),
        )
        drawn.append(cache)
    return make_cases(by_hand, drawn)


def _numbers(cache: Cache) -> int:
    """Return how many numbers the cache holds: a key and a value per token, head and layer."""
    per_token = 2 * cache.layers * cache.kv_heads * cache.head_dim
    return per_token * cache.tokens * cache.batch


def _size(numbers: float, bits: float, group_size: int) -> float:
    # codes, and a scale of two bytes per group
    return numbers * bits / 8 + numbers / group_size * 2


def _cache_bytes(*args: Any) -> float:
    cache = Cache(*args)
    return _size(_numbers(cache), cache.bits, cache.group_size)


# Known mistakes.


def _half_of_it(*args: Any) -> float:
    cache = Cache(*args)
    return _size(_numbers(cache) / 2, cache.bits, cache.group_size)


def _with_query_heads(*args: Any) -> float:
    cache = Cache(*args)
    return _cache_bytes(*cache._replace(kv_heads=cache.query_heads))


def _of_one_sequence(*args: Any) -> float:
    return _cache_bytes(*Cache(*args)._replace(batch=1))


def _codes_in_bits(*args: Any) -> float:
    cache = Cache(*args)
    return _size(_numbers(cache), 8 * cache.bits, cache.group_size)


def _all_in_bits(*args: Any) -> float:
    return 8 * _cache_bytes(*args)


def _all_in_bits_at_once(*args: Any) -> float:
    cache = Cache(*args)
    return _numbers(cache) * (cache.bits + 16 / cache.group_size)


def _without_scales(*args: Any) -> float:
    cache = Cache(*args)
    return _numbers(cache) * cache.bits / 8


SIZE = Exercise(
    id="12.1",
    title="The size of a cache",
    function="cache_bytes",
    points=1,
    cases=_size_cases,
    reference=_cache_bytes,
    mistakes=(
        Mistake(
            "keys or values, not both",
            _half_of_it,
            "A token leaves two vectors per head in each layer: which are they, and is there room"
            " for both?",
        ),
        Mistake(
            "the query heads are counted",
            _with_query_heads,
            "Does the cache hold queries? Several query heads share one key-value head: how many"
            " keys has a token then?",
        ),
        Mistake(
            "one sequence instead of the batch",
            _of_one_sequence,
            "The weights serve all sequences at once: can two sequences share their keys as well?",
        ),
        *variants(
            "bits for bytes",
            "How many bytes are 8 bits?",
            _codes_in_bits,
            _all_in_bits,
            _all_in_bits_at_once,
        ),
        Mistake(
            "the scales are left out",
            _without_scales,
            "Codes alone are not numbers: what does each group need besides them, and how many"
            " groups are there?",
        ),
    ),
)


# 12.2 ---------------------------------------------------------------------------------------------


def _attention_case(generator: Generator, new: int, past: int, dim: int) -> tuple[Tensor, ...]:
    # q, k and v of the new tokens, then k and v of the cache
    lengths = (new, new, new, past, past)
    return tuple(torch.randn(tokens, dim, generator=generator) for tokens in lengths)


def _attention_cases(generator: Generator) -> list[Case]:
    # two new tokens after one in the cache
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    k = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    v = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    k_cache = torch.tensor([[0.0, 0.0]])
    v_cache = torch.tensor([[8.0, 8.0]])

    # new tokens, tokens in the cache, dim; the last case has an empty cache
    sizes = [(1, 3, 4), (3, 2, 4), (2, 5, 9), (4, 1, 4), (3, 0, 4)]
    drawn = [_attention_case(generator, *size) for size in sizes]
    return make_cases([(q, k, v, k_cache, v_cache)], drawn)


def _attention(q: Any, k: np.ndarray, v: np.ndarray, diagonal: int) -> np.ndarray:
    """Return softmax(q k^T / sqrt(dim)) v, where query i sees the first i + 1 + diagonal tokens."""
    scores = _scores(q, k)
    masked = np.where(_mask(scores, diagonal), scores, -np.inf)
    return _softmax(masked) @ v


def _scores(q: Any, k: np.ndarray) -> np.ndarray:
    return f64(q) @ k.T / np.sqrt(k.shape[1])


def _mask(scores: np.ndarray, diagonal: int) -> np.ndarray:
    return np.tri(len(scores), scores.shape[1], diagonal, dtype=bool)


def _softmax(scores: np.ndarray, axis: int = 1) -> np.ndarray:
    # a token that sees nothing, one of the mistakes, gets NaN
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=axis, keepdims=True))
        return weights / weights.sum(axis=axis, keepdims=True)


def _joined(cache: Any, new: Any) -> np.ndarray:
    return np.concatenate([f64(cache), f64(new)])


def _seen(beyond: int) -> Callable[..., np.ndarray]:
    """Return attention over cache and new tokens that sees `beyond` tokens after a query's own."""

    def attend(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> np.ndarray:
        diagonal = len(k_cache) + beyond
        return _attention(q, _joined(k_cache, k), _joined(v_cache, v), diagonal)

    return attend


# Known mistakes.


def _mask_without_cache(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> np.ndarray:
    return _attention(q, _joined(k_cache, k), _joined(v_cache, v), 0)


def _masked_with_zero(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> np.ndarray:
    scores = _scores(q, _joined(k_cache, k))
    seen = _mask(scores, len(k_cache))
    return _softmax(scores * seen) @ _joined(v_cache, v)


def _softmax_of_columns(q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any) -> np.ndarray:
    scores = _scores(q, _joined(k_cache, k))
    seen = _mask(scores, len(k_cache))
    masked = np.where(seen, scores, -np.inf)
    return _softmax(masked, axis=0) @ _joined(v_cache, v)


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
            _mask_without_cache,
            "The first of the new tokens is not token 0 of the sequence: how many precede it?",
        ),
        Mistake(
            "a token does not see itself",
            _seen(-1),
            "How many tokens may the first new one see if the cache holds three? Count the token"
            " itself.",
        ),
        Mistake(
            "a token sees the one after it",
            _seen(1),
            "Count the tokens that the first new one may see: is the last of them the token"
            " itself?",
        ),
        Mistake(
            "a score of 0 where a token is not seen",
            _masked_with_zero,
            "What does the softmax make of a score of 0: a weight of 0?",
        ),
        Mistake(
            "the softmax runs over the new tokens",
            _softmax_of_columns,
            "The weights of each new token sum to 1 over the tokens that it sees: along which"
            " axis of the scores are these?",
        ),
    ),
)


# 12.3 ---------------------------------------------------------------------------------------------


def _keys(generator: Generator, tokens: int, channels: int, group_size: int, bits: int) -> Tensor:
    """Return keys (tokens, channels) away from ties; each group has a code at an end."""
    groups = -(-tokens // group_size)
    shape = groups, group_size, channels
    top = qmax(bits)

    # codes, and a part of a step that does not reach a tie
    codes = whole(generator, 1 - top, top - 1, *shape)
    steps = codes + uniform(generator, -0.45, 0.45, *shape)
    signs = 2 * whole(generator, 0, 1, groups, channels) - 1
    steps[:, 0] = top * signs

    # a scale per group and channel, and channels that differ in size
    of_groups = uniform(generator, 0.05, 1.0, groups, 1, channels)
    of_channels = uniform(generator, 0.2, 3.0, channels)
    keys = steps * (of_groups * of_channels)
    return keys.reshape(-1, channels)[:tokens].contiguous()


def _key_cases(generator: Generator) -> list[Case]:
    # one small channel and one large one, in two groups
    k = torch.tensor([[0.3, 8.1], [-0.4, 7.2], [0.24, -0.7], [0.1, 7.6]])

    # tokens, channels, group size, bits
    drawn = []
    for tokens, channels, group_size, bits in ((8, 4, 4, 4), (6, 6, 3, 3), (12, 4, 2, 8)):
        keys = _keys(generator, tokens, channels, group_size, bits)
        drawn.append((keys, group_size, bits))
    return make_cases([(k, 2, 4)], drawn)


def _rounded(
    x: np.ndarray, axis: int | tuple[int, ...], bits: int, size: Callable[..., Any] = np.abs
) -> np.ndarray:
    """Return x rounded to grids whose scale is shared along an axis."""
    amax = size(x).max(axis=axis, keepdims=True)
    scale = np.where(amax == 0, 1, amax) / qmax(bits)
    codes = np.rint(x / scale).clip(-qmax(bits) - 1, qmax(bits))
    return scale * codes


def _groups_of_tokens(k: Any, group_size: int) -> np.ndarray:
    channels = np.shape(k)[1]
    return f64(k).reshape(-1, group_size, channels)


def _by_channel(
    k: Any, group_size: int, bits: int, size: Callable[..., Any] = np.abs
) -> np.ndarray:
    groups = _groups_of_tokens(k, group_size)
    return _rounded(groups, 1, bits, size).reshape(k.shape)


# Known mistakes.


def _by_token(k: Any, group_size: int, bits: int) -> np.ndarray:
    return _rounded(f64(k), 1, bits)


def _by_token_in_groups(k: Any, group_size: int, bits: int) -> np.ndarray:
    groups = f64(k).reshape(len(k), -1, group_size)
    return _rounded(groups, 2, bits).reshape(k.shape)


def _by_whole_channel(k: Any, group_size: int, bits: int) -> np.ndarray:
    return _rounded(f64(k), 0, bits)


def _by_block(k: Any, group_size: int, bits: int) -> np.ndarray:
    groups = _groups_of_tokens(k, group_size)
    return _rounded(groups, (1, 2), bits).reshape(k.shape)


def _by_largest_number(k: Any, group_size: int, bits: int) -> np.ndarray:
    return _by_channel(k, group_size, bits, np.positive)


def _reshaped(k: Any, group_size: int, bits: int) -> np.ndarray:
    return _by_channel(k, group_size, bits).T.reshape(k.shape)


KEYS = Exercise(
    id="12.3",
    title="Keys by channel",
    function="round_keys",
    points=2,
    cases=_key_cases,
    reference=_by_channel,
    mistakes=(
        *variants(
            "keys by token",
            "A channel that is large at every token sets the step of all numbers that share its"
            " scale: which are these in your answer?",
            _by_token_in_groups,
            _by_token,
        ),
        Mistake(
            "one scale per channel for all tokens",
            _by_whole_channel,
            "A cache grows: must the first tokens be rounded anew when a later one is larger? What"
            " is a group for?",
        ),
        Mistake(
            "the channels of a group share a scale",
            _by_block,
            "In a group, over which axes do you take amax: the tokens only, or the channels as"
            " well?",
        ),
        Mistake(
            "the largest number for the largest magnitude",
            _by_largest_number,
            "What is the amax of 0.3 and -0.4, and which of the two has the code 7 or -7?",
        ),
        Mistake(
            "reshaped where it should be transposed",
            _reshaped,
            "reshape keeps the order in memory: does row 1 of your answer hold the keys of"
            " token 1?",
        ),
    ),
)


# 12.4 ---------------------------------------------------------------------------------------------


def _window_cases(generator: Generator) -> list[Case]:
    # two groups have left, no window, no group has left, a window longer than the sequence
    k = torch.tensor([[0.32], [0.75], [-0.2], [1.4], [0.55], [-0.27], [0.45], [0.24]])
    by_hand = [(k[:7], 3, 1, 4), (k, 3, 0, 4), (k[:4], 4, 2, 4), (k[:6], 3, 7, 4)]

    # tokens, group size, window, bits; all tokens of the last case are in the window
    drawn = []
    for tokens, group_size, residual, bits in (
        (9, 3, 1, 4),
        (8, 4, 3, 3),
        (11, 4, 2, 4),
        (10, 4, 2, 8),
        (6, 3, 8, 4),
    ):
        keys = _keys(generator, tokens, 3, group_size, bits)
        drawn.append((keys, group_size, residual, bits))
    return make_cases(by_hand, drawn)


def _coded(k: Any, start: int, stop: int, group_size: int, bits: int) -> np.ndarray:
    """Return k with the tokens from start to stop quantized by groups; the last may be short."""
    held = f64(k).copy()
    for t in range(start, stop, group_size):
        part = slice(t, min(t + group_size, stop))
        held[part] = _rounded(held[part], 0, bits)
    return held


def _leaving(tokens: int, group_size: int, residual: int) -> int:
    """Return how many tokens have left the window in whole groups."""
    groups = max(tokens - residual, 0) // group_size
    return groups * group_size


def _held(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    stop = _leaving(len(k), group_size, residual)
    return _coded(k, 0, stop, group_size, bits)


# Known mistakes.


def _held_stale(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    start = len(k) - _leaving(len(k), group_size, residual)
    return _coded(k, start, len(k), group_size, bits)


def _held_stale_first(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    start = min(residual, len(k))
    stop = start + _leaving(len(k), group_size, residual)
    return _coded(k, start, stop, group_size, bits)


def _held_without_window(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    return _held(k, group_size, 0, bits)


def _held_with_short_group(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    return _coded(k, 0, max(len(k) - residual, 0), group_size, bits)


def _held_rounded_up(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    groups = -(-max(len(k) - residual, 0) // group_size)
    stop = min(groups * group_size, len(k))
    return _coded(k, 0, stop, group_size, bits)


def _held_below_zero(k: Any, group_size: int, residual: int, bits: int) -> np.ndarray:
    count = (len(k) - residual) // group_size * group_size
    # a negative count counts from the end: k[:-3] is all but the last three
    return _coded(k, 0, len(k[:count]), group_size, bits)


WINDOW = Exercise(
    id="12.4",
    title="A window of the newest tokens",
    function="keys_held",
    points=3,
    cases=_window_cases,
    reference=_held,
    mistakes=(
        *variants(
            "a stale window: the oldest tokens stay as they are",
            "Which tokens get the most attention, the first or the last? Which ones are unchanged"
            " in your answer?",
            _held_stale,
            _held_stale_first,
        ),
        Mistake(
            "the window is forgotten",
            _held_without_window,
            "Are the newest `residual` tokens of your answer exactly the numbers that came in?",
        ),
        Mistake(
            "an incomplete group is coded",
            _held_with_short_group,
            "A group gets its scale only once: what if the largest of its tokens comes later?",
        ),
        Mistake(
            "a group is coded while some of it is in the window",
            _held_rounded_up,
            "When has the LAST token of a group left the window? Before that, its group has to"
            " wait.",
        ),
        Mistake(
            "a negative number of tokens has left the window",
            _held_below_zero,
            "A sequence of six tokens, a window of seven: how many have left it, and what does"
            " k[:-3] take?",
        ),
    ),
)


SHEET = Sheet("12", "The KV cache", (SIZE, ATTENTION, KEYS, WINDOW))
