"""What nbgrader's formgrader opens: the results folder as a course of its own, with each submission as it was graded.

The idea: the formgrader shows notebooks from autograded/STUDENT/SHEET/ beside what the database says of them. Here such
a notebook is the trusted master with the student's solution cells put in, and under each check the words the student
reads: text alone, nothing of a submission is run or rendered. Points are then changed by hand in the formgrader, which
writes to the same database.

nbgrader's own Autograde is not used, and finds nothing to run here: what was handed in lies elsewhere.
"""

import os
import stat
from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qcourse.grading.book.results import write
from qcourse.grading.grades import Submission, SubmissionGrade

if TYPE_CHECKING:
    from nbformat import NotebookNode

CONFIG = '''"""nbgrader's settings for the formgrader: start `jupyter lab` here, then Nbgrader > Formgrader."""

import os

c = get_config()
c.CourseDirectory.root = os.path.dirname(os.path.abspath(__file__))
if "QCOURSE_DB" in os.environ:  # the address of another database than gradebook.db; no password is kept here
    c.CourseDirectory.db_url = os.environ["QCOURSE_DB"]
'''


def write_course(folder: Path, masters: Mapping[str, "NotebookNode"]) -> None:
    """Write what makes a folder a course, where it is not there: nbgrader_config.py and source/SHEET/SHEET.ipynb."""
    import nbformat

    sources = {
        folder / "source" / sheet / f"{sheet}.ipynb": master for sheet, master in masters.items()
    }
    for path, text in {
        folder / "nbgrader_config.py": CONFIG,
        **{path: nbformat.writes(master) for path, master in sources.items()},
    }.items():
        if not path.exists():
            write(path, text)


def write_marked(
    folder: Path, submission: Submission, grade: SubmissionGrade, master: "NotebookNode"
) -> None:
    """Write autograded/STUDENT/SHEET/SHEET.ipynb."""
    import nbformat

    path = folder / "autograded" / grade.student / grade.sheet / f"{grade.sheet}.ipynb"
    write(path, nbformat.writes(marked(submission, grade, master)))


def handed_in(path: Path) -> datetime | None:
    """When nbgrader collected a notebook, from the timestamp.txt beside it, in UTC; None where it does not say so."""
    try:
        return datetime.strptime(
            _beside(path, "timestamp.txt").removesuffix(" UTC"), "%Y-%m-%d %H:%M:%S.%f"
        )
    except ValueError:
        return None


def carry_over(folder: Path, student: str, sheet: str, path: Path) -> None:
    """Put beside a student's page what `nbgrader release_feedback` asks for there: what nbgrader collected with it."""
    for name in ("timestamp.txt", "submission_secret.txt"):
        if text := _beside(path, name):
            write(folder / "feedback" / student / sheet / name, text)


def _beside(path: Path, name: str) -> str:
    """The text of a small regular file beside a notebook; "" where there is none. Links are not followed."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with open(os.open(path.with_name(name), flags), "rb") as file:
            regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            return file.read(200).decode(errors="replace").strip() if regular else ""
    except OSError:
        return ""


def blank_master(path: Path) -> "NotebookNode":
    """A sheet's notebook from solutions/, without its solutions and outputs."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if cell.metadata.get("nbgrader", {}).get("solution"):
            cell.source = "# This cell was not handed in."
    return notebook


def marked(
    submission: Submission, grade: SubmissionGrade, master: "NotebookNode"
) -> "NotebookNode":
    """The master with the student's solution cells, and each exercise's reason under its check."""
    from nbformat.v4 import new_output

    notebook = deepcopy(master)
    reasons = {one.exercise.replace(".", "-"): one.reason for one in grade.exercises}
    sources = {exercise.replace(".", "-"): source for exercise, source in submission.cells.items()}
    for cell in notebook.cells:
        exercise, _, kind = cell.metadata.get("nbgrader", {}).get("grade_id", "").rpartition("-")
        if kind == "solution":
            cell.source = sources.get(exercise, cell.source)
        if kind == "check" and reasons.get(exercise):
            cell.outputs = [new_output("stream", text=reasons[exercise])]
    return notebook
