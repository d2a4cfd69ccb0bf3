"""What was handed in: which files there are, and the cells in them that answer a sheet.

The idea: submitted/<student>/<sheet>.ipynb, or one folder deeper as nbgrader has it; the sheet is the number that the
file's name begins with. A file that cannot be graded is a Problem with a sentence, and stops no other. The course's
own cells come from solutions/, never from what was handed in.

Two steps: `find_submissions` looks at names only, `read_submission` at one file. `submitted_notebook.py` reads that file and says
which cell counts; `attempt.py` runs the cells.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from qcourse.checks.registry import known_id, load_sheet, sheet_ids
from qcourse.course_files import master
from qcourse.grading.grades import Submission
from qcourse.grading.submitted_notebook import IntakeError, code_cells, read_file, solution_of

SHEET = re.compile(r"(\d\d)(?!\d)")
PUNCTUATION = set("_.@+-'’(), ")  # besides letters, marks and digits of all scripts
MOST_NAMES = 5  # of files, in a sentence
LONGEST_NAME = 128  # characters that nbgrader's database has for a student's name


@dataclass(frozen=True)
class Found:
    """A file that may be a submission; nothing in it has been read.

    Args:
        student: the folder's name in Unicode's composed form, which differs on some file systems.
        sheet: "01_quantizer".
        path: the file.
    """

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

    @property
    def line(self) -> str:
        """One line that can be printed, whatever is in the names."""
        return printable(f"{self.student}/{self.path.name}: {self.reason}")


def find_submissions(folder: Path, sheet: str | None = None) -> tuple[list[Found], list[Problem]]:
    """The notebooks in folder/<student>/, by student and sheet, and what looks like one but cannot be.

    Args:
        folder: of all submissions.
        sheet: "01": only notebooks of that sheet; None: of every sheet.

    Raises:
        ValueError: there is no such folder, nothing to grade in it, or no such sheet.
    """
    wanted = None if sheet is None else known_id(sheet)
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder {folder}; it should hold a folder for each student with notebooks in it."
        )
    entries = sorted(folder.iterdir())
    _check_is_of_a_class(folder, entries)
    by_sheet: dict[tuple[str, str], list[Path]] = {}
    problems: list[Problem] = []
    for entry in entries:
        student = unicodedata.normalize("NFC", entry.name)
        paths, reason = _notebooks(entry)
        reason = reason or (name_problem(student) if paths else "")
        if reason:
            problems.append(Problem(student, "", entry, reason))
            continue
        for path in paths:
            by_sheet.setdefault((student, sheet_of(path) or path.name), []).append(path)
    found: list[Found] = []
    for (student, number), paths in by_sheet.items():
        if wanted is not None and number != wanted:
            continue
        name = master(number).stem if number in sheet_ids() else ""
        if reason := _wrong(name, paths):
            problems.append(Problem(student, name, paths[0], reason))
        else:
            found.append(Found(student, name, paths[0]))
    if not found and not problems:
        which = f"of sheet {wanted} " if wanted else ""
        raise ValueError(
            f"No submission {which}is in {folder}; it should hold <student>/<sheet>.ipynb, as ada/01_quantizer.ipynb."
        )
    return found, problems


def name_problem(student: str) -> str:
    """Why a gradebook cannot keep this name; "" where it can.

    >>> name_problem("Renée O'Neil"), name_problem("अदिति"), name_problem("a;b")
    ('', '', "is a folder with ';' (U+003B) in its name, which a gradebook cannot keep; rename it")
    """
    for letter in student:
        if letter not in PUNCTUATION and unicodedata.category(letter)[0] not in "LMN":
            what = (
                f"{letter!r} (U+{ord(letter):04X})"
                if letter.isprintable()
                else f"U+{ord(letter):04X}"
            )
            return f"is a folder with {what} in its name, which a gradebook cannot keep; rename it"
    if student != student.strip():
        return "is a folder whose name begins or ends with a space; rename it"
    if len(student) > LONGEST_NAME:
        return f"is a folder whose name is longer than {LONGEST_NAME} letters; rename it"
    return ""


def fingerprint(data: bytes) -> str:
    """What tells one handed-in file from another."""
    return hashlib.sha256(data).hexdigest()


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
        raise IntakeError(
            f"holds no solution cell of sheet {found.sheet}; was another notebook handed in?"
        )
    return Submission(found.student, found.sheet, found.path, sources, fingerprint(data))


def sheet_of(path: Path) -> str | None:
    """The sheet that a notebook's name begins with.

    >>> sheet_of(Path("01_quantizer (1).ipynb")), sheet_of(Path("notes.ipynb"))
    ('01', None)
    """
    number = SHEET.match(path.name)
    return number[1] if number and number[1] in sheet_ids() else None


def given_cells(sheet_id: str) -> list[str]:
    """The code that a sheet starts from: the cells of its master that are neither answers nor checks."""
    cells = code_cells(master(sheet_id).read_bytes())
    return [source for mark, source in cells if not mark.endswith(("-solution", "-check"))]


def _check_is_of_a_class(folder: Path, entries: list[Path]) -> None:
    """Refuse the folder of one student: its results would land among the submissions.

    Raises:
        ValueError: the folder holds sheets itself, and no other folder does.
    """
    own = [path for path in entries if _is_notebook(path) and sheet_of(path)]
    if own and not any(path.is_dir() and _notebooks(path)[0] for path in entries):
        raise ValueError(
            f"{folder} holds {own[0].name} itself, so it looks like the folder of one student; name the folder above."
        )


def _notebooks(entry: Path) -> tuple[list[Path], str]:
    """The notebooks of a student, in the folder or one folder deeper as nbgrader has them; or why there are none.

    Hidden files are not looked at, and links to folders not followed.
    """
    if entry.name.startswith("."):
        return [], ""
    if entry.is_symlink():
        return [], "is a symbolic link, which is not followed; put the folder itself there"
    if not entry.is_dir():
        return [], "is in no student's folder; put it into one" if _is_notebook(entry) else ""
    try:
        inside = [path for path in entry.iterdir() if not path.name.startswith(".")]
        deeper = [path for path in inside if path.is_dir() and not path.is_symlink()]
        files = set(inside).difference(deeper)
        paths = [*files, *(path for folder in deeper for path in folder.iterdir())]
    except OSError as error:
        return [], f"cannot be read ({error.strerror}); change its permissions"
    found = sorted(path for path in paths if _is_notebook(path))
    return found, "" if found else "holds no notebook"


def _is_notebook(path: Path) -> bool:
    return path.suffix.lower() == ".ipynb" and not path.name.startswith(".")


def _wrong(sheet: str, paths: list[Path]) -> str:
    """Why these files of one student and sheet cannot be read; "" where they can."""
    if any(path.is_symlink() for path in paths):
        return "is a symbolic link, which is not followed; put the file itself there"
    if not sheet:
        return f"belongs to no sheet: its name should begin with one of {', '.join(sheet_ids())}"
    if len(paths) > 1:
        names = ", ".join(printable(path.name) for path in paths[:MOST_NAMES])
        more = ", ..." if len(paths) > MOST_NAMES else ""
        return f"{len(paths)} notebooks for one sheet: {names}{more}; keep the one that counts"
    return ""


def printable(text: str) -> str:
    """The text with what cannot be printed, or is not Unicode, spelled out.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
