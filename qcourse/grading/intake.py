"""What was handed in: which files there are, and the cells in them that answer a sheet.

The idea: the files are submitted/<student>/<sheet>.ipynb, or one folder deeper as in nbgrader; the
sheet is the number that a file's name begins with. A file that cannot be graded becomes a Problem
with one sentence, and stops no other. `find_submissions` looks at names only, `read_submission` at
one file. The course's own cells come from solutions/, never from what was handed in.

`submitted_notebook.py` reads a file and says which cell counts; `student_names.py` checks names.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from qcourse.checks.registry import known_id, load_sheet, sheet_ids
from qcourse.course_files import master
from qcourse.grading.grades import HandedIn, Submission, sheet_number
from qcourse.grading.student_names import name_problem, printable
from qcourse.grading.submitted_notebook import IntakeError, code_cells, read_file, solution_of

SHEET = re.compile(r"(\d\d)(?!\d)")
MOST_NAMES = 5  # of files, in a sentence


@dataclass(frozen=True)
class Found(HandedIn):
    """A file that may be a submission; nothing in it has been read."""


@dataclass(frozen=True)
class Problem(HandedIn):
    """A file or folder that cannot be graded."""

    reason: str  # one sentence, which goes on from the path

    @property
    def line(self) -> str:
        """One line that can be printed, whatever the names contain."""
        return printable(f"{self.student}/{self.path.name}: {self.reason}")


def find_submissions(folder: Path, sheet: str | None = None) -> tuple[list[Found], list[Problem]]:
    """Return the notebooks in folder/<student>/, and what looks like one but cannot be graded.

    Args:
        sheet: "01" for the notebooks of that sheet only; None for every sheet.

    Raises:
        ValueError: there is no such folder, nothing to grade in it, or no such sheet.
    """
    wanted = None if sheet is None else known_id(sheet)
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}; "
            "it should hold a folder for each student with notebooks in it."
        )
    entries = sorted(folder.iterdir())
    _refuse_folder_of_one_student(folder, entries)
    groups, problems = _grouped(entries)
    found, unclear = _one_file_each(groups, wanted)
    problems += unclear
    if not found and not problems:
        which = f"of sheet {wanted} " if wanted else ""
        raise ValueError(
            f"No submission {which}is in {folder}; "
            "it should hold <student>/<sheet>.ipynb, as ada/01_quantizer.ipynb."
        )
    return found, problems


def fingerprint(data: bytes) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_submission(found: Found) -> Submission:
    """Return the solution cells of a notebook.

    Raises:
        IntakeError: it is not a regular file, is too large, or is not a notebook of this course.
    """
    data = read_file(found.path)
    cells = code_cells(data)
    sources: dict[str, str] = {}
    for exercise in load_sheet(sheet_number(found.sheet)).exercises:
        source = solution_of(exercise, cells)
        if source is not None:
            sources[exercise.id] = source
    if not sources:
        raise IntakeError(
            f"holds no solution cell of sheet {found.sheet}; was another notebook handed in?"
        )
    return Submission(found.student, found.sheet, found.path, sources, fingerprint(data))


def sheet_of(path: Path) -> str | None:
    """Return the sheet that a notebook's name begins with.

    >>> sheet_of(Path("01_quantizer (1).ipynb")), sheet_of(Path("notes.ipynb"))
    ('01', None)
    """
    # Two digits, and no third: "01_quantizer", but not "2024.ipynb".
    match = SHEET.match(path.name)
    if match is None or match[1] not in sheet_ids():
        return None
    return match[1]


def given_cells(sheet_id: str) -> list[str]:
    """Return the code that a sheet starts from: its master's cells without answers and checks."""
    cells = code_cells(master(sheet_id).read_bytes())
    return [source for mark, source in cells if not mark.endswith(("-solution", "-check"))]


def _refuse_folder_of_one_student(folder: Path, entries: list[Path]) -> None:
    """Raise ValueError if the folder holds sheets itself and no folder inside it does.

    The results would otherwise be written among the submissions.
    """
    own = [path for path in entries if _is_notebook(path) and sheet_of(path)]
    if not own:
        return
    if not any(path.is_dir() and _notebooks(path)[0] for path in entries):
        raise ValueError(
            f"{folder} holds {own[0].name} itself, so it looks like the folder of one student; "
            "name the folder above."
        )


def _grouped(entries: list[Path]) -> tuple[dict[tuple[str, str], list[Path]], list[Problem]]:
    """Return the notebooks by student and sheet, or by file name if the sheet is unknown."""
    groups: dict[tuple[str, str], list[Path]] = {}
    problems: list[Problem] = []
    for entry in entries:
        student = unicodedata.normalize("NFC", entry.name)
        paths, reason = _notebooks(entry)
        # A folder without notebooks may have any name.
        if paths and not reason:
            reason = name_problem(student)
        if reason:
            problems.append(Problem(student, "", entry, reason))
            continue
        for path in paths:
            key = (student, sheet_of(path) or path.name)
            groups.setdefault(key, []).append(path)
    return groups, problems


def _one_file_each(
    groups: dict[tuple[str, str], list[Path]], wanted: str | None
) -> tuple[list[Found], list[Problem]]:
    """Return the file of each student and wanted sheet, and the groups that have no such file."""
    found: list[Found] = []
    problems: list[Problem] = []
    for (student, number), paths in groups.items():
        if wanted is not None and number != wanted:
            continue
        # Several files for one sheet, or a file of no sheet, cannot be graded.
        name = master(number).stem if number in sheet_ids() else ""
        reason = _unreadable(name, paths)
        if reason:
            problems.append(Problem(student, name, paths[0], reason))
        else:
            found.append(Found(student, name, paths[0]))
    return found, problems


def _notebooks(entry: Path) -> tuple[list[Path], str]:
    """Return a student's notebooks, in the folder or one folder deeper, or why there are none."""
    # Hidden entries are skipped without a word.
    if entry.name.startswith("."):
        return [], ""
    if entry.is_symlink():
        return [], "is a symbolic link, which is not followed; put the folder itself there"
    if not entry.is_dir():
        misplaced = "is in no student's folder; put it into one"
        return [], misplaced if _is_notebook(entry) else ""
    # Files in the student's folder, and files one folder deeper; links are not followed.
    try:
        inside = [path for path in entry.iterdir() if not path.name.startswith(".")]
        deeper = [path for path in inside if path.is_dir() and not path.is_symlink()]
        paths = list(set(inside).difference(deeper))
        for folder in deeper:
            paths += folder.iterdir()
    except OSError as error:
        return [], f"cannot be read ({error.strerror}); change its permissions"
    found = sorted(path for path in paths if _is_notebook(path))
    return found, "" if found else "holds no notebook"


def _is_notebook(path: Path) -> bool:
    return path.suffix.lower() == ".ipynb" and not path.name.startswith(".")


def _unreadable(sheet: str, paths: list[Path]) -> str:
    """Return why these files of one student and sheet cannot be read; "" if they can."""
    if any(path.is_symlink() for path in paths):
        return "is a symbolic link, which is not followed; put the file itself there"
    if not sheet:
        return f"belongs to no sheet: its name should begin with one of {', '.join(sheet_ids())}"
    if len(paths) > 1:
        names = ", ".join(printable(path.name) for path in paths[:MOST_NAMES])
        more = ", ..." if len(paths) > MOST_NAMES else ""
        return f"{len(paths)} notebooks for one sheet: {names}{more}; keep the one that counts"
    return ""
