"""What an exercise is: inputs, a reference, a tolerance, points, and the mistakes people make.

The idea: all there is to an exercise is a value in one file a sheet (`sheet_01.py`, ...), so whoever checks, a
learner's own `check` or a grader in another process, needs only that file and `judge.py`. References are written anew,
small and in float64: a check whose oracle is the code under test would pass everything.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # heavy, and here only a name: a grader asks for exercises' ids without it
    import torch


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        args: its arguments: tensors, numbers, strings, booleans, and tuples of these.
        by_hand: whether the case stands in the source, where anyone can read it. Such cases explain; points come from
            the others, which a generator draws.
    """

    args: tuple[Any, ...]
    by_hand: bool = False


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong implementation. Where people write one mistake in several ways, each has an entry; the name is
    the same.

    Args:
        name: what is wrong, to follow "Looks like: ".
        function: takes what the reference takes and goes wrong in this one way.
        advice: what to look at, a sentence that does not give the code away.
    """

    name: str
    function: Callable[..., Any]
    advice: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Args:
        id: "01.2": the sheet and the number on it.
        title: a few words.
        function: the name of the function to write.
        points: what it is worth when all cases are right; `points.py` says what is earned before.
        cases: draws the cases, the hand-made ones first, so that the first to fail is one that a person can follow.
        reference: the right answer. An integer dtype where it gives one; uint8 or int32 where it gives that. Where it
            raises an exception, one of that kind whose message holds the numbers that its own holds.
        mistakes: the bank of known mistakes.
        tolerance: how far a float may be off, relative to the expected value, or to a hundredth of the largest
            expected value where that is more; 1e-6 where all that is expected is 0. Integers are exact.
    """

    id: str
    title: str
    function: str
    points: int
    cases: "Callable[[torch.Generator], list[Case]]"
    reference: Callable[..., Any]
    mistakes: tuple[Mistake, ...]
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Sheet:
    """The exercises of one sheet, "01" in exercises/01_*.ipynb."""

    id: str
    title: str
    exercises: tuple[Exercise, ...]
