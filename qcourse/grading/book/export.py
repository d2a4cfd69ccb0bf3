"""Grades as a table that other systems read: plain CSV, Canvas, Moodle.

The idea: the gradebook says what counts, manual scores included, and each format is a function from that to rows; the
module `csv` does the quoting. nbgrader's own exporter joins fields with commas, so that a name with a comma in it
shifts a student's grade into another column.

A text that a spreadsheet would take for a formula (=, +, -, @ first) gets an apostrophe before it, which shows it as it
is.

Sources: Canvas, "How do I import grades in the Gradebook?", and its lib/gradebook_importer.rb; Moodle, "Grade import",
CSV file, and its core_text::trim_utf8_bom.
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
FORMULA = ("=", "+", "-", "@", "\t", "\r")
Table = list[list[str]]


@dataclass(frozen=True)
class Person:
    """A student as the gradebook knows them; names are empty where nobody has entered them."""

    id: str
    first_name: str
    last_name: str
    email: str
    lms_user_id: str

    @property
    def listed(self) -> str:
        """Last name first, or the id where there is no name."""
        return ", ".join(filter(None, (self.last_name, self.first_name))) or self.id


def people(book: "Gradebook") -> list[Person]:
    """Everyone in the gradebook, by id."""
    found = [
        Person(
            one.id,
            one.first_name or "",
            one.last_name or "",
            one.email or "",
            one.lms_user_id or "",
        )
        for one in book.students
    ]
    return sorted(found, key=lambda person: person.id)


def export(kind: str, everyone: Iterable[Person], scores: Iterable[Score]) -> str:
    r"""The text of a file of this kind.

    Args:
        kind: "csv", "canvas" or "moodle".
        everyone: whom to list; who has no score gets empty fields.
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
    text = io.StringIO()
    rows = FORMATS[kind](list(everyone), list(scores))
    csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows(
        [map(_plain, row) for row in rows]
    )
    return text.getvalue()


def as_file(kind: str, text: str) -> str:
    """The text as it is written to a file: with the mark that tells Excel that it is UTF-8.

    Moodle takes that mark away. Canvas would read it as a part of the first field, and then refuse the quote after it.
    """
    return text if kind == "canvas" else f"{BYTE_ORDER_MARK}{text}"


def _csv(everyone: list[Person], scores: list[Score]) -> Table:
    """A row an exercise: what was graded, what counts, and who decided."""
    known = {person.id: person for person in everyone}
    header = [
        "student",
        "last_name",
        "first_name",
        "email",
        "sheet",
        "exercise",
        "points",
        "max_points",
        "auto_points",
    ]
    rows = [
        [
            *(
                one.student,
                known[one.student].last_name,
                known[one.student].first_name,
                known[one.student].email,
            ),
            *(one.sheet, one.exercise, _number(one.points), _number(one.max_points)),
            *(
                "" if one.auto_points is None else _number(one.auto_points),
                _yes(one.manual),
                _yes(one.review),
            ),
        ]
        for one in scores
        if one.student in known
    ]
    return [[*header, "manual", "review"], *rows]


def _canvas(everyone: list[Person], scores: list[Score]) -> Table:
    """A row a student, a column a sheet; the second row says what each sheet is worth."""
    earned, worth = _sums(scores)
    header = ["Student", "ID", "SIS User ID", "SIS Login ID", "Section"]
    rows = [
        [person.listed, person.lms_user_id, "", person.id, "", *_earned(earned, person, worth)]
        for person in everyone
    ]
    return [
        [*header, *worth],
        ["    Points Possible", "", "", "", "", *map(_number, worth.values())],
        *rows,
    ]


def _moodle(everyone: list[Person], scores: list[Score]) -> Table:
    """A row a student, a column a sheet; Moodle maps users by username or email when it imports."""
    earned, worth = _sums(scores)
    header = ["username", "firstname", "lastname", "email"]
    rows = [
        [
            person.id,
            person.first_name,
            person.last_name,
            person.email,
            *_earned(earned, person, worth),
        ]
        for person in everyone
    ]
    return [[*header, *worth], *rows]


FORMATS: dict[str, Callable[[list[Person], list[Score]], Table]] = {
    "csv": _csv,
    "canvas": _canvas,
    "moodle": _moodle,
}


def _sums(scores: list[Score]) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Points by student and sheet, and what each sheet is worth."""
    earned: dict[tuple[str, str], float] = {}
    worth: dict[str, dict[str, float]] = {}
    for one in scores:
        earned[one.student, one.sheet] = earned.get((one.student, one.sheet), 0.0) + one.points
        worth.setdefault(one.sheet, {})[one.exercise] = one.max_points
    return earned, {sheet: sum(exercises.values()) for sheet, exercises in worth.items()}


def _earned(
    earned: dict[tuple[str, str], float], person: Person, sheets: Iterable[str]
) -> list[str]:
    """A student's points by sheet; empty where nothing was handed in, which is not the same as 0."""
    return [
        _number(earned[person.id, sheet]) if (person.id, sheet) in earned else ""
        for sheet in sheets
    ]


def _number(value: float) -> str:
    """At most four digits after the point, and none that say nothing: 3, 0.5, 0.6667."""
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plain(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA) else text
