"""Right or wrong, and in which words: a verdict from what a learner's function gave back.

The judge gets answers, never the function, so it can run in another process than the code it
judges. It compares each answer with the reference. If one differs, it also tries the known mistakes
and names the one that gives the same answers on every case.

`answers.py` reads an answer, `compare.py` compares it, `points.py` says what it earns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qcourse.checks.answers import Failure, capture, read
from qcourse.checks.compare import Difference, difference
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.points import earned
from qcourse.checks.words import call

PASSED = "passed"
FAILED = "not yet"
NOT_WRITTEN = "not written yet"
COLORS = {PASSED: "#2e9e4f", FAILED: "#d0492f", NOT_WRITTEN: "#8a8a8a"}


@dataclass(frozen=True, repr=False)
class Verdict:
    """What the judge found.

    Args:
        exercise_id: "01.2".
        status: PASSED, FAILED or NOT_WRITTEN.
        points, max_points: what the answer earned, of how much.
        cases_right, cases: how many cases were right, of how many.
        reason: the first failing case without its expected value, or "".
        expected: the expected value of that case.
        mistake, advice: the known mistake that gives the same answers, or "".
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
        """Return the verdict in words: result, first failing case, known mistake."""
        if self.status == NOT_WRITTEN:
            return [f"{self.exercise_id} {NOT_WRITTEN}"]
        unit = "point" if self.max_points == 1 else "points"
        result = f"{self.exercise_id} {self.status}, {self.points:g} of {self.max_points} {unit}"
        if self.status == PASSED:
            return [result]
        lines = [
            f"{result} ({self.cases_right} of {self.cases} cases right)",
            f"{self.reason}; expected {self.expected}",
        ]
        if self.mistake:
            lines.append(f"Looks like: {self.mistake}. {self.advice}")
        return lines

    def __repr__(self) -> str:
        return "\n".join(self.lines)

    def _repr_html_(self) -> str:
        color = COLORS[self.status]
        first, *rest = [escape(line) for line in self.lines]
        body = "<br>".join([f'<b style="color: {color}">{first}</b>', *rest])
        return f'<div style="border-left: 4px solid {color}; padding-left: 0.8em">{body}</div>'


def judge(exercise: Exercise, cases: Sequence[Case], outputs: Sequence[Any]) -> Verdict:
    """Return the verdict over the outputs of all cases: answers and Failures, as from `capture`.

    Raises:
        ValueError: there is no case, or not one output for each case.
    """
    if not cases or len(cases) != len(outputs):
        raise ValueError(
            f"outputs has {len(outputs)} answers for {len(cases)} cases; "
            "each of 1 or more needs one"
        )
    outputs = [read(output) for output in outputs]
    expected = [_made_by(exercise.reference, case, ValueError) for case in cases]
    found = _differences(exercise, outputs, expected)
    right = [one is None for one in found]
    counts = (exercise.points, sum(right), len(cases))
    if any(_is_stub(output, exercise.function) for output in outputs):
        return Verdict(exercise.id, NOT_WRITTEN, 0, *counts)
    points = earned(exercise.points, cases, expected, right)
    if all(right):
        return Verdict(exercise.id, PASSED, points, *counts)

    # The first failing case is shown; hand-made cases, which a person can follow, come first.
    failing = [(case, one) for case, one in zip(cases, found, strict=True) if one is not None]
    case, first = failing[0]
    reason = f"{call(exercise.function, case.args)} {first.got}"
    known = ("", "")
    if _is_wrong_in_value(outputs, expected, exercise):
        known = _known_mistake(exercise, cases, outputs)
    return Verdict(exercise.id, FAILED, points, *counts, reason, first.expected, *known)


def _differences(
    exercise: Exercise, outputs: Sequence[Any], expected: Sequence[Any]
) -> list[Difference | None]:
    pairs = zip(outputs, expected, strict=True)
    return [difference(output, right, exercise.tolerance) for output, right in pairs]


def _is_stub(output: Any, function: str) -> bool:
    return isinstance(output, Failure) and output.is_stub(function)


def _is_wrong_in_value(outputs: Sequence[Any], expected: Sequence[Any], exercise: Exercise) -> bool:
    """Return whether more than a dtype is wrong; a dtype alone is not one of the known mistakes."""
    for output, right in zip(outputs, expected, strict=True):
        kinds = isinstance(right, Failure)
        if difference(output, right, exercise.tolerance, kinds=kinds) is not None:
            return True
    return False


def _known_mistake(
    exercise: Exercise, cases: Sequence[Case], outputs: Sequence[Any]
) -> tuple[str, str]:
    """Return name and advice of the mistake with these outputs on every case, or two ""."""
    for mistake in exercise.mistakes:
        if _gives(mistake.function, exercise.tolerance, cases, outputs):
            return mistake.name, mistake.advice
    return "", ""


def _gives(
    function: Callable[..., Any], tolerance: float, cases: Sequence[Case], outputs: Sequence[Any]
) -> bool:
    """Return whether the function gives these outputs, dtypes aside."""
    for case, output in zip(cases, outputs, strict=True):
        made = _made_by(function, case, ValueError, RuntimeError)
        if difference(output, made, tolerance, kinds=False) is not None:
            return False
    return True


def _made_by(function: Callable[..., Any], case: Case, *meant: type[Exception]) -> Any:
    """Return a reference's or mistake's answer; it may raise only the errors that are meant."""
    made = capture(function, case.args)
    allowed = [kind.__name__ for kind in meant]

    # Any other error is a bug of the course and must not pass for an answer.
    if isinstance(made, Failure) and made.kinds[0] not in allowed:
        raise RuntimeError(f"{function} went wrong on {case}: {made}")
    return made
