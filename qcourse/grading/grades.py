"""What travels between the parts of the grader: a submission in, a grade out, both plain values.

The idea: `intake.py` makes a `Submission` and `grade_submission.py` makes a `SubmissionGrade` of
it. A grade is JSON's own types, so other processes can send it back and files can hold it.

This file runs nothing and keeps nothing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# What holds the code: a sandbox, or only another process with limits.
BUBBLEWRAP = "bubblewrap"
NONE = "none"
BACKENDS = (BUBBLEWRAP, NONE)
GRADER_S = 60.0  # of our own work: Python's and the sandbox's start, finding names, judging


@dataclass(frozen=True)
class Limits:
    """What a submission may use; past it the worker is killed, or the call it is in fails."""

    case_s: float = 5.0  # wall time of one case, and of running one cell
    exercise_s: float = 20.0  # wall time of an exercise's cells and cases; also processor time
    memory_mib: int = 1024  # of the worker, beyond Python and torch themselves
    file_mib: int = 16  # of all files that it writes together; they are in memory
    reply_mib: int = 8  # of one answer, as it is sent
    tasks: int = 16  # threads; a worker starts no other process

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be above 0")

    def submission_s(self, exercises: int) -> float:
        """Return the wall time after which a submission of this many exercises is given up."""
        # Twice, because a submission is graded once more if the sandbox was lost.
        once_s = exercises * (self.exercise_s + self.case_s)
        return 2 * once_s + GRADER_S


@dataclass(frozen=True)
class HandedIn:
    """A file or folder that was handed in, whatever is in it."""

    student: str  # the folder's name in Unicode's composed form; file systems differ
    sheet: str  # "01_quantizer", the name of the sheet's file; "" if unknown
    path: Path


@dataclass(frozen=True)
class Submission(HandedIn):
    """One student's answers to one sheet."""

    cells: Mapping[str, str]  # exercise id -> source of its solution cell, if there is one
    sha256: str  # of the file's bytes


@dataclass(frozen=True)
class ExerciseGrade:
    """The points of one exercise; `reason` is for the student and holds no expected value.

    >>> ExerciseGrade("01.1", 0.5, 1, "symmetric_scale(...) returned 1").points
    0.5
    """

    exercise: str
    points: float
    max_points: float
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.points <= self.max_points:
            raise ValueError(
                f"points={self.points!r} of exercise {self.exercise} must be 0 to {self.max_points}"
            )


@dataclass(frozen=True)
class SubmissionGrade:
    """One graded submission, and all that is needed to grade it again in the same way."""

    student: str
    sheet: str
    exercises: tuple[ExerciseGrade, ...]  # in the sheet's order
    submission_sha256: str
    seed: int  # of the cases
    backend: str  # one of BACKENDS
    limits: Mapping[str, Any] = field(default_factory=dict)  # as in `Limits`
    environment: str = ""  # a hash of the versions that graded it, and of the checks
    graded_at: str = ""  # UTC, ISO 8601
    problem: str | None = None  # why it could not be graded, one sentence; None if it was

    @property
    def points(self) -> float:
        """The sum over the exercises."""
        return sum(exercise.points for exercise in self.exercises)

    @property
    def max_points(self) -> float:
        """What the sheet is worth."""
        return sum(exercise.max_points for exercise in self.exercises)

    def to_dict(self) -> dict[str, Any]:
        """Return the grade as JSON's own types.

        >>> exercises = (ExerciseGrade("01.1", 1, 1),)
        >>> grade = SubmissionGrade("ada", "01_quantizer", exercises, "ab12", 7, "bubblewrap")
        >>> SubmissionGrade.from_dict(grade.to_dict()) == grade
        True
        """
        # Through text and back: tuples become lists, and what JSON cannot hold raises here.
        text = json.dumps(asdict(self), sort_keys=True)
        return json.loads(text)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "SubmissionGrade":
        """Return the grade that `to_dict` wrote.

        Raises:
            ValueError: it is something else.

        >>> SubmissionGrade.from_dict({})
        Traceback (most recent call last):
        ValueError: found={} is not a grade: 'exercises'
        """
        try:
            exercises = tuple(ExerciseGrade(**exercise) for exercise in found["exercises"])
            return cls(**{**found, "exercises": exercises})
        except (KeyError, TypeError) as error:
            raise ValueError(f"found={str(found)[:80]} is not a grade: {error}") from error


def sheet_number(sheet: str) -> str:
    """Return the number of a sheet, which its checks and its master are found by.

    >>> sheet_number("01_quantizer")
    '01'
    """
    return sheet[:2]
