"""The gradebook on SQLite and on PostgreSQL: what is entered, what stays, what nbgrader sees."""

import os
import sqlite3
import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from standins import SHEET, WORTH, grade
from traitlets.config import Config

from qcourse.course_files import master
from qcourse.grading.book import formgrader
from qcourse.grading.book.gradebook import default_url, open_gradebook, record, register
from qcourse.grading.book.scores import Score, graded_points, scores, without
from qcourse.grading.grades import SubmissionGrade

MASTER = formgrader.blank_master(master("01"))


def entered(url: str, *grades: SubmissionGrade) -> None:
    with open_gradebook(url) as book:
        register(book, SHEET, MASTER)
        for one in grades:
            record(book, one)


def held(url: str) -> list[Score]:
    with open_gradebook(url) as book:
        return scores(book)


def by_hand(
    url: str, student: str, exercise: str, points: float, comment: str | None = None
) -> None:
    """What a person does in the formgrader."""
    cell = exercise.replace(".", "-")
    with open_gradebook(url) as book:
        one = book.find_grade(f"{cell}-check", SHEET, SHEET, student)
        one.manual_score, one.needs_manual_grade = points, False
        book.find_comment(f"{cell}-solution", SHEET, SHEET, student).manual_comment = comment
        book.db.commit()


def test_what_is_entered_is_read_back(url: str) -> None:
    entered(url, grade("ada", {"01.2": 1.5}), grade("bob, the 2nd"))
    read = held(url)
    assert [(one.student, one.exercise) for one in read] == [
        (student, exercise) for student in ("ada", "bob, the 2nd") for exercise in WORTH
    ]
    assert read[1] == Score(
        "ada", SHEET, "01.2", 1.5, 3.0, 1.5, False, False, "01.2 is off", "01.2 is off"
    )
    assert [one.points for one in read[5:]] == list(WORTH.values())


def test_a_manual_score_stays_and_is_marked_for_review(url: str) -> None:
    entered(url, grade("ada", {"01.2": 1.5}))
    by_hand(url, "ada", "01.2", 2.75, "a good idea")
    entered(url, grade("ada", {"01.2": 0.5, "01.3": 0}))
    first, second, third, *_ = held(url)
    assert (second.points, second.auto_points) == (2.75, 0.5)
    assert (second.manual, second.review) == (True, True)
    assert (second.comment, second.auto_comment) == ("a good idea", "01.2 is off")
    assert (first.points, first.manual, first.review) == (1, False, False)
    assert (third.points, third.review) == (0, False)


def test_extra_credit_counts(url: str) -> None:
    entered(url, grade("ada"))
    with open_gradebook(url) as book:
        book.find_grade("01-1-check", SHEET, SHEET, "ada").extra_credit = 0.5
        book.db.commit()
    assert held(url)[0].points == 1.5


def test_what_had_a_problem_is_marked_for_review(url: str) -> None:
    entered(url, grade("ada", dict.fromkeys(WORTH, 0.0), problem="is empty"))
    assert all(one.review for one in held(url))
    entered(url, grade("ada"))
    assert not any(one.review for one in held(url))


@pytest.mark.parametrize("change", [{"points": 1.5}, {"points": -0.5}, {"exercise": "01.9"}])
def test_points_that_cannot_be_are_refused_and_nothing_is_entered(url: str, change: dict) -> None:
    wrong = grade("ada", {"01.2": 1.0})
    # A grade cannot be made of these values.
    for name, value in change.items():
        object.__setattr__(wrong.exercises[0], name, value)
    entered(url, grade("ada"))
    message = r"points=.* of exercise 01\.[19] cannot be: there is (0 to 1 points|no such)"
    with pytest.raises(ValueError, match=message):
        entered(url, wrong)
    assert [one.points for one in held(url)] == list(WORTH.values())


def test_what_the_gradebook_lacks(url: str) -> None:
    ada = grade("ada")
    bob = grade("bob", {"01.1": 0.5})
    eve = grade("eve")
    entered(url, ada, bob)
    with open_gradebook(url) as book:
        assert without(graded_points(book), [ada, bob, eve]) == [eve]
        others = [grade("ada", {"01.1": 0.5}), grade("bob", {"01.1": 0.25})]
        assert without(graded_points(book), others) != []
        book.find_comment("01-1-solution", SHEET, SHEET, "bob").auto_comment = "else"
        book.db.commit()
        assert without(graded_points(book), [ada, bob]) == [bob]


def test_registering_again_changes_nothing_and_another_sheet_is_refused(url: str) -> None:
    entered(url, grade("ada"))
    entered(url)
    assert len(held(url)) == len(WORTH)
    shorter = formgrader.blank_master(master("01"))
    shorter.cells = [
        cell
        for cell in shorter.cells
        if not cell.metadata["nbgrader"]["grade_id"].startswith("01-5")
    ]
    with (
        open_gradebook(url) as book,
        pytest.raises(ValueError, match=f"Sheet {SHEET} has other exercises than"),
    ):
        register(book, SHEET, shorter)


def test_tables_need_no_alembic_on_the_path_and_are_made_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    url = default_url(tmp_path)
    entered(url)
    with sqlite3.connect(tmp_path / "gradebook.db") as database:
        (version,) = database.execute("SELECT version_num FROM alembic_version").fetchall()
        database.execute("DROP TABLE alembic_version")  # as where making them was cut short
        database.execute("DROP TABLE comment")
    entered(url, grade("ada"))
    with sqlite3.connect(tmp_path / "gradebook.db") as database:
        assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [version]
    assert len(held(url)) == len(WORTH)


def test_the_version_is_the_one_that_nbgrader_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbgrader.api import Gradebook

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    Gradebook(f"sqlite:///{tmp_path}/theirs.db").close()
    entered(f"sqlite:///{tmp_path}/ours.db")
    found = []
    for name in ("theirs", "ours"):
        with sqlite3.connect(tmp_path / f"{name}.db") as database:
            rows = database.execute(
                "SELECT sql FROM sqlite_master WHERE type = 'table' ORDER BY name"
            ).fetchall()
            tables = sorted(sql.replace("IF NOT EXISTS ", "") for (sql,) in rows)
            version = database.execute("SELECT * FROM alembic_version").fetchall()
            found.append((version, tables))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg2://teacher:secret@127.0.0.1:1/grades",
        "sqlite:////no/such/folder/gradebook.db",
    ],
)
def test_a_database_that_refuses_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(OSError, match="refuses: ") as refused, open_gradebook(url):
        pass
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("url", ["grades.db", "nosuch://x", ""])
def test_an_address_that_is_none(url: str) -> None:
    with (
        pytest.raises(ValueError, match="--db is not the address of a database"),
        open_gradebook(url),
    ):
        pass


def test_a_database_that_goes_away(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = default_url(tmp_path)
    entered(url)

    def write_what_may_only_be_read() -> None:
        with open_gradebook(url) as book:
            book.db.execute(text("PRAGMA query_only = ON"))
            book.db.commit()
            record(book, grade("ada"))

    with pytest.raises(OSError, match=r"refuses: .*readonly"):
        write_what_may_only_be_read()
    assert not caplog.records


def test_nbgrader_s_formgrader_sees_the_grades(url: str, tmp_path: Path) -> None:
    from nbgrader.apps.api import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    ada = grade("ada", {"01.2": 1.5})
    bob = grade("bob")
    formgrader.write_course(tmp_path, {SHEET: MASTER})
    for one in (ada, bob):
        formgrader.write_marked(tmp_path, one, {"01.2": "def quantize(): ..."}, MASTER)
    entered(url, ada, bob)
    by_hand(url, "ada", "01.2", 2.0)
    config = Config()
    config.CourseDirectory.root = str(tmp_path)
    config.CourseDirectory.db_url = url
    config.Exchange.root = str(tmp_path / "exchange")
    api = NbGraderAPI(coursedir=CourseDirectory(config=config), config=config)
    (assignment,) = api.get_assignments()
    assert (assignment["name"], assignment["max_score"]) == (SHEET, 12)
    assert assignment["average_score"] == 11.5
    found = {
        one["student"]: (one["score"], one["max_score"], one["autograded"])
        for one in api.get_submissions(SHEET)
    }
    assert found == {"ada": (11, 12, True), "bob": (12, 12, True)}
    notebooks = api.get_notebook_submissions(SHEET, SHEET)
    assert sorted(one["student"] for one in notebooks) == ["ada", "bob"]
    assert api.get_student_notebook_submissions("ada", SHEET)[0]["score"] == 11
