"""What the sheets share: draws from a generator, and the least arithmetic that a reference needs."""

from collections.abc import Collection
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.exercise import Exercise

T = TypeVar("T")


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


def found(exercise: Exercise, args: tuple[Any, ...], besides: Collection[str] = ()) -> list[tuple[str, np.ndarray]]:
    """The numbers that the reference (named "") and the mistakes give, all of an answer in one row.

    Args:
        besides: names of mistakes that are left out.
    """
    functions = [("", exercise.reference), *((mistake.name, mistake.function) for mistake in exercise.mistakes)]
    return [
        (name, np.hstack([*map(np.ravel, _parts(function(*args)))]))
        for name, function in functions
        if name not in besides
    ]


def telling(
    exercise: Exercise, args: tuple[Any, ...], *, apart: float, besides: Collection[str] = (), pairs: bool = True
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


def _parts(answer: Any) -> tuple[Any, ...]:
    return answer if isinstance(answer, tuple) else (answer,)
