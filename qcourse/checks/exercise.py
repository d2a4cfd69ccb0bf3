"""What an exercise is: inputs, a reference, a tolerance, points, and the mistakes people make.

An exercise is a value in one file per sheet (`sheet_01.py`, ...). A learner's own `check` and a
grader in another process both need only that file and `judge.py`. References are written anew,
small and in float64: a check that used the code under test as its reference would pass everything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# torch is slow to import, and a grader that asks only for the ids of exercises does not need it.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """One call of the function."""

    # Tensors, numbers, strings, booleans, and tuples of these.
    args: tuple[Any, ...]

    # Whether the case stands in the source, where anyone can read it. Such cases explain; points
    # come only from the others, which are drawn from a generator.
    by_hand: bool = False


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong implementation; several ways to write one mistake share its name."""

    name: str  # completes "Looks like: "
    function: Callable[..., Any]  # takes the reference's arguments
    advice: str  # a sentence that does not give the code away


@dataclass(frozen=True)
class Exercise:
    """One exercise; the tests hold its cases, reference and mistakes against one another."""

    id: str  # "01.2": the sheet and the number on it
    title: str
    function: str  # the name of the function to write
    points: int  # for all cases right; `points.py` says what fewer earn

    # Draws the cases, hand-made ones first: a person can follow the first failing case.
    cases: "Callable[[torch.Generator], list[Case]]"

    # The right answer. Its dtype matters if it is an integer one. If it raises an error, an answer
    # raises one of that kind whose message holds the same numbers.
    reference: Callable[..., Any]
    mistakes: tuple[Mistake, ...]

    # The allowed error of a float, relative to the expected value, or to a hundredth of the largest
    # expected value if that is more. If all expected values are 0, 1e-6. Integers are exact.
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Sheet:
    """The exercises of one sheet, "01" in exercises/01_*.ipynb."""

    id: str
    title: str
    exercises: tuple[Exercise, ...]
