"""What the sheets share: cases, known mistakes, random draws, and the arithmetic of references."""

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
NO_ROWS = np.empty(0, dtype=np.int64)


# Cases and mistakes.


def make_cases(
    by_hand: Iterable[Any], drawn: Iterable[Any], dtype: torch.dtype | None = None
) -> list[Case]:
    """Return the cases of an exercise, hand-made ones first, from a tuple of arguments for each.

    A case of one argument needs no tuple. Lists and arrays become tensors of the given dtype.

    >>> make_cases([([1, 2], 4)], [torch.tensor(3)])
    [Case(args=(tensor([1, 2]), 4), by_hand=True), Case(args=(tensor(3),), by_hand=False)]
    """
    cases = [Case(_as_arguments(args, dtype), by_hand=True) for args in by_hand]
    cases += [Case(_as_arguments(args, dtype), by_hand=False) for args in drawn]
    return cases


def variants(name: str, advice: str, *functions: Callable[..., Any]) -> tuple[Mistake, ...]:
    """Return one known mistake in the several ways that people write it."""
    return tuple(Mistake(name, function, advice) for function in functions)


def _as_arguments(args: Any, dtype: torch.dtype | None) -> tuple[Any, ...]:
    converted = []
    for arg in _parts(args):
        # Lists within tuples stay as they are.
        if isinstance(arg, list | np.ndarray | Tensor):
            arg = torch.as_tensor(arg, dtype=dtype)
        converted.append(arg)
    return tuple(converted)


def _parts(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


# Random draws.


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Return uniform float32 numbers."""
    return torch.empty(shape).uniform_(low, high, generator=generator)


def whole(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Return integers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator)


def pick(generator: Generator, *choices: T) -> T:
    """Return one of the choices."""
    index = int(whole(generator, 0, len(choices) - 1))
    return choices[index]


# Arithmetic.


def f64(x: Any) -> np.ndarray:
    """Return a tensor or list in float64."""
    return np.asarray(x, dtype=np.float64)


def qmax(bits: int) -> int:
    """Return the largest signed code.

    >>> qmax(4)
    7
    """
    return 2 ** (bits - 1) - 1


# Draws that tell the known mistakes from the reference.


def until_told(exercise: Exercise, draw: Callable[[], list[Any]]) -> list[Any]:
    """Return draw(), repeated until each known mistake gives a wrong answer to one of the calls.

    Raises RuntimeError after MOST_DRAWS draws.
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
    # An answer just outside the tolerance would be judged by its last digits.
    apart = 10 * exercise.tolerance
    for case, right in zip(cases, expected, strict=True):
        answer = capture(mistake.function, case.args)
        if difference(answer, right, apart) is not None:
            return True
    return False


def found(
    exercise: Exercise, args: tuple[Any, ...], besides: Collection[str] = ()
) -> list[tuple[str, np.ndarray]]:
    """Return the answers of the reference (named "") and of the mistakes not named in `besides`.

    Each answer is a row of numbers.
    """
    functions = [("", exercise.reference)]
    functions += [(mistake.name, mistake.function) for mistake in exercise.mistakes]
    answers = []
    for name, function in functions:
        if name not in besides:
            parts = [np.ravel(part) for part in _parts(function(*args))]
            answers.append((name, np.hstack(parts)))
    return answers


def telling(
    exercise: Exercise,
    args: tuple[Any, ...],
    *,
    apart: float,
    besides: Collection[str] = (),
    pairs: bool = True,
) -> bool:
    """Return whether every mistake differs from the reference on these arguments.

    Args:
        apart: the least difference, in the number that differs most.
        besides: names of mistakes that other cases tell.
        pairs: also compare mistakes of different names with one another.
    """
    answers = found(exercise, args, besides)
    compared = list(combinations(answers, 2))
    if not pairs:
        compared = [(answers[0], other) for other in answers[1:]]
    for (name, numbers), (other_name, other_numbers) in compared:
        if name == other_name:
            continue
        if not np.abs(numbers - other_numbers).max() > apart:
            return False
    return True


def telling_rows(told: np.ndarray, suits: np.ndarray, count: int) -> np.ndarray:
    """Return `count` suitable rows that together tell every pair apart; none if not found.

    Args:
        told: which pairs of answers each row tells apart (rows, pairs).
        suits: which rows may be taken (rows,).

    >>> telling_rows(np.array([[1, 0], [1, 1], [0, 1]]) > 0, np.array([True, False, True]), 2)
    array([0, 2])
    """
    told = told & suits[:, None]
    order: list[int] = []

    # Greedy cover: take the row that tells the most pairs not told so far.
    left = np.ones(told.shape[1], dtype=bool)
    while left.any():
        gains = (told & left).sum(axis=1)
        best = int(gains.argmax())
        if not gains[best]:
            return NO_ROWS
        order.append(best)
        left &= ~told[best]

    # Any other suitable row may fill up the count.
    order += [row for row in np.flatnonzero(suits).tolist() if row not in order]
    taken = np.sort(order[:count])
    enough = len(taken) == count
    return taken if enough and told[taken].any(axis=0).all() else NO_ROWS
