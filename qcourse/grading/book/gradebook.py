"""The gradebook: nbgrader's own database, so that its formgrader and its exports go on working on what is graded here.

The idea: one process, the one that started the run, knows the database's address and writes; whatever grades, on this
machine or on others, gives back plain data. What a person has decided is never written over: where a new grade comes
in under a manual score, that score stays and is marked for review, as nbgrader itself does.

nbgrader 0.9 (nbgrader.api.Gradebook and the preprocessor SaveCells) on SQLAlchemy: SQLite by default, PostgreSQL by
URL. A cell "01-2-check" holds the points of exercise 01.2, "01-2-solution" its comment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from qcourse.grading.grades import SubmissionGrade

if TYPE_CHECKING:  # heavy, and of the extra `grading`: only what opens a gradebook needs them
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook
    from sqlalchemy.engine import URL, Engine

CHECK, SOLUTION = "-check", "-solution"


def default_url(folder: Path) -> str:
    """SQLite in the folder of the results, where nbgrader looks for it."""
    return f"sqlite:///{(folder / 'gradebook.db').resolve()}"


def gradebook_name(url: "str | URL") -> str:
    """The gradebook's address without the password.

    >>> gradebook_name("postgresql+psycopg2://teacher:secret@db/grades")
    'postgresql+psycopg2://teacher:***@db/grades'
    """
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


@contextmanager
def open_gradebook(url: str) -> Iterator["Gradebook"]:
    """nbgrader's gradebook at this address; tables that are not there, or not all of them, are made.

    Raises:
        ValueError: the address is none.
        OSError: the database refuses.
    """
    from nbgrader.api import Gradebook, InvalidEntry, app_log
    from sqlalchemy import create_engine, exc

    try:
        engine = create_engine(url)
        _make_tables(engine)
        engine.dispose()
        book = Gradebook(url)
    except (exc.ArgumentError, exc.NoSuchModuleError, ImportError) as error:
        raise ValueError(
            f"--db is no address of a database: {error}; try sqlite:///FILE"
        ) from error
    except exc.DBAPIError as error:
        raise _refused(url, error) from error
    loud = app_log.level
    app_log.setLevel("CRITICAL")  # nbgrader logs the traceback of what it then raises
    try:
        with book:
            yield book
    except (exc.DBAPIError, InvalidEntry) as error:
        raise _refused(url, error) from error
    finally:
        app_log.setLevel(loud)


def register(book: "Gradebook", sheet: str, master: "NotebookNode") -> None:
    """Enter a sheet, its exercises and what they are worth; again does no harm.

    Raises:
        ValueError: the gradebook has submissions of this sheet with other exercises.
    """
    from nbgrader.preprocessors import SaveCells

    if _registered(book, sheet, master):
        return
    book.update_or_create_assignment(sheet)
    known = {
        "notebook": sheet,
        "assignment": sheet,
        "db_url": book.engine.url.render_as_string(hide_password=False),
    }
    try:
        SaveCells().preprocess(master, {"nbgrader": known})
    except RuntimeError as error:
        raise ValueError(
            f"Sheet {sheet} has other exercises than the submissions in this gradebook: use another gradebook."
        ) from error
    finally:
        book.db.expire_all()  # written through a connection of its own


def record(book: "Gradebook", grade: SubmissionGrade, *, handed_in: datetime | None = None) -> None:
    """Enter a grade: all of it or nothing. A manual score stays, and is marked for review; so is what had a problem.

    Args:
        handed_in: when, in UTC and without a time zone; None where nobody knows.

    Raises:
        ValueError: points below 0 or above what the exercise is worth, or an exercise that the sheet does not have.
    """
    with book.db.no_autoflush:  # nbgrader links the new rows before it adds them
        book.update_or_create_student(grade.student)
        when = {"timestamp": handed_in} if handed_in else {}
        submission = book.update_or_create_submission(grade.sheet, grade.student, **when)
    notebook = next(one for one in submission.notebooks if one.name == grade.sheet)
    cells = {cell.name: cell for cell in notebook.grades}
    comments = {cell.name: cell for cell in notebook.comments}
    for exercise in grade.exercises:
        cell = cells.get(_cell(exercise.exercise, CHECK))
        if cell is None or not 0 <= exercise.points <= cell.max_score:
            worth = "no such exercise" if cell is None else f"0 to {cell.max_score:g} points for it"
            raise ValueError(
                f"points={exercise.points!r} of exercise {exercise.exercise} cannot be: there is {worth}"
            )
    for exercise in grade.exercises:
        cell = cells[_cell(exercise.exercise, CHECK)]
        cell.auto_score = float(exercise.points)
        cell.needs_manual_grade = cell.manual_score is not None or grade.problem is not None
        comments[_cell(exercise.exercise, SOLUTION)].auto_comment = exercise.reason
    book.db.commit()


def _registered(book: "Gradebook", sheet: str, master: "NotebookNode") -> bool:
    """Whether the gradebook knows the sheet and what each exercise on it is worth."""
    from nbgrader.api import MissingEntry

    marks = [cell.metadata.get("nbgrader", {}) for cell in master.cells]
    try:
        held = {cell.name: cell.max_score for cell in book.find_notebook(sheet, sheet).grade_cells}
    except MissingEntry:
        return False
    return held == {mark["grade_id"]: float(mark["points"]) for mark in marks if mark.get("grade")}


def _cell(exercise: str, kind: str) -> str:
    return exercise.replace(".", "-") + kind


def _make_tables(engine: "Engine") -> None:
    """nbgrader's tables and the version it knows them by; nbgrader itself would look for `alembic` on the PATH."""
    from alembic.script import ScriptDirectory
    from nbgrader.api import Base
    from nbgrader.dbutil import ALEMBIC_DIR
    from sqlalchemy import text

    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(
            text("CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL)")
        )
        if connection.execute(text("SELECT version_num FROM alembic_version")).first() is None:
            version = ScriptDirectory(ALEMBIC_DIR).get_current_head()
            connection.execute(
                text("INSERT INTO alembic_version VALUES (:version)"), {"version": version}
            )


def _refused(url: str, error: Exception) -> OSError:
    """One line: which database, and its own first words."""
    said = str(getattr(error, "orig", None) or error).strip().splitlines()
    why = said[0] if said else type(error).__name__
    return OSError(
        f"The gradebook {gradebook_name(url)} refuses: {why}. Grades are kept; run this again when it is back."
    )
