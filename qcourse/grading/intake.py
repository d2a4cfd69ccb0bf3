"""What was handed in: which files there are, and the cells in them that answer a sheet.

The idea: submitted/<student>/<sheet>.ipynb, or one folder deeper as nbgrader has it; the sheet is the number that the
file's name begins with. A file that cannot be graded is a Problem with a sentence, and stops no other. The course's
own cells come from solutions/, never from what was handed in.

`notebook.py` reads a file and says which cell counts; `attempt.py` runs the cells.
"""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from qcourse.checks.registry import load_sheet, sheet_ids
from qcourse.grading.grades import Submission
from qcourse.grading.notebook import IntakeError, code_cells, read_file, solution_of

SHEET = re.compile(r"(\d\d)(?!\d)")
ODD = re.compile(r"[^\w.@+ '()-]")


@dataclass(frozen=True)
class Found:
    """A file that may be a submission; nothing in it has been read."""

    student: str
    sheet: str
    path: Path


@dataclass(frozen=True)
class Problem:
    """What cannot be graded: whose it is, where, and one sentence; `sheet` is "" where there is none to name."""

    student: str
    sheet: str
    path: Path
    reason: str


def find_submissions(folder: Path, sheet: str | None = None) -> tuple[list[Found], list[Problem]]:
    """The notebooks in folder/<student>/, by student and sheet, and what looks like one but cannot be.

    Args:
        folder: of all submissions.
        sheet: "01": only notebooks of that sheet; None: of every sheet.

    Raises:
        ValueError: there is no such folder, nothing to grade in it, or no such sheet.
    """
    if sheet is not None:
        load_sheet(sheet)  # which says what sheets there are
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; it should hold a folder for each student with notebooks in it.")
    by_sheet: dict[tuple[str, str], list[Path]] = {}
    problems: list[Problem] = []
    for entry in sorted(folder.iterdir()):
        paths, reason = _notebooks(entry)
        if reason:
            problems.append(Problem(_shown(entry.name), "", entry, reason))
        for path in paths:
            by_sheet.setdefault((entry.name, sheet_of(path) or path.name), []).append(path)
    found: list[Found] = []
    for (student, number), paths in by_sheet.items():
        if sheet is not None and number != sheet.zfill(2):
            continue
        name = master(number).stem if number in sheet_ids() else ""
        if reason := _wrong(student, name, paths):
            problems.append(Problem(_shown(student), name, paths[0], reason))
        else:
            found.append(Found(student, name, paths[0]))
    if not found and not problems:
        which = f"of sheet {sheet.zfill(2)} " if sheet else ""
        raise ValueError(
            f"No submission {which}is in {folder}; it should hold <student>/<sheet>.ipynb, as ada/01_quantizer.ipynb."
        )
    return found, problems


def read_submission(found: Found) -> Submission:
    """The solution cells of a notebook.

    Raises:
        IntakeError: it is no regular file, too large, or no notebook of this course.
    """
    data = read_file(found.path)
    cells = code_cells(data)
    exercises = load_sheet(found.sheet[:2]).exercises
    chosen = {exercise.id: solution_of(exercise, cells) for exercise in exercises}
    sources = {exercise: source for exercise, source in chosen.items() if source is not None}
    if not sources:
        raise IntakeError(f"holds no solution cell of sheet {found.sheet}; was another notebook handed in?")
    return Submission(found.student, found.sheet, found.path, sources, hashlib.sha256(data).hexdigest())


def sheet_of(path: Path) -> str | None:
    """The sheet that a notebook's name begins with.

    >>> sheet_of(Path("01_quantizer (1).ipynb")), sheet_of(Path("notes.ipynb"))
    ('01', None)
    """
    number = SHEET.match(path.name)
    return number[1] if number and number[1] in sheet_ids() else None


def master(sheet_id: str) -> Path:
    """The file in solutions/ that a sheet is made from.

    Raises:
        ValueError: the course's folder is not here.
    """
    for root in (Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents):
        for path in sorted((root / "solutions").glob(f"{sheet_id}_*.ipynb")):
            return path
    raise ValueError(f"There is no solutions/{sheet_id}_*.ipynb here; run this in the course's folder.")


def given_cells(sheet_id: str) -> list[str]:
    """The code that a sheet starts from: the cells of its master that are neither answers nor checks."""
    cells = code_cells(master(sheet_id).read_bytes())
    return [source for mark, source in cells if not mark.endswith(("-solution", "-check"))]


def _notebooks(entry: Path) -> tuple[list[Path], str]:
    """The notebooks of a student, in the folder or one folder deeper as nbgrader has them; or why there are none.

    Hidden files are not looked at, and links to folders not followed.
    """
    if entry.name.startswith("."):
        return [], ""
    if entry.is_symlink():
        return [], "is a symbolic link, which is not followed; put the folder itself there"
    if not entry.is_dir():
        return [], "is in no student's folder; put it into one" if entry.suffix == ".ipynb" else ""
    try:
        deeper = [path for path in entry.iterdir() if path.is_dir() and not path.is_symlink()]
        paths = [
            path for folder in (entry, *deeper) for path in folder.glob("[!.]*.ipynb") if path.parent.name[0] != "."
        ]
    except OSError as error:
        return [], f"cannot be read ({error.strerror}); change its permissions"
    return sorted(path for path in paths if path not in deeper), "" if paths else "holds no notebook"


def _wrong(student: str, sheet: str, paths: list[Path]) -> str:
    """Why these files of one student and sheet cannot be read; "" where they can."""
    if any(path.is_symlink() for path in paths):
        return "is a symbolic link, which is not followed; put the file itself there"
    if not sheet:
        return f"belongs to no sheet: its name should begin with one of {', '.join(sheet_ids())}"
    if ODD.search(student) or student != student.strip():
        return f"the folder's name {student!r} has characters that a gradebook cannot keep; rename it"
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths)
        return f"{len(paths)} notebooks for one sheet: {names}; keep the one that counts"
    return ""


def _shown(name: str) -> str:
    """A name that can be printed."""
    return name if name.isprintable() else ascii(name)[1:-1]
