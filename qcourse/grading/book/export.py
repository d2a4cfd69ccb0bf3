"""Grades as a table that other systems read: plain CSV, Canvas, Moodle.

The idea: the gradebook says what counts, manual scores included, and each format is a function
from that to rows. The module `csv` quotes the fields; nbgrader's own exporter joins them with
commas, so a comma in a name shifts a grade into another column. A text that a spreadsheet would
take for a formula (=, +, -, @ first) gets an apostrophe before it.

Sources: Canvas, "How do I import grades in the Gradebook?", and its lib/gradebook_importer.rb;
Moodle, "Grade import", CSV file, and its core_text::trim_utf8_bom.
"""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcourse.grading.book.scores import Score

if TYPE_CHECKING:
    from nbgrader.api import Gradebook

BYTE_ORDER_MARK = "\ufeff"
# What a spreadsheet takes for the beginning of a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
CSV_HEADER = [
    "student",
    "last_name",
    "first_name",
    "email",
    "sheet",
    "exercise",
    "points",
    "max_points",
    "auto_points",
    "manual",
    "review",
]
CANVAS_HEADER = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
CANVAS_WORTH = ["    Points Possible", "", "", "", ""]
MOODLE_HEADER = ["username", "firstname", "lastname", "email"]
Table = list[list[str]]


@dataclass(frozen=True)
class Person:
    """A student as the gradebook has them; a name is empty if it was not entered."""

    id: str  # the name of the folder
    first_name: str
    last_name: str
    email: str
    lms_user_id: str  # of the learning platform, such as Canvas

    @property
    def listed(self) -> str:
        """Last name first, or the id if there is no name."""
        names = [name for name in (self.last_name, self.first_name) if name]
        return ", ".join(names) or self.id


def people(book: "Gradebook") -> list[Person]:
    """Return all students in the gradebook, by id."""
    found: list[Person] = []
    for student in book.students:
        # nbgrader holds None for what was not entered.
        person = Person(
            id=student.id,
            first_name=student.first_name or "",
            last_name=student.last_name or "",
            email=student.email or "",
            lms_user_id=student.lms_user_id or "",
        )
        found.append(person)
    return sorted(found, key=lambda person: person.id)


def export(kind: str, everyone: Iterable[Person], scores: Iterable[Score]) -> str:
    r"""Return the text of a file of this kind.

    Args:
        kind: "csv", "canvas" or "moodle".
        everyone: the students to list; one without a score gets empty fields.
        scores: of the sheets to list.

    Raises:
        ValueError: there is no such kind.

    >>> ada = Person("ada", "Ada", "Lovelace", "", "")
    >>> score = Score("ada", "01_quantizer", "01.1", 0.5, 1.0, 0.5, False, False, "", "")
    >>> export("moodle", [ada], [score]).splitlines()[1]
    '"ada","Ada","Lovelace","","0.5"'
    """
    if kind not in FORMATS:
        raise ValueError(f"format={kind!r} is unknown; the formats are {', '.join(FORMATS)}")
    make_table = FORMATS[kind]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n")
    for row in make_table(list(everyone), list(scores)):
        writer.writerow([_plain(cell) for cell in row])
    return text.getvalue()


def as_file(kind: str, text: str) -> str:
    """Return the text as it is written to a file: with the mark that tells Excel it is UTF-8."""
    # Moodle removes the mark; Canvas would read it as a part of the first field.
    if kind == "canvas":
        return text
    return f"{BYTE_ORDER_MARK}{text}"


def _csv(everyone: list[Person], scores: list[Score]) -> Table:
    """Return a row per exercise: what was graded, what counts, and who decided."""
    by_id = {person.id: person for person in everyone}
    table = [CSV_HEADER]
    for score in scores:
        # The caller may list only some of the students.
        if score.student not in by_id:
            continue
        person = by_id[score.student]
        auto_points = "" if score.auto_points is None else _number(score.auto_points)
        table.append(
            [
                score.student,
                person.last_name,
                person.first_name,
                person.email,
                score.sheet,
                score.exercise,
                _number(score.points),
                _number(score.max_points),
                auto_points,
                _yes(score.manual),
                _yes(score.review),
            ]
        )
    return table


def _canvas(everyone: list[Person], scores: list[Score]) -> Table:
    """Return a row per student, a column per sheet; the second row holds each sheet's worth."""
    earned = _earned(scores)
    worth = _worth(scores)
    # Canvas reads what a sheet is worth from the row below the header.
    worth_cells = [_number(points) for points in worth.values()]
    table = [[*CANVAS_HEADER, *worth], [*CANVAS_WORTH, *worth_cells]]
    for person in everyone:
        points = _points_cells(earned, person, worth)
        table.append([person.listed, person.lms_user_id, "", person.id, "", *points])
    return table


def _moodle(everyone: list[Person], scores: list[Score]) -> Table:
    """Return a row per student, a column per sheet; Moodle maps users by username or email."""
    earned = _earned(scores)
    worth = _worth(scores)
    table = [[*MOODLE_HEADER, *worth]]
    for person in everyone:
        points = _points_cells(earned, person, worth)
        table.append([person.id, person.first_name, person.last_name, person.email, *points])
    return table


FORMATS: dict[str, Callable[[list[Person], list[Score]], Table]] = {
    "csv": _csv,
    "canvas": _canvas,
    "moodle": _moodle,
}


def _earned(scores: list[Score]) -> dict[tuple[str, str], float]:
    """Return the points by student and sheet."""
    earned: dict[tuple[str, str], float] = {}
    for score in scores:
        key = (score.student, score.sheet)
        earned[key] = earned.get(key, 0.0) + score.points
    return earned


def _worth(scores: list[Score]) -> dict[str, float]:
    """Return the points that each sheet is worth."""
    exercises: dict[str, dict[str, float]] = {}
    for score in scores:
        exercises.setdefault(score.sheet, {})[score.exercise] = score.max_points
    return {sheet: sum(points.values()) for sheet, points in exercises.items()}


def _points_cells(
    earned: dict[tuple[str, str], float], person: Person, sheets: Iterable[str]
) -> list[str]:
    """Return a student's points by sheet; empty if nothing was handed in, which is not 0."""
    cells: list[str] = []
    for sheet in sheets:
        points = earned.get((person.id, sheet))
        cells.append("" if points is None else _number(points))
    return cells


def _number(value: float) -> str:
    """Return at most four digits after the point, without trailing zeros: 3, 0.5, 0.6667."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plain(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text
