"""One submission to grade, and what became of it.

The idea: grading one submission is a function from plain data to plain data, so it can run in any
process on any machine. This file holds that function and the two values around it.

`processes.py` runs jobs on this machine, `dask_cluster.py` on many.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcourse.grading.grades import Limits, Submission
from qcourse.grading.sandbox.mounts import SandboxError


@dataclass(frozen=True)
class Job:
    """One submission to grade."""

    submission: Submission
    seed: int  # of the cases
    wall_s: float = 600.0  # the longest time that grading it may take


@dataclass(frozen=True)
class Done:
    """The outcome of a job: a grade as plain data, or the reason why there is none."""

    job: Job
    grade: dict[str, Any] | None
    problem: str = ""
    sandbox_lost: bool = False  # whether the sandbox did not start, or ended


Work = Callable[[Job], dict[str, Any]]


def grade_job(job: Job, *, limits: Limits, backend: str) -> dict[str, Any]:
    """Return the grade of one submission as plain data.

    Raises:
        SandboxError: no sandbox can be started.
    """
    # This import loads torch and the sheets, which only a grading process needs.
    from qcourse.grading.grade_submission import grade_submission

    grade = grade_submission(job.submission, seed=job.seed, limits=limits, backend=backend)
    return grade.to_dict()


def check_sandbox(backend: str) -> None:
    """Start the sandbox once in this process, and end it.

    Raises:
        SandboxError: it does not start; one sentence says why and what to do.
    """
    from qcourse.grading.grade_submission import check_backend, close

    check_backend(backend)
    close()


def reason_of(error: BaseException) -> str:
    """Return why a job failed, in one text; a SandboxError already says it in a sentence."""
    if isinstance(error, SandboxError):
        return str(error)
    return f"{type(error).__name__}: {error}"
