"""Sheet 06, GPTQ: cases, references, tolerances, points and known mistakes.

In the cases of 06.3 and 06.4 no weight comes nearer than a fiftieth of a step to the middle between two codes, when its
turn comes. So float32 and float64, Cholesky and an inverse for each column, blocks or none, all give the same codes.
What is drawn there is drawn until no known mistake gives the right codes, or those of another mistake. Where weights
are pushed beyond both ends of a grid, which chance does not often do, cases have a Hessian made for it.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, qmax, telling_rows, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

MARGIN = 0.02  # of a step, from a tie
NUDGE = 1e-4  # a relative change of the weights that no answer should hang on
CANDIDATES = (
    32  # rows that are drawn at once; those are taken that suit, for each row is swept by itself
)
Answers = list[
    tuple[str, np.ndarray]
]  # of the reference, named "", and of mistakes: (rows, numbers)


def _hessian(generator: Generator, inputs: int) -> Tensor:
    """The damped second moment of inputs that are alike, and some louder than others."""
    own, common = (torch.randn(4 * inputs, count, generator=generator) for count in (inputs, 1))
    x = (own + 1.5 * common) * uniform(generator, 0.6, 1.6, inputs)
    h = x.T @ x / len(x)
    return h + 0.01 * h.diagonal().mean() * torch.eye(inputs)


# 06.1 -------------------------------------------------------------------------------------------------------------


def _moment_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[1.0, 2.0], [3.0, 0.0]], 0.1),
        ([[2.0, 0.0, 1.0]], 0.01),
        ([[1.0, -1.0], [0.5, 2.0], [-2.0, 1.0]], 0.5),
    ]
    shapes = ((6, 3, 0.01), (3, 5, 0.1), (8, 4, 1.0))
    drawn = [
        (torch.randn(tokens, inputs, generator=generator) + 0.5, damp)
        for tokens, inputs, damp in shapes
    ]
    return make_cases(by_hand, drawn)


def _moment(x: Any) -> np.ndarray:
    return f64(x).T @ f64(x) / len(x)


def _damped(h: np.ndarray, damp: float) -> np.ndarray:
    return h + damp * np.trace(h) / len(h) * np.eye(len(h))


def _damped_by(unit: Callable[[np.ndarray], Any]) -> Callable[..., np.ndarray]:
    """The second moment of x, with damp times what unit makes of it added."""
    return lambda x, damp: _moment(x) + damp * unit(_moment(x))


DAMPED = Exercise(
    id="06.1",
    title="The damped Hessian",
    function="damped_hessian",
    points=1,
    cases=_moment_cases,
    reference=lambda x, damp: _damped(_moment(x), damp),
    mistakes=(
        Mistake(
            "damped by the sum of the diagonal, not its mean",
            _damped_by(lambda h: np.trace(h) * np.eye(len(h))),
            "With a thousand inputs, how much larger than a single entry is what you add to it?",
        ),
        Mistake(
            "damped by damp itself",
            _damped_by(lambda h: np.eye(len(h))),
            "Make every input ten times as loud: is what you add still the same share of the diagonal?",
        ),
        Mistake(
            "damped everywhere, not on the diagonal alone",
            _damped_by(lambda h: np.trace(h) / len(h)),
            "Noise of its own on every input makes each of them louder. Does it make two of them more alike?",
        ),
        Mistake(
            "summed over the tokens, not averaged",
            lambda x, damp: len(x) * _damped(_moment(x), damp),
            "The same tokens twice over: should that change the matrix?",
        ),
        Mistake(
            "x x^T, a matrix of tokens",
            lambda x, damp: _damped(f64(x) @ f64(x).T / len(x), damp),
            "There has to be a row for each input, however many tokens there were: which axis has to go?",
        ),
    ),
)


# 06.2 -------------------------------------------------------------------------------------------------------------


def _step_case(generator: Generator, inputs: int) -> tuple[Tensor, Tensor, int]:
    """Weights of which one is well away from a whole number, and from half-way between two."""
    i = int(whole(generator, 0, inputs - 1))
    w = uniform(generator, -4, 4, inputs)
    w[i] = whole(generator, -4, 4) + pick(generator, -1, 1) * uniform(generator, 0.15, 0.4)
    return w, _hessian(generator, inputs), i


def _step_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([0.4, 0.4], [[2.0, 1.0], [1.0, 1.0]], 1),
        ([1.7, -0.6, 2.0], [[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [0.5, 0.0, 1.5]], 0),
        (
            [-1.7, 0.25, 3.5],
            [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]],
            0,
        ),  # nobody can answer
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
    """The optimal brain surgeon's step, and its ways to go wrong; entry i is always the rounded weight."""
    w, h = f64(w), f64(hessian)
    direction = np.linalg.inv(h)[i] if inverse else h[i]
    new = w + factor * (rounding(w[i]) - w[i]) * direction / (direction[i] if divided else 1)
    new[i] = rounding(w[i])
    return new


def _undivided(w: Any, hessian: Any, i: int) -> np.ndarray:
    """Not even weight i arrives where it should."""
    return f64(w) + (np.rint(f64(w)[i]) - f64(w)[i]) * np.linalg.inv(f64(hessian))[i]


def _all_the_wrong_way(w: Any, hessian: Any, i: int) -> np.ndarray:
    """Weight i as well."""
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
        *(
            Mistake(
                "H in the place of its inverse",
                lambda w, hessian, i, factor=factor: _round_one(
                    w, hessian, i, inverse=False, factor=factor
                ),
                "At a minimum the gradient 2 H d points along one axis. What has to be done to H to get d alone?",
            )
            for factor in (1, -1)
        ),
        *(
            Mistake(
                "not divided by the diagonal",
                function,
                "By how much does your step move weight i itself, and by how much should it?",
            )
            for function in (
                lambda w, hessian, i: _round_one(w, hessian, i, divided=False),
                _undivided,
            )
        ),
        *(
            Mistake(
                "the weights move the wrong way",
                function,
                "δ is what rounding ADDS: is it w less its code, or the code less w? And what has weight i become?",
            )
            for function in (
                lambda w, hessian, i: _round_one(w, hessian, i, factor=-1),
                _all_the_wrong_way,
            )
        ),
        Mistake(
            "the others do not move",
            lambda w, hessian, i: _round_one(w, hessian, i, factor=0),
            "Weight i is rounded now. Who makes up for what that changed in the output?",
        ),
        Mistake(
            "floored, not rounded",
            lambda w, hessian, i: _round_one(w, hessian, i, rounding=np.floor),
            "What is the whole number nearest to 0.7?",
        ),
    ),
)


# 06.3 -------------------------------------------------------------------------------------------------------------


Row = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class _Rounding:
    """How steps (w / scale) become codes, and by how much a weight is then said to have moved.

    Args:
        below, above: how many codes there are below -qmax and above qmax.
        moved: from steps, codes before and after saturation, and scale.
    """

    below: float = 1
    above: float = 0
    moved: Callable[..., np.ndarray] = lambda steps, rounded, codes, scale: scale * (codes - steps)


RIGHT = _Rounding()
BEFORE = _Rounding(moved=lambda steps, rounded, codes, scale: scale * (rounded - steps))
NARROW = _Rounding(below=0)
UNSATURATED = _Rounding(np.inf, np.inf), _Rounding(np.inf, 0), _Rounding(1, np.inf)
ENDS = "the ends of the grid"


def _sweep(
    w: Any,
    hessian: Any,
    grid: Callable[[np.ndarray, int], Any],
    top: int,
    row: Row,
    rounding: _Rounding = RIGHT,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each column its steps (w / scale, when its turn comes) and codes; afterwards w moves along a row.

    Args:
        grid: from w as it has become and the column to the scales, (out,).
        top: qmax.
        row: from hessian and the column to how far each column moves where this one moves by 1, (in,).
    """
    w, h = f64(w).copy(), f64(hessian)
    for j in range(w.shape[1]):
        scale = grid(w, j)
        steps = w[:, j] / scale
        rounded = np.rint(steps)
        codes = np.clip(rounded, -top - rounding.below, top + rounding.above)
        yield steps, codes
        w += np.outer(rounding.moved(steps, rounded, codes, scale), row(h, j))
        w[:, j] = scale * codes


def _padded(row: np.ndarray, j: int) -> np.ndarray:
    """What columns j and on do, after zeros for those that are done."""
    return np.concatenate([np.zeros(j), row])


def _by_inverse(h: np.ndarray, j: int) -> np.ndarray:
    """The right row: of the inverse for the columns that are left."""
    inverse = np.linalg.inv(h[j:, j:])
    return _padded(inverse[0] / inverse[0, 0], j)


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
    """Row j of the factor as it is."""
    inverse = np.linalg.inv(h[j:, j:])
    return _padded(inverse[0] / np.sqrt(inverse[0, 0]), j)


def _undivided_inverse(h: np.ndarray, j: int) -> np.ndarray:
    return _padded(np.linalg.inv(h[j:, j:])[0], j)


def _nobody(h: np.ndarray, j: int) -> np.ndarray:
    return np.zeros(len(h))


def _codes_by(row: Row, rounding: _Rounding = RIGHT) -> Callable[..., np.ndarray]:
    """The sweep on a given grid."""

    def codes(w: Any, hessian: Any, scale: Any, bits: int) -> np.ndarray:
        swept = _sweep(w, hessian, _fixed(scale), qmax(bits), row, rounding)
        return np.stack([codes for _, codes in swept], axis=1).astype(np.int64)

    return codes


def _codes_at_the_end(w: Any, hessian: Any, scale: Any, bits: int) -> np.ndarray:
    """Every step moves every column, and what has become of them is rounded last of all."""
    w, inverse, scale = f64(w).copy(), np.linalg.inv(f64(hessian)), f64(scale)[:, 0]
    top = qmax(bits)
    for j in range(w.shape[1]):
        w_hat = scale * np.clip(np.rint(w[:, j] / scale), -top - 1, top)
        w += np.outer(w_hat - w[:, j], inverse[j] / inverse[j, j])
    return np.clip(np.rint(w / scale[:, None]), -top - 1, top).astype(np.int64)


def _saturated_wrongly(by: Callable[[_Rounding], Callable[..., Any]]) -> list[Mistake]:
    """The mistakes at the ends of a grid, for a function of the rounding."""
    advice = "The others may push a weight beyond the last code, or the first: which code does it get then?"
    return [Mistake(ENDS, by(rounding), advice) for rounding in (*UNSATURATED, BEFORE, NARROW)]


def _clear(swept: Iterator[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """In which rows no weight was near a tie when its turn came, (rows,)."""
    return np.all([np.abs(steps - np.floor(steps) - 0.5) > MARGIN for steps, _ in swept], axis=0)


def _answers(exercise: Exercise, args: tuple[Any, ...], besides: Collection[str]) -> Answers:
    """What the reference and the mistakes give, row by row; but for mistakes of these names."""
    functions = [("", exercise.reference)]
    functions += [
        (mistake.name, mistake.function)
        for mistake in exercise.mistakes
        if mistake.name not in besides
    ]
    return [(name, _rows(function(*args))) for name, function in functions]


def _rows(answer: Any) -> np.ndarray:
    """All numbers of an answer, (rows, numbers)."""
    return np.hstack(answer) if isinstance(answer, tuple) else answer


def _steady(
    exercise: Exercise, w: Tensor, *others: Any, besides: Collection[str] = ()
) -> tuple[np.ndarray, Answers]:
    """In which rows neither the reference nor a mistake hangs on the last digits of w, (rows,); and their answers."""
    turn = NUDGE * (-1.0) ** torch.arange(w.shape[1])
    answers = _answers(exercise, (w, *others), besides)
    steady = np.ones(len(w), dtype=bool)
    for nudged in (w * (1 + turn), w * (1 - turn)):
        moved = _answers(exercise, (nudged, *others), besides)
        for (_, before), (_, after) in zip(answers, moved, strict=True):
            steady &= np.isclose(before, after, rtol=MARGIN, atol=MARGIN).all(axis=1)
    return steady, answers


def _told(answers: Answers) -> np.ndarray:
    """Which pairs of answers of different names each row tells apart, (rows, pairs)."""
    pairs = [(a, b) for (one, a), (other, b) in combinations(answers, 2) if one != other]
    return np.stack([np.abs(a - b).max(axis=1) > MARGIN for a, b in pairs], axis=1)


def _ends_told(answers: Answers) -> bool:
    """Whether the mistakes at the ends of the grid differ from the reference in some row."""
    (_, right), *wrong = answers
    return all(np.abs(a - right).max() > MARGIN for name, a in wrong if name == ENDS)


def _codes_case(
    generator: Generator, out: int, inputs: int, bits: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows that suit, drawn until they tell all mistakes apart; the largest of a row may be beyond its grid."""
    while True:
        w, h = torch.randn(CANDIDATES, inputs, generator=generator), _hessian(generator, inputs)
        scale = 0.9 * w.abs().amax(dim=1, keepdim=True) / qmax(bits)
        clear = _clear(_sweep(w, h, _fixed(scale), qmax(bits), _by_inverse))
        steady, answers = _steady(SWEEP, w, h, scale, bits, besides={ENDS})
        rows = telling_rows(_told(answers), clear & steady, out)
        if len(rows):
            return w[rows], h, scale[rows], bits


def _fixed(scale: Any) -> Callable[[np.ndarray, int], np.ndarray]:
    """A grid of given scales (out, 1), whatever w has become."""
    return lambda w, j: f64(scale)[:, 0]


def _codes_cases(generator: Generator) -> list[Case]:
    pair, ones = [[2.0, 1.0], [1.0, 1.0]], [[1.0]]
    four = [[2.0, 1.8, 1.6, 1.6], [1.8, 2.2, 2.0, 1.6], [1.6, 2.0, 2.2, 1.6], [1.6, 1.6, 1.6, 1.6]]
    handed_on = [
        [3.0, 2.0, 1.0],
        [2.0, 2.0, 1.0],
        [1.0, 1.0, 1.0],
    ]  # each error goes to the next column, in full
    by_hand = [
        ([[0.4, 0.4]], pair, ones, 4),
        ([[1.4, 0.4, -0.6, 2.4]], four, ones, 4),  # the lesson's
        ([[7.3, 7.4], [0.3, -0.7]], pair, [[1.0], [0.25]], 4),  # pushed beyond the last code
        (
            [[7.4, 7.3, 5.0], [-4.2, -4.15, -1.5]],
            handed_on,
            [[1.0], [0.5]],
            4,
        ),  # beyond either end, and one more
    ]
    shapes = ((3, 4, 4), (4, 5, 3), (2, 8, 4), (4, 6, 3))
    drawn = [_codes_case(generator, *shape) for shape in shapes]
    return make_cases(
        by_hand, [*drawn, _pushed_codes_case(generator, 3), _pushed_codes_case(generator, 4)]
    )


def _pushed_codes_case(generator: Generator, bits: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """A row that is pushed beyond the last code and one beyond the first, by a Hessian that hands each error on."""
    handed_on = torch.tensor([[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    first = qmax(bits) + torch.tensor([[0.0], [1.0]])  # how far out either end lies
    while True:
        steps = torch.cat(
            [first + uniform(generator, 0.25, 0.45, 2, 2), uniform(generator, 1, 2, 2, 1)], dim=1
        )
        scale = uniform(generator, 0.1, 2.0, 2, 1)
        w = steps * scale * torch.tensor([[1.0], [-1.0]])
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
            "rounding to nearest: nobody answers",
            _codes_by(_nobody),
            "Is column 1 still what it was when its turn comes? What stands right of the diagonal in a LOWER factor?",
        ),
        *(
            Mistake(
                "H in the place of its inverse",
                _codes_by(row),
                "Which matrix says how the others answer: that of the inputs, or its inverse? And whose factor is U?",
            )
            for row in (_by_hessian, _against_hessian, _by_factor_of_hessian)
        ),
        *(
            Mistake(
                "columns that are done still take part",
                function,
                "A rounded column can answer no more. For which columns is the inverse that column 1 needs?",
            )
            for function in (_codes_by(_by_whole_inverse), _codes_at_the_end)
        ),
        *(
            Mistake(
                "the error is not divided by the diagonal",
                _codes_by(row),
                "Your update acts on column j as well: does it bring it just to where it was rounded to?",
            )
            for row in (_undivided_factor, _undivided_inverse)
        ),
        *_saturated_wrongly(lambda rounding: _codes_by(_by_inverse, rounding)),
    ),
)


# 06.4 -------------------------------------------------------------------------------------------------------------


def _amax_scale(w: np.ndarray, top: float) -> np.ndarray:
    amax = np.abs(w).max(axis=1)
    return np.where(amax == 0, 1.0, amax / top)


class _Groups:
    """Scales of groups; they are kept as they come.

    Args:
        before: the weights to fit to, where they are not those of the moment.
        every_column: fit anew at each column, not only at a group's first.
    """

    def __init__(
        self, group_size: int, top: float, *, before: Any = None, every_column: bool = False
    ) -> None:
        self.group_size, self.top, self.before, self.every_column = (
            group_size,
            top,
            before,
            every_column,
        )
        self.scales: dict[int, np.ndarray] = {}

    def __call__(self, w: np.ndarray, j: int) -> np.ndarray:
        group = j // self.group_size
        if self.every_column or group not in self.scales:
            start = group * self.group_size
            source = w if self.before is None else f64(self.before)
            self.scales[group] = _amax_scale(source[:, start : start + self.group_size], self.top)
        return self.scales[group]


def _groups_by(
    row: Row,
    rounding: _Rounding = RIGHT,
    *,
    before: bool = False,
    within: bool = False,
    **fitted: bool,
) -> Callable[..., Any]:
    """The sweep in groups, scales fitted as `_Groups` says; `within`: an error is answered in its own group alone."""

    def codes_and_scales(
        w: Any, hessian: Any, group_size: int, bits: int
    ) -> tuple[np.ndarray, np.ndarray]:
        groups = _Groups(group_size, qmax(bits), before=w if before else None, **fitted)

        def cut(h: np.ndarray, j: int) -> np.ndarray:
            full = row(h, j)
            return (
                np.where(np.arange(len(h)) // group_size == j // group_size, full, 0)
                if within
                else full
            )

        codes = np.stack(
            [codes for _, codes in _sweep(w, hessian, groups, qmax(bits), cut, rounding)], axis=1
        )
        return codes.astype(np.int64), np.stack(list(groups.scales.values()), axis=1)

    return codes_and_scales


def _groups_case(
    generator: Generator, out: int, inputs: int, group_size: int, bits: int, *, telling: bool = True
) -> tuple[Any, ...]:
    """Rows that suit, drawn until they tell all mistakes apart, unless that is not asked for."""
    while True:
        w, h = torch.randn(CANDIDATES, inputs, generator=generator), _hessian(generator, inputs)
        clear = _clear(_sweep(w, h, _Groups(group_size, qmax(bits)), qmax(bits), _by_inverse))
        steady, answers = _steady(GROUPS, w, h, group_size, bits, besides={ENDS} if telling else ())
        told = _told(answers) if telling else np.ones((len(w), 1), dtype=bool)
        rows = telling_rows(told, clear & steady, out)
        if len(rows):
            return w[rows], h, group_size, bits


def _groups_cases(generator: Generator) -> list[Case]:
    far_pair = [
        [2.0, 0.0, 0.0, 1.0],
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.0],
        [1.0, 0.0, 0.0, 1.0],
    ]
    four_times = [
        [33.0, 8.0, 4.0, 0.0],
        [8.0, 2.0, 1.0, 0.0],
        [4.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
    near_pairs = [
        [2.0, 1.0, 0.0, 0.5],
        [1.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, 0.5],
        [0.5, 0.0, 0.5, 2.0],
    ]
    by_hand = [
        ([[2.4, 7.0, 3.1, 6.6]], far_pair, 2, 4),
        ([[0.4, 3.0, -1.2, 2.0], [-2.7, 1.6, 0.2, 3.0]], near_pairs, 2, 3),
        (
            [[6.4, 7.0, 3.0, 2.0], [-6.4, -7.0, -3.0, 2.0]],
            four_times,
            2,
            4,
        ),  # pushed beyond either end
    ]
    shapes = ((4, 6, 2, 3), (2, 6, 3, 3), (3, 8, 4, 4), (4, 6, 3, 4))
    drawn = [_groups_case(generator, *shape) for shape in shapes]
    one_group = _groups_case(generator, 3, 4, 4, 3, telling=False)
    groups_of_one = _groups_case(generator, 2, 4, 1, 4, telling=False)
    return make_cases(by_hand, [*drawn, one_group, groups_of_one, _pushed_groups_case(generator)])


def _pushed_groups_case(generator: Generator) -> tuple[Any, ...]:
    """A row pushed beyond the last code and one beyond the first, by a Hessian that hands on four times each error."""
    four_times = torch.tensor(
        [[33.0, 8.0, 4.0, 0.0], [8.0, 2.0, 1.0, 0.0], [4.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    )
    while True:
        first = torch.cat([6 + uniform(generator, 0.3, 0.45, 2, 1), torch.full((2, 1), 7.0)], dim=1)
        steps = torch.cat([first, uniform(generator, 1, 6, 2, 2)], dim=1) * torch.tensor(
            [[1.0], [-1.0]]
        )
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
    tolerance=1e-3,  # a scale comes out of the updates before it, in float32
    mistakes=(
        Mistake(
            "scales fitted before the sweep",
            _groups_by(_by_inverse, before=True),
            "That is called static groups, and is no mistake elsewhere. Here, which weights has a group at its turn?",
        ),
        Mistake(
            "a new scale at every column",
            _groups_by(_by_inverse, every_column=True),
            "A group has one scale for all its codes, those already written included: when must it be known?",
        ),
        Mistake(
            "errors are answered within their group alone",
            _groups_by(_by_inverse, within=True),
            "A group shares a scale. Does an input stop at the border of a group to go together with others?",
        ),
        *(
            Mistake(
                "H in the place of its inverse",
                _groups_by(row),
                "As in 06.3: is it the matrix of the inputs that says how the others answer, or its inverse?",
            )
            for row in (_by_hessian, _against_hessian, _by_factor_of_hessian)
        ),
        *_saturated_wrongly(lambda rounding: _groups_by(_by_inverse, rounding)),
    ),
)


SHEET = Sheet("06", "GPTQ", (DAMPED, STEP, SWEEP, GROUPS))
