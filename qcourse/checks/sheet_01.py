"""Sheet 01, the quantizer: cases, references, tolerances, points and known mistakes.

The cases stay away from values that float32 and float64, or a division and a product with 1/scale, round differently:
exact ties stand on scales that are powers of two, everything else at least a twentieth of a step from a tie.
"""

from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, qmax, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 01.1 -------------------------------------------------------------------------------------------------------------


def _scale_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-0.33, -0.10, 0.02, 0.41], 4),
        ([-3.0, 1.0, 0.5], 8),
        ([[0.25, -0.75], [0.5, 0.125]], 2),
    ]
    drawn = [(uniform(generator, -4, 2, 3, 5), bits) for bits in (3, 5, 8)]
    return [Case((torch.as_tensor(x), bits)) for x, bits in by_hand + drawn]


SCALE = Exercise(
    id="01.1",
    title="The scale of a symmetric grid",
    function="symmetric_scale",
    points=1,
    cases=_scale_cases,
    reference=lambda x, bits: np.abs(f64(x)).max() / qmax(bits),
    mistakes=(
        Mistake(
            "the largest value, not the largest magnitude",
            lambda x, bits: f64(x).max() / qmax(bits),
            "What happens to a vector whose farthest value from 0 is negative?",
        ),
        Mistake(
            "qmax off by one",
            lambda x, bits: np.abs(f64(x)).max() / 2 ** (bits - 1),
            "How many codes does a signed grid have above 0? Count them for 3 bits.",
        ),
        Mistake(
            "the count of all steps instead of qmax",
            lambda x, bits: np.abs(f64(x)).max() / (2**bits - 1),
            "amax stands for the top code alone. Which code is that, when half of them are negative?",
        ),
        Mistake(
            "the scale of an asymmetric grid",
            lambda x, bits: (f64(x).max() - f64(x).min()) / (2**bits - 1),
            "max - min is the width of a grid that may lie anywhere; a symmetric one is centred on 0.",
        ),
        Mistake(
            "the scale upside down",
            lambda x, bits: qmax(bits) / np.abs(f64(x)).max(),
            "A scale is the width of one step, in the units of x: does it grow or shrink when x doubles?",
        ),
    ),
)


# 01.2 -------------------------------------------------------------------------------------------------------------


def _codes(steps: np.ndarray, bits: int) -> np.ndarray:
    """Rounded steps, saturated."""
    return np.clip(steps, -qmax(bits) - 1, qmax(bits)).astype(np.int64)


def _as_int8(steps: np.ndarray) -> np.ndarray:
    """What a cast to 8 bits leaves of a whole number: its low byte."""
    return steps.astype(np.int64).astype(np.int8)


def _quantize_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-0.33, -0.10, 0.02, 0.41], 0.05, 4),
        ([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], 1.0, 4),
        ([0.375, -0.625, 1.25], 0.25, 8),
        ([-9.0, -8.3, 7.4, 9.0], 1.0, 4),
        ([-300.0, -129.0, 90.7, 128.0, 200.0], 1.0, 8),
    ]
    drawn = []
    for bits in (2, 3, 5, 6):  # codes as far out as twice the range still fit int8, so a cast alone does not wrap them
        steps = whole(generator, -(2**bits), 2**bits - 1, 3, 5)
        scale = float(uniform(generator, 0.01, 2.0))
        drawn.append(((steps + uniform(generator, -0.45, 0.45, 3, 5)) * scale, scale, bits))
    return [Case((torch.as_tensor(x), scale, bits)) for x, scale, bits in by_hand + drawn]


_FAR_OUT = "Which code should stand for a value far beyond the last step? Try x = 1000."

QUANTIZE = Exercise(
    id="01.2",
    title="Codes: round and saturate",
    function="quantize",
    points=3,
    cases=_quantize_cases,
    reference=lambda x, scale, bits: _codes(np.rint(f64(x) / scale), bits),
    mistakes=(
        Mistake(
            "halves rounded up",
            lambda x, scale, bits: _codes(np.floor(f64(x) / scale + 0.5), bits),
            "Half a step goes to the EVEN code: what does torch.round make of 0.5, 1.5 and 2.5?",
        ),
        Mistake(
            "digits cut off instead of rounded",
            lambda x, scale, bits: _codes(np.trunc(f64(x) / scale), bits),
            "A cast to integers drops what follows the point: 0.9 steps become 0. What has to come before it?",
        ),
        Mistake(
            "not saturated",
            lambda x, scale, bits: np.rint(f64(x) / scale).astype(np.int64),
            _FAR_OUT,
        ),
        Mistake(
            "not saturated",
            lambda x, scale, bits: _as_int8(np.rint(f64(x) / scale)),
            _FAR_OUT,
        ),
        Mistake(
            "saturated after the cast to int8",
            lambda x, scale, bits: _codes(_as_int8(np.rint(f64(x) / scale)), bits),
            "200 does not fit 8 bits and wraps around to -56, which no clamp can mend: which must come first?",
        ),
        Mistake(
            "x times the scale",
            lambda x, scale, bits: _codes(np.rint(f64(x) * scale), bits),
            "How many steps of width 0.1 fit into 0.4?",
        ),
    ),
)


# 01.3 -------------------------------------------------------------------------------------------------------------


def _range_case(generator: Generator, bits: int, zero_point: int, *, size: int = 6) -> Tensor:
    """Values whose grid puts 0 near `zero_point` and which lie off its ties; one-sided where that is an end."""
    last = 2**bits - 1
    one_sided = zero_point in (0, last)
    shift = 0.0 if one_sided else float(uniform(generator, -0.35, 0.35))
    inner = whole(generator, 1, last - 1, size) + uniform(generator, -0.1, 0.1, size)
    ends = torch.tensor([-shift, last - shift])
    steps = torch.cat([ends, inner]) if not one_sided else torch.cat([ends[1:] if zero_point == 0 else ends[:1], inner])
    return (steps - zero_point) * float(uniform(generator, 0.05, 2.0))


def _affine_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-0.4, 0.0, 2.5, 5.7], 8),
        ([3.0, 1.0, 0.4, -1.0], 2),
        ([1.0, 2.0, 5.0], 4),
        ([-7.5, -3.0, -1.5], 4),
    ]
    drawn = [(_range_case(generator, bits, int(whole(generator, 1, 2**bits - 2))), bits) for bits in (2, 3, 4, 6, 8)]
    return [Case((torch.as_tensor(x), bits)) for x, bits in by_hand + drawn]


def _affine(x: Any, bits: int, *, steps: int = -1, widened: bool = True, sign: int = -1) -> tuple[float, float]:
    """The scale, and the zero point before it is rounded."""
    low, high = f64(x).min(), f64(x).max()
    if widened:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits + steps)
    return scale, sign * low / scale


def _rounded(scale: float, zero_point: float) -> tuple[float, int]:
    return scale, round(zero_point)


AFFINE = Exercise(
    id="01.3",
    title="A grid for any range",
    function="affine_parameters",
    points=3,
    cases=_affine_cases,
    reference=lambda x, bits: _rounded(*_affine(x, bits)),
    mistakes=(
        Mistake(
            "the range was not widened to hold 0",
            lambda x, bits: _rounded(*_affine(x, bits, widened=False)),
            "Where does 0 land when all of x is positive? Its code must be one of 0 .. 2^bits - 1.",
        ),
        Mistake(
            "the zero point is no whole number",
            _affine,
            "The zero point is a code, and codes are whole: only then is 0.0 exactly on the grid.",
        ),
        Mistake(
            "the zero point is cut off instead of rounded",
            lambda x, bits: (_affine(x, bits)[0], int(_affine(x, bits)[1])),
            "int() drops what follows the point: 16.7 should become 17.",
        ),
        Mistake(
            "the zero point has the wrong sign",
            lambda x, bits: _rounded(*_affine(x, bits, sign=1)),
            "The lowest value gets code 0: how many steps above it lies 0.0?",
        ),
        Mistake(
            "one step too many",
            lambda x, bits: _rounded(*_affine(x, bits, steps=0)),
            "2^bits codes are that many posts: how many steps lie between the first and the last?",
        ),
    ),
)


# 01.4 -------------------------------------------------------------------------------------------------------------


def _fake_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-1.0, 0.0, 0.6, 2.0], 2),
        ([1.2, 2.2, 6.0], 2),
        ([-7.0, -2.8, -1.2], 3),
        ([-1.5, 1.5], 2),  # both ends are ties, and the upper one rounds to code 4: all that ever needs saturation
    ]
    drawn = [(_range_case(generator, bits, int(whole(generator, 0, 2**bits - 1))), bits) for bits in (2, 3, 4, 6, 8)]
    return [Case((torch.as_tensor(x), bits)) for x, bits in by_hand + drawn]


def _fake_quantize(x: Any, bits: int, *, widened: bool = True, rounding: Any = np.rint) -> np.ndarray:
    scale, zero_point = _rounded(*_affine(x, bits, widened=widened))
    codes = np.clip(rounding(f64(x) / scale) + zero_point, 0, 2**bits - 1)
    return scale * (codes - zero_point)


def _fake_unsaturated(x: Any, bits: int) -> np.ndarray:
    scale, _ = _affine(x, bits)
    return scale * np.rint(f64(x) / scale)


def _fake_not_shifted_back(x: Any, bits: int) -> np.ndarray:
    scale, zero_point = _rounded(*_affine(x, bits))
    return _fake_quantize(x, bits) + scale * zero_point


def _fake_fraction(x: Any, bits: int, *, inside: bool) -> np.ndarray:
    """With a zero point that was not rounded, added inside the rounding of x / scale or after it."""
    scale, zero_point = _affine(x, bits)
    steps = f64(x) / scale
    codes = np.rint(steps + zero_point) if inside else np.rint(steps) + zero_point
    return scale * (np.clip(codes, 0, 2**bits - 1) - zero_point)


_ZERO_ON_GRID = "Is 0.0 on your grid? What comes back for an x of 0.0 should be 0.0."


FAKE = Exercise(
    id="01.4",
    title="There and back",
    function="fake_quantize",
    points=3,
    cases=_fake_cases,
    reference=_fake_quantize,
    tolerance=1e-4,  # scale * codes - scale * zero_point is as good, and cancels digits in float32
    mistakes=(
        Mistake(
            "floor instead of round",
            lambda x, bits: _fake_quantize(x, bits, rounding=np.floor),
            "An error of almost a whole step gives it away. A cast to uint8 also only drops digits.",
        ),
        Mistake(
            "not saturated",
            _fake_unsaturated,
            "Rounding can take an end of the range off the grid: at 2 bits 1.5 may get code 4. Which codes are there?",
        ),
        Mistake(
            "the zero point was not taken off again",
            _fake_not_shifted_back,
            "Which float does the code zero_point stand for? It should be 0.0.",
        ),
        Mistake(
            "the range was not widened to hold 0",
            lambda x, bits: _fake_quantize(x, bits, widened=False),
            "What are the codes of an x that is all positive, when the zero point is no code?",
        ),
        Mistake(
            "the zero point is no whole number",
            lambda x, bits: _fake_fraction(x, bits, inside=True),
            _ZERO_ON_GRID,
        ),
        Mistake(
            "the zero point is no whole number",
            lambda x, bits: _fake_fraction(x, bits, inside=False),
            _ZERO_ON_GRID,
        ),
    ),
)


# 01.5 -------------------------------------------------------------------------------------------------------------


def _entropy_cases(generator: Generator) -> list[Case]:
    by_hand = [
        [0, 0, 1, 1],
        [-8, -8, 7, 0],
        [5, 5, 5],
        [0] * 15 + [7],
    ]
    normal = torch.randn(2, 40, generator=generator) * torch.tensor([[1.5], [20.0]])
    skewed = whole(generator, 0, 3, 6, 5) ** 3
    drawn = [*(normal.round().clamp(-128, 127).to(torch.int8)), skewed]
    return [Case((torch.as_tensor(codes),)) for codes in by_hand + drawn]


def _shares(codes: Any) -> np.ndarray:
    """How often each code that occurs does, as a share."""
    return np.unique(np.asarray(codes), return_counts=True)[1] / codes.numel()


def _with_empty_bins(codes: Any, low: int, high: int) -> float:
    counts, _ = np.histogram(np.asarray(codes), bins=np.arange(low, high + 2))
    shares = counts / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 * -inf is the mistake
        return -(shares * np.log2(shares)).sum()


_ONLY_WHAT_OCCURS = "0 * log2(0) is NaN to a computer: which shares belong in the sum?"

ENTROPY = Exercise(
    id="01.5",
    title="How much the codes say",
    function="code_entropy",
    points=2,
    cases=_entropy_cases,
    reference=lambda codes: (_shares(codes) * np.log2(1 / _shares(codes))).sum(),
    mistakes=(
        Mistake(
            "the natural logarithm",
            lambda codes: -(_shares(codes) * np.log(_shares(codes))).sum(),
            "Two codes, equally often, are 1 bit, not 0.69. Which base counts in bits?",
        ),
        Mistake(
            "the minus sign is missing",
            lambda codes: (_shares(codes) * np.log2(_shares(codes))).sum(),
            "The logarithm of a share is negative; an amount of information is not.",
        ),
        Mistake(
            "all codes taken to be equally frequent",
            lambda codes: np.log2(len(_shares(codes))),
            "log2 of how many codes occur is the most it can be: what of a code that hardly ever comes?",
        ),
        Mistake(
            "codes that never occur are counted in",
            lambda codes: _with_empty_bins(codes, int(codes.min()), int(codes.max())),
            _ONLY_WHAT_OCCURS,
        ),
        Mistake(
            "codes that never occur are counted in",
            lambda codes: _with_empty_bins(codes, -128, 127),
            _ONLY_WHAT_OCCURS,
        ),
    ),
)


SHEET = Sheet("01", "The quantizer", (SCALE, QUANTIZE, AFFINE, FAKE, ENTROPY))
