"""Sheet 04, outliers: cases, references, tolerances, points and known mistakes.

Cases are drawn until every mistake that chooses columns chooses others than the right ones, and than the other
mistakes. In 04.3 no value lies near to half-way between two codes, whichever of the scales that people use it is
counted in; so float32 and float64 round alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

HALF_WAY = 1e-3  # of a step: how near to a half no value may be


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _all_differ(functions: Sequence[Callable[..., np.ndarray]], *args: Any) -> bool:
    """Whether no two of the functions give the same."""
    found = [tuple(function(*args).tolist()) for function in functions]
    return len(set(found)) == len(found)


# 04.1 -------------------------------------------------------------------------------------------------------------


def _beyond(x: Any, threshold: float) -> np.ndarray:
    """The right answer: columns with some |x| above the threshold, (columns,) rising."""
    return np.flatnonzero(np.abs(f64(x)).max(axis=0) > threshold)


def _beyond_deviations(freedom: int) -> Callable[..., np.ndarray]:
    return lambda x, threshold: _beyond(x, threshold * f64(x).std(ddof=freedom))


def _beyond_on_average(x: Any, threshold: float) -> np.ndarray:
    return np.flatnonzero(np.abs(f64(x)).mean(axis=0) > threshold)


def _beyond_above(x: Any, threshold: float) -> np.ndarray:
    return np.flatnonzero(f64(x).max(axis=0) > threshold)


def _beyond_rows(x: Any, threshold: float) -> np.ndarray:
    return np.flatnonzero(np.abs(f64(x)).max(axis=1) > threshold)


def _beyond_mask(x: Any, threshold: float) -> np.ndarray:
    return np.abs(f64(x)).max(axis=0) > threshold


def _beyond_values(x: Any, threshold: float) -> np.ndarray:
    """A column for each loud value, token by token."""
    return np.nonzero(np.abs(f64(x)) > threshold)[1]


WAYS = (
    _beyond,
    _beyond_deviations(0),
    _beyond_on_average,
    _beyond_above,
    _beyond_rows,
    _beyond_values,
)


def _column_case(
    generator: Generator, tokens: int, inputs: int, threshold: float
) -> tuple[Tensor, float]:
    """Activations of size one with some louder columns, drawn until each way to choose is a way of its own."""
    while True:
        x = _normal(generator, tokens, inputs) * uniform(generator, 0.3, 1.2 * threshold, inputs)
        if len(_beyond(x, threshold)) and _all_differ(WAYS, x, threshold):
            return x, threshold


def _column_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[0.5, -7.0, 2.0, 6.5], [1.0, -0.3, 2.5, -0.4], [-0.2, 0.1, -1.5, 0.3]], 6.0),
        ([[6.0, 0.5, -6.5], [-1.0, 2.0, 0.5]], 6.0),  # at the threshold, and beyond it below 0
        ([[0.5, 0.25, -1.5, 1.25, 0.125], [0.25, -0.5, 1.0, 0.5, -0.25]], 1.0),
    ]
    drawn = [
        _column_case(generator, tokens, 8, threshold)
        for tokens, threshold in ((5, 6.0), (12, 2.0), (3, 4.0))
    ]
    return make_cases(by_hand, [*drawn, *_column_edges(generator)])


def _column_edges(generator: Generator) -> list[tuple[Tensor, float]]:
    """No column beyond the threshold, though one is at it; and every column beyond."""
    none = uniform(generator, -2.5, 2.5, 4, 6)
    none[int(whole(generator, 0, 3)), int(whole(generator, 0, 5))] = pick(generator, -3.0, 3.0)
    every = uniform(generator, -1, 1, 4, 5)
    every[int(whole(generator, 0, 3))] = uniform(generator, 2.5, 6, 5) * pick(generator, -1, 1)
    return [(none, 3.0), (every, 2.0)]


COLUMNS = Exercise(
    id="04.1",
    title="The outlier columns",
    function="outlier_columns",
    points=1,
    cases=_column_cases,
    reference=_beyond,
    mistakes=(
        *(
            Mistake(
                "the threshold counted in standard deviations",
                _beyond_deviations(freedom),
                "6.0 is a magnitude in the units of x. Which columns should be found if x has no spread to speak of?",
            )
            for freedom in (1, 0)
        ),
        Mistake(
            "the mean of |x|, not the largest",
            _beyond_on_average,
            "In MiniLM channel 99 is loud in one token of a text: what is left of that in a mean over all tokens?",
        ),
        Mistake(
            "x, not |x|",
            _beyond_above,
            "How does your comparison see a value of -7.0?",
        ),
        Mistake(
            "tokens, not columns",
            _beyond_rows,
            "x is (tokens, in). Over which axis do you look for a loud value, and which one is left?",
        ),
        Mistake(
            "a mask, not the numbers of the columns",
            _beyond_mask,
            "You say of each column whether it is loud. How do you get from there to the places that hold True?",
        ),
    ),
)


# 04.2 -------------------------------------------------------------------------------------------------------------


def _top(ranking: np.ndarray, k: int) -> set[int]:
    """The k channels that rank highest."""
    return set(np.argsort(-ranking)[:k].tolist())


def _largest(x: Any) -> np.ndarray:
    return np.abs(f64(x)).max(axis=0)


def _in_every(ranking: Callable[[Any], np.ndarray]) -> Callable[..., np.ndarray]:
    """The channels among the k first of every layer."""

    def common(layers: Sequence[Any], k: int) -> np.ndarray:
        return np.array(
            sorted(set.intersection(*(_top(ranking(x), k) for x in layers))), dtype=np.int64
        )

    return common


def _in_any(layers: Sequence[Any], k: int) -> np.ndarray:
    return np.array(sorted(set.union(*(_top(_largest(x), k) for x in layers))))


def _of_all_together(layers: Sequence[Any], k: int) -> np.ndarray:
    return np.array(sorted(_top(np.stack([_largest(x) for x in layers]).max(axis=0), k)))


AVERAGES = (
    _in_every(lambda x: np.abs(f64(x)).mean(axis=0)),
    _in_every(lambda x: (f64(x) ** 2).mean(axis=0)),  # ranks as the length of a column does
    _in_every(lambda x: f64(x).std(axis=0)),
)
RANKED = (
    _in_every(_largest),
    AVERAGES[0],
    _in_every(lambda x: f64(x).max(axis=0)),
    _in_any,
    _of_all_together,
)


def _layers_case(
    generator: Generator, layers: int, inputs: int, k: int
) -> tuple[tuple[Tensor, ...], int]:
    """Layers of different loudness that share two habits, drawn until each way to choose is a way of its own."""
    while True:
        habit = torch.ones(inputs)
        habit[torch.randperm(inputs, generator=generator)[:2]] = 3
        drawn = []
        for tokens in range(4, 4 + layers):
            x = _normal(generator, tokens, inputs) * habit * float(uniform(generator, 0.5, 3))
            x[int(tokens / 2)] *= uniform(generator, 0.5, 3, inputs)
            drawn.append(x)
        averaged = all(_all_differ((RANKED[0], average), drawn, k) for average in AVERAGES)
        if len(RANKED[0](drawn, k)) and averaged and _all_differ(RANKED, drawn, k):
            return tuple(drawn), k


def _layers_cases(generator: Generator) -> list[Case]:
    first = [[0.1, -9.0, 0.3, 2.0], [0.2, 1.0, 0.4, -2.5]]
    second = [[0.5, 4.0, -0.2, 0.3], [0.1, -3.0, 0.6, 5.0], [0.7, 0.2, 0.3, 0.1]]
    third = [[-1.0, 1.5, 9.5, 0.2], [1.2, -8.0, 7.0, 0.4]]
    by_hand = [
        (tuple(map(torch.as_tensor, layers)), 2)
        for layers in ((first, second, third), (first, second))
    ]
    drawn = [
        _layers_case(generator, layers, inputs, k)
        for layers, inputs, k in ((2, 6, 2), (3, 8, 3), (4, 10, 4))
    ]
    return make_cases(by_hand, [*drawn, *_layers_edges(generator)])


def _layers_edges(generator: Generator) -> list[tuple[tuple[Tensor, ...], int]]:
    """Nothing in common; every channel, because k is that large; and a single layer."""
    apart = torch.ones(6)
    apart[torch.randperm(6, generator=generator)[:3]] = 20
    quiet = uniform(generator, 0.5, 1, 4, 6)
    three = tuple(_normal(generator, tokens, 5) for tokens in (2, 3, 4))
    return [
        ((quiet * apart, quiet * (21 - apart)), 3),
        (three, 5),
        ((_normal(generator, 4, 6),), 2),
    ]


COMMON = Exercise(
    id="04.2",
    title="The same in every layer",
    function="common_channels",
    points=2,
    cases=_layers_cases,
    reference=RANKED[0],
    mistakes=(
        *(
            Mistake(
                "an average over tokens, not the largest",
                function,
                "A channel may be loud in one token of a hundred: does an average know, and does a shared scale care?",
            )
            for function in AVERAGES
        ),
        Mistake(
            "x, not |x|",
            RANKED[2],
            "Where does a channel rank whose farthest value lies below 0?",
        ),
        Mistake(
            "in any layer, not in every",
            _in_any,
            "A channel that is loud in one layer only: is that a habit or an accident?",
        ),
        Mistake(
            "the loudest of all layers together",
            _of_all_together,
            "One layer may be louder than all others: who speaks for them, if you rank over all at once?",
        ),
    ),
)


# 04.3 -------------------------------------------------------------------------------------------------------------


def _scale(x: np.ndarray, axis: int | None) -> np.ndarray:
    """amax / 127 along an axis, or of all; 1 where amax is 0."""
    amax = np.abs(x).max(axis=axis, keepdims=True)
    return np.where(amax == 0, 1, amax / qmax(8))


# The scales that people use for a matrix, x or w, of which the columns `loud` are outliers.


def _by_row(a: np.ndarray, loud: np.ndarray) -> np.ndarray:
    return _scale(a * ~loud, 1)


def _by_whole_row(a: np.ndarray, loud: np.ndarray) -> np.ndarray:
    return _scale(a, 1)


def _by_column(a: np.ndarray, loud: np.ndarray) -> np.ndarray:
    return _scale(a * ~loud, 0)


def _by_matrix(a: np.ndarray, loud: np.ndarray) -> np.ndarray:
    return _scale(a * ~loud, None)


def _by_row_unguarded(a: np.ndarray, loud: np.ndarray) -> np.ndarray:
    return np.abs(a * ~loud).max(axis=1, keepdims=True) / qmax(8)


SCALES = (_by_row, _by_whole_row, _by_column, _by_matrix)
Scales = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _in_two(x_scales: Scales, w_scales: Scales | None) -> Callable[..., np.ndarray]:
    """The product in two parts, with these scales; None leaves w as it is."""

    def product(x: Any, w: Any, threshold: float) -> np.ndarray:
        x, w = f64(x), f64(w)
        loud = np.abs(x).max(axis=0) > threshold
        x_hat = _rounded(x * ~loud, x_scales(x, loud))
        w_hat = _rounded(w * ~loud, w_scales(w, loud)) if w_scales else w * ~loud
        return x_hat @ w_hat.T + x[:, loud] @ w[:, loud].T

    return product


def _rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 / 0, which is one of the mistakes
        return scale * np.rint(x / scale)


def _hat(x: np.ndarray) -> np.ndarray:
    return _rounded(x, _scale(x, 1))


def _counted_twice(x: Any, w: Any, threshold: float) -> np.ndarray:
    x, w = f64(x), f64(w)
    loud = np.abs(x).max(axis=0) > threshold
    return _hat(x) @ _hat(w).T + x[:, loud] @ w[:, loud].T


def _single_values(x: Any, w: Any, threshold: float) -> np.ndarray:
    x, w = f64(x), f64(w)
    loud = np.abs(x) > threshold
    return _hat(x * ~loud) @ _hat(w).T + (x * loud) @ w.T


def _clear(x: Any, w: Any, threshold: float) -> bool:
    """Whether no value is near to half-way between two codes, in any of the scales above."""
    x, w = f64(x), f64(w)
    loud = np.abs(x).max(axis=0) > threshold
    steps = [each / scales(each, loud) for each in (x, w) for scales in SCALES]
    steps.append(x / _scale(x * (np.abs(x) <= threshold), 1))
    return all((np.abs(each % 1 - 0.5) > HALF_WAY).all() for each in steps)


def _product_case(
    generator: Generator, tokens: int, inputs: int, outputs: int, loud: int, *, edge: str = ""
) -> tuple[Any, ...]:
    """Activations whose first loud columns are outliers in some tokens only, in an order of their own.

    Args:
        edge: "at" has a value at the threshold in a quiet column, "zeros" a token that is 0 but for outliers.
    """
    while True:
        x, w = _normal(generator, tokens, inputs), _normal(generator, outputs, inputs)
        x[::2, :loud] *= 25
        if edge == "at":
            x[1, loud] = pick(generator, -6.0, 6.0)
        if edge == "zeros":
            x[0, loud:] = 0
        order = torch.randperm(inputs, generator=generator)
        x = x[:, order]
        beyond = np.abs(f64(x)).max(axis=0) > 6.0
        quiet = (np.abs(f64(x)) <= 6.0)[:, beyond]
        if (
            beyond.sum() == loud
            and quiet.any()
            and _clear(x, w, 6.0)
            and (edge != "at" or _threshold_told(x, w))
        ):
            return x, w, 6.0


def _threshold_told(x: Tensor, w: Tensor) -> bool:
    """Whether a column at the threshold of 6 makes a difference that no rounding does."""
    product = _in_two(_by_row, _by_row)
    return bool(np.abs(product(x, w, 6.0) - product(x, w, 5.99)).max() > 0.05)


def _product_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[12.7, 40.0, -5.08]], [[1.27, 0.5, 0.381], [-0.254, 2.0, 0.1]], 20.0),
        ([[1.27, -8.0, 0.334], [0.127, 0.5, -0.0508]], [[0.3, 0.77, -1.27]], 6.0),
        ([[0.4, -0.82, 1.26], [2.54, 0.12, -0.5]], [[0.61, -1.27, 0.33]], 6.0),  # no outlier at all
        (
            [[0.0, 7.0, 0.0], [0.5, 0.0, 1.27]],
            [[0.3, -0.4, 1.27], [0.0, 0.5, 0.0]],
            6.0,
        ),  # rows of zeros remain
        ([[7.0, -8.0], [0.5, 9.0]], [[0.3, -0.2], [1.1, 0.4]], 6.0),  # nothing remains
    ]
    sizes = ((4, 6, 3, 1), (5, 8, 4, 2), (3, 10, 5, 2))
    drawn = [_product_case(generator, *size) for size in sizes]
    drawn += [_product_case(generator, 4, 7, 3, 2, edge=edge) for edge in ("at", "zeros")]
    return make_cases(by_hand, drawn)


PRODUCT = Exercise(
    id="04.3",
    title="The product in two parts",
    function="llm_int8",
    points=3,
    cases=_product_cases,
    reference=_in_two(_by_row, _by_row),
    tolerance=1e-4,  # the parts may cancel, and come from float32
    mistakes=(
        *(
            Mistake(
                "the scales are made with the outliers",
                _in_two(_by_whole_row, w_scales),
                "What is the step of a token whose outlier has already been taken care of? In which order do you work?",
            )
            for w_scales in (_by_whole_row, _by_row)
        ),
        Mistake(
            "the outlier columns are counted twice",
            _counted_twice,
            "Each channel belongs to one of the two sums: what do the loud ones add to the 8-bit part?",
        ),
        Mistake(
            "single values, not columns",
            _single_values,
            "One loud value makes its column loud: in which part are the quiet values of that column?",
        ),
        *(
            Mistake(
                "a scale for each column, not for each row",
                _in_two(*scales),
                "The sum runs over the columns. Could a scale that changes along it be taken out of it?",
            )
            for scales in ((_by_column, _by_column), (_by_column, _by_row), (_by_row, _by_column))
        ),
        Mistake(
            "0 / 0 in a row of zeros",
            _in_two(_by_row_unguarded, _by_row_unguarded),
            "What is the amax of a token that has nothing but its outliers, and what do you divide by it?",
        ),
    ),
)


# 04.4 -------------------------------------------------------------------------------------------------------------


def _plant_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([1.0, 0.5, 2.0], [[0.3, -0.2, 0.1], [0.5, 0.4, -0.6], [0.7, 0.9, -0.4]], [1], 4.0),
        ([0.8, 1.2], [[0.7, -0.13], [0.33, 0.18]], [0, 1], 0.5),
        ([0.5, 1.5], [[0.25, -0.5]], torch.tensor([], dtype=torch.int64), 8.0),  # nothing to plant
    ]
    drawn = [
        (
            uniform(generator, 0.3, 2, 6),
            _normal(generator, outputs, 6),
            channels,
            round(float(uniform(generator, 8, 64)), 2),
        )
        for outputs, channels in ((6, [0, 4]), (7, [3]), (9, [1, 2, 5]), (6, [*range(6)]))
    ]
    return make_cases(by_hand, drawn)


def _planted(gain_power: int, w_power: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """The gains and the columns of the channels, each multiplied by the factor to a power."""

    def plant(gain: Any, w: Any, channels: Tensor, factor: float) -> tuple[np.ndarray, np.ndarray]:
        by = np.ones(len(f64(gain)))
        by[channels] = factor
        return f64(gain) * by**gain_power, f64(w) * by**w_power

    return plant


def _planted_rows(
    gain: Any, w: Any, channels: Tensor, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    by, rows = np.ones(len(f64(gain))), np.ones((len(f64(w)), 1))
    by[channels] = rows[channels] = factor
    return f64(gain) * by, f64(w) / rows


def _planted_everywhere(
    gain: Any, w: Any, channels: Tensor, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    by = np.ones(len(f64(gain)))
    by[channels] = factor
    return f64(gain) * by, f64(w) / factor


PLANT = Exercise(
    id="04.4",
    title="Plant an outlier",
    function="plant",
    points=2,
    cases=_plant_cases,
    reference=_planted(1, -1),
    mistakes=(
        Mistake(
            "multiplied on both sides",
            _planted(1, 1),
            "The gain makes the channel louder. What must the weight that reads it do, for the output to stay?",
        ),
        Mistake(
            "planted in the weights",
            _planted(-1, 1),
            "The output is right, but which of the two has the outlier now: x or w?",
        ),
        Mistake(
            "the weight is left as it was",
            _planted(1, 0),
            "What does the next layer answer, now that its input has grown?",
        ),
        Mistake(
            "rows of w, not columns",
            _planted_rows,
            "w is (out, in), and the norm feeds its inputs: which axis counts these?",
        ),
        Mistake(
            "all of w is divided",
            _planted_everywhere,
            "What has become of the channels that you did not choose?",
        ),
    ),
)


SHEET = Sheet("04", "Outliers", (COLUMNS, COMMON, PRODUCT, PLANT))
