"""A submission graded: cases drawn from a seed, answers from the sandbox, and the judge of the checks over them.

The idea: grading is `qcourse.checks.judge` over the answers of another process, with fresh cases. The points follow
from the same rule as in the learner's own check (`checks/points.py`), and the words are the same, less the expected
values.

It knows no database; `attempt.py` says how cells are run.
"""

import atexit
import importlib.metadata
import os
import platform
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch

from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.judge import NOT_WRITTEN, PASSED, judge
from qcourse.checks.registry import load_sheet
from qcourse.course_files import grader_version
from qcourse.grading.grades import BUBBLEWRAP, ExerciseGrade, Limits, Submission, SubmissionGrade
from qcourse.grading.intake import given_cells
from qcourse.grading.sandbox.attempt import Attempt
from qcourse.grading.sandbox.host import Sandbox
from qcourse.grading.sandbox.mounts import LIBRARIES, SandboxError

LONGEST = 600  # characters of a reason
_templates: dict[
    tuple[int, str], Sandbox
] = {}  # by process too: a copy of this one must not use its socket
_one_at_a_time = threading.Lock()


def grade_submission(
    submission: Submission, *, seed: int, limits: Limits | None = None, backend: str = BUBBLEWRAP
) -> SubmissionGrade:
    """Points and reasons for one submission; where the sandbox is lost on the way, it is graded once more in a new one.

    Args:
        seed: of the cases, 0 to 2^63 - 1. Draw it anew for each run: whoever knows it can know the cases.
        limits: what the submission may use.
        backend: "bubblewrap" or "none".

    Raises:
        SandboxError: there is no sandbox to be had, or it was lost twice.
    """
    limits = limits or Limits()
    generator = torch.Generator().manual_seed(seed)
    sheet = load_sheet(submission.sheet[:2])
    cases = {exercise: exercise.cases(generator) for exercise in sheet.exercises}
    with _one_at_a_time:
        try:
            outputs = _outputs(submission, cases, limits, backend)
        except SandboxError:  # lost on the way, for want of memory perhaps
            _forget(backend)
            outputs = _outputs(submission, cases, limits, backend)
    grades, problems = [], []
    for exercise in cases:
        try:
            grades.append(grade_exercise(exercise, cases[exercise], outputs.get(exercise.id)))
        except Exception as error:  # a fault of ours: it must neither cost the rest of the sheet nor pass in silence
            grades.append(
                ExerciseGrade(
                    exercise.id,
                    0.0,
                    exercise.points,
                    "could not be judged; your teacher has been told",
                )
            )
            problems.append(f"{exercise.id}: the judge itself failed: {_printable(repr(error))}")
    return SubmissionGrade(
        student=submission.student,
        sheet=submission.sheet,
        exercises=tuple(grades),
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
    """The points of one exercise, as `checks/points.py` has it; outputs=None where it has no cell."""
    if outputs is None:
        return ExerciseGrade(
            exercise.id, 0.0, exercise.points, f"no cell defines {exercise.function}"
        )
    verdict = judge(exercise, cases, outputs)
    if verdict.status == PASSED:
        return ExerciseGrade(exercise.id, float(exercise.points), exercise.points)
    if verdict.status == NOT_WRITTEN:
        return ExerciseGrade(exercise.id, 0.0, exercise.points, NOT_WRITTEN)
    looks = f". Looks like: {verdict.mistake}. {verdict.advice}" if verdict.mistake else ""
    reason = (
        f"{verdict.cases_right} of {verdict.cases} cases right; {_printable(verdict.reason)}{looks}"
    )
    return ExerciseGrade(exercise.id, float(verdict.points), exercise.points, reason)


def check_backend(backend: str) -> None:
    """Start the sandbox and one worker in it.

    Raises:
        SandboxError: that fails; one sentence says why and what to do.
    """
    with _one_at_a_time:
        _template(backend).worker(Limits()).close()


@cache
def environment() -> str:
    """A hash of what a grade hangs on besides the submission and the seed: versions, the checks, the sheets."""
    versions = {name: importlib.metadata.version(name) for name in (*LIBRARIES, "qcourse")}
    return grader_version(platform.python_version(), platform.machine(), repr(versions))


def _outputs(
    submission: Submission, cases: Mapping[Exercise, Sequence[Case]], limits: Limits, backend: str
) -> dict[str, list[Any]]:
    """The answers of each exercise, from workers of this process's template."""
    template = _template(backend)
    given = given_cells(submission.sheet[:2])
    return Attempt(lambda: template.worker(limits), given, submission.cells, limits).outputs(cases)


def _template(backend: str) -> Sandbox:
    """The one template of this process, started where there is none."""
    key = os.getpid(), backend
    if key not in _templates:
        _templates[key] = Sandbox(backend)
    return _templates[key]


def _forget(backend: str) -> None:
    """End the template, so that the next is a new one: its parts may be lost while the outermost still runs."""
    lost = _templates.pop((os.getpid(), backend), None)
    if lost is not None:
        lost.close()


@atexit.register
def close() -> None:
    """End the templates of this process; the next grade starts one anew."""
    for key in [key for key in _templates if key[0] == os.getpid()]:
        _templates.pop(key).close()


def _printable(text: str) -> str:
    """The text in one line, and not too long: a student's function may have put anything into it."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text[:LONGEST])
    return f"{kept} ..." if len(text) > LONGEST else kept
