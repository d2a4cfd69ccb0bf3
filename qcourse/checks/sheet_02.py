"""Sheet 02, granularity: cases, references, tolerances, points and known mistakes.

In 02.2 every value is at least a twentieth of a step from a tie or, as on sheet 01, an exact tie.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, uniform, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 02.1 ---------------------------------------------------------------------------------------------


def _channel_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Rows of different size, then rows whose farthest value is negative.
        ([[0.2, 0.1, -0.05], [2.0, -1.0, 0.5]], 4),
        ([[-0.7, 0.1, 0.2], [-1.4, -2.8, -0.7], [0.5, 0.25, 7.0]], 4),
        # Rows of zeros.
        ([[0.0, 0.0], [-0.5, 0.25], [0.0, 0.0], [1.0, 3.5]], 4),
    ]
    rows = torch.tensor([[0.1], [1.0], [3.0], [0.5]])
    drawn = [(torch.randn(4, 6, generator=generator) * rows, bits) for bits in (3, 8, 4)]

    # One channel of the last weight is unused.
    last, _ = drawn[-1]
    last[int(whole(generator, 0, 3))] = 0.0
    return make_cases(by_hand, drawn)


def _scales(amax: Any, bits: int) -> np.ndarray:
    return np.where(amax == 0, 1.0, amax / qmax(bits))


def _channel_scales(w: Any, bits: int) -> np.ndarray:
    # One scale per row, (out, 1).
    return _scales(np.abs(f64(w)).max(axis=1, keepdims=True), bits)


# Known mistakes.


def _scales_of_inputs(w: Any, bits: int) -> np.ndarray:
    return _scales(np.abs(f64(w)).max(axis=0, keepdims=True), bits)


def _scales_of_largest_value(w: Any, bits: int) -> np.ndarray:
    return _scales(f64(w).max(axis=1, keepdims=True), bits)


def _scale_of_matrix(w: Any, bits: int) -> np.ndarray:
    return _scales(np.abs(f64(w)).max(), bits)


def _scales_without_axis(w: Any, bits: int) -> np.ndarray:
    return _scales(np.abs(f64(w)).max(axis=1), bits)


def _scales_with_zeros(w: Any, bits: int) -> np.ndarray:
    return np.abs(f64(w)).max(axis=1, keepdims=True) / qmax(bits)


CHANNEL = Exercise(
    id="02.1",
    title="A scale for each output channel",
    function="channel_scales",
    points=2,
    cases=_channel_cases,
    reference=_channel_scales,
    mistakes=(
        Mistake(
            "a scale for each input instead of each output",
            _scales_of_inputs,
            "w is (out, in): over which axis must amax run, so that every ROW keeps its own scale?",
        ),
        Mistake(
            "the largest value, not the largest magnitude",
            _scales_of_largest_value,
            "What happens to a row whose farthest value from 0 is negative?",
        ),
        Mistake(
            "one scale for the whole matrix",
            _scale_of_matrix,
            "amax without an axis runs over the whole matrix. How does it run over a single axis?",
        ),
        Mistake(
            "the axis is missing",
            _scales_without_axis,
            "(out,) would line up with the COLUMNS of w in w / scale. What keeps an axis of"
            " length 1?",
        ),
        Mistake(
            "a channel of zeros gets scale 0",
            _scales_with_zeros,
            "The next line divides by this scale. What is 0 / 0?",
        ),
    ),
)


# 02.2 ---------------------------------------------------------------------------------------------


def _on_grid(generator: Generator, rows: int, columns: int, group_size: int, bits: int) -> Tensor:
    """Draw weights (rows, columns) off all ties; each group reaches its top or bottom code."""
    groups = -(-columns // group_size)  # rounded up
    shape = (rows, groups, group_size)
    steps = whole(generator, 1 - qmax(bits), qmax(bits) - 1, *shape)
    steps = steps + uniform(generator, -0.45, 0.45, *shape)
    signs = 2 * whole(generator, 0, 1, rows, groups) - 1
    steps[:, :, 0] = qmax(bits) * signs

    # One scale per group. The columns beyond the last full group are cut off again.
    scales = uniform(generator, 0.05, 1.0, rows, groups, 1)
    w = (steps * scales).reshape(rows, -1)
    return w[:, :columns].contiguous()


def _group_cases(generator: Generator) -> list[Case]:
    w = torch.tensor([[0.7, -0.32, 7.0, 1.2], [-1.4, 0.52, 0.35, 0.07]])
    one_more = torch.tensor([[2.1], [0.8]])
    by_hand = [
        # Two groups per row, then a column too many.
        (w, 2, 4),
        (torch.cat([w, one_more], dim=1), 2, 4),
    ]

    # The last of these does not divide either: 6 columns in groups of 4.
    drawn = []
    for shape in [(4, 8, 4, 4), (6, 6, 3, 8), (4, 12, 2, 3), (4, 6, 4, 4)]:
        _, _, group_size, bits = shape
        drawn.append((_on_grid(generator, *shape), group_size, bits))
    tied = (_tied_groups(generator, 3, 12, 6), 6, 4)
    return make_cases(by_hand, [*drawn, tied])


def _tied_groups(generator: Generator, rows: int, columns: int, group_size: int) -> Tensor:
    """Draw 4-bit weights that are ties, below 0 and above, but for one per group."""
    shape = (rows, columns // group_size, group_size)
    steps = torch.tensor([7.0, -2.5, -1.5, 0.5, 1.5, -0.5]).expand(shape).clone()
    steps[:, :, 1:] += 2 * whole(generator, -1, 1, *shape[:2], 1)

    # With a power of two as its scale, every tie is exact.
    scales = 2.0 ** whole(generator, -4, 1, *shape[:2], 1)
    order = torch.randperm(group_size, generator=generator)
    w = (steps * scales)[:, :, order]
    return w.reshape(rows, columns)


def _grouped(w: np.ndarray, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of groups along the last axis, which the size must divide."""
    rows, columns = w.shape

    # Each group is quantized symmetrically with scale = amax / qmax.
    groups = w.reshape(rows, columns // group_size, group_size)
    scales = np.abs(groups).max(axis=2) / qmax(bits)
    steps = np.rint(groups / scales[:, :, None])
    codes = steps.clip(-qmax(bits) - 1, qmax(bits))
    return codes.reshape(w.shape).astype(np.int64), scales


def _groups(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    columns = w.shape[1]
    if columns % group_size:
        # A right answer names both numbers too.
        raise ValueError(f"group_size={group_size} does not divide {columns}")
    return _grouped(f64(w), group_size, bits)


# Known mistakes.


def _groups_dropping(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    columns = w.shape[1]

    # The columns that fill no group get code 0.
    kept = columns // group_size * group_size
    codes, scales = _grouped(f64(w)[:, :kept], group_size, bits)
    return np.pad(codes, ((0, 0), (0, columns - kept))), scales


def _groups_with_short_one(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    codes = []
    scales = []
    for start in range(0, w.shape[1], group_size):
        # The last part may be shorter than the others.
        part = f64(w)[:, start : start + group_size]
        part_codes, part_scales = _grouped(part, part.shape[1], bits)
        codes.append(part_codes)
        scales.append(part_scales)
    return np.concatenate(codes, axis=1), np.concatenate(scales, axis=1)


def _groups_refused_by(error: type[Exception]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return the right quantizer, but with an error that does not name the numbers."""

    def groups(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
        if w.shape[1] % group_size:
            raise error("shape is invalid")
        return _grouped(f64(w), group_size, bits)

    return groups


def _column_of_scales(scales: np.ndarray, groups: int) -> np.ndarray:
    return scales


def _flat_scales(scales: np.ndarray, groups: int) -> np.ndarray:
    return scales[:, 0]


def _repeated_scales(scales: np.ndarray, groups: int) -> np.ndarray:
    return scales.repeat(groups, axis=1)


def _scale_per_row(
    shaped: Callable[..., np.ndarray], refuse: bool
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return a quantizer with one scale per row; `shaped` lays the scales (out, 1) out."""

    def groups(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
        if refuse:
            _groups(w, group_size, bits)
        columns = w.shape[1]
        codes, scales = _grouped(f64(w), columns, bits)
        return codes, shaped(scales, columns // group_size)

    return groups


def _groups_strided(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    _groups(w, group_size, bits)  # refuses as it should

    # Column j goes to group j % count instead of j // group_size.
    count = w.shape[1] // group_size
    strided = f64(w).reshape(-1, group_size, count).transpose(0, 2, 1)
    codes, scales = _grouped(strided.reshape(w.shape), group_size, bits)
    in_order = codes.reshape(-1, count, group_size).transpose(0, 2, 1)
    return in_order.reshape(w.shape), scales


_REFUSED_WRONGLY = variants(
    "the refusal is left to reshape, or does not name the numbers",
    "Raise a ValueError of your own that says which group_size does not divide how many columns.",
    _groups_refused_by(RuntimeError),  # the error of torch's reshape
    _groups_refused_by(ValueError),  # the error of NumPy's
)
_ONE_SCALE_PER_ROW = variants(
    "one scale per row instead of per group",
    "Over how many values does your amax run? A row of 4 in groups of 2 needs two scales.",
    *(
        _scale_per_row(shaped, refuse)
        for shaped in (_column_of_scales, _flat_scales, _repeated_scales)
        for refuse in (True, False)
    ),
)

GROUPS = Exercise(
    id="02.2",
    title="A scale for each group",
    function="quantize_groups",
    points=3,
    cases=_group_cases,
    reference=_groups,
    mistakes=(
        Mistake(
            "the columns that fill no group are left at code 0",
            _groups_dropping,
            "5 columns, groups of 2: what happened to the fifth column? No value may be dropped in"
            " silence.",
        ),
        Mistake(
            "the last group is shorter",
            _groups_with_short_one,
            "It can be done, but then the shape of the scales no longer tells the group size."
            " Refuse it instead.",
        ),
        *_REFUSED_WRONGLY,
        *_ONE_SCALE_PER_ROW,
        Mistake(
            "a group gathers every n-th column instead of neighbors",
            _groups_strided,
            "In reshape(out, ?, ?) the values along the last axis are neighbors: should it be the"
            " groups or the values of a group?",
        ),
    ),
)


# 02.3 ---------------------------------------------------------------------------------------------


def _pack_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Both signs, in either place of a byte.
        [-6, -2, 0, 7],
        [-3, 6],
        # All positive, then both ends of the grid.
        [1, 2, 3, 4, 5, 6, 7, 0],
        [-8, 7, 7, -8],
    ]
    drawn = [whole(generator, -8, 7, count) for count in (8, 20, 12)]
    return make_cases(by_hand, drawn, torch.int8)


def _pairs(codes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes with even index and those with odd index."""
    codes = np.asarray(codes, dtype=np.int64)
    return codes[0::2], codes[1::2]


def _bytes(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    # The lower four bits of a negative code are its two's complement.
    packed = (low & 15) + 16 * (high & 15)
    return packed.astype(np.uint8)


def _packed(codes: Any) -> np.ndarray:
    even, odd = _pairs(codes)
    return _bytes(even, odd)


# Known mistakes.


def _packed_high_first(codes: Any) -> np.ndarray:
    even, odd = _pairs(codes)
    return _bytes(odd, even)


def _packed_by_or(codes: Any) -> np.ndarray:
    even, odd = _pairs(codes)
    return (even | odd << 4).astype(np.uint8)


def _packed_by_sum(codes: Any) -> np.ndarray:
    even, odd = _pairs(codes)
    return (even + 16 * odd).astype(np.uint8)


def _packed_shifted(codes: Any) -> np.ndarray:
    even, odd = _pairs(codes)
    return _bytes(even + 8, odd + 8)


def _packed_halves(codes: Any) -> np.ndarray:
    low, high = np.split(np.asarray(codes, dtype=np.int64), 2)
    return _bytes(low, high)


def _packed_signed(codes: Any) -> np.ndarray:
    return _packed(codes).astype(np.int8)


PACK = Exercise(
    id="02.3",
    title="Two codes a byte",
    function="pack_int4",
    points=3,
    cases=_pack_cases,
    reference=_packed,
    mistakes=(
        Mistake(
            "the first code sits in the high half",
            _packed_high_first,
            "Low nibble first: code 0 belongs in the lower four bits.",
        ),
        *variants(
            "a negative code spills over its neighbor",
            "The upper bits of a negative code are all ones. Which of them reach the neighbor's"
            " half of the byte?",
            _packed_by_or,
            _packed_by_sum,
        ),
        Mistake(
            "codes shifted by 8",
            _packed_shifted,
            "Two's complement keeps 0 .. 7 as they are. Shifted codes are a different format, which"
            " other libraries use.",
        ),
        Mistake(
            "the first half of the codes paired with the second",
            _packed_halves,
            "Neighbors share a byte: codes 0 and 1, then 2 and 3.",
        ),
        Mistake(
            "the bytes are signed",
            _packed_signed,
            "The bits are right. Which dtype has bytes that run from 0 to 255?",
        ),
    ),
)


# 02.4 ---------------------------------------------------------------------------------------------


def _unpack_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Both signs; one byte; all positive; the code -8 in either place.
        [0xEA, 0x70],
        [0x6D],
        [0x10, 0x32, 0x54, 0x76],
        [0x88, 0x80, 0x08],
    ]
    drawn = [whole(generator, 0, 255, count) for count in (4, 12, 7)]

    # One upper nibble is -8 for certain.
    byte = 0x80 + int(whole(generator, 0, 15))
    place = int(whole(generator, 0, 11))
    drawn[1][place] = byte
    return make_cases(by_hand, drawn, torch.uint8)


def _nibbles(packed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and the upper four bits of each byte, 0 to 15."""
    packed = np.asarray(packed, dtype=np.int64)
    return packed & 15, packed >> 4


def _signed(nibbles: np.ndarray) -> np.ndarray:
    # Two's complement: 8 to 15 stand for -8 to -1.
    return nibbles - 16 * (nibbles >= 8)


def _in_turn(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).reshape(-1)


def _unsigned_codes(packed: Any) -> np.ndarray:
    low, high = _nibbles(packed)
    return _in_turn(low, high)


def _unpacked(packed: Any) -> np.ndarray:
    return _signed(_unsigned_codes(packed))


# Known mistakes.


def _unpacked_high_first(packed: Any) -> np.ndarray:
    low, high = _nibbles(packed)
    return _signed(_in_turn(high, low))


def _unpacked_halves(packed: Any) -> np.ndarray:
    return _signed(np.concatenate(_nibbles(packed)))


def _unpacked_beyond_8(packed: Any) -> np.ndarray:
    codes = _unsigned_codes(packed)
    return codes - 16 * (codes > 8)


def _unpacked_in_uint8(packed: Any) -> np.ndarray:
    return _unpacked(packed).astype(np.uint8)


UNPACK = Exercise(
    id="02.4",
    title="Bytes to codes again",
    function="unpack_int4",
    points=3,
    cases=_unpack_cases,
    reference=_unpacked,
    mistakes=(
        Mistake(
            "the sign is lost",
            _unsigned_codes,
            "Four bits hold -8 .. 7. Which nibbles stand for the negative ones?",
        ),
        Mistake(
            "the upper half comes first",
            _unpacked_high_first,
            "Low nibble first: 0xEA holds the codes 0xA, then 0xE.",
        ),
        Mistake(
            "all lower halves, then all upper halves",
            _unpacked_halves,
            "The two codes of a byte are neighbors. cat appends one half to the other: what"
            " interleaves them?",
        ),
        Mistake(
            "8 is read as 8",
            _unpacked_beyond_8,
            "0b1000 has its sign bit set: it is the smallest code of all.",
        ),
        Mistake(
            "16 was subtracted in uint8",
            _unpacked_in_uint8,
            "uint8 has no -6: it wraps around to 250. Which dtype should the nibbles have before"
            " they get a sign?",
        ),
    ),
)


# 02.5 ---------------------------------------------------------------------------------------------


def _bits_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Symmetric groups of 128 and of 32, then asymmetric ones.
        (4, 128, 2, True),
        (4, 32, 2, True),
        (4, 128, 2, False),
        # A float32 scale per row, and a scale of one byte.
        (8, 4096, 4, False),
        (3, 64, 1, True),
    ]
    drawn = []
    for symmetric in (True, False, False):
        bits = pick(generator, 2, 3, 4, 8)
        group_size = pick(generator, 16, 64, 256)
        scale_bytes = pick(generator, 2, 4)
        drawn.append((bits, group_size, scale_bytes, symmetric))
    return make_cases(by_hand, drawn)


def _bits_per_weight(bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> float:
    # A group shares a scale and, if asymmetric, a zero point of `bits` bits.
    zero_point_bits = 0 if symmetric else bits
    return bits + (8 * scale_bytes + zero_point_bits) / group_size


# Known mistakes.


def _bits_without_scales(bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> int:
    return bits


def _bits_by_bytes(bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> float:
    zero_point_bits = 0 if symmetric else bits
    return bits + (scale_bytes + zero_point_bits) / group_size


def _bits_without_zeros(bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> float:
    return bits + 8 * scale_bytes / group_size


def _bits_with_wide_zeros(bits: int, group_size: int, scale_bytes: int, symmetric: bool) -> float:
    numbers = 1 if symmetric else 2
    return bits + (8 * scale_bytes * numbers) / group_size


BITS = Exercise(
    id="02.5",
    title="What a weight really takes",
    function="bits_per_weight",
    points=1,
    cases=_bits_cases,
    reference=_bits_per_weight,
    mistakes=(
        Mistake(
            "the scales are not counted",
            _bits_without_scales,
            "Each group stores a scale too. How many bits does it add to each weight?",
        ),
        Mistake(
            "bytes taken for bits",
            _bits_by_bytes,
            "A scale of 2 bytes is how many bits?",
        ),
        Mistake(
            "the zero points are not counted",
            _bits_without_zeros,
            "What does an asymmetric grid store besides its scale?",
        ),
        Mistake(
            "a zero point as wide as a scale",
            _bits_with_wide_zeros,
            "A zero point is a code: how many bits does one code take?",
        ),
    ),
)


SHEET = Sheet("02", "Granularity", (CHANNEL, GROUPS, PACK, UNPACK, BITS))
