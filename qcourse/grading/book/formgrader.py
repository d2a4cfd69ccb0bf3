"""The results folder as a course that nbgrader's formgrader opens.

The idea: the formgrader shows notebooks from autograded/STUDENT/SHEET/ beside what the database
says of them. Here such a notebook is the trusted master with the student's solution cells put in.
Under each check stands the reason as text; nothing of a submission is run or rendered. A person
changes points in the formgrader, which writes to the same database.

nbgrader's own Autograde finds nothing to run here: what was handed in is in another folder.
"""

import os
import stat
from collections.abc import Mapping
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcourse.grading.book.results import write
from qcourse.grading.grades import SubmissionGrade

if TYPE_CHECKING:
    from nbformat import NotebookNode

TIMESTAMP = "%Y-%m-%d %H:%M:%S.%f"
CONFIG = '''"""nbgrader's settings for the formgrader.

Start `jupyter lab` here, then Nbgrader > Formgrader.
"""

import os

c = get_config()
c.CourseDirectory.root = os.path.dirname(os.path.abspath(__file__))
# The address of another database than gradebook.db; no password is kept here.
if "QCOURSE_DB" in os.environ:
    c.CourseDirectory.db_url = os.environ["QCOURSE_DB"]
'''


def write_course(folder: Path, masters: Mapping[str, "NotebookNode"]) -> None:
    """Write nbgrader_config.py and source/SHEET/SHEET.ipynb, unless they are there."""
    import nbformat

    files = {folder / "nbgrader_config.py": CONFIG}
    for sheet, master in masters.items():
        path = folder / "source" / sheet / f"{sheet}.ipynb"
        files[path] = nbformat.writes(master)
    # A teacher may have changed these files, so what is there stays.
    for path, text in files.items():
        if not path.exists():
            write(path, text)


def write_marked(
    folder: Path, grade: SubmissionGrade, cells: Mapping[str, str], master: "NotebookNode"
) -> None:
    """Write autograded/STUDENT/SHEET/SHEET.ipynb.

    Args:
        cells: the source of each solution cell that was handed in, by exercise.
    """
    import nbformat

    path = folder / "autograded" / grade.student / grade.sheet / f"{grade.sheet}.ipynb"
    notebook = _marked(grade, cells, master)
    write(path, nbformat.writes(notebook))


def handed_in(path: Path) -> datetime | None:
    """Return when nbgrader collected a notebook (UTC, from timestamp.txt), or None if unknown."""
    # nbgrader writes "2026-01-31 17:00:00.250000 UTC".
    text = _beside(path, "timestamp.txt").removesuffix(" UTC")
    try:
        return datetime.strptime(text, TIMESTAMP)
    except ValueError:
        return None


def carry_over(folder: Path, student: str, sheet: str, path: Path) -> None:
    """Copy what `nbgrader release_feedback` asks for from the notebook's folder to the page's."""
    for name in ("timestamp.txt", "submission_secret.txt"):
        text = _beside(path, name)
        if text:
            write(folder / "feedback" / student / sheet / name, text)


def blank_master(path: Path) -> "NotebookNode":
    """Return a sheet's notebook from solutions/, without its solutions and outputs."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    # A notebook of a student who left a cell out then says so in its place.
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            cell.execution_count = None
        if _nbgrader(cell).get("solution"):
            cell.source = "# This cell was not handed in."
    return notebook


def _beside(path: Path, name: str) -> str:
    """Return the text of a small regular file beside a notebook; "" if there is none."""
    # A link is not followed, and a named pipe is not waited for.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path.with_name(name), flags)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return ""
            data = file.read(200)
    except OSError:
        return ""
    return data.decode(errors="replace").strip()


def _marked(
    grade: SubmissionGrade, cells: Mapping[str, str], master: "NotebookNode"
) -> "NotebookNode":
    """Return the master with the student's solution cells, and each reason under its check."""
    from nbformat.v4 import new_output

    # A cell's grade_id is "01-2-solution" or "01-2-check"; an exercise's id is "01.2".
    reasons = {one.exercise.replace(".", "-"): one.reason for one in grade.exercises}
    sources = {exercise.replace(".", "-"): text for exercise, text in cells.items()}
    # The cells that are neither stay as the master has them.
    notebook = deepcopy(master)
    for cell in notebook.cells:
        exercise, _, kind = _nbgrader(cell).get("grade_id", "").rpartition("-")
        if kind == "solution":
            cell.source = sources.get(exercise, cell.source)
        if kind == "check" and reasons.get(exercise):
            cell.outputs = [new_output("stream", text=reasons[exercise])]
    return notebook


def _nbgrader(cell: "NotebookNode") -> Mapping[str, Any]:
    return cell.metadata.get("nbgrader", {})
