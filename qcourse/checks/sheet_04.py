"""Sheet 04, outliers: cases, references, tolerances, points and known mistakes.

Cases are drawn until each mistake that selects columns selects other columns than the reference and
than the other mistakes. In 04.3 no value is near half-way between two codes in any of the scales
that people use, so float32 and float64 round alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, uniform, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

HALF_WAY = 1e-3  # steps: the least distance of a value from half-way between two codes


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _all_differ(functions: Sequence[Callable[..., np.ndarray]], *args: Any) -> bool:
    """Return whether no two of the functions give the same result."""
    found = [tuple(function(*args).tolist()) for function in functions]
    return len(set(found)) == len(found)


def _column_amax(x: Any) -> np.ndarray:
    return np.abs(f64(x)).max(axis=0)


# 04.1 ---------------------------------------------------------------------------------------------


def _beyond(x: Any, threshold: float) -> np.ndarray:
    """Return the right answer: the columns with some |x| > threshold, in rising order."""
    return np.flatnonzero(_column_amax(x) > threshold)


# Known mistakes.


def _beyond_deviations(x: Any, threshold: float) -> np.ndarray:
    return _beyond(x, threshold * f64(x).std())


def _beyond_sample_deviations(x: Any, threshold: float) -> np.ndarray:
    return _beyond(x, threshold * f64(x).std(ddof=1))


def _beyond_on_average(x: Any, threshold: float) -> np.ndarray:
    return np.flatnonzero(np.abs(f64(x)).mean(axis=0) > threshold)


def _beyond_above(x: Any, threshold: float) -> np.ndarray:
    return np.flatnonzero(f64(x).max(axis=0) > threshold)


def _beyond_rows(x: Any, threshold: float) -> np.ndarray:
    return np.flatnonzero(np.abs(f64(x)).max(axis=1) > threshold)


def _beyond_mask(x: Any, threshold: float) -> np.ndarray:
    return _column_amax(x) > threshold


def _beyond_values(x: Any, threshold: float) -> np.ndarray:
    """Return one column for each large value, token by token."""
    _, columns = np.nonzero(np.abs(f64(x)) > threshold)
    return columns


# The ways to select columns that every case must tell apart.
WAYS = (
    _beyond,
    _beyond_deviations,
    _beyond_on_average,
    _beyond_above,
    _beyond_rows,
    _beyond_values,
)


def _column_case(
    generator: Generator, tokens: int, inputs: int, threshold: float
) -> tuple[Tensor, float]:
    """Draw activations with some larger columns until all ways to select columns differ."""
    while True:
        sizes = _normal(generator, tokens, inputs)
        x = sizes * uniform(generator, 0.3, 1.2 * threshold, inputs)
        if len(_beyond(x, threshold)) and _all_differ(WAYS, x, threshold):
            return x, threshold


def _column_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # An outlier column below 0, and one above.
        ([[0.5, -7.0, 2.0, 6.5], [1.0, -0.3, 2.5, -0.4], [-0.2, 0.1, -1.5, 0.3]], 6.0),
        # Exactly at the threshold, which is no outlier, and beyond it below 0.
        ([[6.0, 0.5, -6.5], [-1.0, 2.0, 0.5]], 6.0),
        # Another threshold.
        ([[0.5, 0.25, -1.5, 1.25, 0.125], [0.25, -0.5, 1.0, 0.5, -0.25]], 1.0),
    ]
    drawn = []
    for tokens, threshold in ((5, 6.0), (12, 2.0), (3, 4.0)):
        drawn.append(_column_case(generator, tokens, 8, threshold))
    return make_cases(by_hand, [*drawn, *_column_edges(generator)])


def _column_edges(generator: Generator) -> list[tuple[Tensor, float]]:
    """Draw no column beyond the threshold, though one at it; and every column beyond."""
    # One value at the threshold of 3, the others below it.
    none = uniform(generator, -2.5, 2.5, 4, 6)
    at_threshold = pick(generator, -3.0, 3.0)
    none[int(whole(generator, 0, 3)), int(whole(generator, 0, 5))] = at_threshold

    # One token has values beyond the threshold of 2 in every column.
    every = uniform(generator, -1, 1, 4, 5)
    large = uniform(generator, 2.5, 6, 5) * pick(generator, -1, 1)
    every[int(whole(generator, 0, 3))] = large
    return [(none, 3.0), (every, 2.0)]


COLUMNS = Exercise(
    id="04.1",
    title="The outlier columns",
    function="outlier_columns",
    points=1,
    cases=_column_cases,
    reference=_beyond,
    mistakes=(
        *variants(
            "the threshold counted in standard deviations",
            "6.0 is a magnitude in the units of x. Which columns should be found if x has almost no"
            " spread?",
            _beyond_sample_deviations,
            _beyond_deviations,
        ),
        Mistake(
            "the mean of |x|, not the largest",
            _beyond_on_average,
            "In MiniLM, channel 99 is large in one token of a sequence. How much of that is left in"
            " a mean over all tokens?",
        ),
        Mistake(
            "x, not |x|",
            _beyond_above,
            "How does your comparison treat a value of -7.0?",
        ),
        Mistake(
            "tokens, not columns",
            _beyond_rows,
            "x is (tokens, in). Over which axis do you look for a large value, and which one is"
            " left?",
        ),
        Mistake(
            "a mask, not the numbers of the columns",
            _beyond_mask,
            "Your answer says for each column whether it is an outlier. How do you get the indices"
            " of the True entries?",
        ),
    ),
)


# 04.2 ---------------------------------------------------------------------------------------------

# How large a column of x is, by the right measure and by wrong ones.


def _by_mean(x: Any) -> np.ndarray:
    return np.abs(f64(x)).mean(axis=0)


def _by_squares(x: Any) -> np.ndarray:
    """Rank as the length of a column does."""
    return (f64(x) ** 2).mean(axis=0)


def _by_deviation(x: Any) -> np.ndarray:
    return f64(x).std(axis=0)


def _by_largest_value(x: Any) -> np.ndarray:
    return f64(x).max(axis=0)


def _top(ranking: np.ndarray, k: int) -> set[int]:
    """Return the k channels that rank highest."""
    return set(np.argsort(-ranking)[:k].tolist())


def _in_every(measure: Callable[[Any], np.ndarray]) -> Callable[..., np.ndarray]:
    """Return the function that finds the channels in the top k of every layer."""

    def common(layers: Sequence[Any], k: int) -> np.ndarray:
        tops = [_top(measure(x), k) for x in layers]

        # Channels in the top k of every layer, in rising order.
        return np.array(sorted(set.intersection(*tops)), dtype=np.int64)

    return common


# Known mistakes, besides other measures.


def _in_any(layers: Sequence[Any], k: int) -> np.ndarray:
    tops = [_top(_column_amax(x), k) for x in layers]
    return np.array(sorted(set.union(*tops)))


def _of_all_together(layers: Sequence[Any], k: int) -> np.ndarray:
    amax = np.stack([_column_amax(x) for x in layers]).max(axis=0)
    return np.array(sorted(_top(amax, k)))


_common_channels = _in_every(_column_amax)
_common_by_largest_value = _in_every(_by_largest_value)
AVERAGES = (_in_every(_by_mean), _in_every(_by_squares), _in_every(_by_deviation))
RANKED = (
    _common_channels,
    AVERAGES[0],
    _common_by_largest_value,
    _in_any,
    _of_all_together,
)


def _layers_case(
    generator: Generator, layers: int, inputs: int, k: int
) -> tuple[tuple[Tensor, ...], int]:
    """Draw layers of different size that share two outlier channels, until all ways differ."""
    while True:
        # Two channels are three times as large in every layer.
        shared = torch.ones(inputs)
        shared[torch.randperm(inputs, generator=generator)[:2]] = 3
        drawn = []
        for tokens in range(4, 4 + layers):
            x = _normal(generator, tokens, inputs) * shared
            x = x * float(uniform(generator, 0.5, 3))

            # One token of each layer has outliers of its own.
            x[int(tokens / 2)] *= uniform(generator, 0.5, 3, inputs)
            drawn.append(x)
        averages_differ = all(
            _all_differ((_common_channels, average), drawn, k) for average in AVERAGES
        )
        found_any = len(_common_channels(drawn, k)) > 0
        if found_any and averages_differ and _all_differ(RANKED, drawn, k):
            return tuple(drawn), k


def _layers_cases(generator: Generator) -> list[Case]:
    first = torch.as_tensor([[0.1, -9.0, 0.3, 2.0], [0.2, 1.0, 0.4, -2.5]])
    second = torch.as_tensor([[0.5, 4.0, -0.2, 0.3], [0.1, -3.0, 0.6, 5.0], [0.7, 0.2, 0.3, 0.1]])
    third = torch.as_tensor([[-1.0, 1.5, 9.5, 0.2], [1.2, -8.0, 7.0, 0.4]])
    by_hand = [
        # The third layer has one of the two shared channels, and a new one.
        ((first, second, third), 2),
        ((first, second), 2),
    ]
    drawn = []
    for layers, inputs, k in ((2, 6, 2), (3, 8, 3), (4, 10, 4)):
        drawn.append(_layers_case(generator, layers, inputs, k))
    return make_cases(by_hand, [*drawn, *_layers_edges(generator)])


def _layers_edges(generator: Generator) -> list[tuple[tuple[Tensor, ...], int]]:
    """Draw layers with no common channel; k as large as the layer; and a single layer."""
    # Three channels are large in one layer, and the other three in the next.
    sizes = torch.ones(6)
    sizes[torch.randperm(6, generator=generator)[:3]] = 20
    small = uniform(generator, 0.5, 1, 4, 6)
    disjoint = (small * sizes, small * (21 - sizes))
    three = tuple(_normal(generator, tokens, 5) for tokens in (2, 3, 4))
    single = (_normal(generator, 4, 6),)
    return [(disjoint, 3), (three, 5), (single, 2)]


COMMON = Exercise(
    id="04.2",
    title="The same in every layer",
    function="common_channels",
    points=2,
    cases=_layers_cases,
    reference=_common_channels,
    mistakes=(
        *variants(
            "an average over tokens, not the largest",
            "A channel may be large in one token of a hundred. Does an average show that, and does"
            " a shared scale depend on it?",
            *AVERAGES,
        ),
        Mistake(
            "x, not |x|",
            _common_by_largest_value,
            "Where does a channel rank whose farthest value lies below 0?",
        ),
        Mistake(
            "in any layer, not in every",
            _in_any,
            "A channel is an outlier in one layer only. Is it the same in every layer?",
        ),
        Mistake(
            "the largest of all layers together",
            _of_all_together,
            "One layer may be larger than all others. What do the other layers contribute, if you"
            " rank over all at once?",
        ),
    ),
)


# 04.3 ---------------------------------------------------------------------------------------------


def _scale(x: np.ndarray, axis: int | None) -> np.ndarray:
    """Return amax / 127 along an axis, or of the whole matrix; 1 where amax is 0."""
    amax = np.abs(x).max(axis=axis, keepdims=True)
    return np.where(amax == 0, 1, amax / qmax(8))


# The scales that people use for a matrix, x or w. The mask `outlier` marks its outlier columns.


def _by_row(a: np.ndarray, outlier: np.ndarray) -> np.ndarray:
    return _scale(a * ~outlier, 1)


def _by_whole_row(a: np.ndarray, outlier: np.ndarray) -> np.ndarray:
    return _scale(a, 1)


def _by_column(a: np.ndarray, outlier: np.ndarray) -> np.ndarray:
    return _scale(a * ~outlier, 0)


def _by_matrix(a: np.ndarray, outlier: np.ndarray) -> np.ndarray:
    return _scale(a * ~outlier, None)


def _by_row_unguarded(a: np.ndarray, outlier: np.ndarray) -> np.ndarray:
    return np.abs(a * ~outlier).max(axis=1, keepdims=True) / qmax(8)


SCALES = (_by_row, _by_whole_row, _by_column, _by_matrix)
Scales = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _in_two(x_scales: Scales, w_scales: Scales | None) -> Callable[..., np.ndarray]:
    """Return the product in two parts, with these scales; None leaves w unquantized."""

    def product(x: Any, w: Any, threshold: float) -> np.ndarray:
        x = f64(x)
        w = f64(w)
        outlier = _column_amax(x) > threshold

        # The 8-bit part has zeros in the outlier columns.
        x_hat = _rounded(x * ~outlier, x_scales(x, outlier))
        w_hat = w * ~outlier
        if w_scales:
            w_hat = _rounded(w_hat, w_scales(w, outlier))
        exact_part = x[:, outlier] @ w[:, outlier].T
        return x_hat @ w_hat.T + exact_part

    return product


def _rounded(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 / 0, which is one of the mistakes
        return scale * np.rint(x / scale)


def _hat(x: np.ndarray) -> np.ndarray:
    return _rounded(x, _scale(x, 1))


# Known mistakes, besides other scales.


def _counted_twice(x: Any, w: Any, threshold: float) -> np.ndarray:
    x = f64(x)
    w = f64(w)
    outlier = _column_amax(x) > threshold
    exact_part = x[:, outlier] @ w[:, outlier].T
    return _hat(x) @ _hat(w).T + exact_part


def _single_values(x: Any, w: Any, threshold: float) -> np.ndarray:
    x = f64(x)
    w = f64(w)
    outlier = np.abs(x) > threshold
    exact_part = (x * outlier) @ w.T
    return _hat(x * ~outlier) @ _hat(w).T + exact_part


def _clear(x: Any, w: Any, threshold: float) -> bool:
    """Return whether no value is near half-way between two codes, in any of the scales above."""
    x = f64(x)
    w = f64(w)
    outlier = _column_amax(x) > threshold

    # Steps in every scale above, then in the scale without the large values themselves.
    steps = [matrix / scales(matrix, outlier) for matrix in (x, w) for scales in SCALES]
    steps.append(x / _scale(x * (np.abs(x) <= threshold), 1))
    return all((np.abs(each % 1 - 0.5) > HALF_WAY).all() for each in steps)


def _product_case(
    generator: Generator, tokens: int, inputs: int, outputs: int, outliers: int, *, edge: str = ""
) -> tuple[Any, ...]:
    """Draw activations with so many columns that are outliers in some tokens only.

    Args:
        edge: "at" puts a value at the threshold into another column; "zeros" makes a token 0 apart
            from its outliers.
    """
    while True:
        x = _normal(generator, tokens, inputs)
        w = _normal(generator, outputs, inputs)

        # Every second token gets outliers in the first columns, which are then shuffled.
        x[::2, :outliers] *= 25
        if edge == "at":
            x[1, outliers] = pick(generator, -6.0, 6.0)
        if edge == "zeros":
            x[0, outliers:] = 0
        order = torch.randperm(inputs, generator=generator)
        x = x[:, order]
        if _suits(x, w, outliers) and (edge != "at" or _threshold_told(x, w)):
            return x, w, 6.0


def _suits(x: Tensor, w: Tensor, outliers: int) -> bool:
    """Return whether x has so many outlier columns, with some small values in them."""
    beyond = _column_amax(x) > 6.0
    small = (np.abs(f64(x)) <= 6.0)[:, beyond]
    return bool(beyond.sum() == outliers and small.any() and _clear(x, w, 6.0))


def _threshold_told(x: Tensor, w: Tensor) -> bool:
    """Return whether a column at the threshold of 6 matters more than any rounding."""
    moved = _llm_int8(x, w, 6.0) - _llm_int8(x, w, 5.99)
    return bool(np.abs(moved).max() > 0.05)


def _product_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # One outlier column.
        ([[12.7, 40.0, -5.08]], [[1.27, 0.5, 0.381], [-0.254, 2.0, 0.1]], 20.0),
        ([[1.27, -8.0, 0.334], [0.127, 0.5, -0.0508]], [[0.3, 0.77, -1.27]], 6.0),
        # No outlier at all.
        ([[0.4, -0.82, 1.26], [2.54, 0.12, -0.5]], [[0.61, -1.27, 0.33]], 6.0),
        # Rows of zeros remain.
        ([[0.0, 7.0, 0.0], [0.5, 0.0, 1.27]], [[0.3, -0.4, 1.27], [0.0, 0.5, 0.0]], 6.0),
        # Nothing remains.
        ([[7.0, -8.0], [0.5, 9.0]], [[0.3, -0.2], [1.1, 0.4]], 6.0),
    ]
    sizes = ((4, 6, 3, 1), (5, 8, 4, 2), (3, 10, 5, 2))
    drawn = [_product_case(generator, *size) for size in sizes]
    drawn += [_product_case(generator, 4, 7, 3, 2, edge=edge) for edge in ("at", "zeros")]
    return make_cases(by_hand, drawn)


_llm_int8 = _in_two(_by_row, _by_row)

PRODUCT = Exercise(
    id="04.3",
    title="The product in two parts",
    function="llm_int8",
    points=3,
    cases=_product_cases,
    reference=_llm_int8,
    tolerance=1e-4,  # the parts may cancel, and come from float32
    mistakes=(
        *variants(
            "the scales are made with the outliers",
            "The outliers have a part of their own. Do they still set the step of the 8-bit part?"
            " Check the order of your steps.",
            _in_two(_by_whole_row, _by_whole_row),
            _in_two(_by_whole_row, _by_row),
        ),
        Mistake(
            "the outlier columns are counted twice",
            _counted_twice,
            "Each channel belongs to one of the two sums: what do the outlier columns add to the"
            " 8-bit part?",
        ),
        Mistake(
            "single values, not columns",
            _single_values,
            "One outlier makes its whole column an outlier column. In which part are the small"
            " values of that column?",
        ),
        *variants(
            "a scale for each column, not for each row",
            "The sum runs over the columns. Can a scale that changes along the sum be taken out of"
            " it?",
            _in_two(_by_column, _by_column),
            _in_two(_by_column, _by_row),
            _in_two(_by_row, _by_column),
        ),
        Mistake(
            "0 / 0 in a row of zeros",
            _in_two(_by_row_unguarded, _by_row_unguarded),
            "What is the amax of a token that has nothing but its outliers, and what do you divide"
            " by it?",
        ),
    ),
)


# 04.4 ---------------------------------------------------------------------------------------------


def _plant_cases(generator: Generator) -> list[Case]:
    no_channel = torch.tensor([], dtype=torch.int64)
    by_hand = [
        # One channel, then all channels, then none.
        ([1.0, 0.5, 2.0], [[0.3, -0.2, 0.1], [0.5, 0.4, -0.6], [0.7, 0.9, -0.4]], [1], 4.0),
        ([0.8, 1.2], [[0.7, -0.13], [0.33, 0.18]], [0, 1], 0.5),
        ([0.5, 1.5], [[0.25, -0.5]], no_channel, 8.0),
    ]

    # As many outputs as inputs, then more; the last has every channel.
    drawn = []
    for outputs, channels in ((6, [0, 4]), (7, [3]), (9, [1, 2, 5]), (6, [*range(6)])):
        gain = uniform(generator, 0.3, 2, 6)
        w = _normal(generator, outputs, 6)
        factor = float(uniform(generator, 8, 64))
        drawn.append((gain, w, channels, round(factor, 2)))
    return make_cases(by_hand, drawn)


def _factors(count: int, channels: Tensor, factor: float) -> np.ndarray:
    """Return `factor` for these channels and 1 for the others, (count,)."""
    factors = np.ones(count)
    factors[channels] = factor
    return factors


def _planted(gain_power: int, w_power: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return a function that multiplies gains and columns by these powers of the factor."""

    def plant(gain: Any, w: Any, channels: Tensor, factor: float) -> tuple[np.ndarray, np.ndarray]:
        by = _factors(len(gain), channels, factor)

        # The right powers are 1 and -1: (gain * by) and (w / by) cancel in the output.
        return f64(gain) * by**gain_power, f64(w) * by**w_power

    return plant


# Known mistakes, besides other powers.


def _planted_rows(
    gain: Any, w: Any, channels: Tensor, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    by = _factors(len(gain), channels, factor)
    rows = _factors(len(w), channels, factor)
    return f64(gain) * by, f64(w) / rows[:, None]


def _planted_everywhere(
    gain: Any, w: Any, channels: Tensor, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    by = _factors(len(gain), channels, factor)
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
            "The gain makes the channel larger. What must the weight that reads it do, so that the"
            " output stays the same?",
        ),
        Mistake(
            "planted in the weights",
            _planted(-1, 1),
            "The output is right, but which of the two has the outlier now: x or w?",
        ),
        Mistake(
            "the weight is left as it was",
            _planted(1, 0),
            "What does the next layer return, now that its input has grown?",
        ),
        Mistake(
            "rows of w, not columns",
            _planted_rows,
            "w is (out, in), and the norm feeds its inputs: which axis are those?",
        ),
        Mistake(
            "all of w is divided",
            _planted_everywhere,
            "What happens to the channels that you did not choose?",
        ),
    ),
)


SHEET = Sheet("04", "Outliers", (COLUMNS, COMMON, PRODUCT, PLANT))
