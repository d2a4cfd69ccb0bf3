"""Sheet 13, quantization-aware training: cases, references, tolerances, points and known mistakes.

Values stay a twentieth of a step from where a code or a gradient changes. In 13.2 none lies within
half a step beyond an end, where LSQ's rule and that of 13.1 differ. Cases are drawn until they tell
the mistakes apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import (
    f64,
    found,
    make_cases,
    pick,
    qmax,
    telling,
    uniform,
    variants,
    whole,
)
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet


def _until(draw: Callable[[], tuple], good: Callable[[tuple], bool]) -> tuple:
    """Return the first draw that is good."""
    args = draw()
    while not good(args):
        args = draw()
    return args


def _ends(bits: int) -> tuple[int, int]:
    return -qmax(bits) - 1, qmax(bits)


# 13.1 ---------------------------------------------------------------------------------------------


def _ste_case(generator: Generator, bits: int) -> tuple[Tensor, float, int, Tensor]:
    """Return values on codes inside and outside the range, at its ends, and just beyond them."""
    qmin, top = _ends(bits)
    scale = pick(generator, 0.05, 0.3, 2.5)

    # codes from twice the lowest to twice the highest, and the ends
    codes = torch.cat([whole(generator, 2 * qmin, 2 * top, 6), torch.tensor([qmin, top, top])])
    steps = codes + uniform(generator, -0.45, 0.45, 9)

    # beyond the ends, still rounded to them or not
    beyond = torch.tensor([qmin - 0.3, top + 0.3, qmin - 0.7, top + 0.7])
    steps = torch.cat([steps, beyond])

    grad = uniform(generator, 0.5, 2.0, 13)
    sign = pick(generator, -1, 1)
    return scale * steps, scale, bits, grad * sign


def _ste_cases(generator: Generator) -> list[Case]:
    # values around both ends, then the weights of lesson 01, then a wide step
    x = torch.tensor([-9.0, -8.3, 0.4, 7.4, 7.6])
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weights = torch.tensor([-0.51, 0.02, 0.33, -0.18, 0.6])
    by_hand = [(x, 1.0, 4, grad), (weights, 0.21, 3, grad), (x, 4.0, 2, -grad)]

    drawn = [_ste_case(generator, bits) for bits in (2, 3, 4)]
    return make_cases(by_hand, drawn)


def _passing(passes: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """Return the gradient that passes where v = x / scale, its code and the ends allow it."""

    def gradient(x: Any, scale: float, bits: int, grad: Any) -> np.ndarray:
        v = f64(x) / scale
        qmin, top = _ends(bits)
        return f64(grad) * passes(v, np.rint(v), qmin, top)

    return gradient


def _inside(v: np.ndarray, code: np.ndarray, qmin: int, top: int) -> np.ndarray:
    return (code >= qmin) & (code <= top)


_through = _passing(_inside)


# Known mistakes.


def _nowhere(v: np.ndarray, code: np.ndarray, qmin: int, top: int) -> bool:
    return False


def _everywhere(v: np.ndarray, code: np.ndarray, qmin: int, top: int) -> bool:
    return True


def _strictly_inside(v: np.ndarray, code: np.ndarray, qmin: int, top: int) -> np.ndarray:
    return (code > qmin) & (code < top)


def _inside_before_rounding(v: np.ndarray, code: np.ndarray, qmin: int, top: int) -> np.ndarray:
    return (v >= qmin) & (v <= top)


def _times_scale(x: Any, scale: float, bits: int, grad: Any) -> np.ndarray:
    return _through(x, scale, bits, grad) * scale


def _over_scale(x: Any, scale: float, bits: int, grad: Any) -> np.ndarray:
    return _through(x, scale, bits, grad) * (1 / scale)


STE = Exercise(
    id="13.1",
    title="Straight through",
    function="gradient_through",
    points=1,
    cases=_ste_cases,
    reference=_through,
    mistakes=(
        Mistake(
            "the gradient of rounding is left at zero",
            _passing(_nowhere),
            "The true slope of rounding is 0 and teaches nothing: which slope has the line through"
            " the stairs?",
        ),
        Mistake(
            "the gradient passes beyond the ends as well",
            _passing(_everywhere),
            "Far beyond the last level, x may move a little: does the output move with it?",
        ),
        Mistake(
            "nothing passes at the ends themselves",
            _passing(_strictly_inside),
            "With an amax scale the largest weight has the code qmax. Is it clipped? May it never"
            " move again?",
        ),
        Mistake(
            "x is compared with the ends, not its code",
            _passing(_inside_before_rounding),
            "At 4 bits 7.4 steps round to the code 7: is that code on the grid?",
        ),
        *variants(
            "the scale is left in the gradient",
            "x is divided by the scale on the way in: what happens to the code on the way out?",
            _times_scale,
            _over_scale,
        ),
    ),
)


# 13.2 ---------------------------------------------------------------------------------------------


def _lsq_case(generator: Generator, bits: int) -> tuple[Tensor, float, int, Tensor]:
    """Return five values inside, two beyond the upper end, one beyond the lower."""
    qmin, top = _ends(bits)
    inside = uniform(generator, qmin + 0.05, top - 0.05, 5)
    distances = uniform(generator, 0.6, 3.0, 3)
    beyond = torch.tensor([top, top, qmin]) + torch.tensor([1, 1, -1]) * distances
    scale = pick(generator, 0.1, 0.4, 1.5)
    grad = uniform(generator, -2.0, 2.0, 8)
    return torch.cat([inside, beyond]) * scale, scale, bits, grad


def _far_from_ties(args: tuple) -> bool:
    x, scale = args[:2]
    v = f64(x) / scale
    distances = np.abs(v - np.floor(v) - 0.5)
    return bool((distances > 0.05).all())


def _large(args: tuple) -> bool:
    """Return whether all answers, right and wrong, are far from 0, where float32 sums cancel."""
    return all(abs(answer[0]) > 0.3 for _, answer in found(LSQ, args))


def _tells_slopes(args: tuple) -> bool:
    return _far_from_ties(args) and _large(args) and telling(LSQ, args, apart=0.1, pairs=False)


def _lsq_cases(generator: Generator) -> list[Case]:
    # each with values inside and one beyond an end: the upper, then the lower
    by_hand = [
        (torch.tensor([0.6, 1.4, 30.0]), 1.0, 4, torch.tensor([1.0, 1.0, 1.0])),
        (torch.tensor([0.9, -0.2, -3.0]), 0.5, 2, torch.tensor([2.0, -1.0, 1.5])),
    ]
    drawn = []
    for bits in (2, 3, 4):
        drawn.append(_until(partial(_lsq_case, generator, bits), _tells_slopes))
    return make_cases(by_hand, drawn)


def _rounding(v: np.ndarray, code: np.ndarray) -> np.ndarray:
    return code - v


def _the_end(v: np.ndarray, end: np.ndarray) -> np.ndarray:
    return end


def _slope(
    inside: Callable[..., Any] = _rounding,
    beyond: Callable[..., Any] = _the_end,
    together: Callable[[np.ndarray], float] = np.sum,
) -> Callable[..., float]:
    """Return the gradient of a scale: the sum of grad times a slope, inside the ends and beyond."""

    def gradient(x: Any, scale: float, bits: int, grad: Any) -> float:
        v = f64(x) / scale
        qmin, top = _ends(bits)
        is_inside = (v >= qmin) & (v <= top)
        end = v.clip(qmin, top)
        slopes = np.where(is_inside, inside(v, np.rint(v)), beyond(v, end))
        return together(f64(grad) * slopes)

    return gradient


# Known mistakes.


def _code_only(v: np.ndarray, code: np.ndarray) -> np.ndarray:
    return code


def _opposite(v: np.ndarray, code: np.ndarray) -> np.ndarray:
    return v - code


def _zero(v: np.ndarray, end: np.ndarray) -> float:
    return 0


def _end_minus_value(v: np.ndarray, end: np.ndarray) -> np.ndarray:
    return end - v


def _code_minus_value(v: np.ndarray, end: np.ndarray) -> np.ndarray:
    return np.rint(v) - v


LSQ = Exercise(
    id="13.2",
    title="The slope of a scale",
    function="scale_gradient",
    points=3,
    cases=_lsq_cases,
    reference=_slope(),
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "the codes alone",
            _slope(_code_only),
            "s occurs twice in s round(x / s): what does the product rule add to round(v)?",
        ),
        Mistake(
            "clipped values have no slope",
            _slope(beyond=_zero),
            "Beyond the end x_hat is qmax times s: does it not change when s does?",
        ),
        *variants(
            "beyond the ends as inside",
            "Where x is clipped, x_hat = s qmax. Does x occur in that? What is its slope by s?",
            _slope(beyond=_end_minus_value),
            _slope(beyond=_code_minus_value),
        ),
        Mistake(
            "the sign of what is inside",
            _slope(_opposite),
            "A value of 0.6 steps has the code 1. If s grows a little, does 1 times s grow or"
            " shrink?",
        ),
        Mistake(
            "the mean for the sum",
            _slope(together=np.mean),
            "All values share the one scale. By the chain rule, are their slopes added or"
            " averaged?",
        ),
    ),
)


# 13.3 ---------------------------------------------------------------------------------------------


def _step_cases(generator: Generator) -> list[Case]:
    # one scale becomes smaller, one larger
    by_hand = [(torch.tensor([0.1, 0.5]), torch.tensor([3.0, -2.0]), 0.05)]

    def draw() -> tuple:
        scale = uniform(generator, 0.05, 0.6, 4)
        grad = uniform(generator, -4, 4, 4)
        return scale, grad, pick(generator, 0.1, 0.3)

    drawn = [_until(draw, _tells_steps) for _ in range(3)]
    return make_cases(by_hand, drawn)


def _tells_steps(args: tuple) -> bool:
    # a step on the scale itself would make one of them negative
    scale, grad, rate = args
    crosses_zero = bool((scale < rate * grad).any())
    return crosses_zero and telling(STEP, args, apart=0.01)


def _stepped(scale: Any, grad: Any, rate: float) -> np.ndarray:
    # t = log s, so d loss / d t = s d loss / d s
    of_log = f64(scale) * f64(grad)
    return f64(scale) * np.exp(-rate * of_log)


# Known mistakes.


def _on_the_scale(scale: Any, grad: Any, rate: float) -> np.ndarray:
    return f64(scale) - rate * f64(grad)


def _without_chain_rule(scale: Any, grad: Any, rate: float) -> np.ndarray:
    return f64(scale) * np.exp(-rate * f64(grad))


def _divided(scale: Any, grad: Any, rate: float) -> np.ndarray:
    return f64(scale) * np.exp(-rate * f64(grad) / f64(scale))


def _uphill(scale: Any, grad: Any, rate: float) -> np.ndarray:
    return _stepped(scale, grad, -rate)


def _logarithm(scale: Any, grad: Any, rate: float) -> np.ndarray:
    return np.log(f64(scale)) - rate * f64(scale) * f64(grad)


STEP = Exercise(
    id="13.3",
    title="A scale stays above 0",
    function="step_scale",
    points=1,
    cases=_step_cases,
    reference=_stepped,
    mistakes=(
        Mistake(
            "a step on the scale, not on its logarithm",
            _on_the_scale,
            "What becomes of a scale of 0.1, a slope of 3 and a rate of 0.05? Which quantity is"
            " learned?",
        ),
        Mistake(
            "the slope by s for the slope by log s",
            _without_chain_rule,
            "s = exp(t): what is d s / d t, and so the slope of the loss by t?",
        ),
        Mistake(
            "divided by s where it should be multiplied",
            _divided,
            "d log s / d s is 1 / s; here the loss changes with log s. Which way round does the"
            " chain go?",
        ),
        Mistake(
            "uphill",
            _uphill,
            "A positive slope says that a larger scale makes the loss larger: where should it go?",
        ),
        Mistake(
            "the logarithm is returned",
            _logarithm,
            "The quantizer divides by the scale: what do you return, and what is asked for?",
        ),
    ),
)


# 13.4 ---------------------------------------------------------------------------------------------


def _clear(args: tuple) -> bool:
    """Return whether no magnitude is near a value where a code changes, by any answer's rule.

    The mean of w must not be near 0, where few of its digits are right in float32.
    """
    w = f64(args[0])
    magnitude = np.abs(w)
    signed_mean = abs(w.mean())
    if signed_mean < 0.02:
        return False

    # where codes change: multiples of the scales of all answers
    scales = np.array([magnitude.mean(), magnitude.max(), signed_mean])
    edges = np.outer(scales, (0.5, 1.0, 1.5, 2.5, 3.5)).ravel()
    distances = np.abs(magnitude.reshape(-1, 1) - edges)

    # the largest magnitude equals its own scale
    below_largest = magnitude.ravel() < magnitude.max()
    return bool((distances[below_largest] > 1e-3).all())


def _weights(generator: Generator, shape: tuple[int, ...]) -> tuple[Tensor]:
    return (0.3 * torch.randn(shape, generator=generator),)


def _ternary_cases(generator: Generator) -> list[Case]:
    # a row and a matrix
    by_hand = [
        (torch.tensor([0.9, -0.2, 0.1, -1.2]),),
        (torch.tensor([[0.5, -0.2], [0.01, -0.35]]),),
    ]
    drawn = []
    for shape in ((3, 4), (16,), (2, 12)):
        drawn.append(_until(partial(_weights, generator, shape), _tells_levels))
    return make_cases(by_hand, drawn)


def _tells_levels(args: tuple) -> bool:
    return _clear(args) and telling(TERNARY, args, apart=0.01)


def _levels(w: Any, scale: float, edge: float) -> tuple[np.ndarray, float]:
    """Return the signs of the weights beyond an edge, 0 for the others, and the scale."""
    beyond = np.abs(f64(w)) > edge
    return np.sign(f64(w)) * beyond, scale


def _absmean(w: Any) -> float:
    return np.abs(f64(w)).mean()


def _ternary(w: Any) -> tuple[np.ndarray, float]:
    scale = _absmean(w)
    return _levels(w, scale, scale / 2)


# Known mistakes.


def _by_amax(w: Any) -> tuple[np.ndarray, float]:
    scale = np.abs(f64(w)).max()
    return _levels(w, scale, scale / 2)


def _by_signed_mean(w: Any) -> tuple[np.ndarray, float]:
    scale = f64(w).mean()
    return np.rint(f64(w) / scale).clip(-1, 1), scale


def _edge_at_scale(w: Any) -> tuple[np.ndarray, float]:
    scale = _absmean(w)
    return _levels(w, scale, scale)


def _unsaturated(w: Any) -> tuple[np.ndarray, float]:
    scale = _absmean(w)
    return np.rint(f64(w) / scale), scale


def _two_levels(w: Any) -> tuple[np.ndarray, float]:
    return _levels(w, _absmean(w), 0)


TERNARY = Exercise(
    id="13.4",
    title="Three levels",
    function="ternary",
    points=2,
    cases=_ternary_cases,
    reference=_ternary,
    mistakes=(
        Mistake(
            "the largest magnitude for the mean",
            _by_amax,
            "With amax most weights round to 0. Which scale does BitNet use?",
        ),
        Mistake(
            "the mean of w, not of |w|",
            _by_signed_mean,
            "Weights are as often negative as positive: how large is their mean?",
        ),
        Mistake(
            "the edge at the scale, not at half of it",
            _edge_at_scale,
            "0.6 of a scale: is it nearer to 0 or to 1?",
        ),
        Mistake(
            "the codes are not saturated",
            _unsaturated,
            "A weight of twice the mean rounds to 2: is that one of the three levels?",
        ),
        Mistake(
            "two levels",
            _two_levels,
            "Which weights get the code 0?",
        ),
    ),
)


# 13.5 ---------------------------------------------------------------------------------------------


def _trits_cases(generator: Generator) -> list[Case]:
    # one byte, two bytes, and less than one
    by_hand = [[1, 0, -1, 1, 1], [1, 0, -1, 1, 1, -1], [1, 1]]

    # the last two codes differ, so that a reversed or missing last byte shows
    drawn = []
    for length in (10, 13, 24):
        codes = whole(generator, -1, 1, length).tolist()
        drawn.append([*codes[:-2], 1, 0])
    return make_cases(by_hand, drawn, torch.int8)


def _in_base(digits: np.ndarray, powers: tuple[int, ...], fill: int = 0) -> np.ndarray:
    """Return one byte per len(powers) digits: their sum, each times its power."""
    missing = -len(digits) % len(powers)
    padded = np.pad(digits, (0, missing), constant_values=fill).reshape(-1, len(powers))
    numbers = padded @ np.array(powers)
    return (numbers % 256).astype(np.uint8)


def _digits(codes: Any) -> np.ndarray:
    return np.asarray(codes).astype(np.int64) + 1


THREES = (1, 3, 9, 27, 81)


def _packed(codes: Any) -> np.ndarray:
    return _in_base(_digits(codes), THREES)


# Known mistakes.


def _highest_first(codes: Any) -> np.ndarray:
    return _in_base(_digits(codes), THREES[::-1])


def _not_shifted(codes: Any) -> np.ndarray:
    return _in_base(_digits(codes) - 1, THREES)


def _in_two_bits(codes: Any) -> np.ndarray:
    return _in_base(_digits(codes), (1, 4, 16, 64))


def _whole_bytes_only(codes: Any) -> np.ndarray:
    complete = len(codes) // 5 * 5
    return _in_base(_digits(codes)[:complete], THREES)


def _filled_with_zeros(codes: Any) -> np.ndarray:
    # a code of 0 is the digit 1
    return _in_base(_digits(codes), THREES, fill=1)


TRITS = Exercise(
    id="13.5",
    title="Five to a byte",
    function="pack_trits",
    points=2,
    cases=_trits_cases,
    reference=_packed,
    mistakes=(
        Mistake(
            "the first digit is the highest",
            _highest_first,
            "In a byte of the course the first code is the lowest digit: by which power of 3 is it"
            " multiplied?",
        ),
        Mistake(
            "the codes are not shifted",
            _not_shifted,
            "The digits of a number in base 3 are 0, 1 and 2: which code is which?",
        ),
        Mistake(
            "two bits per code",
            _in_two_bits,
            "How many codes are in a byte of yours? How many values of the byte are never used?",
        ),
        Mistake(
            "the rest is dropped",
            _whole_bytes_only,
            "Six codes, five to a byte: how many bytes does it take to keep all six?",
        ),
        Mistake(
            "the last byte is filled up with zeros",
            _filled_with_zeros,
            "What is missing in the last byte counts as the digit 0: which code is that?",
        ),
    ),
)


SHEET = Sheet("13", "Quantization-aware training", (STE, LSQ, STEP, TERNARY, TRITS))
