"""Sheet 05, calibration: cases, references, tolerances, points and known mistakes.

In 05.3 the error of the best clip is at least a hundredth below that of the second best, so float32
and float64 choose the same clip. A tie in the rounding gives the same error either way. In 05.2
most ranks lie between two values, because the exercise says what to do there.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, qmax, uniform, until_told, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet


def _batches(*batches: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(batch) for batch in batches)


# 05.1 ---------------------------------------------------------------------------------------------


def _range_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Both signs, all positive, all negative. The extremes lie in different batches.
        (_batches([0.2, -0.7], [1.4, 0.1], [0.5, -0.3]),),
        (_batches([2.0, 3.0], [1.5, 4.0], [2.5, 2.75]),),
        (_batches([-5.0, -3.0], [-4.0, -2.0], [-4.5, -3.5]),),
    ]

    # All negative, both signs, all positive; batches of any shape.
    drawn: list[tuple[tuple[Tensor, ...]]] = []
    for center in (-3, 0, 3):
        batches = []
        for shape in ((3, 4), (5,), (2, 1, 3), (1, 2)):
            values = uniform(generator, -1, 1, *shape)
            width = float(uniform(generator, 0.5, 2))
            batches.append(values * width + center)
        drawn.append((tuple(batches),))

    # A single batch.
    drawn.append(((uniform(generator, -2, 1, 2, 3),),))
    return make_cases(by_hand, drawn)


def _extremes(batches: Sequence[Any]) -> np.ndarray:
    """Return the smallest and the largest value of each batch, (batches, 2)."""
    return np.array([(f64(batch).min(), f64(batch).max()) for batch in batches])


def _range_from(ends: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest of ends (batches, 2)."""
    return ends[:, 0].min(), ends[:, 1].max()


def _running_range(batches: Sequence[Any]) -> tuple[float, float]:
    return _range_from(_extremes(batches))


# Known mistakes.


def _range_of_last(batches: Sequence[Any]) -> tuple[float, float]:
    return _range_from(_extremes(batches[-1:]))


def _range_averaged(batches: Sequence[Any]) -> tuple[float, float]:
    low, high = _extremes(batches).mean(axis=0)
    return low, high


def _range_from_zero(batches: Sequence[Any]) -> tuple[float, float]:
    start = np.zeros((1, 2))
    return _range_from(np.vstack([start, _extremes(batches)]))


def _largest_magnitude(batches: Sequence[Any]) -> tuple[float, float]:
    amax = np.abs(_extremes(batches)).max()
    return -amax, amax


RANGE = Exercise(
    id="05.1",
    title="The range of all batches",
    function="running_range",
    points=1,
    cases=_range_cases,
    reference=_running_range,
    mistakes=(
        Mistake(
            "the last batch only",
            _range_of_last,
            "What happened to the range of the earlier batches? A new batch may widen the range,"
            " never narrow it.",
        ),
        Mistake(
            "the average of the batches' extremes",
            _range_averaged,
            "One batch holds the largest value of all: is that value inside your range?",
        ),
        Mistake(
            "starts from 0",
            _range_from_zero,
            "If every value is positive, did 0 ever occur? Which start does any batch replace?",
        ),
        Mistake(
            "the largest magnitude on both sides",
            _largest_magnitude,
            "That is the range of a symmetric grid. Here low and high are independent.",
        ),
    ),
)


# 05.2 ---------------------------------------------------------------------------------------------


def _percentile_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Ten regular values and an outlier; the rank is a whole number.
        ([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0, 8.0], 90.0),
        # The rank lies between two values.
        ([-4.0, 1.0, 3.0, -2.0], 50.0),
        ([[-3.0, -1.0], [2.0, -5.0]], 75.0),
    ]
    drawn = []
    for percent in (90.0, 95.0, 99.0, 100.0):
        drawn.append((torch.randn(5, 8, generator=generator) - 0.5, percent))

    # A single value is every percentile.
    drawn.append((uniform(generator, -3, -1, 1), 70.0))
    return make_cases(by_hand, drawn)


def _percentile_clip(x: Any, percent: float) -> float:
    return np.percentile(np.abs(f64(x)), percent)


# Known mistakes.


def _percentile_signed(x: Any, percent: float) -> float:
    return np.percentile(f64(x), percent)


def _percentile_of_fraction(x: Any, percent: float) -> float:
    return np.percentile(np.abs(f64(x)), percent / 100)


def _percentile_of_two_tails(x: Any, percent: float) -> float:
    return np.percentile(np.abs(f64(x)), 50 + percent / 2)


def _share_of_amax(x: Any, percent: float) -> float:
    return percent / 100 * np.abs(f64(x)).max()


def _at_rank(
    rounding: Callable[[float], float], *, missing: int = 0, back: int = 0
) -> Callable[..., float]:
    """Return the magnitude at the whole rank rounding(share * (n - missing)) - back."""

    def percentile(x: Any, percent: float) -> float:
        # The k-th smallest magnitude, without interpolation.
        magnitudes = np.sort(np.abs(f64(x)), axis=None)
        share = percent / 100
        place = int(rounding(share * (magnitudes.size - missing)) - back)
        return magnitudes[min(place, magnitudes.size - 1)]

    return percentile


_AT_A_WHOLE_RANK = variants(
    "a whole rank where the percentile lies between two",
    "Four values have ranks 0 to 3, and half of that is 1.5: what lies between ranks 1 and 2?",
    # Shares of the last rank, n - 1, then shares of n.
    _at_rank(np.floor, missing=1),
    _at_rank(np.ceil, missing=1),
    _at_rank(np.rint, missing=1),
    _at_rank(np.floor),
    _at_rank(np.floor, back=1),
    _at_rank(np.ceil, back=1),
)

PERCENTILE = Exercise(
    id="05.2",
    title="A clip by percentile",
    function="percentile_clip",
    points=2,
    cases=_percentile_cases,
    reference=_percentile_clip,
    tolerance=1e-4,  # in float32 even the rank is slightly off
    mistakes=(
        Mistake(
            "the percentile of x, not of |x|",
            _percentile_signed,
            "A clip acts at both ends: how does the farthest negative value affect yours?",
        ),
        Mistake(
            "a fraction where percent are wanted",
            _percentile_of_fraction,
            "torch.quantile wants 0.99 and numpy.percentile wants 99: which do you call, and with"
            " what?",
        ),
        Mistake(
            "the tail halved as if |x| had two",
            _percentile_of_two_tails,
            "|x| folds both tails onto one end: how much of it is clipped, if 90 percent are kept?",
        ),
        Mistake(
            "a share of the largest magnitude",
            _share_of_amax,
            "Keep 90 percent of the VALUES: should the clip move if only the outlier grows?",
        ),
        *_AT_A_WHOLE_RANK,
    ),
)


# 05.3 ---------------------------------------------------------------------------------------------

SHARES = 0.2, 0.4, 0.6, 0.8, 1.0  # of amax: the candidates of the drawn cases
MARGIN = 1.01  # the least ratio of the second best error to the best
Clips = tuple[float, ...]

# Searches that do not look at all candidates, and where they end.


def _first_dip(errors: Sequence[float]) -> int:
    """Go on from the first candidate while the errors fall."""
    falls = [after < before for before, after in pairwise(errors)]
    return falls.index(False) if False in falls else len(falls)


def _last_dip(errors: Sequence[float]) -> int:
    """Go back from the last candidate while the errors fall."""
    return len(errors) - 1 - _first_dip(errors[::-1])


def _dip_by_halves(errors: Sequence[float]) -> int:
    """Go on in the half of the candidates in which the errors fall."""
    low = 0
    high = len(errors) - 1
    while low < high:
        middle = (low + high) // 2
        if errors[middle] < errors[middle + 1]:
            high = middle
        else:
            low = middle + 1
    return low


def _two_dips_case(generator: Generator, misled: int) -> tuple[Tensor, Clips, int]:
    """Draw values at three magnitudes, so that several clips are better than their neighbors.

    The clips come in no order and one is best by a margin. A search that stops at a dip misses it.
    So does one that first sorts the clips and starts at the smallest (misled=0) or the largest (1).
    """
    while True:
        # Each value is near one of three magnitudes.
        sizes = uniform(generator, 0.15, 1.0, 3)
        signs = 2 * whole(generator, 0, 1, 24) - 1
        chosen = sizes[whole(generator, 0, 2, 24)]
        x = chosen * signs * uniform(generator, 0.95, 1.05, 24)
        clips = _candidates(x, np.linspace(0.1, 1, 8).tolist())
        errors = [_mean_square(x, clip, 2) for clip in clips]
        order = torch.randperm(8, generator=generator).tolist()
        if _misleads(errors, order, misled):
            return x, tuple(clips[i] for i in order), 2


def _misleads(errors: list[float], order: list[int], misled: int) -> bool:
    best, second = sorted(errors)[:2]
    shuffled = [errors[i] for i in order]
    searches = (_first_dip, _last_dip, _dip_by_halves)
    shuffled_misses = all(shuffled[search(shuffled)] > best for search in searches)

    # Of the searches in sorted clips, the one by halves has to miss only if misled is 0.
    must_miss = (_first_dip, _dip_by_halves) if misled == 0 else (_last_dip,)
    sorted_misses = all(errors[search(errors)] > best for search in must_miss)
    return bool(second > MARGIN * best and sorted_misses and shuffled_misses)


def _candidates(x: Tensor, shares: Sequence[float]) -> Clips:
    """Return clips that are these shares of amax, to three decimals."""
    amax = x.abs().max().item()
    return tuple(round(share * amax, 3) for share in shares)


def _clip_case(generator: Generator, bits: int) -> tuple[Tensor, Clips, int]:
    """Draw activations with an outlier until one clip is best by a margin."""
    while True:
        x = torch.randn(6, 8, generator=generator)
        x[2, 5] = uniform(generator, -8, 8)
        clips = _candidates(x, SHARES)
        best, second = sorted(_mean_square(x, clip, bits) for clip in clips)[:2]
        if second > MARGIN * best:
            return x, clips, bits


def _clip_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # The best clip lies between the others.
        ([0.4, -0.5, 0.6, 0.5, 1.0], (0.25, 0.5, 1.0), 2),
        # The lowest code reaches further than the clip.
        ([0.93, -1.18, 0.62, -1.21, 0.28], (0.45, 0.9, 1.2), 3),
        # Clipping does not pay, without an outlier and with one.
        ([1.0, -3.0, 2.0, -2.9, 0.1], (3.0, 2.0, 1.0), 3),
        ([-0.7, 0.6, -0.5, 0.4, -9.0], (0.6, 2.0, 9.0), 4),
    ]

    def draw() -> list[tuple[Any, ...]]:
        with_outlier = [_clip_case(generator, bits) for bits in (2, 3, 4, 6)]
        return with_outlier + [_two_dips_case(generator, misled) for misled in (0, 1)]

    return make_cases(by_hand, until_told(CLIP, draw))


def _x_hat(x: Any, clip: float, bits: int, *, below: float = 1, above: float = 0) -> np.ndarray:
    """Quantize x with scale = clip / qmax and codes from -qmax - below to qmax + above."""
    scale = clip / qmax(bits)
    steps = np.rint(f64(x) / scale)

    # qmax stands for the clip, so the right lowest value is one step below -clip.
    return scale * np.clip(steps, -qmax(bits) - below, qmax(bits) + above)


# The errors by which people choose.


def _mean_square(x: Any, clip: float, bits: int, **codes: float) -> float:
    return np.square(f64(x) - _x_hat(x, clip, bits, **codes)).mean()


# The right error is the mean square; these are known mistakes.


def _mean_square_unsaturated(x: Any, clip: float, bits: int) -> float:
    return _mean_square(x, clip, bits, below=np.inf, above=np.inf)


def _mean_square_narrow(x: Any, clip: float, bits: int) -> float:
    return _mean_square(x, clip, bits, below=0)


def _mean_square_inside(x: Any, clip: float, bits: int) -> float:
    """Clip x first, and forget what it was."""
    return _mean_square(np.clip(f64(x), -clip, clip), clip, bits)


def _mean_square_to_clipped(x: Any, clip: float, bits: int) -> float:
    clipped = np.clip(f64(x), -clip, clip)
    return np.square(clipped - _x_hat(x, clip, bits)).mean()


def _mean_square_in_steps(x: Any, clip: float, bits: int) -> float:
    scale = clip / qmax(bits)
    return _mean_square(x, clip, bits) / scale**2


def _mean_magnitude(x: Any, clip: float, bits: int) -> float:
    return np.abs(f64(x) - _x_hat(x, clip, bits)).mean()


def _best_by(error: Callable[..., float]) -> Callable[..., tuple[float, float]]:
    """Return a search for the clip with the smallest error, and that error."""

    def best(x: Any, clips: Sequence[float], bits: int) -> tuple[float, float]:
        errors = [error(x, clip, bits) for clip in clips]
        return clips[int(np.argmin(errors))], min(errors)

    return best


CLIP = Exercise(
    id="05.3",
    title="The clip with the least squared error",
    function="best_clip",
    points=3,
    cases=_clip_cases,
    reference=_best_by(_mean_square),
    tolerance=1e-3,  # a small error is the difference of two large numbers in float32
    mistakes=(
        Mistake(
            "the codes are not saturated",
            _best_by(_mean_square_unsaturated),
            "A grid without ends gets better with every smaller clip. Which codes exist, and what"
            " happens to values beyond them?",
        ),
        *variants(
            "compared with the clipped x, not with x",
            "Clipping causes an error too, and often a large one. What was x before?",
            _best_by(_mean_square_inside),
            _best_by(_mean_square_to_clipped),
        ),
        Mistake(
            "the error is counted in steps",
            _best_by(_mean_square_in_steps),
            "Half a step of a wide grid is a large error, and half a step of a fine grid a small"
            " one. In which units can you compare them?",
        ),
        Mistake(
            "the lowest code is never used",
            _best_by(_mean_square_narrow),
            "Clamp the codes, not x: as in 01.2, there is one more code below -clip. Which one?",
        ),
        Mistake(
            "the magnitude of the error, not its square",
            _best_by(_mean_magnitude),
            "Squares make one large error weigh more than many small ones: did you square before"
            " the mean?",
        ),
    ),
)


# 05.4 ---------------------------------------------------------------------------------------------


def _average_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Two batches, then three.
        (_batches([1.0, -2.0], [4.0, 0.5]), 0.9),
        (_batches([-8.0, 1.0], [2.0, -4.0], [0.5, -0.25]), 0.75),
        # A momentum of 0 keeps only the last batch.
        (_batches([3.0, 1.0], [-5.0, 2.0]), 0.0),
    ]
    drawn = []
    for momentum in (0.6, 0.95, 0.8):
        batches = tuple(uniform(generator, -3, 2, tokens, 3) for tokens in (2, 4, 1, 3))
        drawn.append((batches, momentum))
    return make_cases(by_hand, drawn)


def _amaxes(batches: Sequence[Any]) -> list[float]:
    return [np.abs(f64(batch)).max() for batch in batches]


def _averaged(values: Sequence[float], momentum: float) -> float:
    """Return the moving average as one weighted sum.

    The first of n values weighs momentum^(n - 1), and value i (1 - momentum) momentum^(n - 1 - i).
    """
    ages = np.arange(len(values) - 1, -1, -1.0)
    weights = momentum**ages
    weights[1:] *= 1 - momentum
    return weights @ np.array(values)


def _moving_amax(batches: Sequence[Any], momentum: float) -> float:
    return _averaged(_amaxes(batches), momentum)


# Known mistakes.


def _momentum_turned(batches: Sequence[Any], momentum: float) -> float:
    return _averaged(_amaxes(batches), 1 - momentum)


def _average_from_zero(batches: Sequence[Any], momentum: float) -> float:
    return _averaged([0.0, *_amaxes(batches)], momentum)


def _plain_mean(batches: Sequence[Any], momentum: float) -> np.floating:
    return np.mean(_amaxes(batches))


def _average_of_largest_values(batches: Sequence[Any], momentum: float) -> float:
    return _averaged([f64(batch).max() for batch in batches], momentum)


AVERAGE = Exercise(
    id="05.4",
    title="A moving average of the maxima",
    function="moving_amax",
    points=2,
    cases=_average_cases,
    reference=_moving_amax,
    mistakes=(
        Mistake(
            "the momentum the wrong way round",
            _momentum_turned,
            "At a momentum of 0.99, how much of the old average should one new batch leave?",
        ),
        Mistake(
            "starts from 0",
            _average_from_zero,
            "The first batch has an amax of 2: what is the average of all batches so far? It is not"
            " 0.2.",
        ),
        Mistake(
            "every batch weighs the same",
            _plain_mean,
            "The plain mean ignores the momentum: what should a momentum of 0 forget?",
        ),
        Mistake(
            "the largest value, not the largest magnitude",
            _average_of_largest_values,
            "What is amax of a batch whose farthest value from 0 is negative?",
        ),
    ),
)


SHEET = Sheet("05", "Calibration", (RANGE, PERCENTILE, CLIP, AVERAGE))
