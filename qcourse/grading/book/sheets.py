"""The sheets of a run, as the gradebook and the formgrader know them.

The idea: both are given the same notebooks, so each master is read once.

`gradebook.py` and `formgrader.py` do the writing; this file decides what they write.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from qcourse.course_files import master
from qcourse.grading.book.formgrader import blank_master, write_course
from qcourse.grading.book.gradebook import register
from qcourse.grading.grades import sheet_number

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook


def enter_sheets(
    folder: Path, book: "Gradebook", sheets: Iterable[str]
) -> dict[str, "NotebookNode"]:
    """Enter the sheets in the gradebook and in the results folder; return their blank masters.

    Raises:
        ValueError: the gradebook has submissions of a sheet with other exercises.
    """
    masters: dict[str, NotebookNode] = {}
    for sheet in sorted(sheets):
        path = master(sheet_number(sheet))
        masters[sheet] = blank_master(path)
    for sheet, notebook in masters.items():
        register(book, sheet, notebook)
    write_course(folder, masters)
    return masters
