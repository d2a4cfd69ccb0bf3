"""Sheet 13, quantization-aware training: cases, references, tolerances, points and known mistakes.

Values stay a twentieth of a step from where a code or a gradient changes. In 13.2 none lies within half a step beyond
an end, where LSQ's rule and that of 13.1 part. Cases are drawn until they tell the mistakes apart.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, found, make_cases, pick, qmax, telling, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet


def _until(draw: Callable[[], tuple], good: Callable[[tuple], bool]) -> tuple:
    while not good(args := draw()):
        pass
    return args


def _ends(bits: int) -> tuple[int, int]:
    return -qmax(bits) - 1, qmax(bits)


# 13.1 -------------------------------------------------------------------------------------------------------------


def _ste_case(generator: Generator, bits: int) -> tuple[Tensor, float, int, Tensor]:
    """Values on codes from twice the lowest to twice the highest, the ends among them, and some just beyond."""
    qmin, top = _ends(bits)
    scale = pick(generator, 0.05, 0.3, 2.5)
    codes = torch.cat([whole(generator, 2 * qmin, 2 * top, 6), torch.tensor([qmin, top, top])])
    steps = codes + uniform(generator, -0.45, 0.45, 9)
    steps = torch.cat([steps, torch.tensor([qmin - 0.3, top + 0.3, qmin - 0.7, top + 0.7])])
    return scale * steps, scale, bits, uniform(generator, 0.5, 2.0, 13) * pick(generator, -1, 1)


def _ste_cases(generator: Generator) -> list[Case]:
    x, grad = torch.tensor([-9.0, -8.3, 0.4, 7.4, 7.6]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    weights = torch.tensor([-0.51, 0.02, 0.33, -0.18, 0.6])
    by_hand = [(x, 1.0, 4, grad), (weights, 0.21, 3, grad), (x, 4.0, 2, -grad)]
    return make_cases(by_hand, (_ste_case(generator, bits) for bits in (2, 3, 4)))


def _passing(
    passes: Callable[..., Any], times: Callable[[float], float] = lambda scale: 1
) -> Callable[..., np.ndarray]:
    """The gradient where v = x / scale, its code and the ends say so, perhaps multiplied by something."""

    def gradient(x: Any, scale: float, bits: int, grad: Any) -> np.ndarray:
        v = f64(x) / scale
        return f64(grad) * passes(v, np.rint(v), *_ends(bits)) * times(scale)

    return gradient


def _inside(v: np.ndarray, code: np.ndarray, qmin: int, top: int) -> np.ndarray:
    return (code >= qmin) & (code <= top)


STE = Exercise(
    id="13.1",
    title="Straight through",
    function="gradient_through",
    points=1,
    cases=_ste_cases,
    reference=_passing(_inside),
    mistakes=(
        Mistake(
            "the gradient of rounding is left at zero",
            _passing(lambda v, code, qmin, top: False),
            "The true slope of rounding is 0 and teaches nothing: which slope has the line through the stairs?",
        ),
        Mistake(
            "the gradient passes beyond the ends as well",
            _passing(lambda v, code, qmin, top: True),
            "Far beyond the last mark x may move as it likes: does what comes out move with it?",
        ),
        Mistake(
            "nothing passes at the ends themselves",
            _passing(lambda v, code, qmin, top: (code > qmin) & (code < top)),
            "With an amax scale the largest weight has the code qmax. Is it clipped? May it never move again?",
        ),
        Mistake(
            "x is held against the ends, not its code",
            _passing(lambda v, code, qmin, top: (v >= qmin) & (v <= top)),
            "At 4 bits 7.4 steps round to the code 7: is that code on the grid?",
        ),
        *(
            Mistake(
                "the scale is left in the gradient",
                _passing(_inside, times),
                "x is divided by the scale on the way in: what happens to the code on the way out?",
            )
            for times in (lambda scale: scale, lambda scale: 1 / scale)
        ),
    ),
)


# 13.2 -------------------------------------------------------------------------------------------------------------


def _lsq_case(generator: Generator, bits: int) -> tuple[Tensor, float, int, Tensor]:
    """Five values inside, two beyond the upper end, one beyond the lower."""
    qmin, top = _ends(bits)
    inside = uniform(generator, qmin + 0.05, top - 0.05, 5)
    beyond = torch.tensor([top, top, qmin]) + torch.tensor([1, 1, -1]) * uniform(
        generator, 0.6, 3.0, 3
    )
    scale = pick(generator, 0.1, 0.4, 1.5)
    return torch.cat([inside, beyond]) * scale, scale, bits, uniform(generator, -2.0, 2.0, 8)


def _far_from_ties(args: tuple) -> bool:
    v = f64(args[0]) / args[1]
    return bool((np.abs(v - np.floor(v) - 0.5) > 0.05).all())


def _large(args: tuple) -> bool:
    """Whether no answer in the bank is near 0, where float32 has no digits left of a sum that cancels."""
    return all(abs(answer[0]) > 0.3 for _, answer in found(LSQ, args))


def _lsq_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (torch.tensor([0.6, 1.4, 30.0]), 1.0, 4, torch.tensor([1.0, 1.0, 1.0])),
        (torch.tensor([0.9, -0.2, -3.0]), 0.5, 2, torch.tensor([2.0, -1.0, 1.5])),
    ]
    drawn = [
        _until(
            partial(_lsq_case, generator, bits),
            lambda args: (
                _far_from_ties(args) and _large(args) and telling(LSQ, args, apart=0.1, pairs=False)
            ),
        )
        for bits in (2, 3, 4)
    ]
    return make_cases(by_hand, drawn)


def _pulling(
    inside: Callable[..., Any],
    beyond: Callable[..., Any] = lambda v, end: end,
    together: Callable[[np.ndarray], float] = np.sum,
) -> Callable[..., float]:
    """All pulls at the scale together; each is grad times a slope, one inside the ends and one beyond."""

    def gradient(x: Any, scale: float, bits: int, grad: Any) -> float:
        v, (qmin, top) = f64(x) / scale, _ends(bits)
        slopes = np.where(
            (v >= qmin) & (v <= top), inside(v, np.rint(v)), beyond(v, v.clip(qmin, top))
        )
        return together(f64(grad) * slopes)

    return gradient


def _rounding(v: np.ndarray, code: np.ndarray) -> np.ndarray:
    return code - v


LSQ = Exercise(
    id="13.2",
    title="The slope of a scale",
    function="scale_gradient",
    points=3,
    cases=_lsq_cases,
    reference=_pulling(_rounding),
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "the codes alone",
            _pulling(lambda v, code: code),
            "s stands twice in s round(x / s): what does the product rule add to round(v)?",
        ),
        Mistake(
            "what is clipped does not pull",
            _pulling(_rounding, lambda v, end: 0),
            "Beyond the end x_hat is qmax times s: does it not change when s does?",
        ),
        *(
            Mistake(
                "beyond the ends as inside",
                _pulling(_rounding, beyond),
                "Where x is clipped, x_hat = s qmax. Does x stand in that? Which slope has it by s?",
            )
            for beyond in (lambda v, end: end - v, lambda v, end: np.rint(v) - v)
        ),
        Mistake(
            "the sign of what is inside",
            _pulling(lambda v, code: v - code),
            "A value of 0.6 steps has the code 1. If s grows a little, does 1 times s grow or shrink?",
        ),
        Mistake(
            "the mean for the sum",
            _pulling(_rounding, together=np.mean),
            "Each value pulls at the one scale. By the chain rule, are pulls added or averaged?",
        ),
    ),
)


# 13.3 -------------------------------------------------------------------------------------------------------------


def _step_cases(generator: Generator) -> list[Case]:
    by_hand = [(torch.tensor([0.1, 0.5]), torch.tensor([3.0, -2.0]), 0.05)]
    drawn = [
        _until(
            lambda: (
                uniform(generator, 0.05, 0.6, 4),
                uniform(generator, -4, 4, 4),
                pick(generator, 0.1, 0.3),
            ),
            lambda args: (args[0] < args[2] * args[1]).any() and telling(STEP, args, apart=0.01),
        )
        for _ in range(3)
    ]
    return make_cases(by_hand, drawn)


STEP = Exercise(
    id="13.3",
    title="A scale stays above 0",
    function="step_scale",
    points=1,
    cases=_step_cases,
    reference=lambda scale, grad, rate: f64(scale) * np.exp(-rate * f64(scale) * f64(grad)),
    mistakes=(
        Mistake(
            "a step on the scale, not on its logarithm",
            lambda scale, grad, rate: f64(scale) - rate * f64(grad),
            "What becomes of a scale of 0.1, a slope of 3 and a rate of 0.05? What is it that is learned?",
        ),
        Mistake(
            "the slope by s for the slope by log s",
            lambda scale, grad, rate: f64(scale) * np.exp(-rate * f64(grad)),
            "s = exp(t): what is d s / d t, and so the slope of the loss by t?",
        ),
        Mistake(
            "divided by s where it should be multiplied",
            lambda scale, grad, rate: f64(scale) * np.exp(-rate * f64(grad) / f64(scale)),
            "d log s / d s is 1 / s; here the loss changes with log s. Which way round does the chain go?",
        ),
        Mistake(
            "uphill",
            lambda scale, grad, rate: f64(scale) * np.exp(rate * f64(scale) * f64(grad)),
            "A positive slope says that a larger scale makes the loss larger: where should it go?",
        ),
        Mistake(
            "the logarithm is returned",
            lambda scale, grad, rate: np.log(f64(scale)) - rate * f64(scale) * f64(grad),
            "The quantizer divides by the scale: what have you got, and what is asked for?",
        ),
    ),
)


# 13.4 -------------------------------------------------------------------------------------------------------------


def _clear(args: tuple) -> bool:
    """Whether no magnitude is near where a code changes, for any of the scales and cuts that are in the bank.

    Nor is the mean of w near 0, where float32 has few digits left of it.
    """
    magnitude = np.abs(f64(args[0]))
    scales = (magnitude.mean(), magnitude.max(), abs(f64(args[0]).mean()))
    if scales[2] < 0.02:
        return False
    edges = np.array([half * scale for scale in scales for half in (0.5, 1.0, 1.5, 2.5, 3.5)])
    return bool(
        (np.abs(magnitude.reshape(-1, 1) - edges) > 1e-3)[magnitude.ravel() < magnitude.max()].all()
    )


def _weights(generator: Generator, shape: tuple[int, ...]) -> tuple[Tensor]:
    return (0.3 * torch.randn(shape, generator=generator),)


def _ternary_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (torch.tensor([0.9, -0.2, 0.1, -1.2]),),
        (torch.tensor([[0.5, -0.2], [0.01, -0.35]]),),
    ]
    drawn = [
        _until(
            partial(_weights, generator, shape),
            lambda args: _clear(args) and telling(TERNARY, args, apart=0.01),
        )
        for shape in ((3, 4), (16,), (2, 12))
    ]
    return make_cases(by_hand, drawn)


def _cut(w: Any, scale: float, edge: float) -> tuple[np.ndarray, float]:
    """The signs of what is beyond an edge, and the scale."""
    return np.sign(f64(w)) * (np.abs(f64(w)) > edge), scale


def _absmean(w: Any) -> float:
    return np.abs(f64(w)).mean()


def _by_signed_mean(w: Any) -> tuple[np.ndarray, float]:
    scale = f64(w).mean()
    return np.rint(f64(w) / scale).clip(-1, 1), scale


TERNARY = Exercise(
    id="13.4",
    title="Three levels",
    function="ternary",
    points=2,
    cases=_ternary_cases,
    reference=lambda w: _cut(w, _absmean(w), _absmean(w) / 2),
    mistakes=(
        Mistake(
            "the largest magnitude for the mean",
            lambda w: _cut(w, np.abs(f64(w)).max(), np.abs(f64(w)).max() / 2),
            "With amax most weights round to 0. Which scale has BitNet?",
        ),
        Mistake(
            "the mean of w, not of |w|",
            _by_signed_mean,
            "Weights are as often negative as positive: how large is their mean?",
        ),
        Mistake(
            "cut at the scale, not at half of it",
            lambda w: _cut(w, _absmean(w), _absmean(w)),
            "0.6 of a scale: is it nearer to 0 or to 1?",
        ),
        Mistake(
            "the codes are not saturated",
            lambda w: (np.rint(f64(w) / _absmean(w)), _absmean(w)),
            "A weight of twice the mean rounds to 2: is that one of the three levels?",
        ),
        Mistake(
            "two levels",
            lambda w: _cut(w, _absmean(w), 0),
            "Which weights get the code 0?",
        ),
    ),
)


# 13.5 -------------------------------------------------------------------------------------------------------------


def _trits_cases(generator: Generator) -> list[Case]:
    by_hand = [[1, 0, -1, 1, 1], [1, 0, -1, 1, 1, -1], [1, 1]]
    drawn = [whole(generator, -1, 1, length).tolist() for length in (10, 13, 24)]
    ends = [
        [*codes[:-2], 1, 0] for codes in drawn
    ]  # whoever turns or drops the last byte is found out
    return make_cases(by_hand, ends, torch.int8)


def _in_base(digits: np.ndarray, powers: tuple[int, ...], fill: int = 0) -> np.ndarray:
    missing = -len(digits) % len(powers)
    padded = np.pad(digits, (0, missing), constant_values=fill).reshape(-1, len(powers))
    return (padded @ np.array(powers) % 256).astype(np.uint8)


def _digits(codes: Any) -> np.ndarray:
    return np.asarray(codes).astype(np.int64) + 1


THREES = (1, 3, 9, 27, 81)

TRITS = Exercise(
    id="13.5",
    title="Five to a byte",
    function="pack_trits",
    points=2,
    cases=_trits_cases,
    reference=lambda codes: _in_base(_digits(codes), THREES),
    mistakes=(
        Mistake(
            "the first digit is the highest",
            lambda codes: _in_base(_digits(codes), THREES[::-1]),
            "In a byte of the course the first code is the lowest digit: by which power of 3 is it multiplied?",
        ),
        Mistake(
            "the codes are not shifted",
            lambda codes: _in_base(_digits(codes) - 1, THREES),
            "The digits of a number in base 3 are 0, 1 and 2: which code is which?",
        ),
        Mistake(
            "two bits a code",
            lambda codes: _in_base(_digits(codes), (1, 4, 16, 64)),
            "How many codes are in a byte of yours? How many values of the byte are never used?",
        ),
        Mistake(
            "the rest is dropped",
            lambda codes: _in_base(_digits(codes)[: len(codes) // 5 * 5], THREES),
            "Six codes, five to a byte: how many bytes does it take to keep all six?",
        ),
        Mistake(
            "the last byte is filled up with zeros",
            lambda codes: _in_base(_digits(codes), THREES, fill=1),
            "What is missing in the last byte counts as the digit 0: which code is that?",
        ),
    ),
)


SHEET = Sheet("13", "Quantization-aware training", (STE, LSQ, STEP, TERNARY, TRITS))
