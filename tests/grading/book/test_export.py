"""The tables that other systems read, read back by the module csv."""

import csv
import io

import pytest

from qcourse.grading.book.export import Person, export
from qcourse.grading.book.scores import Score

ADA = Person("ada", "Ada", "King, Countess of Lovelace", "ada@example.org", "17")
BOB = Person('bob "the\nbuilder"', "", "", "", "")
EVE = Person("eve", "=HYPERLINK()", "+1", "@eve", "-1")


def score(
    student: str, sheet: str, exercise: str, points: float, worth: float = 3.0, manual: bool = False
) -> Score:
    return Score(student, sheet, exercise, points, worth, 0.5, manual, manual, "", "")


SCORES = [
    score("ada", "01_quantizer", "01.1", 1.0, 1.0),
    score("ada", "01_quantizer", "01.2", 2 / 3, manual=True),
    score("ada", "02_granularity", "02.1", 2.5),
    score(BOB.id, "01_quantizer", "01.1", 0.0, 1.0),
    score(BOB.id, "01_quantizer", "01.2", 3.0),
]


def table(kind: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(export(kind, [ADA, BOB, EVE], SCORES), newline="")))


def test_csv_has_a_row_an_exercise() -> None:
    header, *rows = table("csv")
    assert header[4:] == [
        "sheet",
        "exercise",
        "points",
        "max_points",
        "auto_points",
        "manual",
        "review",
    ]
    assert len(rows) == len(SCORES)
    assert rows[1] == [
        *("ada", "King, Countess of Lovelace", "Ada", "ada@example.org"),
        *("01_quantizer", "01.2", "0.6667", "3", "0.5", "yes", "yes"),
    ]
    assert rows[3][0] == BOB.id


def test_canvas_has_a_row_a_student_and_says_what_a_sheet_is_worth() -> None:
    header, worth, *rows = table("canvas")
    assert header == [
        "Student",
        "ID",
        "SIS User ID",
        "SIS Login ID",
        "Section",
        "01_quantizer",
        "02_granularity",
    ]
    assert worth == ["    Points Possible", "", "", "", "", "4", "3"]
    assert rows[0] == ["King, Countess of Lovelace, Ada", "17", "", "ada", "", "1.6667", "2.5"]
    assert rows[1] == [BOB.id, "", "", BOB.id, "", "3", ""]  # nothing handed in is no 0
    assert rows[2][-2:] == ["", ""]


def test_moodle_maps_users_by_name_or_email() -> None:
    header, ada, _, _ = table("moodle")
    assert header == [
        "username",
        "firstname",
        "lastname",
        "email",
        "01_quantizer",
        "02_granularity",
    ]
    assert ada == ["ada", "Ada", "King, Countess of Lovelace", "ada@example.org", "1.6667", "2.5"]


@pytest.mark.parametrize("kind", ["csv", "canvas", "moodle"])
def test_no_cell_is_a_formula(kind: str) -> None:
    scores = [*SCORES, score("eve", "01_quantizer", "01.1", 1.0)]
    cells = [cell for row in csv.reader(io.StringIO(export(kind, [EVE], scores))) for cell in row]
    assert any("HYPERLINK" in cell for cell in cells) or kind == "canvas"
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


def test_an_unknown_format() -> None:
    with pytest.raises(
        ValueError, match="format='xls' is unknown; the formats are csv, canvas, moodle"
    ):
        export("xls", [], [])
