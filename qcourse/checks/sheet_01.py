"""Sheet 01, the quantizer: cases, references, tolerances, points and known mistakes.

The cases stay away from values that float32 and float64, or a division and a product with 1/scale, round differently:
exact ties, and codes met exactly, where floor could fall either way, stand on scales that are powers of two; everything
else is at least a twentieth of a step from a tie. In 01.4 a tie of x meets an even zero point only, so that it makes no
difference whether the zero point is added before or after rounding.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, qmax, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# 01.1 -------------------------------------------------------------------------------------------------------------


def _scale_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-0.33, -0.10, 0.02, 0.41], 4),
        ([-3.0, 1.0, 0.5], 8),
        ([[0.25, -0.75], [0.5, 0.125]], 2),
    ]
    drawn = [(uniform(generator, -4, 2, 3, 5), bits) for bits in (3, 5, 8)]
    return make_cases(by_hand, drawn)


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


def _saturated(steps: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(steps, -qmax(bits) - 1, qmax(bits)).astype(np.int64)


def _unsaturated(steps: np.ndarray, bits: int) -> np.ndarray:
    return steps.astype(np.int64)


def _wrapped(steps: np.ndarray, bits: int) -> np.ndarray:
    """What a cast to int8 leaves of a whole number: its low byte."""
    return steps.astype(np.int64).astype(np.int8)


def _saturated_late(steps: np.ndarray, bits: int) -> np.ndarray:
    return _saturated(_wrapped(steps, bits), bits)


def _narrow(steps: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(steps, -qmax(bits), qmax(bits)).astype(np.int64)


def _wide(steps: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(steps, -qmax(bits) - 1, qmax(bits) + 1).astype(np.int64)


def _wide_as_int8(steps: np.ndarray, bits: int) -> np.ndarray:
    return _wrapped(_wide(steps, bits), bits)


def _half_up(steps: np.ndarray) -> np.ndarray:
    return np.floor(steps + 0.5)


def _quantizer(
    rounding: Callable[..., Any], ending: Callable[..., Any]
) -> Callable[..., np.ndarray]:
    """ending(rounding(x / scale)) as a function of x, scale and bits."""
    return lambda x, scale, bits: ending(rounding(f64(x) / scale), bits)


def _quantize_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-0.33, -0.12, 0.02, 0.41], 0.05, 4),
        ([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5], 1.0, 4),
        ([0.375, -0.625, 1.25], 0.25, 8),
        ([-9.0, -8.3, 7.4, 9.0], 1.0, 4),
        ([-300.0, -129.0, 90.7, 128.0, 200.0], 1.0, 8),
    ]
    drawn = []
    for bits in (
        2,
        3,
        5,
        6,
    ):  # codes as far out as twice the range still fit int8, so a cast alone does not wrap them
        steps = whole(generator, -(2**bits), 2**bits - 1, 3, 5)
        scale = float(uniform(generator, 0.01, 2.0))
        drawn.append(((steps + uniform(generator, -0.45, 0.45, 3, 5)) * scale, scale, bits))
    return make_cases(by_hand, [*drawn, _ties_case(generator), _far_case(generator)])


def _power_of_two(generator: Generator) -> float:
    """A scale by which every multiple and every half is exact."""
    return 2.0 ** int(whole(generator, -4, 1))


def _ties_case(generator: Generator) -> tuple[Tensor, float, int]:
    """Halves below and above 0, each of them next to an even code and next to an odd one."""
    scale = _power_of_two(generator)
    even = 2 * whole(generator, -3, 2, 2, 1)
    steps = even + torch.tensor([[-0.5, 0.5, 1.5], [-1.5, -0.5, 0.5]])
    return torch.cat([steps, torch.tensor([[-1.5, 0.5, 2.5]])]) * scale, scale, 4


def _far_case(generator: Generator) -> tuple[Tensor, float, int]:
    """Values that a cast to int8 turns into codes on the other side of 0, or far from either end."""
    scale = float(uniform(generator, 0.01, 2.0))
    far = torch.cat(
        [
            whole(generator, 160, 240, 3),
            whole(generator, -240, -160, 3),
            whole(generator, -100, 100, 3),
        ]
    )
    return (far + uniform(generator, -0.45, 0.45, 9)) * scale, scale, 8


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
            "Half a step goes to the EVEN code: what does torch.round make of 0.5, 1.5 and 2.5?",
        ),
        *(
            Mistake(
                "cut off or floored instead of rounded",
                _quantizer(rounding, ending),
                "A cast to integers drops what follows the point: 0.9 steps become 0. What has to come before it?",
            )
            for rounding in (np.trunc, np.floor)
            for ending in (_saturated, _unsaturated, _wrapped, _saturated_late)
        ),
        *(
            Mistake(
                "not saturated, or only after the cast to int8",
                _quantizer(np.rint, ending),
                "Which code should stand for x = 1000? A cast to int8 makes -56 of 200: no later clamp mends that.",
            )
            for ending in (_unsaturated, _wrapped, _saturated_late)
        ),
        *(
            Mistake(
                "qmin or qmax is off by one",
                _quantizer(np.rint, ending),
                "Four bits make 16 codes, one of them 0: how many lie below it, and how many above?",
            )
            for ending in (_narrow, _wide, _wide_as_int8)
        ),
        Mistake(
            "x times the scale",
            lambda x, scale, bits: _saturated(np.rint(f64(x) * scale), bits),
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
    steps = (
        torch.cat([ends, inner])
        if not one_sided
        else torch.cat([ends[1:] if zero_point == 0 else ends[:1], inner])
    )
    return (steps - zero_point) * (
        _power_of_two(generator) if one_sided else float(uniform(generator, 0.05, 2.0))
    )


def _affine_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([-0.4, 0.0, 2.5, 5.7], 8),
        ([3.0, 1.0, 0.4, -1.0], 2),
        ([1.0, 2.0, 5.0], 4),
        ([-7.5, -3.0, -1.5], 4),
    ]
    drawn = [
        (_range_case(generator, bits, int(whole(generator, 1, 2**bits - 2))), bits)
        for bits in (2, 3, 4, 6, 8)
    ]
    return make_cases(by_hand, [*drawn, *_one_sided_cases(generator), *_tied_zero_cases(generator)])


def _one_sided_cases(generator: Generator) -> list[tuple[Tensor, int]]:
    """Nothing negative, and nothing positive: the range must be widened."""
    return [(_range_case(generator, 4, 0), 4), (_range_case(generator, 3, 7), 3)]


def _tied_zero_cases(generator: Generator) -> list[tuple[Tensor, int]]:
    """Values whose zero point lies half-way between two codes; the even one is once the lower and once the upper."""
    cases = []
    for bits, lower in (
        (3, 2 * int(whole(generator, 0, 2))),
        (4, 1 + 2 * int(whole(generator, 0, 5))),
    ):
        last = 2**bits - 1
        inner = whole(generator, 1, last - 2, 4) - lower + 0.1
        steps = torch.cat([torch.tensor([-lower - 0.5, last - lower - 0.5]), inner])
        cases.append((steps * _power_of_two(generator), bits))
    return cases


def _affine(
    x: Any, bits: int, *, steps: int = -1, widened: bool = True, sign: int = -1
) -> tuple[float, float]:
    """The scale, and the zero point before it is rounded."""
    low, high = f64(x).min(), f64(x).max()
    if widened:
        low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits + steps)
    return scale, sign * low / scale


def _rounded(scale: float, zero_point: float) -> tuple[float, int]:
    return scale, round(zero_point)


def _unwidened(x: Any, bits: int) -> tuple[float, int]:
    return _rounded(*_affine(x, bits, widened=False))


def _clamped(x: Any, bits: int) -> tuple[float, int]:
    """A zero point forced into the codes, where the range may not hold 0."""
    scale, zero_point = _unwidened(x, bits)
    return scale, min(max(zero_point, 0), 2**bits - 1)


_NOT_WIDENED = "the range was not widened to hold 0"


AFFINE = Exercise(
    id="01.3",
    title="A grid for any range",
    function="affine_parameters",
    points=3,
    cases=_affine_cases,
    reference=lambda x, bits: _rounded(*_affine(x, bits)),
    mistakes=(
        *(
            Mistake(
                _NOT_WIDENED,
                grid,
                "Where does 0 land when all of x is positive? A zero point clamped to a code does not bring it there.",
            )
            for grid in (_unwidened, _clamped)
        ),
        Mistake(
            "the zero point is not rounded",
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
        (
            [-1.5, 1.5],
            2,
        ),  # both ends are ties, and the upper one rounds to code 4: all that ever needs saturation
    ]
    drawn = [
        (_range_case(generator, bits, int(whole(generator, 0, 2**bits - 1))), bits)
        for bits in (2, 3, 4, 6, 8)
    ]
    tied = [*_tied_zero_cases(generator), _tied_values_case(generator)]
    return make_cases(by_hand, [*drawn, *_one_sided_cases(generator), *tied])


def _tied_values_case(generator: Generator) -> tuple[Tensor, int]:
    """Halves below and above 0, each of them next to an even code and next to an odd one; the zero point is even."""
    zero_point = 2 * int(whole(generator, 2, 5))
    ends = torch.tensor([-zero_point, 15.0 - zero_point])
    steps = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    order = torch.randperm(8, generator=generator)
    return torch.cat([ends, steps])[order] * _power_of_two(generator), 4


def _there_and_back(
    x: Any, bits: int, grid: tuple[float, float], rounding: Any = np.rint
) -> np.ndarray:
    scale, zero_point = grid
    codes = np.clip(rounding(f64(x) / scale) + zero_point, 0, 2**bits - 1)
    return scale * (codes - zero_point)


def _fake_quantize(x: Any, bits: int, rounding: Any = np.rint) -> np.ndarray:
    return _there_and_back(x, bits, _rounded(*_affine(x, bits)), rounding)


def _fake_unsaturated(x: Any, bits: int) -> np.ndarray:
    scale, _ = _affine(x, bits)
    return scale * np.rint(f64(x) / scale)


def _fake_not_shifted_back(x: Any, bits: int) -> np.ndarray:
    scale, zero_point = _rounded(*_affine(x, bits))
    return _fake_quantize(x, bits) + scale * zero_point


def _fake_fraction_inside(x: Any, bits: int) -> np.ndarray:
    """With a zero point that was not rounded, added inside the rounding of x / scale."""
    scale, zero_point = _affine(x, bits)
    return scale * (np.clip(np.rint(f64(x) / scale + zero_point), 0, 2**bits - 1) - zero_point)


FAKE = Exercise(
    id="01.4",
    title="There and back",
    function="fake_quantize",
    points=3,
    cases=_fake_cases,
    reference=_fake_quantize,
    tolerance=1e-4,  # scale * codes - scale * zero_point is as good, and cancels digits in float32
    mistakes=(
        *(
            Mistake(
                "floored, or halves rounded up",
                lambda x, bits, rounding=rounding: _fake_quantize(x, bits, rounding),
                "An error near a whole step means floor, or a cast that drops digits; a half goes to the EVEN code.",
            )
            for rounding in (np.floor, _half_up)
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
        *(
            Mistake(
                _NOT_WIDENED,
                lambda x, bits, grid=grid: _there_and_back(x, bits, grid(x, bits)),
                "What are the codes of an x that is all positive, when 0 lies outside its range?",
            )
            for grid in (_unwidened, _clamped)
        ),
        *(
            Mistake(
                "the zero point is not rounded",
                function,
                "Is 0.0 on your grid? What comes back for an x of 0.0 should be 0.0.",
            )
            for function in (
                _fake_fraction_inside,
                lambda x, bits: _there_and_back(x, bits, _affine(x, bits)),
            )
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
    return make_cases(by_hand, drawn)


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
