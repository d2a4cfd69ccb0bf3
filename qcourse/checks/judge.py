"""Right or wrong, and in which words: pure functions of what a learner's function gave back.

The idea: the judge gets answers, never the function, so it can sit in another process than the code it judges. It
compares case by case with the reference; where a case fails it also asks the bank of known mistakes, and names the one
that gives the same answer on every case.

`answers.py` makes plain data of what a function gave, `compare.py` compares it, `points.py` says what it earns and
`words.py` writes it out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qcourse.checks.answers import Failure, capture, read
from qcourse.checks.compare import difference
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.points import earned
from qcourse.checks.words import call

PASSED = "passed"
FAILED = "not yet"
NOT_WRITTEN = "not written yet"


@dataclass(frozen=True, repr=False)
class Verdict:
    """What the judge found.

    Args:
        exercise_id: "01.2".
        status: PASSED, FAILED or NOT_WRITTEN.
        points, max_points: what it earned of what it is worth.
        cases_right, cases: how many cases came out right, of how many.
        reason: the first failing case, without the expected value; "" where there is none.
        expected: the expected value of that case.
        mistake, advice: the known mistake that it looks like; "" where none does.
    """

    exercise_id: str
    status: str
    points: float
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
        first = f"{self.exercise_id} {self.status}, {self.points:g} of {worth}"
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
        raise ValueError(
            f"outputs has {len(outputs)} answers for {len(cases)} cases; each of 1 or more needs one"
        )
    outputs = [read(output) for output in outputs]
    expected = [_made_by(exercise.reference, case, ValueError) for case in cases]
    found = [difference(*pair, exercise.tolerance) for pair in zip(outputs, expected, strict=True)]
    right = [one is None for one in found]
    counts = (exercise.points, sum(right), len(cases))
    if any(isinstance(output, Failure) and output.is_stub(exercise.function) for output in outputs):
        return Verdict(exercise.id, NOT_WRITTEN, 0, *counts)
    points = earned(exercise.points, cases, expected, right)
    if all(right):
        return Verdict(exercise.id, PASSED, points, *counts)
    known = (
        _known_mistake(exercise, cases, outputs)
        if _is_wrong_in_value(outputs, expected, exercise)
        else ("", "")
    )
    case, first = next(
        (case, one) for case, one in zip(cases, found, strict=True) if one is not None
    )
    reason = f"{call(exercise.function, case.args)} {first.got}"
    return Verdict(exercise.id, FAILED, points, *counts, reason, first.expected, *known)


def _is_wrong_in_value(outputs: Sequence[Any], expected: Sequence[Any], exercise: Exercise) -> bool:
    """Whether more than a dtype is wrong; a mistake that gives right numbers has not been made where only that is."""
    return any(
        difference(output, right, exercise.tolerance, kinds=isinstance(right, Failure)) is not None
        for output, right in zip(outputs, expected, strict=True)
    )


def _known_mistake(
    exercise: Exercise, cases: Sequence[Case], outputs: Sequence[Any]
) -> tuple[str, str]:
    """The name and advice of the mistake that gives these outputs on every case; kinds of number aside."""
    for mistake in exercise.mistakes:
        made = (_made_by(mistake.function, case, ValueError, RuntimeError) for case in cases)
        pairs = zip(outputs, made, strict=True)
        if all(
            difference(output, wrong, exercise.tolerance, kinds=False) is None
            for output, wrong in pairs
        ):
            return mistake.name, mistake.advice
    return "", ""


def _made_by(function: Callable[..., Any], case: Case, *meant: type[Exception]) -> Any:
    """What a reference or a mistake gives; an error that it does not mean is ours, and must not pass for an answer."""
    made = capture(function, case.args)
    if isinstance(made, Failure) and made.kinds[0] not in (kind.__name__ for kind in meant):
        raise RuntimeError(f"{function} went wrong on {case}: {made}")
    return made
