"""What the sheets share: draws from a generator, and the least arithmetic that a reference needs."""

from collections.abc import Callable, Collection, Iterable
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.answers import capture
from qcourse.checks.compare import difference
from qcourse.checks.exercise import Case, Exercise, Mistake

T = TypeVar("T")
MOST_DRAWS = 10_000


def make_cases(
    by_hand: Iterable[Any], drawn: Iterable[Any], dtype: torch.dtype | None = None
) -> list[Case]:
    """The cases of an exercise, the hand-made ones first, from the arguments of each: a tuple, or a single one.

    Args:
        dtype: of the tensors that lists and arrays become; torch's choice where it is None.

    >>> make_cases([([1, 2], 4)], [torch.tensor(3)])
    [Case(args=(tensor([1, 2]), 4), by_hand=True), Case(args=(tensor(3),), by_hand=False)]
    """
    marked = [(args, True) for args in by_hand]
    marked += [(args, False) for args in drawn]
    return [Case(_as_arguments(args, dtype), by_hand) for args, by_hand in marked]


def until_told(exercise: Exercise, draw: Callable[[], list[Any]]) -> list[Any]:
    """What draw gives, drawn anew until each known mistake of the exercise answers one of these calls wrongly.

    Args:
        draw: gives the arguments of some calls.

    Raises:
        RuntimeError: no draw of MOST_DRAWS tells them all, so the shapes that are drawn cannot.
    """
    for _ in range(MOST_DRAWS):
        drawn = draw()
        cases = make_cases([], drawn)
        expected = [capture(exercise.reference, case.args) for case in cases]
        if all(_is_told(exercise, mistake, cases, expected) for mistake in exercise.mistakes):
            return drawn
    raise RuntimeError(
        f"{exercise.id}: {MOST_DRAWS} draws do not tell its mistakes from the reference"
    )


def _is_told(exercise: Exercise, mistake: Mistake, cases: list[Case], expected: list[Any]) -> bool:
    pairs = zip(cases, expected, strict=True)
    answers = ((capture(mistake.function, case.args), right) for case, right in pairs)
    return any(
        difference(answer, right, 10 * exercise.tolerance) is not None for answer, right in answers
    )


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform float32 numbers."""
    return torch.empty(shape).uniform_(low, high, generator=generator)


def whole(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator)


def pick(generator: Generator, *choices: T) -> T:
    """One of the choices."""
    return choices[int(whole(generator, 0, len(choices) - 1))]


def f64(x: Any) -> np.ndarray:
    """A tensor or list in float64."""
    return np.asarray(x, dtype=np.float64)


def qmax(bits: int) -> int:
    """The largest signed code.

    >>> qmax(4)
    7
    """
    return 2 ** (bits - 1) - 1


def found(
    exercise: Exercise, args: tuple[Any, ...], besides: Collection[str] = ()
) -> list[tuple[str, np.ndarray]]:
    """The numbers that the reference (named "") and the mistakes give, all of an answer in one row.

    Args:
        besides: names of mistakes that are left out.
    """
    functions = [
        ("", exercise.reference),
        *((mistake.name, mistake.function) for mistake in exercise.mistakes),
    ]
    return [
        (name, np.hstack([*map(np.ravel, _parts(function(*args)))]))
        for name, function in functions
        if name not in besides
    ]


def telling(
    exercise: Exercise,
    args: tuple[Any, ...],
    *,
    apart: float,
    besides: Collection[str] = (),
    pairs: bool = True,
) -> bool:
    """Whether on one case no mistake answers as the reference does.

    Args:
        apart: by how much the numbers that differ must differ.
        besides: names of mistakes that other cases tell.
        pairs: whether mistakes of different names must answer differently as well.
    """
    answers = found(exercise, args, besides)
    compared = combinations(answers, 2) if pairs else ((answers[0], other) for other in answers[1:])
    return all(one == other or np.abs(a - b).max() > apart for (one, a), (other, b) in compared)


def telling_rows(told: np.ndarray, suits: np.ndarray, count: int) -> np.ndarray:
    """So many of the rows that suit, which together tell every pair apart; none where such rows are not found.

    Args:
        told: which pairs of answers each row tells apart (rows, pairs).
        suits: which rows may be taken (rows,).

    >>> telling_rows(np.array([[1, 0], [1, 1], [0, 1]]) > 0, np.array([True, False, True]), 2)
    array([0, 2])
    """
    told = told & suits[:, None]
    order: list[int] = []
    left = np.ones(told.shape[1], dtype=bool)  # pairs that no row of those taken tells
    while left.any():
        gains = (told & left).sum(axis=1)
        best = int(gains.argmax())
        if not gains[best]:
            return np.empty(0, dtype=np.int64)
        order.append(best)
        left &= ~told[best]
    order += [row for row in np.flatnonzero(suits).tolist() if row not in order]
    taken = np.sort(order[:count])
    return (
        taken
        if len(taken) == count and told[taken].any(axis=0).all()
        else np.empty(0, dtype=np.int64)
    )


def _as_arguments(args: Any, dtype: torch.dtype | None) -> tuple[Any, ...]:
    """The arguments of a call; lists and arrays become tensors, on the top level only."""
    numbers = list | np.ndarray | Tensor
    return tuple(
        torch.as_tensor(arg, dtype=dtype) if isinstance(arg, numbers) else arg
        for arg in _parts(args)
    )


def _parts(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)
