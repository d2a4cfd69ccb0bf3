"""Sheet 02, granularity: cases, references, tolerances, points and known mistakes.

The cases of 02.2 stay at least a twentieth of a step from a tie, but for those that are ties exactly, as on sheet 01.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 02.1 -------------------------------------------------------------------------------------------------------------


def _channel_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[0.2, 0.1, -0.05], [2.0, -1.0, 0.5]], 4),
        ([[-0.7, 0.1, 0.2], [-1.4, -2.8, -0.7], [0.5, 0.25, 7.0]], 4),
        ([[0.0, 0.0], [-0.5, 0.25], [0.0, 0.0], [1.0, 3.5]], 4),
    ]
    rows = torch.tensor([[0.1], [1.0], [3.0], [0.5]])
    drawn = [(torch.randn(4, 6, generator=generator) * rows, bits) for bits in (3, 8, 4)]
    drawn[-1][0][int(whole(generator, 0, 3))] = 0.0  # a channel that is never used
    return make_cases(by_hand, drawn)


def _scales(amax: Any, bits: int) -> np.ndarray:
    return np.where(amax == 0, 1.0, amax / qmax(bits))


CHANNEL = Exercise(
    id="02.1",
    title="A scale for each output channel",
    function="channel_scales",
    points=2,
    cases=_channel_cases,
    reference=lambda w, bits: _scales(np.abs(f64(w)).max(axis=1, keepdims=True), bits),
    mistakes=(
        Mistake(
            "a scale for each input instead of each output",
            lambda w, bits: _scales(np.abs(f64(w)).max(axis=0, keepdims=True), bits),
            "w is (out, in): which axis must amax run over, so that every ROW keeps a scale of its own?",
        ),
        Mistake(
            "the largest value, not the largest magnitude",
            lambda w, bits: _scales(f64(w).max(axis=1, keepdims=True), bits),
            "What happens to a row whose farthest value from 0 is negative?",
        ),
        Mistake(
            "one scale for the whole matrix",
            lambda w, bits: _scales(np.abs(f64(w)).max(), bits),
            "amax without an axis sees the matrix as one: how does it look along a single axis?",
        ),
        Mistake(
            "the axis is gone",
            lambda w, bits: _scales(np.abs(f64(w)).max(axis=1), bits),
            "(out,) would line up with the COLUMNS of w in w / scale. What keeps an axis of length 1?",
        ),
        Mistake(
            "a channel of zeros gets scale 0",
            lambda w, bits: np.abs(f64(w)).max(axis=1, keepdims=True) / qmax(bits),
            "The next line divides by this scale. What is 0 / 0?",
        ),
    ),
)


# 02.2 -------------------------------------------------------------------------------------------------------------


def _on_grid(generator: Generator, rows: int, columns: int, group_size: int, bits: int) -> Tensor:
    """Weights (rows, columns) of which each group has a value on its top or bottom code and none near a tie."""
    groups = -(-columns // group_size)
    shape = rows, groups, group_size
    steps = whole(generator, 1 - qmax(bits), qmax(bits) - 1, *shape) + uniform(
        generator, -0.45, 0.45, *shape
    )
    steps[:, :, 0] = qmax(bits) * (2 * whole(generator, 0, 1, rows, groups) - 1)
    return (
        (steps * uniform(generator, 0.05, 1.0, rows, groups, 1))
        .reshape(rows, -1)[:, :columns]
        .contiguous()
    )


def _group_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (torch.tensor([[0.7, -0.32, 7.0, 1.2], [-1.4, 0.52, 0.35, 0.07]]), 2, 4),
        (torch.tensor([[0.7, -0.32, 7.0, 1.2, 2.1], [-1.4, 0.52, 0.35, 0.07, 0.8]]), 2, 4),
    ]
    shapes = [(4, 8, 4, 4), (6, 6, 3, 8), (4, 12, 2, 3), (4, 6, 4, 4)]
    drawn = [(_on_grid(generator, *shape), *shape[2:]) for shape in shapes]
    return make_cases(by_hand, [*drawn, (_tied_groups(generator, 3, 12, 6), 6, 4)])


def _tied_groups(generator: Generator, rows: int, columns: int, group_size: int) -> Tensor:
    """Weights for 4 bits, all but one of each group half-way between two codes, below 0 and above."""
    shape = rows, columns // group_size, group_size
    steps = torch.tensor([7.0, -2.5, -1.5, 0.5, 1.5, -0.5]).expand(shape).clone()
    steps[:, :, 1:] += 2 * whole(generator, -1, 1, *shape[:2], 1)
    scales = 2.0 ** whole(generator, -4, 1, *shape[:2], 1)
    order = torch.randperm(group_size, generator=generator)
    return (steps * scales)[:, :, order].reshape(rows, columns)


def _grouped(w: np.ndarray, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of groups along the last axis, whose length the size divides."""
    groups = w.reshape(w.shape[0], w.shape[1] // group_size, group_size)
    scales = np.abs(groups).max(axis=2) / qmax(bits)
    codes = np.rint(groups / scales[:, :, None]).clip(-qmax(bits) - 1, qmax(bits))
    return codes.reshape(w.shape).astype(np.int64), scales


def _groups(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    if w.shape[1] % group_size:
        raise ValueError(
            f"group_size={group_size} does not divide {w.shape[1]}"
        )  # an answer must name both numbers
    return _grouped(f64(w), group_size, bits)


def _groups_dropping(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    kept = w.shape[1] // group_size * group_size
    codes, scales = _grouped(f64(w)[:, :kept], group_size, bits)
    return np.pad(codes, ((0, 0), (0, w.shape[1] - kept))), scales


def _groups_with_short_one(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    starts = range(0, w.shape[1], group_size)
    parts = [f64(w)[:, start : start + group_size] for start in starts]
    codes, scales = zip(*(_grouped(part, part.shape[1], bits) for part in parts), strict=True)
    return np.concatenate(codes, axis=1), np.concatenate(scales, axis=1)


def _groups_refused_by(error: type[Exception]) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """With an error that does not name the numbers."""

    def groups(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
        if w.shape[1] % group_size:
            raise error("shape is invalid")
        return _grouped(f64(w), group_size, bits)

    return groups


def _scale_a_row(
    shaped: Callable[..., np.ndarray], refuse: bool
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """With one scale a row, its shape made of (out, 1) and the number of groups."""

    def groups(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
        if refuse:
            _groups(w, group_size, bits)
        codes, scales = _grouped(f64(w), w.shape[1], bits)
        return codes, shaped(scales, w.shape[1] // group_size)

    return groups


def _groups_strided(w: Any, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    _groups(w, group_size, bits)  # refuses as it should
    count = w.shape[1] // group_size
    gathered = f64(w).reshape(-1, group_size, count).transpose(0, 2, 1).reshape(w.shape)
    codes, scales = _grouped(gathered, group_size, bits)
    return codes.reshape(-1, count, group_size).transpose(0, 2, 1).reshape(w.shape), scales


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
            "5 columns, groups of 2: what has become of the fifth? Nothing may get lost without a word.",
        ),
        Mistake(
            "the last group is shorter",
            _groups_with_short_one,
            "It can be done, but then the shape of the scales no longer tells the group size. Refuse it instead.",
        ),
        *(
            Mistake(
                "the refusal is left to reshape, or does not name the numbers",
                _groups_refused_by(error),
                "Raise a ValueError of your own that says which group_size does not divide how many columns.",
            )
            for error in (RuntimeError, ValueError)  # what torch's reshape raises, and NumPy's
        ),
        *(
            Mistake(
                "one scale a row instead of a group",
                _scale_a_row(shaped, refuse),
                "Over how many values does your amax run? In a row of 4 with groups of 2 there are two scales to find.",
            )
            for shaped in (
                lambda s, groups: s,
                lambda s, groups: s[:, 0],
                lambda s, groups: s.repeat(groups, axis=1),
            )
            for refuse in (True, False)
        ),
        Mistake(
            "a group gathers every n-th column instead of neighbours",
            _groups_strided,
            "In reshape(out, ?, ?) the last axis is the one whose values lie side by side: which of the two is it?",
        ),
    ),
)


# 02.3 -------------------------------------------------------------------------------------------------------------


def _pack_cases(generator: Generator) -> list[Case]:
    by_hand = [[-6, -2, 0, 7], [-3, 6], [1, 2, 3, 4, 5, 6, 7, 0], [-8, 7, 7, -8]]
    drawn = [whole(generator, -8, 7, count) for count in (8, 20, 12)]
    return make_cases(by_hand, drawn, torch.int8)


def _pairs(codes: Any) -> tuple[np.ndarray, np.ndarray]:
    """The codes with even and those with odd index."""
    codes = np.asarray(codes, dtype=np.int64)
    return codes[0::2], codes[1::2]


def _bytes(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return ((low & 15) + 16 * (high & 15)).astype(np.uint8)


def _pack_halves(codes: Any) -> np.ndarray:
    low, high = np.split(np.asarray(codes, dtype=np.int64), 2)
    return _bytes(low, high)


_NEGATIVE_BITS = "The upper bits of a negative code are all ones. What of them reaches the neighbour's half of the byte?"

PACK = Exercise(
    id="02.3",
    title="Two codes a byte",
    function="pack_int4",
    points=3,
    cases=_pack_cases,
    reference=lambda codes: _bytes(*_pairs(codes)),
    mistakes=(
        Mistake(
            "the first code sits in the high half",
            lambda codes: _bytes(*_pairs(codes)[::-1]),
            "Low nibble first: code 0 belongs in the lower four bits.",
        ),
        Mistake(
            "a negative code spills over its neighbour",
            lambda codes: (_pairs(codes)[0] | _pairs(codes)[1] << 4).astype(np.uint8),
            _NEGATIVE_BITS,
        ),
        Mistake(
            "a negative code spills over its neighbour",
            lambda codes: (_pairs(codes)[0] + 16 * _pairs(codes)[1]).astype(np.uint8),
            _NEGATIVE_BITS,
        ),
        Mistake(
            "codes shifted by 8",
            lambda codes: _bytes(*(part + 8 for part in _pairs(codes))),
            "Two's complement keeps 0 .. 7 as they are; shifted codes are another format, which others do use.",
        ),
        Mistake(
            "the first half of the codes paired with the second",
            _pack_halves,
            "Neighbours share a byte: codes 0 and 1, then 2 and 3.",
        ),
        Mistake(
            "the bytes are signed",
            lambda codes: _bytes(*_pairs(codes)).astype(np.int8),
            "The bits are right. Which dtype has bytes that run from 0 to 255?",
        ),
    ),
)


# 02.4 -------------------------------------------------------------------------------------------------------------


def _unpack_cases(generator: Generator) -> list[Case]:
    by_hand = [[0xEA, 0x70], [0x6D], [0x10, 0x32, 0x54, 0x76], [0x88, 0x80, 0x08]]
    drawn = [whole(generator, 0, 255, count) for count in (4, 12, 7)]
    drawn[1][int(whole(generator, 0, 11))] = 0x80 + int(whole(generator, 0, 15))  # -8 somewhere
    return make_cases(by_hand, drawn, torch.uint8)


def _nibbles(packed: Any) -> tuple[np.ndarray, np.ndarray]:
    """The lower and the upper four bits of each byte, 0 to 15."""
    packed = np.asarray(packed, dtype=np.int64)
    return packed & 15, packed >> 4


def _signed(nibbles: np.ndarray) -> np.ndarray:
    return nibbles - 16 * (nibbles >= 8)


def _in_turn(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.stack([first, second], axis=1).reshape(-1)


UNPACK = Exercise(
    id="02.4",
    title="Bytes to codes again",
    function="unpack_int4",
    points=3,
    cases=_unpack_cases,
    reference=lambda packed: _signed(_in_turn(*_nibbles(packed))),
    mistakes=(
        Mistake(
            "the sign is lost",
            lambda packed: _in_turn(*_nibbles(packed)),
            "Four bits hold -8 .. 7. Which nibbles stand for the negative ones?",
        ),
        Mistake(
            "the upper half comes first",
            lambda packed: _signed(_in_turn(*_nibbles(packed)[::-1])),
            "Low nibble first: 0xEA holds the codes 0xA, then 0xE.",
        ),
        Mistake(
            "all lower halves, then all upper halves",
            lambda packed: _signed(np.concatenate(_nibbles(packed))),
            "The two codes of a byte are neighbours. cat puts one after the other: what weaves them together?",
        ),
        Mistake(
            "8 is read as 8",
            lambda packed: _in_turn(*_nibbles(packed)) - 16 * (_in_turn(*_nibbles(packed)) > 8),
            "0b1000 has its sign bit set: the smallest code of all.",
        ),
        Mistake(
            "16 was subtracted in uint8",
            lambda packed: _signed(_in_turn(*_nibbles(packed))).astype(np.uint8),
            "uint8 has no -6: it wraps around to 250. Which dtype should the nibbles have before they get a sign?",
        ),
    ),
)


# 02.5 -------------------------------------------------------------------------------------------------------------


def _bits_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (4, 128, 2, True),
        (4, 32, 2, True),
        (4, 128, 2, False),
        (8, 4096, 4, False),
        (3, 64, 1, True),
    ]
    drawn = [
        (
            pick(generator, 2, 3, 4, 8),
            pick(generator, 16, 64, 256),
            pick(generator, 2, 4),
            symmetric,
        )
        for symmetric in (True, False, False)
    ]
    return make_cases(by_hand, drawn)


BITS = Exercise(
    id="02.5",
    title="What a weight really takes",
    function="bits_per_weight",
    points=1,
    cases=_bits_cases,
    reference=lambda bits, group_size, scale_bytes, symmetric: (
        bits + (8 * scale_bytes + (0 if symmetric else bits)) / group_size
    ),
    mistakes=(
        Mistake(
            "the scales are not counted",
            lambda bits, group_size, scale_bytes, symmetric: bits,
            "Each group stores a scale too. Who pays for it?",
        ),
        Mistake(
            "bytes taken for bits",
            lambda bits, group_size, scale_bytes, symmetric: (
                bits + (scale_bytes + (0 if symmetric else bits)) / group_size
            ),
            "A scale of 2 bytes is how many bits?",
        ),
        Mistake(
            "the zero points are not counted",
            lambda bits, group_size, scale_bytes, symmetric: bits + 8 * scale_bytes / group_size,
            "What does an asymmetric grid store beside its scale?",
        ),
        Mistake(
            "a zero point as wide as a scale",
            lambda bits, group_size, scale_bytes, symmetric: (
                bits + (8 * scale_bytes * (1 if symmetric else 2)) / group_size
            ),
            "A zero point is a code: how many bits does one code take?",
        ),
    ),
)


SHEET = Sheet("02", "Granularity", (CHANNEL, GROUPS, PACK, UNPACK, BITS))
