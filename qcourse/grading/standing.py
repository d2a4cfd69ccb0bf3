"""Which grades of former runs stand, so that only what is new or changed is graded.

The idea: a grade stands if grading the same file by the same check again would tell nothing new.

`recorder.py` asks for each submission that has a grade on disk, and keeps the grades that stand.
"""

from dataclasses import dataclass

from qcourse.grading.book.results import Run, Stored
from qcourse.grading.grades import NONE
from qcourse.grading.intake import Found, fingerprint
from qcourse.grading.submitted_notebook import IntakeError, read_file


@dataclass(frozen=True)
class Standing:
    """A submission and the grade of it that stands."""

    found: Found
    stored: Stored


def stands(found: Found, stored: Stored, run: Run, version: str, backend: str) -> bool:
    """Return whether a grade is of this very file, by the check as it is, and still wanted.

    Args:
        version: of the sheet and its check, now.
        backend: what this run grades with.
    """
    grade = stored.grade
    if grade.problem is not None or stored.version != version:
        return False
    # A grade made without a sandbox does not count in a run with one.
    if grade.backend == NONE and backend != NONE:
        return False
    # This run's seed marks the grades that a regrading run has already made anew.
    if run.regrade and grade.seed != run.seed(found.sheet):
        return False
    try:
        return fingerprint(read_file(found.path)) == grade.submission_sha256
    except IntakeError:
        return False
