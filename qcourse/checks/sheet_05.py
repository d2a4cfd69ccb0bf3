"""Sheet 05, calibration: cases, references, tolerances, points and known mistakes.

The cases of 05.3 have a best clip whose error lies at least a hundredth below that of the next, so float32 and float64
choose alike; a tie in the rounding leaves an error as it is, whichever way it falls. In 05.2 most ranks lie between
two values, for the card says what to do there.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, qmax, uniform, until_told, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet


def _batches(*batches: Any) -> tuple[Tensor, ...]:
    return tuple(torch.as_tensor(batch) for batch in batches)


# 05.1 -------------------------------------------------------------------------------------------------------------


def _range_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([0.2, -0.7], [1.4, 0.1], [0.5, -0.3]),
        ([2.0, 3.0], [1.5, 4.0], [2.5, 2.75]),
        ([-5.0, -3.0], [-4.0, -2.0], [-4.5, -3.5]),
    ]
    shapes = ((3, 4), (5,), (2, 1, 3), (1, 2))
    drawn = [
        [
            uniform(generator, -1, 1, *shape) * float(uniform(generator, 0.5, 2)) + centre
            for shape in shapes
        ]
        for centre in (-3, 0, 3)  # all negative, both, all positive
    ]
    drawn.append([uniform(generator, -2, 1, 2, 3)])
    return make_cases(
        ((_batches(*batches),) for batches in by_hand), ((_batches(*batches),) for batches in drawn)
    )


def _extremes(batches: Sequence[Any]) -> np.ndarray:
    """The extremes of each batch, (batches, 2)."""
    return np.array([(f64(batch).min(), f64(batch).max()) for batch in batches])


def _range_from(ends: np.ndarray) -> tuple[float, float]:
    """The least and the largest of ends (batches, 2)."""
    return ends[:, 0].min(), ends[:, 1].max()


def _largest_magnitude(batches: Sequence[Any]) -> tuple[float, float]:
    amax = np.abs(_extremes(batches)).max()
    return -amax, amax


RANGE = Exercise(
    id="05.1",
    title="The range of all batches",
    function="running_range",
    points=1,
    cases=_range_cases,
    reference=lambda batches: _range_from(_extremes(batches)),
    mistakes=(
        Mistake(
            "the last batch only",
            lambda batches: _range_from(_extremes(batches[-1:])),
            "What has become of the range of the batches before? A new batch may widen it, never narrow it.",
        ),
        Mistake(
            "the average of the batches' extremes",
            lambda batches: tuple(_extremes(batches).mean(axis=0)),
            "The largest value of all lies in one batch: is it inside your range?",
        ),
        Mistake(
            "starts from 0",
            lambda batches: _range_from(np.vstack([np.zeros((1, 2)), _extremes(batches)])),
            "If every value is positive, was 0 ever seen? What could a range start from that any batch replaces?",
        ),
        Mistake(
            "the largest magnitude on both sides",
            _largest_magnitude,
            "That is the range of a symmetric grid; here low and high go their own ways.",
        ),
    ),
)


# 05.2 -------------------------------------------------------------------------------------------------------------


def _percentile_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0, 8.0], 90.0),
        ([-4.0, 1.0, 3.0, -2.0], 50.0),
        ([[-3.0, -1.0], [2.0, -5.0]], 75.0),
    ]
    drawn = [
        (torch.randn(5, 8, generator=generator) - 0.5, percent)
        for percent in (90.0, 95.0, 99.0, 100.0)
    ]
    drawn.append((uniform(generator, -3, -1, 1), 70.0))  # a single value is every percentile
    return make_cases(by_hand, drawn)


def _at_rank(rank: Callable[[int, float], float]) -> Callable[..., float]:
    """The magnitude at a whole rank, which is a function of how many there are and of the share to keep."""

    def percentile(x: Any, percent: float) -> float:
        magnitudes = np.sort(np.abs(f64(x)), axis=None)
        return magnitudes[min(int(rank(magnitudes.size, percent / 100)), magnitudes.size - 1)]

    return percentile


PERCENTILE = Exercise(
    id="05.2",
    title="A clip by percentile",
    function="percentile_clip",
    points=2,
    cases=_percentile_cases,
    reference=lambda x, percent: np.percentile(np.abs(f64(x)), percent),
    tolerance=1e-4,  # float32 puts the rank itself off by a little
    mistakes=(
        Mistake(
            "the percentile of x, not of |x|",
            lambda x, percent: np.percentile(f64(x), percent),
            "A clip cuts at both ends: what has the farthest negative value to say in yours?",
        ),
        Mistake(
            "a fraction where percent are wanted",
            lambda x, percent: np.percentile(np.abs(f64(x)), percent / 100),
            "torch.quantile wants 0.99 and numpy.percentile wants 99: which do you call, and with what?",
        ),
        Mistake(
            "the tail halved as if |x| had two",
            lambda x, percent: np.percentile(np.abs(f64(x)), 50 + percent / 2),
            "Folded to |x|, both tails lie at one end: how much of it goes, when 90 percent are kept?",
        ),
        Mistake(
            "a share of the largest magnitude",
            lambda x, percent: percent / 100 * np.abs(f64(x)).max(),
            "Keep 90 percent of the VALUES: should the clip move when only the outlier grows?",
        ),
        *(
            Mistake(
                "a whole rank where the percentile lies between two",
                _at_rank(rank),
                "Four values have ranks 0 to 3, and half of that is 1.5: what lies between ranks 1 and 2?",
            )
            for rank in (
                lambda n, share: np.floor(share * (n - 1)),
                lambda n, share: np.ceil(share * (n - 1)),
                lambda n, share: np.rint(share * (n - 1)),
                lambda n, share: np.floor(share * n),
                lambda n, share: np.floor(share * n) - 1,
                lambda n, share: np.ceil(share * n) - 1,
            )
        ),
    ),
)


# 05.3 -------------------------------------------------------------------------------------------------------------

SHARES = 0.2, 0.4, 0.6, 0.8, 1.0  # of amax: the candidates of the drawn cases
MARGIN = 1.01  # of the errors of the second best and the best


def _dip(errors: Sequence[float]) -> int:
    """Where a search ends that goes on only while the errors fall."""
    falls = [after < before for before, after in pairwise(errors)]
    return falls.index(False) if False in falls else len(falls)


def _half(errors: Sequence[float]) -> int:
    """Where a search ends that goes on in the half in which the errors fall."""
    low, high = 0, len(errors) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if errors[middle] < errors[middle + 1] else (middle + 1, high)
    return low


def _dips(errors: Sequence[float]) -> tuple[int, int, int]:
    """Where searches end that do not look at all candidates: from the first, from the last, and in halves."""
    return _dip(errors), len(errors) - 1 - _dip(errors[::-1]), _half(errors)


def _two_dips_case(generator: Generator, misled: int) -> tuple[Tensor, tuple[float, ...], int]:
    """Values at three magnitudes: several clips are better than their neighbours. One is the best by a margin.

    The clips come in no order. A search that stops at a dip misses the best one; so does one that sorts them first, for
    one of the directions: the smallest first (0) or the largest first (1).
    """
    while True:
        sizes = uniform(generator, 0.15, 1.0, 3)
        signs = 2 * whole(generator, 0, 1, 24) - 1
        x = sizes[whole(generator, 0, 2, 24)] * signs * uniform(generator, 0.95, 1.05, 24)
        clips = [
            round(share * x.abs().max().item(), 3) for share in np.linspace(0.1, 1, 8).tolist()
        ]
        errors = [_mean_square(x, clip, 2) for clip in clips]
        order = torch.randperm(8, generator=generator).tolist()
        shuffled = [errors[i] for i in order]
        best, second = sorted(errors)[:2]
        in_order = _dips(errors)
        sorted_misses = errors[in_order[misled]] > best and (
            misled == 1 or errors[in_order[2]] > best
        )
        if (
            second > MARGIN * best
            and sorted_misses
            and all(shuffled[i] > best for i in _dips(shuffled))
        ):
            return x, tuple(clips[i] for i in order), 2


def _clip_case(generator: Generator, bits: int) -> tuple[Tensor, tuple[float, ...], int]:
    """Activations with an outlier, drawn until one clip is the best by a margin."""
    while True:
        x = torch.randn(6, 8, generator=generator)
        x[2, 5] = uniform(generator, -8, 8)
        clips = tuple(round(share * x.abs().max().item(), 3) for share in SHARES)
        best, second = sorted(_mean_square(x, clip, bits) for clip in clips)[:2]
        if second > MARGIN * best:
            return x, clips, bits


def _clip_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([0.4, -0.5, 0.6, 0.5, 1.0], (0.25, 0.5, 1.0), 2),
        (
            [0.93, -1.18, 0.62, -1.21, 0.28],
            (0.45, 0.9, 1.2),
            3,
        ),  # the lowest code reaches further than the clip
        ([1.0, -3.0, 2.0, -2.9, 0.1], (3.0, 2.0, 1.0), 3),  # nothing is worth clipping
        ([-0.7, 0.6, -0.5, 0.4, -9.0], (0.6, 2.0, 9.0), 4),  # nor here, outlier or not
    ]

    def draw() -> list[tuple[Any, ...]]:
        near_the_end = [_clip_case(generator, bits) for bits in (2, 3, 4, 6)]
        return near_the_end + [_two_dips_case(generator, misled) for misled in (0, 1)]

    return make_cases(by_hand, until_told(CLIP, draw))


def _x_hat(x: Any, clip: float, bits: int, *, below: float = 1, above: float = 0) -> np.ndarray:
    """x on the grid whose code qmax stands for the clip, with so many codes more below -qmax and above qmax."""
    scale = clip / qmax(bits)
    return scale * np.clip(np.rint(f64(x) / scale), -qmax(bits) - below, qmax(bits) + above)


def _mean_square(x: Any, clip: float, bits: int, **codes: float) -> float:
    return np.square(f64(x) - _x_hat(x, clip, bits, **codes)).mean()


def _mean_square_unsaturated(x: Any, clip: float, bits: int) -> float:
    return _mean_square(x, clip, bits, below=np.inf, above=np.inf)


def _mean_square_narrow(x: Any, clip: float, bits: int) -> float:
    return _mean_square(x, clip, bits, below=0)


def _mean_square_inside(x: Any, clip: float, bits: int) -> float:
    """x is clipped at once, and nobody remembers what it was."""
    return _mean_square(np.clip(f64(x), -clip, clip), clip, bits)


def _mean_square_to_clipped(x: Any, clip: float, bits: int) -> float:
    return np.square(np.clip(f64(x), -clip, clip) - _x_hat(x, clip, bits)).mean()


def _mean_square_in_steps(x: Any, clip: float, bits: int) -> float:
    return _mean_square(x, clip, bits) / (clip / qmax(bits)) ** 2


def _mean_magnitude(x: Any, clip: float, bits: int) -> float:
    return np.abs(f64(x) - _x_hat(x, clip, bits)).mean()


def _best_by(error: Callable[..., float]) -> Callable[..., tuple[float, float]]:
    """The clip with the least error, and that error."""

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
    tolerance=1e-3,  # a small error is what is left of two large numbers in float32
    mistakes=(
        Mistake(
            "the codes are not saturated",
            _best_by(_mean_square_unsaturated),
            "A grid without ends gets better with every smaller clip: which codes are there, and what of the rest?",
        ),
        *(
            Mistake(
                "compared with the clipped x, not with x",
                _best_by(error),
                "What clipping takes away is an error too, and of the large ones. What was x before?",
            )
            for error in (_mean_square_inside, _mean_square_to_clipped)
        ),
        Mistake(
            "the error is counted in steps",
            _best_by(_mean_square_in_steps),
            "Half a step of a wide grid is a large error, of a fine one a small: in which units do they compare?",
        ),
        Mistake(
            "the lowest code is never used",
            _best_by(_mean_square_narrow),
            "Clamp the codes, not x: below -clip there is one code more, as in 01.2. Which one?",
        ),
        Mistake(
            "the magnitude of the error, not its square",
            _best_by(_mean_magnitude),
            "Squares make one large error weigh more than many small ones: did you square before the mean?",
        ),
    ),
)


# 05.4 -------------------------------------------------------------------------------------------------------------


def _average_cases(generator: Generator) -> list[Case]:
    by_hand = [
        (_batches([1.0, -2.0], [4.0, 0.5]), 0.9),
        (_batches([-8.0, 1.0], [2.0, -4.0], [0.5, -0.25]), 0.75),
        (_batches([3.0, 1.0], [-5.0, 2.0]), 0.0),
    ]
    drawn = [
        (tuple(uniform(generator, -3, 2, tokens, 3) for tokens in (2, 4, 1, 3)), momentum)
        for momentum in (0.6, 0.95, 0.8)
    ]
    return make_cases(by_hand, drawn)


def _amaxes(batches: Sequence[Any]) -> list[float]:
    return [np.abs(f64(batch)).max() for batch in batches]


def _averaged(values: Sequence[float], momentum: float) -> float:
    """The weights of all values at once: momentum^(n - 1) for the first, (1 - momentum) momentum^(n - 1 - i) else."""
    weights = momentum ** np.arange(len(values) - 1, -1, -1.0)
    weights[1:] *= 1 - momentum
    return weights @ np.array(values)


AVERAGE = Exercise(
    id="05.4",
    title="A moving average of the maxima",
    function="moving_amax",
    points=2,
    cases=_average_cases,
    reference=lambda batches, momentum: _averaged(_amaxes(batches), momentum),
    mistakes=(
        Mistake(
            "the momentum the wrong way round",
            lambda batches, momentum: _averaged(_amaxes(batches), 1 - momentum),
            "At a momentum of 0.99, how much of the old average should one new batch leave?",
        ),
        Mistake(
            "starts from 0",
            lambda batches, momentum: _averaged([0.0, *_amaxes(batches)], momentum),
            "The first batch has an amax of 2: what is the average of all that was seen so far? It is not 0.2.",
        ),
        Mistake(
            "every batch weighs the same",
            lambda batches, momentum: np.mean(_amaxes(batches)),
            "The plain mean knows no momentum: what should a momentum of 0 forget?",
        ),
        Mistake(
            "the largest value, not the largest magnitude",
            lambda batches, momentum: _averaged([f64(batch).max() for batch in batches], momentum),
            "What is amax of a batch whose farthest value from 0 is negative?",
        ),
    ),
)


SHEET = Sheet("05", "Calibration", (RANGE, PERCENTILE, CLIP, AVERAGE))
