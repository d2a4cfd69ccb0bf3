"""Sheet 06, GPTQ: cases, references, tolerances, points and known mistakes.

In 06.3 and 06.4 every weight, when its turn comes, is at least a fiftieth of a step from half-way
between two codes. So float32 and float64, a Cholesky factor and an inverse per column, with blocks
or without, all give the same codes. Cases are drawn until no known mistake gives the right codes or
those of another mistake. Chance rarely pushes weights beyond both ends of a grid; cases that do so
have a Hessian made for it.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import (
    f64,
    make_cases,
    pick,
    qmax,
    telling_rows,
    uniform,
    variants,
    whole,
)
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

MARGIN = 0.02  # steps: the least distance of a weight from a tie
NUDGE = 1e-4  # a relative change of the weights that no answer should depend on
CANDIDATES = 32  # rows drawn at once, of which suitable ones are taken: rows are independent

# The answers of the reference, named "", and of mistakes: (rows, numbers) each.
Answers = list[tuple[str, np.ndarray]]


def _hessian(generator: Generator, inputs: int) -> Tensor:
    """Return x^T x / tokens, damped, of correlated inputs of different size."""
    own = torch.randn(4 * inputs, inputs, generator=generator)
    common = torch.randn(4 * inputs, 1, generator=generator)

    # A common part makes the inputs correlated.
    x = (own + 1.5 * common) * uniform(generator, 0.6, 1.6, inputs)
    h = x.T @ x / len(x)
    damp = 0.01 * h.diagonal().mean()
    return h + damp * torch.eye(inputs)


# 06.1 ---------------------------------------------------------------------------------------------


def _moment_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # Two tokens, one token, more tokens than inputs.
        ([[1.0, 2.0], [3.0, 0.0]], 0.1),
        ([[2.0, 0.0, 1.0]], 0.01),
        ([[1.0, -1.0], [0.5, 2.0], [-2.0, 1.0]], 0.5),
    ]
    drawn = []
    for tokens, inputs, damp in ((6, 3, 0.01), (3, 5, 0.1), (8, 4, 1.0)):
        drawn.append((torch.randn(tokens, inputs, generator=generator) + 0.5, damp))
    return make_cases(by_hand, drawn)


def _moment(x: Any) -> np.ndarray:
    return f64(x).T @ f64(x) / len(x)


def _damped(h: np.ndarray, damp: float) -> np.ndarray:
    # H + damp mean(diag H) I
    inputs = len(h)
    return h + damp * np.trace(h) / inputs * np.eye(inputs)


def _damped_hessian(x: Any, damp: float) -> np.ndarray:
    return _damped(_moment(x), damp)


# Known mistakes.


def _damped_by_trace(x: Any, damp: float) -> np.ndarray:
    h = _moment(x)
    return h + damp * (np.trace(h) * np.eye(len(h)))


def _damped_by_identity(x: Any, damp: float) -> np.ndarray:
    h = _moment(x)
    return h + damp * np.eye(len(h))


def _damped_everywhere(x: Any, damp: float) -> np.ndarray:
    h = _moment(x)
    return h + damp * (np.trace(h) / len(h))


def _damped_sum(x: Any, damp: float) -> np.ndarray:
    return len(x) * _damped_hessian(x, damp)


def _damped_tokens(x: Any, damp: float) -> np.ndarray:
    of_tokens = f64(x) @ f64(x).T / len(x)
    return _damped(of_tokens, damp)


DAMPED = Exercise(
    id="06.1",
    title="The damped Hessian",
    function="damped_hessian",
    points=1,
    cases=_moment_cases,
    reference=_damped_hessian,
    mistakes=(
        Mistake(
            "damped by the sum of the diagonal, not its mean",
            _damped_by_trace,
            "With a thousand inputs, how much larger than a single entry is the term that you add"
            " to it?",
        ),
        Mistake(
            "damped by damp itself",
            _damped_by_identity,
            "Multiply every input by ten: is your term still the same share of the diagonal?",
        ),
        Mistake(
            "damped everywhere, not on the diagonal alone",
            _damped_everywhere,
            "Independent noise on every input makes each input larger. Does it make two inputs more"
            " correlated?",
        ),
        Mistake(
            "summed over the tokens, not averaged",
            _damped_sum,
            "Use the same tokens twice: should that change the matrix?",
        ),
        Mistake(
            "x x^T, a matrix of tokens",
            _damped_tokens,
            "The matrix needs one row per input, for any number of tokens: which axis must be"
            " summed over?",
        ),
    ),
)


# 06.2 ---------------------------------------------------------------------------------------------


def _step_case(generator: Generator, inputs: int) -> tuple[Tensor, Tensor, int]:
    """Draw weights; weight i is well away from a whole number and from half-way between two."""
    i = int(whole(generator, 0, inputs - 1))
    w = uniform(generator, -4, 4, inputs)
    code = whole(generator, -4, 4)
    side = pick(generator, -1, 1)
    w[i] = code + side * uniform(generator, 0.15, 0.4)
    return w, _hessian(generator, inputs), i


def _step_cases(generator: Generator) -> list[Case]:
    diagonal = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]
    by_hand = [
        # Two correlated inputs.
        ([0.4, 0.4], [[2.0, 1.0], [1.0, 1.0]], 1),
        # Weight 1 does not move: its input is uncorrelated.
        ([1.7, -0.6, 2.0], [[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [0.5, 0.0, 1.5]], 0),
        # No other weight can compensate.
        ([-1.7, 0.25, 3.5], diagonal, 0),
    ]
    drawn = [_step_case(generator, inputs) for inputs in (2, 3, 4, 6)]
    return make_cases(by_hand, drawn)


def _round_one(
    w: Any,
    hessian: Any,
    i: int,
    *,
    factor: float = 1,
    inverse: bool = True,
    divided: bool = True,
    rounding: Callable[[float], float] = np.rint,
) -> np.ndarray:
    """Return w after the optimal brain surgeon's step; the options are ways to go wrong.

    Entry i is always the rounded weight.
    """
    w = f64(w)
    h = f64(hessian)
    rounded = rounding(w[i])

    # w += (round(w_i) - w_i) / [H^-1]_ii * row i of H^-1
    direction = np.linalg.inv(h)[i] if inverse else h[i]
    diagonal = direction[i] if divided else 1
    new = w + factor * (rounded - w[i]) * direction / diagonal
    new[i] = rounded
    return new


# Known mistakes, besides the options above.


def _undivided(w: Any, hessian: Any, i: int) -> np.ndarray:
    """Move weight i too far as well."""
    w = f64(w)
    change = np.rint(w[i]) - w[i]
    return w + change * np.linalg.inv(f64(hessian))[i]


def _all_the_wrong_way(w: Any, hessian: Any, i: int) -> np.ndarray:
    """Move weight i the wrong way as well."""
    return 2 * f64(w) - _round_one(w, hessian, i)


STEP = Exercise(
    id="06.2",
    title="One weight rounds, the others answer",
    function="round_one",
    points=2,
    cases=_step_cases,
    reference=_round_one,
    tolerance=1e-3,  # an inverse in float32
    mistakes=(
        *variants(
            "H in place of its inverse",
            "At a minimum the gradient 2 H d points along one axis. How do you get d alone from"
            " H d?",
            partial(_round_one, inverse=False, factor=1),
            partial(_round_one, inverse=False, factor=-1),
        ),
        *variants(
            "not divided by the diagonal",
            "By how much does your step move weight i itself, and by how much should it?",
            partial(_round_one, divided=False),
            _undivided,
        ),
        *variants(
            "the weights move the wrong way",
            "δ is what rounding ADDS: is it w minus its code, or the code minus w? And which value"
            " did weight i get?",
            partial(_round_one, factor=-1),
            _all_the_wrong_way,
        ),
        Mistake(
            "the others do not move",
            partial(_round_one, factor=0),
            "Weight i is rounded now. Which weights compensate for the change of the output?",
        ),
        Mistake(
            "floored, not rounded",
            partial(_round_one, rounding=np.floor),
            "Which whole number is closest to 0.7?",
        ),
    ),
)


# 06.3 ---------------------------------------------------------------------------------------------

Row = Callable[[np.ndarray, int], np.ndarray]


def _moved_to_code(
    steps: np.ndarray, rounded: np.ndarray, codes: np.ndarray, scale: Any
) -> np.ndarray:
    return scale * (codes - steps)


def _moved_to_unsaturated(
    steps: np.ndarray, rounded: np.ndarray, codes: np.ndarray, scale: Any
) -> np.ndarray:
    return scale * (rounded - steps)


@dataclass(frozen=True)
class _Rounding:
    """How steps (w / scale) become codes, and how far a weight is then said to have moved.

    Args:
        below, above: how many codes there are below -qmax and above qmax.
        moved: the move, from steps, codes before and after saturation, and scale.
    """

    below: float = 1
    above: float = 0
    moved: Callable[..., np.ndarray] = _moved_to_code


ENDS = "the ends of the grid"
RIGHT = _Rounding()
WRONG_ENDS = (
    # Not saturated, or at one end only.
    _Rounding(below=np.inf, above=np.inf),
    _Rounding(below=np.inf, above=0),
    _Rounding(below=1, above=np.inf),
    # The others compensate for the code before saturation.
    _Rounding(moved=_moved_to_unsaturated),
    # The lowest code is never used.
    _Rounding(below=0),
)


def _sweep(
    w: Any,
    hessian: Any,
    grid: Callable[[np.ndarray, int], Any],
    top: int,
    row: Row,
    rounding: _Rounding = RIGHT,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the steps (w / scale, when its turn comes) and the codes of each column.

    Args:
        grid: the scales (out,), from the current w and the column.
        top: qmax.
        row: how far each column moves if this column moves by 1 (in,), from hessian and column.
    """
    w = f64(w).copy()
    h = f64(hessian)
    for j in range(w.shape[1]):
        scale = grid(w, j)
        steps = w[:, j] / scale
        rounded = np.rint(steps)
        codes = np.clip(rounded, -top - rounding.below, top + rounding.above)
        yield steps, codes

        # Every column moves along the row; this one ends exactly on its codes.
        moved = rounding.moved(steps, rounded, codes, scale)
        w += np.outer(moved, row(h, j))
        w[:, j] = scale * codes


# The rows that people use. The right one is that of the inverse for the columns that are left.


def _padded(row: np.ndarray, j: int) -> np.ndarray:
    """Return the row of columns j and on, after zeros for the finished columns."""
    return np.concatenate([np.zeros(j), row])


def _by_inverse(h: np.ndarray, j: int) -> np.ndarray:
    # [H^-1]_jk / [H^-1]_jj over the columns j, j + 1, ...
    inverse = np.linalg.inv(h[j:, j:])
    return _padded(inverse[0] / inverse[0, 0], j)


# Known mistakes.


def _by_whole_inverse(h: np.ndarray, j: int) -> np.ndarray:
    inverse = np.linalg.inv(h)
    return _padded(inverse[j, j:] / inverse[j, j], j)


def _by_hessian(h: np.ndarray, j: int) -> np.ndarray:
    return _padded(h[j, j:] / h[j, j], j)


def _by_factor_of_hessian(h: np.ndarray, j: int) -> np.ndarray:
    upper = np.linalg.cholesky(h).T
    return upper[j] / upper[j, j]


def _against_hessian(h: np.ndarray, j: int) -> np.ndarray:
    return -_by_hessian(h, j)


def _undivided_factor(h: np.ndarray, j: int) -> np.ndarray:
    """Return row j of the Cholesky factor of the inverse as it is."""
    inverse = np.linalg.inv(h[j:, j:])
    return _padded(inverse[0] / np.sqrt(inverse[0, 0]), j)


def _undivided_inverse(h: np.ndarray, j: int) -> np.ndarray:
    return _padded(np.linalg.inv(h[j:, j:])[0], j)


def _no_compensation(h: np.ndarray, j: int) -> np.ndarray:
    return np.zeros(len(h))


def _fixed(scale: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """Return a grid of given scales (out, 1), whatever w has become."""
    return lambda w, j: f64(scale)[:, 0]


def _codes_by(row: Row, rounding: _Rounding = RIGHT) -> Callable[..., np.ndarray]:
    """Return the sweep on a given grid."""

    def codes(w: Any, hessian: Any, scale: Any, bits: int) -> np.ndarray:
        swept = _sweep(w, hessian, _fixed(scale), qmax(bits), row, rounding)
        columns = [codes for _, codes in swept]
        return np.stack(columns, axis=1).astype(np.int64)

    return codes


def _codes_at_the_end(w: Any, hessian: Any, scale: Any, bits: int) -> np.ndarray:
    """Move every column in every step, and round the result only at the end."""
    w = f64(w).copy()
    inverse = np.linalg.inv(f64(hessian))
    scale = f64(scale)[:, 0]
    top = qmax(bits)
    for j in range(w.shape[1]):
        w_hat = scale * np.clip(np.rint(w[:, j] / scale), -top - 1, top)
        w += np.outer(w_hat - w[:, j], inverse[j] / inverse[j, j])
    steps = np.rint(w / scale[:, None])
    return np.clip(steps, -top - 1, top).astype(np.int64)


def _saturated_wrongly(by: Callable[[_Rounding], Callable[..., Any]]) -> tuple[Mistake, ...]:
    """Return the mistakes at the ends of a grid, for a sweep with a given rounding."""
    return variants(
        ENDS,
        "Compensation may push a weight beyond the last code, or beyond the first. Which code does"
        " it get then?",
        *(by(rounding) for rounding in WRONG_ENDS),
    )


# What makes a row of weights suitable for a case.


def _clear(swept: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return in which rows no weight was near a tie when its turn came, (rows,)."""
    distances = [np.abs(steps - np.floor(steps) - 0.5) for steps, _ in swept]
    return np.all([distance > MARGIN for distance in distances], axis=0)


def _answers(exercise: Exercise, args: tuple[Any, ...], besides: Collection[str]) -> Answers:
    """Return the answers of the reference and of the mistakes not named in `besides`."""
    answers = [("", _rows(exercise.reference(*args)))]
    for mistake in exercise.mistakes:
        if mistake.name not in besides:
            answers.append((mistake.name, _rows(mistake.function(*args))))
    return answers


def _rows(answer: Any) -> np.ndarray:
    """Return all numbers of an answer, (rows, numbers)."""
    return np.hstack(answer) if isinstance(answer, tuple) else answer


def _steady(
    exercise: Exercise, w: Tensor, *others: Any, besides: Collection[str] = ()
) -> tuple[np.ndarray, Answers]:
    """Return in which rows no answer depends on the last digits of w, (rows,), and the answers."""
    signs = (-1.0) ** torch.arange(w.shape[1])

    # Every other weight grows a little and the rest shrink, then the reverse.
    turn = NUDGE * signs
    answers = _answers(exercise, (w, *others), besides)
    steady = np.ones(len(w), dtype=bool)
    for nudged in (w * (1 + turn), w * (1 - turn)):
        moved = _answers(exercise, (nudged, *others), besides)
        for (_, before), (_, after) in zip(answers, moved, strict=True):
            close = np.isclose(before, after, rtol=MARGIN, atol=MARGIN)
            steady &= close.all(axis=1)
    return steady, answers


def _told(answers: Answers) -> np.ndarray:
    """Return which pairs of answers of different names each row tells apart, (rows, pairs)."""
    told = []
    for (name, numbers), (other_name, other_numbers) in combinations(answers, 2):
        if name != other_name:
            told.append(np.abs(numbers - other_numbers).max(axis=1) > MARGIN)
    return np.stack(told, axis=1)


def _ends_told(answers: Answers) -> bool:
    """Return whether each mistake at the ends of the grid differs from the reference."""
    (_, right), *wrong = answers
    at_the_ends = [numbers for name, numbers in wrong if name == ENDS]
    return all(np.abs(numbers - right).max() > MARGIN for numbers in at_the_ends)


def _codes_case(
    generator: Generator, out: int, inputs: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Draw suitable rows that tell all mistakes apart.

    The largest weight of a row may lie beyond its grid.
    """
    while True:
        w = torch.randn(CANDIDATES, inputs, generator=generator)
        h = _hessian(generator, inputs)

        # The scale is a tenth too small for the largest weight of a row.
        scale = 0.9 * w.abs().amax(dim=1, keepdim=True) / qmax(bits)
        clear = _clear(_sweep(w, h, _fixed(scale), qmax(bits), _by_inverse))
        steady, answers = _steady(SWEEP, w, h, scale, bits, besides={ENDS})
        rows = telling_rows(_told(answers), clear & steady, out)
        if len(rows):
            return w[rows], h, scale[rows], bits


# Hands each error on to the next column, in full.
HANDED_ON = [[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]]


def _codes_cases(generator: Generator) -> list[Case]:
    pair = [[2.0, 1.0], [1.0, 1.0]]
    four = [[2.0, 1.8, 1.6, 1.6], [1.8, 2.2, 2.0, 1.6], [1.6, 2.0, 2.2, 1.6], [1.6, 1.6, 1.6, 1.6]]
    by_hand = [
        # Two columns, then the example of the lesson.
        ([[0.4, 0.4]], pair, [[1.0]], 4),
        ([[1.4, 0.4, -0.6, 2.4]], four, [[1.0]], 4),
        # A weight is pushed beyond the last code.
        ([[7.3, 7.4], [0.3, -0.7]], pair, [[1.0], [0.25]], 4),
        # Beyond either end, with one more column after it.
        ([[7.4, 7.3, 5.0], [-4.2, -4.15, -1.5]], HANDED_ON, [[1.0], [0.5]], 4),
    ]
    shapes = ((3, 4, 4), (4, 5, 3), (2, 8, 4), (4, 6, 3))
    drawn = [_codes_case(generator, *shape) for shape in shapes]
    pushed = [_pushed_codes_case(generator, bits) for bits in (3, 4)]
    return make_cases(by_hand, [*drawn, *pushed])


def _pushed_codes_case(generator: Generator, bits: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Draw a row that is pushed beyond the last code and one beyond the first."""
    handed_on = torch.tensor(HANDED_ON)
    signs = torch.tensor([[1.0], [-1.0]])
    last = qmax(bits) + torch.tensor([[0.0], [1.0]])  # the last code in each direction
    while True:
        at_the_end = last + uniform(generator, 0.25, 0.45, 2, 2)
        inside = uniform(generator, 1, 2, 2, 1)
        steps = torch.cat([at_the_end, inside], dim=1)
        scale = uniform(generator, 0.1, 2.0, 2, 1)
        w = steps * scale * signs
        clear = _clear(_sweep(w, handed_on, _fixed(scale), qmax(bits), _by_inverse))
        steady, answers = _steady(SWEEP, w, handed_on, scale, bits)
        if (clear & steady).all() and _ends_told(answers):
            return w, handed_on, scale, bits


SWEEP = Exercise(
    id="06.3",
    title="The sweep over a matrix",
    function="sweep_codes",
    points=3,
    cases=_codes_cases,
    reference=_codes_by(_by_inverse),
    mistakes=(
        Mistake(
            "round-to-nearest (RTN): no weight compensates",
            _codes_by(_no_compensation),
            "Does column 1 change before its turn comes? And what stands right of the diagonal in"
            " a LOWER factor?",
        ),
        *variants(
            "H in place of its inverse",
            "Which matrix tells how the other weights compensate: that of the inputs, or its"
            " inverse? And U is a factor of which one?",
            _codes_by(_by_hessian),
            _codes_by(_against_hessian),
            _codes_by(_by_factor_of_hessian),
        ),
        *variants(
            "finished columns still take part",
            "A rounded column cannot compensate any more. Over which columns is the inverse that"
            " column 1 needs?",
            _codes_by(_by_whole_inverse),
            _codes_at_the_end,
        ),
        *variants(
            "the error is not divided by the diagonal",
            "Your update acts on column j as well: does it move column j exactly to its rounded"
            " value?",
            _codes_by(_undivided_factor),
            _codes_by(_undivided_inverse),
        ),
        *_saturated_wrongly(partial(_codes_by, _by_inverse)),
    ),
)


# 06.4 ---------------------------------------------------------------------------------------------


def _amax_scale(w: np.ndarray, top: float) -> np.ndarray:
    amax = np.abs(w).max(axis=1)
    return np.where(amax == 0, 1.0, amax / top)


@dataclass
class _Groups:
    """A grid of groups, whose scales are computed at their turn and kept.

    Args:
        before: the weights to take the scales from, if not the current ones.
        every_column: compute a scale anew at each column, not only at a group's first.
    """

    group_size: int
    top: float
    before: Any = None
    every_column: bool = False
    scales: dict[int, np.ndarray] = field(default_factory=dict)

    def __call__(self, w: np.ndarray, j: int) -> np.ndarray:
        group = j // self.group_size

        # The scale comes from the weights as the sweep has changed them so far.
        if self.every_column or group not in self.scales:
            start = group * self.group_size
            source = w if self.before is None else f64(self.before)
            columns = source[:, start : start + self.group_size]
            self.scales[group] = _amax_scale(columns, self.top)
        return self.scales[group]


def _groups_by(
    row: Row,
    rounding: _Rounding = RIGHT,
    *,
    before: bool = False,
    within: bool = False,
    every_column: bool = False,
) -> Callable[..., Any]:
    """Return the sweep in groups.

    Args:
        before: take the scales from the weights before the sweep.
        within: compensate each error in its own group only.
        every_column: see `_Groups`.
    """

    def codes_and_scales(
        w: Any, hessian: Any, group_size: int, bits: int
    ) -> tuple[np.ndarray, np.ndarray]:
        source = w if before else None
        groups = _Groups(group_size, qmax(bits), source, every_column)
        row_used = partial(_row_within_group, row, group_size) if within else row
        swept = _sweep(w, hessian, groups, qmax(bits), row_used, rounding)
        codes = np.stack([codes for _, codes in swept], axis=1)
        scales = np.stack(list(groups.scales.values()), axis=1)
        return codes.astype(np.int64), scales

    return codes_and_scales


def _row_within_group(row: Row, group_size: int, h: np.ndarray, j: int) -> np.ndarray:
    """Return the row with zeros for the columns of other groups."""
    groups = np.arange(len(h)) // group_size
    return np.where(groups == j // group_size, row(h, j), 0)


def _groups_case(
    generator: Generator, out: int, inputs: int, group_size: int, bits: int, *, telling: bool = True
) -> tuple[Any, ...]:
    """Draw suitable rows; unless `telling` is False, they tell all mistakes apart."""
    while True:
        w = torch.randn(CANDIDATES, inputs, generator=generator)
        h = _hessian(generator, inputs)
        grid = _Groups(group_size, qmax(bits))
        clear = _clear(_sweep(w, h, grid, qmax(bits), _by_inverse))
        besides = {ENDS} if telling else ()
        steady, answers = _steady(GROUPS, w, h, group_size, bits, besides=besides)
        told = _told(answers) if telling else np.ones((len(w), 1), dtype=bool)
        rows = telling_rows(told, clear & steady, out)
        if len(rows):
            return w[rows], h, group_size, bits


# Hands four times each error on to the next column.
FOUR_TIMES = [
    [33.0, 8.0, 4.0, 0.0],
    [8.0, 2.0, 1.0, 0.0],
    [4.0, 1.0, 1.0, 0.0],
    [0.0, 0.0, 0.0, 1.0],
]


def _groups_cases(generator: Generator) -> list[Case]:
    far_pair = [
        [2.0, 0.0, 0.0, 1.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, 1.0],
    ]
    near_pairs = [
        [2.0, 1.0, 0.0, 0.5],
        [1.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.5],
        [0.5, 0.0, 0.5, 2.0],
    ]
    by_hand = [
        # An error changes the scale of the next group.
        ([[2.4, 7.0, 3.1, 6.6]], far_pair, 2, 4),
        # Errors stay in their group, and leave it.
        ([[0.4, 3.0, -1.2, 2.0], [-2.7, 1.6, 0.2, 3.0]], near_pairs, 2, 3),
        # Weights are pushed beyond either end.
        ([[6.4, 7.0, 3.0, 2.0], [-6.4, -7.0, -3.0, 2.0]], FOUR_TIMES, 2, 4),
    ]
    shapes = ((4, 6, 2, 3), (2, 6, 3, 3), (3, 8, 4, 4), (4, 6, 3, 4))
    drawn = [_groups_case(generator, *shape) for shape in shapes]

    # One group per row, and groups of one weight.
    one_group = _groups_case(generator, 3, 4, 4, 3, telling=False)
    groups_of_one = _groups_case(generator, 2, 4, 1, 4, telling=False)
    pushed = _pushed_groups_case(generator)
    return make_cases(by_hand, [*drawn, one_group, groups_of_one, pushed])


def _pushed_groups_case(generator: Generator) -> tuple[Any, ...]:
    """Draw a row that is pushed beyond the last code and one beyond the first."""
    four_times = torch.tensor(FOUR_TIMES)
    signs = torch.tensor([[1.0], [-1.0]])
    sevens = torch.full((2, 1), 7.0)
    while True:
        pushing = 6 + uniform(generator, 0.3, 0.45, 2, 1)
        rest = uniform(generator, 1, 6, 2, 2)
        steps = torch.cat([pushing, sevens, rest], dim=1) * signs
        w = steps * uniform(generator, 0.1, 2.0, 2, 1)
        clear = _clear(_sweep(w, four_times, _Groups(2, 7), 7, _by_inverse))
        steady, answers = _steady(GROUPS, w, four_times, 2, 4)
        if (clear & steady).all() and _ends_told(answers):
            return w, four_times, 2, 4


GROUPS = Exercise(
    id="06.4",
    title="Groups that are fitted at their turn",
    function="sweep_groups",
    points=4,
    cases=_groups_cases,
    reference=_groups_by(_by_inverse),
    tolerance=1e-3,  # a scale comes from the updates before it, in float32
    mistakes=(
        Mistake(
            "scales computed before the sweep",
            _groups_by(_by_inverse, before=True),
            "Other programs offer that as static groups. Which weights does a group have here when"
            " its turn comes?",
        ),
        Mistake(
            "a new scale at every column",
            _groups_by(_by_inverse, every_column=True),
            "A group has one scale for all its codes, the first ones included: when must it be"
            " known?",
        ),
        Mistake(
            "errors are compensated within their group alone",
            _groups_by(_by_inverse, within=True),
            "A group shares a scale. Are inputs of different groups uncorrelated because of that?",
        ),
        *variants(
            "H in place of its inverse",
            "As in 06.3: which matrix tells how the other weights compensate, that of the inputs or"
            " its inverse?",
            _groups_by(_by_hessian),
            _groups_by(_against_hessian),
            _groups_by(_by_factor_of_hessian),
        ),
        *_saturated_wrongly(partial(_groups_by, _by_inverse)),
    ),
)


SHEET = Sheet("06", "GPTQ", (DAMPED, STEP, SWEEP, GROUPS))
