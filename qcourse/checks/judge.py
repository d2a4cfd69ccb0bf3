"""Right or wrong, and in which words: pure functions of what a learner's function gave back.

The idea: the judge gets answers, never the function, so it can sit in another process than the code it judges. It
compares case by case with the reference; where a case fails it also asks the bank of known mistakes, and names the one
that gives the same answer on every case.

`answers.py` makes plain data of what a function gave; `words.py` writes it out.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from qcourse.checks.answers import Failure, capture
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.words import call, pinpoint, show

PASSED = "passed"
FAILED = "not yet"
NOT_WRITTEN = "not written yet"
NOTHING = 1e-6  # how far a float may be off where all that is expected is 0: there is no size to be relative to
INTEGER = "iu"  # NumPy's letters for integers; "f" is floats, "b" booleans
ACCEPTED = {
    "i": (INTEGER, "an integer dtype"),
    "u": (INTEGER, "uint8"),  # no reference gives any other
    "f": (INTEGER + "f", "floats"),
    "b": ("b", "booleans"),
}


@dataclass(frozen=True)
class Difference:
    """How an answer differs: what came, and what should have come (kept apart: a grader shows only the first)."""

    got: str
    expected: str


@dataclass(frozen=True, repr=False)
class Verdict:
    """What the judge found.

    Args:
        exercise_id: "01.2".
        status: PASSED, FAILED or NOT_WRITTEN.
        points, max_points: what it earned of what it is worth: all, or 0.
        cases_right, cases: how many cases came out right, of how many.
        reason: the first failing case, without the expected value; "" where there is none.
        expected: the expected value of that case.
        mistake, advice: the known mistake that it looks like; "" where none does.
    """

    exercise_id: str
    status: str
    points: int
    max_points: int
    cases_right: int
    cases: int
    reason: str = ""
    expected: str = ""
    mistake: str = ""
    advice: str = ""

    @property
    def lines(self) -> list[str]:
        """The verdict in words, a line a thought."""
        if self.status == NOT_WRITTEN:
            return [f"{self.exercise_id} {NOT_WRITTEN}"]
        worth = "1 point" if self.max_points == 1 else f"{self.max_points} points"
        first = f"{self.exercise_id} {self.status}, {self.points} of {worth}"
        if self.status == PASSED:
            return [first]
        looks = [f"Looks like: {self.mistake}. {self.advice}"] if self.mistake else []
        return [
            f"{first} ({self.cases_right} of {self.cases} cases right)",
            f"{self.reason}; expected {self.expected}",
            *looks,
        ]

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        colour = {PASSED: "#2e9e4f", FAILED: "#d0492f"}.get(self.status, "#8a8a8a")
        first, *rest = map(escape, self.lines)
        body = "<br>".join([f'<b style="color: {colour}">{first}</b>', *rest])
        return f'<div style="border-left: 4px solid {colour}; padding-left: 0.8em">{body}</div>'


def judge(exercise: Exercise, cases: Sequence[Case], outputs: Sequence[Any]) -> Verdict:
    """The verdict over the outputs of all cases: answers and Failures, as `capture` gives them.

    Raises:
        ValueError: not one output for each case, or no case.
    """
    if not cases or len(cases) != len(outputs):
        raise ValueError(f"outputs has {len(outputs)} answers for {len(cases)} cases; each of 1 or more needs one")
    outputs = [output if type(output) is Failure else capture(lambda given: given, (output,)) for output in outputs]
    expected = [_made_by(exercise.reference, case, ValueError) for case in cases]
    found = [difference(*pair, exercise.tolerance) for pair in zip(outputs, expected, strict=True)]
    right, count = found.count(None), len(cases)
    if any(isinstance(output, Failure) and output.is_stub(exercise.function) for output in outputs):
        return Verdict(exercise.id, NOT_WRITTEN, 0, exercise.points, right, count)
    if right == count:
        return Verdict(exercise.id, PASSED, exercise.points, exercise.points, right, count)
    case, first = next((case, one) for case, one in zip(cases, found, strict=True) if one is not None)
    reason = f"{call(exercise.function, case.args)} {first.got}"
    mistake, advice = _known_mistake(exercise, cases, outputs)
    return Verdict(exercise.id, FAILED, 0, exercise.points, right, count, reason, first.expected, mistake, advice)


def difference(answer: Any, expected: Any, tolerance: float, *, kinds: bool = True) -> Difference | None:
    """How the answer differs from what is expected; None where it does not.

    Args:
        answer, expected: plain data or Failures.
        tolerance: as in `Exercise`.
        kinds: whether the dtype must be of the expected kind, and a refusal name the expected numbers.

    >>> difference((1, 2.0), np.array([1, 2]), 0.0)
    Difference(got='returned [1.0, 2.0] (float64)', expected='an integer dtype')
    >>> difference((1, 2), np.array([1, 2]), 0.0) is None
    True
    """
    if isinstance(answer, Failure) or isinstance(expected, Failure):
        return _failure_difference(answer, expected, kinds)
    if isinstance(expected, tuple):
        return _tuple_difference(answer, expected, tolerance, kinds)
    if isinstance(expected, str) or isinstance(answer, str):
        same = type(answer) is type(expected) and answer == expected
        return None if same else Difference(f"returned {show(answer)}", show(expected))
    try:
        found = _array_difference(_array(answer), _array(expected), tolerance, kinds)
    except ValueError:  # lists of unequal lengths, or text among numbers
        return Difference("returned lists that make no array", f"shape {_array(expected).shape}")
    return found or (_byte_difference(answer, _array(expected)) if kinds else None)


def _known_mistake(exercise: Exercise, cases: Sequence[Case], outputs: Sequence[Any]) -> tuple[str, str]:
    """The name and advice of the mistake that gives these outputs on every case; kinds of number aside."""
    for mistake in exercise.mistakes:
        made = (_made_by(mistake.function, case, ValueError, RuntimeError) for case in cases)
        pairs = zip(outputs, made, strict=True)
        if all(difference(output, wrong, exercise.tolerance, kinds=False) is None for output, wrong in pairs):
            return mistake.name, mistake.advice
    return "", ""


def _made_by(function: Callable[..., Any], case: Case, *meant: type[Exception]) -> Any:
    """What a reference or a mistake gives; an error that it does not mean is ours, and must not pass for an answer."""
    made = capture(function, case.args)
    if isinstance(made, Failure) and made.kinds[0] not in (kind.__name__ for kind in meant):
        raise RuntimeError(f"{function} went wrong on {case}: {made}")
    return made


def _failure_difference(answer: Any, expected: Any, kinds: bool) -> Difference | None:
    numbers = _numbers(expected) if kinds else []
    refused = isinstance(answer, Failure) and isinstance(expected, Failure) and expected.kinds[0] in answer.kinds
    if refused and set(numbers) <= set(_numbers(answer)):
        return None
    naming = f" that names {' and '.join(numbers)}" if numbers else ""
    wanted = f"a {expected.kinds[0]}{naming}" if isinstance(expected, Failure) else show(expected)
    if not isinstance(answer, Failure):
        return Difference(f"returned {show(answer)}", wanted)
    if answer.kinds[0] == "UnreadableError":
        return Difference(answer.message, wanted)
    if answer.kinds[0] == "ChangedArgumentError":
        return Difference(answer.message, "its arguments as they were")
    where = f" ({answer.line})" if answer.line else ""
    return Difference(f"raised {answer.kinds[0]}: {answer.message}{where}", wanted)


def _numbers(failure: Any) -> list[str]:
    """The numbers in a refusal's message: what it says of the case, whatever its words."""
    return re.findall(r"\d+", failure.message) if isinstance(failure, Failure) else []


def _tuple_difference(answer: Any, expected: tuple, tolerance: float, kinds: bool) -> Difference | None:
    if not isinstance(answer, tuple) or len(answer) != len(expected):
        return Difference(f"returned {show(answer)}", f"{len(expected)} values: {show(expected)}")
    for number, (part, wanted) in enumerate(zip(answer, expected, strict=True), start=1):
        found = difference(part, wanted, tolerance, kinds=kinds)
        if found:
            return Difference(f"{found.got} as value {number} of {len(expected)}", found.expected)
    return None


def _array(value: Any) -> np.ndarray:
    """Numbers, or lists of them, as one array; ValueError where that cannot be."""
    if isinstance(value, str):
        raise ValueError("text is no number")
    if isinstance(value, tuple):
        return np.stack([_array(part) for part in value]) if value else np.empty(0)
    return np.asarray(value)


def _array_difference(answer: np.ndarray, expected: np.ndarray, tolerance: float, kinds: bool) -> Difference | None:
    if answer.shape != expected.shape:
        return Difference(f"returned shape {answer.shape}", f"shape {expected.shape}")
    accepted, word = ACCEPTED[expected.dtype.kind]
    if kinds and answer.dtype.kind not in accepted:
        return Difference(f"returned {show(answer)} ({answer.dtype})", word)
    wrong = _wrong(answer, expected, tolerance)
    if not wrong.any():
        return None
    return Difference(*pinpoint(answer, expected, wrong))


def _byte_difference(answer: Any, expected: np.ndarray) -> Difference | None:
    """Arrays and tensors of bytes must be uint8: a wider dtype gives away what packing saves. A list has no dtype."""
    if expected.dtype != np.uint8 or not isinstance(answer, np.ndarray) or answer.dtype == np.uint8:
        return None
    return Difference(f"returned {answer.dtype}: {answer.itemsize} bytes a value", "uint8")


def _wrong(answer: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """Where the answer is off: integers are right exactly, floats within the tolerance, NaN only for NaN."""
    with np.errstate(invalid="ignore", over="ignore"):  # infinities, which == settles, and NaNs as torch.empty has them
        right = answer == expected
        if answer.dtype.kind not in INTEGER or expected.dtype.kind not in INTEGER:
            answer, expected = answer.astype(np.float64), expected.astype(np.float64)
            finite = np.isfinite(expected)
            size = np.abs(np.where(finite, expected, 0.0))
            allowed = tolerance * np.maximum(size, size.max(initial=0.0) / 100) if size.any() else NOTHING
            near = np.abs(answer - expected) <= allowed
            right |= (near & finite) | (np.isnan(answer) & np.isnan(expected))
    return np.asarray(~right)
