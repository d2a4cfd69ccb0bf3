"""Wrong answers that fail only at ties, at an edge, or on inputs of some shapes.

Each of them once passed. They need not be known mistakes of a sheet; they must fail for every seed.
NEAR_MISSES holds (exercise id, what is wrong, the function).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def half_up(steps: Tensor) -> Tensor:
    return torch.floor(steps + 0.5)


def half_down(steps: Tensor) -> Tensor:
    return torch.ceil(steps - 0.5)


def half_away(steps: Tensor) -> Tensor:
    return steps.sign() * half_up(steps.abs())


def half_toward_0(steps: Tensor) -> Tensor:
    return steps.sign() * half_down(steps.abs())


ROUNDINGS = {
    "halves rounded up": half_up,
    "halves rounded down": half_down,
    "halves rounded away from 0": half_away,
    "halves rounded toward 0": half_toward_0,
}


# Sheet 01.


def affine_by(rounding: Callable[[Tensor], Tensor]) -> Callable:
    """Round the zero point in another way."""

    def affine_parameters(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        low = x.min().clamp(max=0)
        high = x.max().clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        return scale, rounding(-low / scale).long()

    return affine_parameters


def fake_by(rounding: Callable[[Tensor], Tensor]) -> Callable:
    """Round x in another way."""

    def fake_quantize(x: Tensor, bits: int) -> Tensor:
        scale, zero_point = affine_by(torch.round)(x, bits)
        return scale * ((rounding(x / scale) + zero_point).clamp(0, 2**bits - 1) - zero_point)

    return fake_quantize


# Sheet 02.


def groups_by(rounding: Callable[[Tensor], Tensor]) -> Callable:
    def quantize_groups(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
        if w.shape[1] % group_size:
            raise ValueError(f"group_size={group_size} does not divide {w.shape[1]}")
        qmax = 2 ** (bits - 1) - 1
        groups = w.unflatten(1, (-1, group_size))
        scales = groups.abs().amax(dim=2) / qmax
        return rounding(groups / scales[..., None]).clamp(-qmax - 1, qmax).int().flatten(1), scales

    return quantize_groups


# Sheet 04.


def columns_stacked(x: Tensor, threshold: float) -> Tensor:
    """Stack the columns found, although there may be none."""
    found = [i for i in range(x.shape[1]) if x[:, i].abs().max() > threshold]
    return torch.stack([torch.tensor(i) for i in found])


def columns_or_largest(x: Tensor, threshold: float) -> Tensor:
    amax = x.abs().amax(dim=0)
    found = (amax > threshold).nonzero().flatten()
    return found if len(found) else amax.argmax().reshape(1)


def columns_but_not_all(x: Tensor, threshold: float) -> Tensor:
    """Leave at least one column to the 8-bit part."""
    amax = x.abs().amax(dim=0)
    found = (amax > threshold) & (amax > amax.min())
    return found.nonzero().flatten()


def common_by_partition(layers: tuple[Tensor, ...], k: int) -> list[int]:
    """Call argpartition with k, which is out of range if k is the number of channels."""
    tops = [set(np.argpartition(-x.abs().amax(dim=0).numpy(), k)[:k].tolist()) for x in layers]
    return sorted(set.intersection(*tops))


def common_or_any(layers: tuple[Tensor, ...], k: int) -> list[int]:
    tops = [set(x.abs().amax(dim=0).topk(k).indices.tolist()) for x in layers]
    return sorted(set.intersection(*tops) or set.union(*tops))


def common_by_pairs(layers: tuple[Tensor, ...], k: int) -> list[int]:
    """Start from the channels that the first two layers share."""
    tops = [set(x.abs().amax(dim=0).topk(k).indices.tolist()) for x in layers]
    common = tops[0] & tops[1]
    for top in tops[2:]:
        common &= top
    return sorted(common)


def product_at_least(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() >= threshold).any(dim=0)
    hats = []
    for rest in (x.masked_fill(outlier, 0), w.masked_fill(outlier, 0)):
        scale = rest.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
        hats.append(scale * torch.round(rest / scale))
    return x[:, outlier] @ w[:, outlier].T + hats[0] @ hats[1].T


def plant_from_first(
    gain: Tensor, w: Tensor, channels: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    by = torch.ones_like(gain)
    by[channels[0]] = factor
    for channel in channels[1:]:
        by[channel] = factor
    return gain * by, w / by


# Sheet 05.


def range_of_cat(batches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    everything = torch.cat(batches)
    return everything.min(), everything.max()


def range_of_rows(batches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Reduce rows, then the rest: right for two axes of one width."""
    lows = [x.reshape(-1, x.shape[-1]).min(dim=0).values for x in batches]
    highs = [x.reshape(-1, x.shape[-1]).max(dim=0).values for x in batches]
    return torch.stack(lows).min(), torch.stack(highs).max()


def range_after_first(batches: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    low, high = torch.aminmax(torch.cat([x.flatten() for x in batches[1:]]))
    return torch.minimum(low, batches[0].min()), torch.maximum(high, batches[0].max())


def percentile_between(x: Tensor, percent: float) -> Tensor:
    """Read the value above the rank, which the last rank does not have."""
    magnitudes = x.abs().flatten().sort().values
    rank = percent / 100 * (len(magnitudes) - 1)
    low = int(rank)
    return magnitudes[low] + (rank - low) * (magnitudes[low + 1] - magnitudes[low])


def clip_by(pick: Callable[[list[float]], int], ordered: bool) -> Callable:
    """Search without looking at all candidates, in the given order or from the smallest."""

    def best_clip(x: Tensor, clips: tuple[float, ...], bits: int) -> tuple[float, float]:
        qmax = 2 ** (bits - 1) - 1
        clips = tuple(sorted(clips)) if ordered else clips
        errors = []
        for clip in clips:
            x_hat = clip / qmax * torch.round(x / (clip / qmax)).clamp(-qmax - 1, qmax)
            errors.append((x - x_hat).square().mean().item())
        best = pick(errors)
        return clips[best], errors[best]

    return best_clip


def first_dip(errors: list[float]) -> int:
    best = 0
    while best + 1 < len(errors) and errors[best + 1] < errors[best]:
        best += 1
    return best


def last_dip(errors: list[float]) -> int:
    return len(errors) - 1 - first_dip(errors[::-1])


def halving(errors: list[float]) -> int:
    """Go on in the half in which the errors fall."""
    low = 0
    high = len(errors) - 1
    while low < high:
        middle = (low + high) // 2
        if errors[middle] < errors[middle + 1]:
            high = middle
        else:
            low = middle + 1
    return low


# Sheet 06.


def groups_of_two_or_more(
    w: Tensor, hessian: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Take groups of one from the weights before the sweep."""
    if group_size > 1:
        return sweep_groups(w, hessian, group_size, bits)
    qmax = 2 ** (bits - 1) - 1
    codes, _ = sweep_groups(w, hessian, w.shape[1], bits)
    return codes, w.abs() / qmax


def sweep_groups(w: Tensor, hessian: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    qmax = 2 ** (bits - 1) - 1
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    w = w.clone()
    codes = torch.empty(w.shape, dtype=torch.int8)
    scales = []
    for j in range(w.shape[1]):
        if j % group_size == 0:
            scales.append(w[:, j : j + group_size].abs().amax(dim=1) / qmax)
        codes[:, j] = torch.round(w[:, j] / scales[-1]).clamp(-qmax - 1, qmax)
        error = (w[:, j] - scales[-1] * codes[:, j]) / upper[j, j]
        w[:, j:] -= torch.outer(error, upper[j, j:])
    return codes, torch.stack(scales, dim=1)


# Sheet 07.


def keep_last(w: Tensor, w_hat: Tensor, x: Tensor, count: int) -> Tensor:
    """Slice with [-count:], which is everything if count is 0."""
    kept = x.abs().mean(dim=0).argsort()[-count:]
    mixed = w_hat.clone()
    mixed[:, kept] = w[:, kept]
    return mixed


def keep_partition(w: Tensor, w_hat: Tensor, x: Tensor, count: int) -> Tensor:
    kept = np.argpartition(-x.abs().mean(dim=0).numpy(), count)[:count]
    mixed = w_hat.clone()
    mixed[:, kept] = w[:, kept]
    return mixed


# Sheet 08.


def hadamard_from_two(x: Tensor) -> Tensor:
    """Begin with the matrix of size 2."""
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    while len(h) < x.shape[-1]:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    return x @ h / x.shape[-1] ** 0.5


# Sheet 10.


def fleet_by(rounded: Callable[[float], int]) -> Callable:
    def fleet_gpus(
        weights: float, cache: float, gpu: float, reserve: float, replicas: int, node: int
    ) -> Any:
        gpus = (weights + cache) / (gpu * (1 - reserve))
        return replicas * node * rounded(gpus / node), replicas * rounded(gpus)

    return fleet_gpus


def fleet_counted(
    weights: float, cache: float, gpu: float, reserve: float, replicas: int, node: int
) -> Any:
    """Go on counting while the memory does not exceed the need."""
    single = nodes = 0
    while single * gpu * (1 - reserve) <= weights + cache:
        single += 1
    while nodes * node * gpu * (1 - reserve) <= weights + cache:
        nodes += 1
    return replicas * nodes * node, replicas * single


# Sheet 11.


def decode_by(dtype: torch.dtype, zero: Callable[[int], int]) -> Callable:
    def decode_plane(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
        registers = (words >> 4 * plane) & 0x000F000F | 0x64006400
        values = registers.view(torch.float16) - (1024 + zero(zero_point))
        return registers.to(dtype), values.reshape(-1, 2)

    return decode_plane


def dot(x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    rows, groups = scale.shape
    numbers = codes.reshape(rows, groups, -1).float() - zero_point[..., None].float()
    sums = (numbers * x.reshape(groups, -1)).sum(dim=2)
    return sums, (sums * scale).sum(dim=1)


def dot_squeezed(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    sums, outputs = dot(x, codes, zero_point, scale)
    return sums.squeeze(), outputs


def dot_squeezed_outputs(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    sums, outputs = dot(x, codes, zero_point, scale)
    return sums, outputs.squeeze()


def dot_zero_is_8(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Treat a zero point of 0 as missing."""
    return dot(x, codes, torch.where(zero_point == 0, 8, zero_point), scale)


def matvec(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return dot(x, codes, zero_point, scale)[1]


def nibbles(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def matvec_by_group_bytes(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Begin each group with a new byte."""
    size = len(x) // scale.shape[1]
    group_bytes = -(-size // 2)
    codes = []
    for group in range(scale.shape[1]):
        start = group * size // 2
        part = packed[:, start : start + group_bytes]
        codes.append(nibbles(part)[:, :size])
    codes = torch.cat(codes, dim=1)
    return matvec(x, codes, scale, zero_point)


def matvec_by_parity_in_group(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor
) -> Tensor:
    """Choose the half of the byte by the parity of k within its group."""
    k = torch.arange(len(x))
    within = k % (len(x) // scale.shape[1])
    codes = packed[:, k // 2] >> (within % 2 * 4).to(torch.uint8) & 15
    return matvec(x, codes, scale, zero_point)


def matvec_by_byte_groups(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Give both codes of a byte the scale of the first."""
    k = torch.arange(len(x)) // 2 * 2
    group = k // (len(x) // scale.shape[1])
    codes = nibbles(packed)[:, : len(x)].float()
    return ((codes - zero_point[:, group].float()) * scale[:, group]) @ x


def matvec_zero_is_8(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    codes = nibbles(packed)[:, : len(x)]
    return matvec(x, codes, scale, torch.where(zero_point == 0, 8, zero_point))


# Sheet 12.


def attend_by(mask_without_cache: bool) -> Callable:
    """Use no mask if the cache is empty, so that new tokens see later ones."""

    def attend(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        keys = torch.cat([k_cache, k])
        values = torch.cat([v_cache, v])
        scores = q @ keys.T / q.shape[1] ** 0.5
        seen = torch.ones(scores.shape, dtype=torch.bool).tril(len(k_cache))
        if len(k_cache) or mask_without_cache:
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(dim=1) @ values

    return attend


def attend_from_newest(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Read the newest token of the cache, which may be empty."""
    k_cache[-1], v_cache[-1]
    return attend_by(True)(q, k, v, k_cache, v_cache)


# Sheet 14.


def heal_by(mask_of: Callable[[Tensor], Tensor], least: int = 0) -> Callable:
    """Use another mask, or at least so many steps."""

    def heal(w: Tensor, x: Tensor, rate: float, steps: int) -> Tensor:
        mask = mask_of(w)
        w_hat = w * mask
        for _ in range(max(steps, least)):
            w_hat = w_hat - rate * ((x @ w_hat.T - x @ w.T).T @ x / len(x)) * mask
        return w_hat

    return heal


def mask_of_runs(w: Tensor) -> Tensor:
    runs = w.abs().unflatten(1, (-1, 4))
    return torch.zeros_like(runs).scatter(2, runs.topk(2, dim=2).indices, 1.0).flatten(1)


def mask_of_rows(w: Tensor) -> Tensor:
    """Keep the larger half of a row of any length."""
    return torch.zeros_like(w).scatter(1, w.abs().topk(w.shape[1] // 2, dim=1).indices, 1.0)


def mask_of_first_run(w: Tensor) -> Tensor:
    """Keep two values per row, which is right if a row is one run."""
    return torch.zeros_like(w).scatter(1, w.abs().topk(2, dim=1).indices, 1.0)


NEAR_MISSES: list[tuple[str, str, Callable]] = [
    *(("01.3", f"zero point: {name}", affine_by(rounding)) for name, rounding in ROUNDINGS.items()),
    ("01.4", "halves rounded down", fake_by(half_down)),
    ("01.4", "halves rounded away from 0", fake_by(half_away)),
    *(("02.2", name, groups_by(rounding)) for name, rounding in ROUNDINGS.items()),
    ("04.1", "an error where there is none", columns_stacked),
    ("04.1", "the largest where there is none", columns_or_largest),
    ("04.1", "never all", columns_but_not_all),
    ("04.2", "an error where k is all channels", common_by_partition),
    ("04.2", "any where none is in every layer", common_or_any),
    ("04.2", "two layers at least", common_by_pairs),
    ("04.3", "at the threshold, not beyond it", product_at_least),
    ("04.4", "an error where no channel is chosen", plant_from_first),
    ("05.1", "batches of one width", range_of_cat),
    ("05.1", "batches of one width and at least two axes", range_of_rows),
    ("05.1", "two batches at least", range_after_first),
    ("05.2", "an error at the last rank", percentile_between),
    ("05.3", "the first dip", clip_by(first_dip, ordered=False)),
    ("05.3", "the last dip", clip_by(last_dip, ordered=False)),
    ("05.3", "halving", clip_by(halving, ordered=False)),
    ("05.3", "the dip of the smallest clips", clip_by(first_dip, ordered=True)),
    ("05.3", "the dip of the largest clips", clip_by(last_dip, ordered=True)),
    ("05.3", "halving in order", clip_by(halving, ordered=True)),
    ("06.4", "groups of two at least", groups_of_two_or_more),
    ("07.1", "all where count is 0", keep_last),
    ("07.1", "an error where count is all", keep_partition),
    ("08.3", "n is 2 at least", hadamard_from_two),
    ("10.5", "one more where it fits exactly", fleet_by(lambda gpus: math.floor(gpus) + 1)),
    ("10.5", "counted one too far where it fits exactly", fleet_counted),
    ("11.1", "words of 64 bits", lambda codes: planes(codes).long()),
    ("11.2", "registers of 64 bits", decode_by(torch.int64, lambda zero_point: zero_point)),
    (
        "11.2",
        "a zero point of 0 taken for none",
        decode_by(torch.int32, lambda zero_point: zero_point or 8),
    ),
    (
        "11.2",
        "a zero point of at most 14",
        decode_by(torch.int32, lambda zero_point: min(zero_point, 14)),
    ),
    ("11.3", "one group or one row without its axis", dot_squeezed),
    ("11.3", "one row without its axis", dot_squeezed_outputs),
    ("11.3", "a zero point of 0 taken for none", dot_zero_is_8),
    ("11.5", "groups begin with a byte of their own", matvec_by_group_bytes),
    ("11.5", "the half of the byte by the place in the group", matvec_by_parity_in_group),
    ("11.5", "one scale for both codes of a byte", matvec_by_byte_groups),
    ("11.5", "a zero point of 0 taken for none", matvec_zero_is_8),
    ("12.2", "no mask where the cache is empty", attend_by(mask_without_cache=False)),
    ("12.2", "an error where the cache is empty", attend_from_newest),
    ("14.5", "the larger half of a row", heal_by(mask_of_rows)),
    ("14.5", "two of a row", heal_by(mask_of_first_run)),
    ("14.5", "one step at least", heal_by(mask_of_runs, least=1)),
]


def planes(codes: Tensor) -> Tensor:
    blocks = codes.long().reshape(len(codes), -1, 4, 16, 2)
    shift = 4 * (torch.arange(4)[:, None, None] + 4 * torch.arange(2))
    return (blocks << shift).sum(dim=(2, 4)).reshape(len(codes), -1).to(torch.int32)
