"""Sheet 02, granularity: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import numpy as np
import torch
from torch import Tensor

import qcourse
from qcourse.cost.memory import bytes_per_parameter

# Right answers.


def codes_and_scales(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    q = qcourse.quantize(w, bits, granularity=qcourse.PerGroup(group_size))
    return q.codes, q.scale


def bits_of_package(bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> float:
    zero_bytes = 0 if symmetric else bits / 8
    size_bytes = bytes_per_parameter(
        bits, group_size, scale_bytes=scale_bytes, zero_bytes=zero_bytes
    )
    return 8 * size_bytes


def channel_loop(w: Tensor, bits: int) -> list:
    return [[max(abs(v) for v in row) / (2 ** (bits - 1) - 1) or 1.0] for row in w.tolist()]


def channel_maximum(w: Tensor, bits: int) -> Tensor:
    largest = torch.maximum(w.max(dim=1).values, -w.min(dim=1).values)
    largest[largest == 0] = 2 ** (bits - 1) - 1
    return largest.unsqueeze(-1) / (2 ** (bits - 1) - 1)


def groups_loop(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    if w.shape[1] % group_size != 0:
        # A subclass of ValueError is a ValueError.
        error = type("GroupSizeError", (ValueError,), {})
        raise error(w.shape, group_size)
    codes = torch.zeros(w.shape, dtype=torch.int32)
    scales = torch.zeros(w.shape[0], w.shape[1] // group_size)
    for row in range(w.shape[0]):
        for group in range(scales.shape[1]):
            part = slice(group * group_size, (group + 1) * group_size)
            scales[row, group] = w[row, part].abs().max() / (2 ** (bits - 1) - 1)
            codes[row, part] = torch.round(w[row, part] / scales[row, group]).int()
    return codes, scales


def groups_numpy(w: Tensor, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    if w.shape[1] % group_size:
        raise ValueError(f"{w.shape[1]} columns make no groups of {group_size}")
    parts = w.double().numpy().reshape(len(w), -1, group_size)
    scales = np.abs(parts).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(parts / scales).astype(np.int16).reshape(w.shape), scales[..., 0]


def pack_loop(codes: Tensor) -> list:
    values = codes.tolist()
    return [values[i] % 16 + values[i + 1] % 16 * 16 for i in range(0, len(values), 2)]


def pack_numpy(codes: Tensor) -> np.ndarray:
    pairs = codes.numpy().view(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def unpack_loop(packed: Tensor) -> list:
    nibbles = [part for byte in packed.tolist() for part in (byte % 16, byte // 16)]
    return [nibble if nibble < 8 else nibble - 16 for nibble in nibbles]


def unpack_shifts(packed: Tensor) -> Tensor:
    codes = torch.empty(2 * len(packed), dtype=torch.int8)
    codes[0::2] = (packed << 4).view(torch.int8) >> 4  # an arithmetic shift carries the sign
    codes[1::2] = packed.view(torch.int8) >> 4
    return codes


THE_PACKAGE = {
    "02.1": lambda w, bits: qcourse.quantize(w, bits, granularity=qcourse.PerChannel(0)).scale,
    "02.2": codes_and_scales,
    "02.3": lambda codes: qcourse.pack(codes, 4),
    "02.4": lambda packed: qcourse.unpack(packed, 4, 2 * len(packed)),
    "02.5": bits_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "02.1": (channel_loop, channel_maximum),
    "02.2": (groups_loop, groups_numpy),
    "02.3": (pack_loop, pack_numpy),
    "02.4": (unpack_loop, unpack_shifts),
    "02.5": (
        lambda bits, group_size, scale_bytes, symmetric: (
            (bits * group_size + 8 * scale_bytes + bits * (not symmetric)) / group_size
        ),
        lambda bits, group_size, scale_bytes, symmetric: torch.tensor(
            bits * (1 + (not symmetric) / group_size) + scale_bytes / group_size * 8,
            dtype=torch.float64,
        ),
    ),
}


# Mistakes.


def row_scales(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    if w.shape[1] % group_size:
        raise ValueError("group_size must divide the row")
    scales = w.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(w / scales).to(torch.int8), scales


def groups_numpy_unnamed(w: Tensor, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    parts = w.numpy().reshape(len(w), -1, group_size)  # refuses with a ValueError of NumPy's own
    scales = np.abs(parts).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(parts / scales).astype(np.int8).reshape(w.shape), scales[..., 0]


def groups_torch(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    parts = w.reshape(len(w), -1, group_size)  # refuses with torch's RuntimeError
    scales = parts.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(parts / scales).to(torch.int8).reshape(w.shape), scales[..., 0]


REFUSAL = "the refusal is left to reshape, or does not name the numbers"
MISTAKES = [
    ("02.2", "one scale per row instead of per group", row_scales),
    ("02.2", REFUSAL, groups_numpy_unnamed),
    ("02.2", REFUSAL, groups_torch),
]
