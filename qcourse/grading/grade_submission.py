"""Grade one submission: cases drawn from a seed, answers from the sandbox, points from the checks.

The idea: grading is `qcourse.checks.judge` over the answers of another process, with fresh cases.
The points follow the same rule as the learner's own check (`checks/points.py`), and the words are
the same, without the expected values.

`sandbox/attempt.py` runs the cells; this file knows no gradebook.
"""

import atexit
import importlib.metadata
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any

import torch

from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.judge import NOT_WRITTEN, PASSED, judge
from qcourse.checks.registry import load_sheet
from qcourse.course_files import grader_version
from qcourse.grading.grades import (
    BUBBLEWRAP,
    ExerciseGrade,
    Limits,
    Submission,
    SubmissionGrade,
    sheet_number,
)
from qcourse.grading.intake import given_cells
from qcourse.grading.sandbox.attempt import Attempt
from qcourse.grading.sandbox.host import Sandbox
from qcourse.grading.sandbox.mounts import LIBRARIES, SandboxError

LONGEST = 600  # characters of a reason
NOT_JUDGED = "could not be judged; your teacher has been told"
# By process id too: a forked copy of this process must not use this one's socket.
_sandboxes: dict[tuple[int, str], Sandbox] = {}
_one_at_a_time = threading.Lock()


def grade_submission(
    submission: Submission, *, seed: int, limits: Limits | None = None, backend: str = BUBBLEWRAP
) -> SubmissionGrade:
    """Return points and reasons for one submission.

    Args:
        seed: of the cases, 0 to 2^63 - 1; drawn anew for each run, because it gives the cases away.
        backend: "bubblewrap" or "none".

    Raises:
        SandboxError: no sandbox can be started, or it was lost twice.
    """
    limits = limits or Limits()
    # One generator for all exercises, in the sheet's order.
    generator = torch.Generator().manual_seed(seed)
    sheet = load_sheet(sheet_number(submission.sheet))
    cases = {exercise: exercise.cases(generator) for exercise in sheet.exercises}
    # The sandbox answers one request at a time, so threads take turns.
    with _one_at_a_time:
        outputs = _outputs(submission, cases, limits, backend)

    grades, problems = _judged(cases, outputs)
    return SubmissionGrade(
        student=submission.student,
        sheet=submission.sheet,
        exercises=grades,
        submission_sha256=submission.sha256,
        seed=seed,
        backend=backend,
        limits=asdict(limits),
        environment=environment(),
        graded_at=datetime.now(UTC).isoformat(timespec="seconds"),
        problem="; ".join(problems) or None,
    )


def grade_exercise(
    exercise: Exercise, cases: Sequence[Case], outputs: Sequence[Any] | None
) -> ExerciseGrade:
    """Return the points of one exercise; outputs=None if the notebook has no cell for it."""
    if outputs is None:
        missing = f"no cell defines {exercise.function}"
        return ExerciseGrade(exercise.id, 0.0, exercise.points, missing)
    verdict = judge(exercise, cases, outputs)
    if verdict.status == PASSED:
        return ExerciseGrade(exercise.id, float(exercise.points), exercise.points)
    if verdict.status == NOT_WRITTEN:
        return ExerciseGrade(exercise.id, 0.0, exercise.points, NOT_WRITTEN)
    # The reason shows what the student's code returned, never what was expected.
    right = f"{verdict.cases_right} of {verdict.cases} cases right"
    reason = f"{right}; {_one_line(verdict.reason)}"
    if verdict.mistake:
        reason += f". Looks like: {verdict.mistake}. {verdict.advice}"
    return ExerciseGrade(exercise.id, float(verdict.points), exercise.points, reason)


def check_backend(backend: str) -> None:
    """Start the sandbox and one worker in it.

    Raises:
        SandboxError: that fails; one sentence says why and what to do.
    """
    with _one_at_a_time:
        _sandbox(backend).worker(Limits()).close()


@cache
def environment() -> str:
    """Return a hash of what a grade depends on besides submission and seed: versions, checks."""
    versions = {name: importlib.metadata.version(name) for name in (*LIBRARIES, "qcourse")}
    return grader_version(platform.python_version(), platform.machine(), repr(versions))


@atexit.register
def close() -> None:
    """End the sandboxes of this process; the next grade starts a new one."""
    own = [key for key in _sandboxes if key[0] == os.getpid()]
    for key in own:
        _sandboxes.pop(key).close()


def _judged(
    cases: Mapping[Exercise, Sequence[Case]], outputs: Mapping[str, Sequence[Any]]
) -> tuple[tuple[ExerciseGrade, ...], list[str]]:
    """Return the grade of each exercise, and a line for each that could not be judged."""
    grades: list[ExerciseGrade] = []
    problems: list[str] = []
    for exercise, its_cases in cases.items():
        try:
            grade = grade_exercise(exercise, its_cases, outputs.get(exercise.id))
        # A fault of ours must not cost the rest of the sheet, and must not pass in silence.
        except Exception as error:
            grade = ExerciseGrade(exercise.id, 0.0, exercise.points, NOT_JUDGED)
            problems.append(f"{exercise.id}: the judge itself failed: {_one_line(repr(error))}")
        grades.append(grade)
    return tuple(grades), problems


def _outputs(
    submission: Submission, cases: Mapping[Exercise, Sequence[Case]], limits: Limits, backend: str
) -> dict[str, list[Any]]:
    """Return the answers of each exercise; if the sandbox is lost, try once more in a new one."""
    try:
        return _outputs_of_one_try(submission, cases, limits, backend)
    except SandboxError:
        # The outermost process may still run, although those inside are lost (for want of memory).
        _forget(backend)
        return _outputs_of_one_try(submission, cases, limits, backend)


def _outputs_of_one_try(
    submission: Submission, cases: Mapping[Exercise, Sequence[Case]], limits: Limits, backend: str
) -> dict[str, list[Any]]:
    start_worker = partial(_sandbox(backend).worker, limits)
    given = given_cells(sheet_number(submission.sheet))
    attempt = Attempt(start_worker, given, submission.cells, limits)
    return attempt.outputs(cases)


def _sandbox(backend: str) -> Sandbox:
    """Return the one sandbox of this process, started if there is none."""
    key = (os.getpid(), backend)
    if key not in _sandboxes:
        _sandboxes[key] = Sandbox(backend)
    return _sandboxes[key]


def _forget(backend: str) -> None:
    """End the sandbox, so that the next is a new one."""
    lost = _sandboxes.pop((os.getpid(), backend), None)
    if lost is not None:
        lost.close()


def _one_line(text: str) -> str:
    """Return the text in one line of bounded length; a student's function may have written it."""
    letters = [letter if letter.isprintable() else " " for letter in text[:LONGEST]]
    line = "".join(letters)
    return f"{line} ..." if len(text) > LONGEST else line
