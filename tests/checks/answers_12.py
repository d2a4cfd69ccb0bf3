"""Sheet 12, the KV cache: right answers in other styles, and mistakes as people write them."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import qcourse
from qcourse.cost.memory import kv_cache_bytes
from qcourse.methods.kv_cache import QuantizedKVCache
from qcourse.models.llama import KVCache

# Right answers.


def size_of_package(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    bits: int,
    group_size: int,
) -> float:
    return kv_cache_bytes(
        layers, kv_heads, head_dim, tokens, batch=batch, bits=bits, group_size=group_size
    )


def size_loop(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    bits: int,
    group_size: int,
) -> float:
    total = 0.0
    for _ in range(layers):
        for bytes_a_number in (bits / 8, 2 / group_size):
            for _ in ("keys", "values"):
                total += batch * tokens * kv_heads * head_dim * bytes_a_number
    return total


def size_in_one_line(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    bits: int,
    group_size: int,
) -> float:
    return layers * kv_heads * head_dim * tokens * batch * (bits + 16 / group_size) / 4


def attend_of_package(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    cache = KVCache()
    cache.update(0, k_cache[None, None], v_cache[None, None])
    keys, values = cache.update(0, k[None, None], v[None, None])
    mask = torch.ones(len(q), keys.shape[2], dtype=torch.bool).tril(len(k_cache))
    return F.scaled_dot_product_attention(q[None, None], keys, values, attn_mask=mask)[0, 0]


def attend_loop(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    keys = k_cache
    values = v_cache
    rows = []
    for t in range(len(q)):
        keys = torch.cat([keys, k[t : t + 1]])
        values = torch.cat([values, v[t : t + 1]])
        weights = (q[t] @ keys.T / math.sqrt(q.shape[1])).softmax(0)
        rows.append(weights @ values)
    return torch.stack(rows)


def attend_numpy(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> np.ndarray:
    keys = np.vstack([k_cache, k])
    values = np.vstack([v_cache, v])
    weights = np.exp(q.numpy() @ keys.T / np.sqrt(q.shape[1]))
    position = np.arange(len(k_cache), len(keys))
    weights[np.arange(len(keys))[None] > position[:, None]] = 0
    return weights @ values / weights.sum(axis=1, keepdims=True)


def round_of_package(k: Tensor, group_size: int, bits: int) -> Tensor:
    return held_of_package(k, group_size, 0, bits)


def held_of_package(k: Tensor, group_size: int, residual: int, bits: int) -> Tensor:
    quantizer = qcourse.IntQuantizer(bits, granularity=qcourse.PerGroup(group_size))
    cache = QuantizedKVCache(quantizer, None, residual=residual)
    for t in range(len(k)):
        cache.update(0, k[None, None, t : t + 1], k[None, None, t : t + 1])
    return cache.layers[0][0].all_tokens()[0, 0]


def round_columns(k: Tensor, group_size: int, bits: int) -> list:
    top = 2 ** (bits - 1) - 1
    rows = k.tolist()
    for channel in range(k.shape[1]):
        for start in range(0, len(rows), group_size):
            tokens = range(start, start + group_size)
            scale = max(abs(rows[t][channel]) for t in tokens) / top
            for t in tokens:
                rows[t][channel] = scale * max(-top - 1, min(top, round(rows[t][channel] / scale)))
    return rows


def round_transposed(k: Tensor, group_size: int, bits: int) -> Tensor:
    return qcourse.fake_quantize(k.T.contiguous(), bits, granularity=qcourse.PerGroup(group_size)).T


def held_as_they_come(k: Tensor, group_size: int, residual: int, bits: int) -> Tensor:
    coded = []
    window = []
    for token in k:
        window.append(token)
        if len(window) == residual + group_size:
            coded.append(round_transposed(torch.stack(window[:group_size]), group_size, bits))
            window = window[group_size:]
    return torch.cat([*coded, *(token[None] for token in window)])


def held_numpy(k: Tensor, group_size: int, residual: int, bits: int) -> np.ndarray:
    held = k.numpy().copy()
    top = 2 ** (bits - 1) - 1
    start = 0
    while start + group_size + residual <= len(held):
        group = held[start : start + group_size]
        scale = np.abs(group).max(axis=0) / top
        group[:] = np.clip(np.round(group / scale), -top - 1, top) * scale
        start += group_size
    return held


THE_PACKAGE = {
    "12.1": size_of_package,
    "12.2": attend_of_package,
    "12.3": round_of_package,
    "12.4": held_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "12.1": (
        size_loop,
        size_in_one_line,
    ),
    "12.2": (attend_loop, attend_numpy),
    "12.3": (round_columns, round_transposed),
    "12.4": (held_as_they_come, held_numpy),
}

# Mistakes.


def size_of_heads(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    bits: int,
    group_size: int,
) -> float:
    return kv_cache_bytes(
        layers, query_heads, head_dim, tokens, batch=batch, bits=bits, group_size=group_size
    )


def size_of_one_sequence(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    bits: int,
    group_size: int,
) -> float:
    return kv_cache_bytes(layers, kv_heads, head_dim, tokens, bits=bits, group_size=group_size)


def size_without_scales(
    layers: int,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    batch: int,
    bits: int,
    group_size: int,
) -> float:
    return kv_cache_bytes(layers, kv_heads, head_dim, tokens, batch=batch, bits=bits)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, diagonal: int | None
) -> Tensor:
    keys = torch.cat([k_cache, k])
    values = torch.cat([v_cache, v])
    scores = q @ keys.T / q.shape[1] ** 0.5
    if diagonal is not None:
        scores = scores.masked_fill(torch.ones_like(scores).triu(diagonal).bool(), -torch.inf)
    return scores.softmax(dim=1) @ values


def attend_causal_flag(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    keys = torch.cat([k_cache, k])
    values = torch.cat([v_cache, v])
    return F.scaled_dot_product_attention(q[None], keys[None], values[None], is_causal=True)[0]


def attend_hidden_by_zero(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    keys = torch.cat([k_cache, k])
    scores = q @ keys.T / math.sqrt(k.shape[1])
    mask = torch.ones_like(scores).tril(len(k_cache))
    return torch.softmax(scores * mask, dim=-1) @ torch.cat([v_cache, v])


def attend_masked_late(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    weights = (q @ torch.cat([k_cache, k]).T / math.sqrt(k.shape[1])).softmax(dim=-1)
    return weights.tril(len(k_cache)) @ torch.cat([v_cache, v])


def attend_other_axis(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    # (past + new, new)
    scores = torch.cat([k_cache, k]) @ q.T / math.sqrt(k.shape[1])
    hidden = torch.ones_like(scores).tril(-len(k_cache) - 1).bool()
    scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=1).T @ torch.cat([v_cache, v])


def round_by_largest(k: Tensor, group_size: int, bits: int) -> Tensor:
    top = 2 ** (bits - 1) - 1
    groups = k.unflatten(0, (-1, group_size))
    scale = groups.amax(dim=1, keepdim=True) / top
    return ((groups / scale).round().clamp(-top - 1, top) * scale).flatten(0, 1)


def round_rows(k: Tensor, group_size: int, bits: int) -> Tensor:
    return qcourse.fake_quantize(k, bits, granularity=qcourse.PerGroup(group_size))


def round_whole_channels(k: Tensor, group_size: int, bits: int) -> Tensor:
    return qcourse.fake_quantize(k, bits, granularity=qcourse.PerChannel(1))


def round_reshaped(k: Tensor, group_size: int, bits: int) -> Tensor:
    return round_transposed(k, group_size, bits).T.reshape(k.shape)


def held_without_window(k: Tensor, group_size: int, residual: int, bits: int) -> Tensor:
    return held_as_they_come(k, group_size, 0, bits)


def held_too_long(k: Tensor, group_size: int, residual: int, bits: int) -> Tensor:
    count = 0
    while len(k) - count - residual > group_size:
        count += group_size
    if not count:
        return k
    return torch.cat([round_transposed(k[:count], group_size, bits), k[count:]])


def held_oldest(k: Tensor, group_size: int, residual: int, bits: int) -> Tensor:
    count = max(len(k) - residual, 0) // group_size * group_size
    if not count:
        return k
    return torch.cat([k[:-count], round_transposed(k[-count:], group_size, bits)])


def held_below_zero(k: Tensor, group_size: int, residual: int, bits: int) -> Tensor:
    count = (len(k) - residual) // group_size * group_size
    coded = [round_transposed(k[:count], group_size, bits)] if len(k[:count]) else []
    return torch.cat([*coded, k[count:] if count else k])


MISTAKES = [
    ("12.1", "the query heads are counted", size_of_heads),
    ("12.1", "one sequence instead of the batch", size_of_one_sequence),
    ("12.1", "the scales are left out", size_without_scales),
    ("12.1", "keys or values, not both", lambda *sizes: size_of_package(*sizes) / 2),
    ("12.1", "bits for bytes", lambda *sizes: size_of_package(*sizes) * 8),
    ("12.2", "the mask forgets the cache", attend_causal_flag),
    ("12.2", "", lambda *tensors: attend_masked(*tensors, diagonal=None)),
    (
        "12.2",
        "a token does not see itself",
        lambda *tensors: attend_masked(*tensors, diagonal=len(tensors[3])),
    ),
    (
        "12.2",
        "a token sees the one after it",
        lambda *tensors: attend_masked(*tensors, diagonal=len(tensors[3]) + 2),
    ),
    ("12.2", "a score of 0 where a token is not seen", attend_hidden_by_zero),
    ("12.2", "", attend_masked_late),
    ("12.2", "the softmax runs over the new tokens", attend_other_axis),
    ("12.3", "the largest number for the largest magnitude", round_by_largest),
    ("12.3", "keys by token", round_rows),
    ("12.3", "one scale per channel for all tokens", round_whole_channels),
    ("12.3", "reshaped where it should be transposed", round_reshaped),
    ("12.4", "the window is forgotten", held_without_window),
    ("12.4", "a negative number of tokens has left the window", held_below_zero),
    ("12.4", "", held_too_long),
    ("12.4", "a stale window: the oldest tokens stay as they are", held_oldest),
]
