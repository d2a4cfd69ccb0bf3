"""Sheet 01, the quantizer: cases, references, tolerances, points and known mistakes.

No case holds a value that float32 and float64 round differently, or a division and a product with
1 / scale. Exact ties and exact codes, where floor could go either way, use scales that are powers
of two. All other values are at least a twentieth of a step from a tie. In 01.4 a tie of x meets
only an even zero point, so that adding the zero point before or after rounding is the same.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, qmax, uniform, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 01.1 ---------------------------------------------------------------------------------------------


def _scale_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # The farthest value from 0 is positive, then negative.
        ([-0.33, -0.10, 0.02, 0.41], 4),
        ([-3.0, 1.0, 0.5], 8),
        # A matrix has one scale too.
        ([[0.25, -0.75], [0.5, 0.125]], 2),
    ]

    # The farthest value is nearly always negative here.
    drawn = [(uniform(generator, -4, 2, 3, 5), bits) for bits in (3, 5, 8)]
    return make_cases(by_hand, drawn)


def _amax(x: Any) -> float:
    return np.abs(f64(x)).max()


def _symmetric_scale(x: Any, bits: int) -> float:
    # scale = max|x| / qmax
    return _amax(x) / qmax(bits)


# Known mistakes.


def _scale_of_largest_value(x: Any, bits: int) -> float:
    return f64(x).max() / qmax(bits)


def _scale_with_one_more_code(x: Any, bits: int) -> float:
    return _amax(x) / 2 ** (bits - 1)


def _scale_by_all_steps(x: Any, bits: int) -> float:
    return _amax(x) / (2**bits - 1)


def _asymmetric_scale(x: Any, bits: int) -> float:
    width = f64(x).max() - f64(x).min()
    return width / (2**bits - 1)


def _inverse_scale(x: Any, bits: int) -> float:
    return qmax(bits) / _amax(x)


SCALE = Exercise(
    id="01.1",
    title="The scale of a symmetric grid",
    function="symmetric_scale",
    points=1,
    cases=_scale_cases,
    reference=_symmetric_scale,
    mistakes=(
        Mistake(
            "the largest value, not the largest magnitude",
            _scale_of_largest_value,
            "What happens to a vector whose farthest value from 0 is negative?",
        ),
        Mistake(
            "qmax off by one",
            _scale_with_one_more_code,
            "How many codes does a signed grid have above 0? Count them for 3 bits.",
        ),
        Mistake(
            "the count of all steps instead of qmax",
            _scale_by_all_steps,
            "The top code stands for amax. Which code is that, if half of the codes are negative?",
        ),
        Mistake(
            "the scale of an asymmetric grid",
            _asymmetric_scale,
            "max - min is the width of a grid that may lie anywhere. Where is the center of a"
            " symmetric grid?",
        ),
        Mistake(
            "the scale is inverted",
            _inverse_scale,
            "A scale is the width of one step, in the units of x. Does it grow or shrink when x"
            " doubles?",
        ),
    ),
)


# 01.2 ---------------------------------------------------------------------------------------------

# A quantizer is a rounding of x / scale and an ending, which turns whole numbers into codes. These
# are the endings that people choose; the first is right.


def _saturated(steps: np.ndarray, bits: int) -> np.ndarray:
    codes = np.clip(steps, -qmax(bits) - 1, qmax(bits))
    return codes.astype(np.int64)


def _unsaturated(steps: np.ndarray, bits: int) -> np.ndarray:
    return steps.astype(np.int64)


def _wrapped(steps: np.ndarray, bits: int) -> np.ndarray:
    """Keep the low byte of a whole number, as a cast to int8 does."""
    return steps.astype(np.int64).astype(np.int8)


def _saturated_late(steps: np.ndarray, bits: int) -> np.ndarray:
    return _saturated(_wrapped(steps, bits), bits)


def _narrow(steps: np.ndarray, bits: int) -> np.ndarray:
    codes = np.clip(steps, -qmax(bits), qmax(bits))
    return codes.astype(np.int64)


def _wide(steps: np.ndarray, bits: int) -> np.ndarray:
    codes = np.clip(steps, -qmax(bits) - 1, qmax(bits) + 1)
    return codes.astype(np.int64)


def _wide_as_int8(steps: np.ndarray, bits: int) -> np.ndarray:
    return _wrapped(_wide(steps, bits), bits)


def _half_up(steps: np.ndarray) -> np.ndarray:
    return np.floor(steps + 0.5)


def _quantizer(
    rounding: Callable[..., Any], ending: Callable[..., Any]
) -> Callable[..., np.ndarray]:
    """Return a quantizer that computes ending(rounding(x / scale), bits)."""

    def quantize(x: Any, scale: float, bits: int) -> np.ndarray:
        steps = f64(x) / scale
        return ending(rounding(steps), bits)

    return quantize


def _multiplied(x: Any, scale: float, bits: int) -> np.ndarray:
    steps = f64(x) * scale
    return _saturated(np.rint(steps), bits)


def _quantize_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Values between two codes.
        ([-0.33, -0.12, 0.02, 0.41], 0.05, 4),
        # Ties, which round to the even code.
        ([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], 1.0, 4),
        ([0.375, -0.625, 1.25], 0.25, 8),
        # Beyond both ends of the grid, then also beyond int8.
        ([-9.0, -8.3, 7.4, 9.0], 1.0, 4),
        ([-300.0, -129.0, 90.7, 128.0, 200.0], 1.0, 8),
    ]

    # Codes as far out as twice the range still fit int8, so a cast alone does not wrap them.
    drawn = []
    for bits in (2, 3, 5, 6):
        codes = whole(generator, -(2**bits), 2**bits - 1, 3, 5)
        scale = float(uniform(generator, 0.01, 2.0))
        steps = codes + uniform(generator, -0.45, 0.45, 3, 5)
        drawn.append((steps * scale, scale, bits))
    return make_cases(by_hand, [*drawn, _ties_case(generator), _far_case(generator)])


def _power_of_two(generator: Generator) -> float:
    """Draw a scale with which every multiple and every half is exact."""
    exponent = int(whole(generator, -4, 1))
    return 2.0**exponent


def _ties_case(generator: Generator) -> tuple[Tensor, float, int]:
    """Draw halves below and above 0, each next to an even code and next to an odd one."""
    scale = _power_of_two(generator)
    even = 2 * whole(generator, -3, 2, 2, 1)
    steps = even + torch.tensor([[-0.5, 0.5, 1.5], [-1.5, -0.5, 0.5]])
    fixed = torch.tensor([[-1.5, 0.5, 2.5]])
    return torch.cat([steps, fixed]) * scale, scale, 4


def _far_case(generator: Generator) -> tuple[Tensor, float, int]:
    """Draw values whose cast to int8 changes sign, or lands far from either end."""
    scale = float(uniform(generator, 0.01, 2.0))

    # A cast subtracts 256 from the first three, adds 256 to the next, and keeps the last.
    above = whole(generator, 160, 240, 3)
    below = whole(generator, -240, -160, 3)
    inside = whole(generator, -100, 100, 3)
    steps = torch.cat([above, below, inside]) + uniform(generator, -0.45, 0.45, 9)
    return steps * scale, scale, 8


# People write each of these mistakes in several ways, with another rounding or ending.
_TRUNCATED = variants(
    "truncated or floored instead of rounded",
    "A cast to integers drops what follows the decimal point: 0.9 steps become 0. What has to come"
    " before the cast?",
    *(
        _quantizer(rounding, ending)
        for rounding in (np.trunc, np.floor)
        for ending in (_saturated, _unsaturated, _wrapped, _saturated_late)
    ),
)
_NOT_SATURATED = variants(
    "not saturated, or only after the cast to int8",
    "Which code should stand for x = 1000? A cast to int8 turns 200 into -56, and no later clamp"
    " repairs that.",
    _quantizer(np.rint, _unsaturated),
    _quantizer(np.rint, _wrapped),
    _quantizer(np.rint, _saturated_late),
)
_WRONG_ENDS = variants(
    "qmin or qmax is off by one",
    "Four bits make 16 codes, and one of them is 0. How many lie below it, and how many above?",
    _quantizer(np.rint, _narrow),
    _quantizer(np.rint, _wide),
    _quantizer(np.rint, _wide_as_int8),
)

QUANTIZE = Exercise(
    id="01.2",
    title="Codes: round and saturate",
    function="quantize",
    points=3,
    cases=_quantize_cases,
    reference=_quantizer(np.rint, _saturated),
    mistakes=(
        Mistake(
            "halves rounded up",
            _quantizer(_half_up, _saturated),
            "Half a step rounds to the EVEN code: what does torch.round return for 0.5, 1.5 and"
            " 2.5?",
        ),
        *_TRUNCATED,
        *_NOT_SATURATED,
        *_WRONG_ENDS,
        Mistake(
            "x times the scale",
            _multiplied,
            "How many steps of width 0.1 fit into 0.4?",
        ),
    ),
)


# 01.3 ---------------------------------------------------------------------------------------------


def _range_case(generator: Generator, bits: int, zero_point: int, *, size: int = 6) -> Tensor:
    """Draw values off all ties whose grid puts 0 near `zero_point`.

    A zero point at an end of the grid gives values of one sign, none of them near 0.
    """
    last = 2**bits - 1
    one_sided = zero_point in (0, last)
    shift = 0.0 if one_sided else float(uniform(generator, -0.35, 0.35))
    inner = whole(generator, 1, last - 1, size) + uniform(generator, -0.1, 0.1, size)
    ends = torch.tensor([-shift, last - shift])

    # The end at 0 is left out of a one-sided range.
    if one_sided:
        ends = ends[1:] if zero_point == 0 else ends[:1]
    steps = torch.cat([ends, inner]) - zero_point
    scale = _power_of_two(generator) if one_sided else float(uniform(generator, 0.05, 2.0))
    return steps * scale


def _affine_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Both signs.
        ([-0.4, 0.0, 2.5, 5.7], 8),
        ([3.0, 1.0, 0.4, -1.0], 2),
        # All positive, then all negative.
        ([1.0, 2.0, 5.0], 4),
        ([-7.5, -3.0, -1.5], 4),
    ]
    drawn = []
    for bits in (2, 3, 4, 6, 8):
        zero_point = int(whole(generator, 1, 2**bits - 2))
        drawn.append((_range_case(generator, bits, zero_point), bits))
    return make_cases(by_hand, [*drawn, *_one_sided_cases(generator), *_tied_zero_cases(generator)])


def _one_sided_cases(generator: Generator) -> list[tuple[Tensor, int]]:
    """Draw positive values, then negative ones: both ranges must be widened."""
    positive = (_range_case(generator, 4, 0), 4)
    negative = (_range_case(generator, 3, 7), 3)
    return [positive, negative]


def _tied_zero_cases(generator: Generator) -> list[tuple[Tensor, int]]:
    """Draw values whose zero point is half-way between two codes.

    The even code is the lower one in the first case and the upper one in the second.
    """
    even = 2 * int(whole(generator, 0, 2))
    odd = 1 + 2 * int(whole(generator, 0, 5))
    cases = []
    for bits, lower in ((3, even), (4, odd)):
        last = 2**bits - 1
        inner = whole(generator, 1, last - 2, 4) - lower + 0.1
        ends = torch.tensor([-lower - 0.5, last - lower - 0.5])
        steps = torch.cat([ends, inner])
        cases.append((steps * _power_of_two(generator), bits))
    return cases


def _affine(
    x: Any, bits: int, *, steps: int = -1, widened: bool = True, sign: int = -1
) -> tuple[float, float]:
    """Return the scale, and the zero point before it is rounded."""
    # scale = (high - low) / (2^bits - 1), zero_point = -low / scale
    low = f64(x).min()
    high = f64(x).max()
    if widened:
        low = min(low, 0.0)
        high = max(high, 0.0)
    scale = (high - low) / (2**bits + steps)
    return scale, sign * low / scale


def _rounded(scale: float, zero_point: float) -> tuple[float, int]:
    return scale, round(zero_point)


def _affine_parameters(x: Any, bits: int) -> tuple[float, int]:
    return _rounded(*_affine(x, bits))


# Known mistakes.


def _unwidened(x: Any, bits: int) -> tuple[float, int]:
    return _rounded(*_affine(x, bits, widened=False))


def _clamped(x: Any, bits: int) -> tuple[float, int]:
    """Clamp the zero point to the codes, although 0 may lie outside the range."""
    scale, zero_point = _unwidened(x, bits)
    return scale, min(max(zero_point, 0), 2**bits - 1)


def _zero_point_truncated(x: Any, bits: int) -> tuple[float, int]:
    scale, zero_point = _affine(x, bits)
    return scale, int(zero_point)


def _zero_point_negated(x: Any, bits: int) -> tuple[float, int]:
    return _rounded(*_affine(x, bits, sign=1))


def _one_step_more(x: Any, bits: int) -> tuple[float, int]:
    return _rounded(*_affine(x, bits, steps=0))


_NOT_WIDENED = "the range was not widened to hold 0"

AFFINE = Exercise(
    id="01.3",
    title="A grid for any range",
    function="affine_parameters",
    points=3,
    cases=_affine_cases,
    reference=_affine_parameters,
    mistakes=(
        *variants(
            _NOT_WIDENED,
            "Where does 0 land if all of x is positive? Clamping the zero point does not put 0 on"
            " the grid.",
            _unwidened,
            _clamped,
        ),
        Mistake(
            "the zero point is not rounded",
            _affine,
            "The zero point is a code, and codes are whole: only then is 0.0 exactly on the grid.",
        ),
        Mistake(
            "the zero point is truncated instead of rounded",
            _zero_point_truncated,
            "int() drops what follows the decimal point: 16.7 should become 17.",
        ),
        Mistake(
            "the zero point has the wrong sign",
            _zero_point_negated,
            "The lowest value gets code 0: how many steps above it lies 0.0?",
        ),
        Mistake(
            "one step too many",
            _one_step_more,
            "How many steps lie between the first and the last of 2^bits codes?",
        ),
    ),
)


# 01.4 ---------------------------------------------------------------------------------------------


def _fake_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Both signs, all positive, all negative.
        ([-1.0, 0.0, 0.6, 2.0], 2),
        ([1.2, 2.2, 6.0], 2),
        ([-7.0, -2.8, -1.2], 3),
        # Both ends are ties. The upper one rounds to code 4, the only way to need saturation.
        ([-1.5, 1.5], 2),
    ]
    drawn = []
    for bits in (2, 3, 4, 6, 8):
        zero_point = int(whole(generator, 0, 2**bits - 1))
        drawn.append((_range_case(generator, bits, zero_point), bits))
    tied = [*_tied_zero_cases(generator), _tied_values_case(generator)]
    return make_cases(by_hand, [*drawn, *_one_sided_cases(generator), *tied])


def _tied_values_case(generator: Generator) -> tuple[Tensor, int]:
    """Draw halves next to even and odd codes, below and above 0, with an even zero point."""
    zero_point = 2 * int(whole(generator, 2, 5))
    ends = torch.tensor([-zero_point, 15.0 - zero_point])
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    order = torch.randperm(8, generator=generator)
    steps = torch.cat([ends, halves])[order]
    return steps * _power_of_two(generator), 4


def _there_and_back(
    x: Any, bits: int, grid: tuple[float, float], rounding: Any = np.rint
) -> np.ndarray:
    # x_hat = scale * (clamp(round(x / scale) + zero_point) - zero_point)
    scale, zero_point = grid
    shifted = rounding(f64(x) / scale) + zero_point
    codes = np.clip(shifted, 0, 2**bits - 1)
    return scale * (codes - zero_point)


def _fake_quantize(x: Any, bits: int, rounding: Any = np.rint) -> np.ndarray:
    return _there_and_back(x, bits, _affine_parameters(x, bits), rounding)


# Known mistakes.


def _fake_floored(x: Any, bits: int) -> np.ndarray:
    return _fake_quantize(x, bits, np.floor)


def _fake_half_up(x: Any, bits: int) -> np.ndarray:
    return _fake_quantize(x, bits, _half_up)


def _fake_unsaturated(x: Any, bits: int) -> np.ndarray:
    scale, _ = _affine(x, bits)
    return scale * np.rint(f64(x) / scale)


def _fake_not_shifted_back(x: Any, bits: int) -> np.ndarray:
    scale, zero_point = _affine_parameters(x, bits)
    return _fake_quantize(x, bits) + scale * zero_point


def _fake_unwidened(x: Any, bits: int) -> np.ndarray:
    return _there_and_back(x, bits, _unwidened(x, bits))


def _fake_clamped(x: Any, bits: int) -> np.ndarray:
    return _there_and_back(x, bits, _clamped(x, bits))


def _fake_fraction_inside(x: Any, bits: int) -> np.ndarray:
    """Add an unrounded zero point inside the rounding of x / scale."""
    scale, zero_point = _affine(x, bits)
    steps = np.rint(f64(x) / scale + zero_point)
    codes = np.clip(steps, 0, 2**bits - 1)
    return scale * (codes - zero_point)


def _fake_fraction_outside(x: Any, bits: int) -> np.ndarray:
    return _there_and_back(x, bits, _affine(x, bits))


FAKE = Exercise(
    id="01.4",
    title="There and back",
    function="fake_quantize",
    points=3,
    cases=_fake_cases,
    reference=_fake_quantize,
    # scale * codes - scale * zero_point is right too, and cancels digits in float32.
    tolerance=1e-4,
    mistakes=(
        *variants(
            "floored, or halves rounded up",
            "An error near a whole step means floor, or a cast that drops digits. A half rounds to"
            " the EVEN code.",
            _fake_floored,
            _fake_half_up,
        ),
        Mistake(
            "not saturated",
            _fake_unsaturated,
            "Rounding can push an end of the range off the grid: at 2 bits 1.5 may get code 4."
            " Which codes exist?",
        ),
        Mistake(
            "the zero point was not subtracted again",
            _fake_not_shifted_back,
            "Which float does the code zero_point stand for? It should be 0.0.",
        ),
        *variants(
            _NOT_WIDENED,
            "Which codes does an all-positive x get, if 0 lies outside its range?",
            _fake_unwidened,
            _fake_clamped,
        ),
        *variants(
            "the zero point is not rounded",
            "Is 0.0 on your grid? What comes back for an x of 0.0 should be 0.0.",
            _fake_fraction_inside,
            _fake_fraction_outside,
        ),
    ),
)


# 01.5 ---------------------------------------------------------------------------------------------


def _entropy_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Two codes, equally frequent: 1 bit.
        [0, 0, 1, 1],
        # Negative codes, with many unused codes between them.
        [-8, -8, 7, 0],
        # A single code carries no information.
        [5, 5, 5],
        # A rare code.
        [0] * 15 + [7],
    ]

    # A narrow and a wide Gaussian as int8 codes, and a matrix of skewed codes.
    normal = torch.randn(2, 40, generator=generator) * torch.tensor([[1.5], [20.0]])
    skewed = whole(generator, 0, 3, 6, 5) ** 3
    gaussian = normal.round().clamp(-128, 127).to(torch.int8)
    return make_cases(by_hand, [*gaussian, skewed])


def _shares(codes: Any) -> np.ndarray:
    """Return the relative frequency of each code that occurs."""
    _, counts = np.unique(np.asarray(codes), return_counts=True)
    return counts / codes.numel()


def _entropy(codes: Any) -> float:
    # sum p log2(1 / p) bits per code
    shares = _shares(codes)
    return (shares * np.log2(1 / shares)).sum()


# Known mistakes.


def _entropy_in_nats(codes: Any) -> float:
    shares = _shares(codes)
    return -(shares * np.log(shares)).sum()


def _entropy_negated(codes: Any) -> float:
    shares = _shares(codes)
    return (shares * np.log2(shares)).sum()


def _entropy_of_uniform(codes: Any) -> float:
    return np.log2(len(_shares(codes)))


def _with_empty_bins(codes: Any, low: int, high: int) -> float:
    counts, _ = np.histogram(np.asarray(codes), bins=np.arange(low, high + 2))
    shares = counts / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 * -inf is the mistake
        return -(shares * np.log2(shares)).sum()


def _with_bins_of_range(codes: Any) -> float:
    return _with_empty_bins(codes, int(codes.min()), int(codes.max()))


def _with_bins_of_int8(codes: Any) -> float:
    return _with_empty_bins(codes, -128, 127)


ENTROPY = Exercise(
    id="01.5",
    title="How much the codes say",
    function="code_entropy",
    points=2,
    cases=_entropy_cases,
    reference=_entropy,
    mistakes=(
        Mistake(
            "the natural logarithm",
            _entropy_in_nats,
            "Two equally frequent codes carry 1 bit, not 0.69. Which base of the logarithm counts"
            " bits?",
        ),
        Mistake(
            "the minus sign is missing",
            _entropy_negated,
            "The logarithm of a share is negative. Can an amount of information be?",
        ),
        Mistake(
            "all codes are taken to be equally frequent",
            _entropy_of_uniform,
            "log2 of the number of codes is the largest possible entropy. What does a rare code"
            " contribute?",
        ),
        *variants(
            "codes that never occur are included",
            "A computer returns NaN for 0 * log2(0): which shares belong in the sum?",
            _with_bins_of_range,
            _with_bins_of_int8,
        ),
    ),
)


SHEET = Sheet("01", "The quantizer", (SCALE, QUANTIZE, AFFINE, FAKE, ENTROPY))
