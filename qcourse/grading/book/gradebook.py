"""The gradebook: nbgrader's own database, so its formgrader and its exports work on our grades.

The idea: only the process that started the run knows the database's address and writes; grading
processes give back plain data. A person's decision is never overwritten: if a new grade comes in
under a manual score, that score stays and is marked for review, as in nbgrader itself.

Source: nbgrader 0.9 (nbgrader.api.Gradebook and the preprocessor SaveCells) on SQLAlchemy, with
SQLite by default and PostgreSQL by URL. `scores.py` reads what this file writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcourse.grading.grades import ExerciseGrade, SubmissionGrade

# These imports are slow and need the extra `grading`, so only open_gradebook loads them.
if TYPE_CHECKING:
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook
    from sqlalchemy.engine import URL, Engine

# The cell "01-2-check" holds the points of exercise 01.2, "01-2-solution" its comment.
CHECK = "-check"
SOLUTION = "-solution"


def default_url(folder: Path) -> str:
    """Return the address of SQLite's file in the results folder, where nbgrader looks for it."""
    path = (folder / "gradebook.db").resolve()
    return f"sqlite:///{path}"


def gradebook_name(url: "str | URL") -> str:
    """Return the gradebook's address without the password.

    >>> gradebook_name("postgresql+psycopg2://teacher:secret@db/grades")
    'postgresql+psycopg2://teacher:***@db/grades'
    """
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


@contextmanager
def open_gradebook(url: str) -> Iterator["Gradebook"]:
    """Open nbgrader's gradebook at this address; make the tables that it lacks.

    Raises:
        ValueError: it is not the address of a database.
        OSError: the database refuses.
    """
    from nbgrader.api import InvalidEntry, app_log
    from sqlalchemy import exc

    book = _opened(url)
    # nbgrader logs the traceback of an error that it then raises.
    level_before = app_log.level
    app_log.setLevel("CRITICAL")
    try:
        with book:
            yield book
    except (exc.DBAPIError, InvalidEntry) as error:
        raise _refused(url, error) from error
    finally:
        app_log.setLevel(level_before)


def register(book: "Gradebook", sheet: str, master: "NotebookNode") -> None:
    """Enter a sheet, its exercises and what they are worth; a second time changes nothing.

    Raises:
        ValueError: the gradebook has submissions of this sheet with other exercises.
    """
    from nbgrader.preprocessors import SaveCells

    if _registered(book, sheet, master):
        return
    book.update_or_create_assignment(sheet)
    url = book.engine.url.render_as_string(hide_password=False)
    names = {"notebook": sheet, "assignment": sheet, "db_url": url}
    try:
        SaveCells().preprocess(master, {"nbgrader": names})
    except RuntimeError as error:
        raise ValueError(
            f"Sheet {sheet} has other exercises than the submissions in this gradebook: "
            "use another gradebook."
        ) from error
    finally:
        # SaveCells writes through its own connection, so what this one has read may be old.
        book.db.expire_all()


def record(book: "Gradebook", grade: SubmissionGrade, *, handed_in: datetime | None = None) -> None:
    """Enter a grade, all of it or nothing; a manual score stays, and is marked for review.

    Args:
        handed_in: when, in UTC and without a time zone; None if unknown.

    Raises:
        ValueError: the sheet does not have such an exercise, or not so many points for it.
    """
    notebook = _submitted_notebook(book, grade, handed_in)
    points_cells = {cell.name: cell for cell in notebook.grades}
    comment_cells = {cell.name: cell for cell in notebook.comments}

    # Every exercise is checked before the first is written.
    for exercise in grade.exercises:
        _check_points(exercise, points_cells.get(_cell(exercise, CHECK)))
    for exercise in grade.exercises:
        cell = points_cells[_cell(exercise, CHECK)]
        cell.auto_score = float(exercise.points)
        cell.needs_manual_grade = cell.manual_score is not None or grade.problem is not None
        comment_cells[_cell(exercise, SOLUTION)].auto_comment = exercise.reason
    book.db.commit()


def _opened(url: str) -> "Gradebook":
    from nbgrader.api import Gradebook
    from sqlalchemy import create_engine, exc

    try:
        engine = create_engine(url)
        _make_tables(engine)
        engine.dispose()
        return Gradebook(url)
    except (exc.ArgumentError, exc.NoSuchModuleError, ImportError) as error:
        raise ValueError(
            f"--db is not the address of a database: {error}; try sqlite:///FILE"
        ) from error
    except exc.DBAPIError as error:
        raise _refused(url, error) from error


def _submitted_notebook(
    book: "Gradebook", grade: SubmissionGrade, handed_in: datetime | None
) -> Any:
    """Return nbgrader's row for this student's notebook, made if it is not there."""
    when = {"timestamp": handed_in} if handed_in else {}
    # nbgrader links the new rows before it adds them, which a flush in between would refuse.
    with book.db.no_autoflush:
        book.update_or_create_student(grade.student)
        submission = book.update_or_create_submission(grade.sheet, grade.student, **when)
    return next(one for one in submission.notebooks if one.name == grade.sheet)


def _check_points(exercise: ExerciseGrade, cell: Any) -> None:
    """Raise ValueError unless the cell exists and is worth at least these points."""
    if cell is not None and 0 <= exercise.points <= cell.max_score:
        return
    worth = "no such exercise" if cell is None else f"0 to {cell.max_score:g} points for it"
    raise ValueError(
        f"points={exercise.points!r} of exercise {exercise.exercise} cannot be: there is {worth}"
    )


def _registered(book: "Gradebook", sheet: str, master: "NotebookNode") -> bool:
    """Return whether the gradebook has the sheet with these exercises and points."""
    from nbgrader.api import MissingEntry

    try:
        notebook = book.find_notebook(sheet, sheet)
    except MissingEntry:
        return False
    held = {cell.name: cell.max_score for cell in notebook.grade_cells}
    marks = [cell.metadata.get("nbgrader", {}) for cell in master.cells]
    wanted = {mark["grade_id"]: float(mark["points"]) for mark in marks if mark.get("grade")}
    return held == wanted


def _cell(exercise: ExerciseGrade, kind: str) -> str:
    return exercise.exercise.replace(".", "-") + kind


def _make_tables(engine: "Engine") -> None:
    """Make nbgrader's tables, and enter their version."""
    from alembic.script import ScriptDirectory
    from nbgrader.api import Base
    from nbgrader.dbutil import ALEMBIC_DIR
    from sqlalchemy import text

    make_version_table = text(
        "CREATE TABLE IF NOT EXISTS alembic_version (version_num VARCHAR(32) NOT NULL)"
    )
    read_version = text("SELECT version_num FROM alembic_version")
    write_version = text("INSERT INTO alembic_version VALUES (:version)")
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        # nbgrader itself would run `alembic`, which may not be on the PATH.
        connection.execute(make_version_table)
        if connection.execute(read_version).first() is None:
            version = ScriptDirectory(ALEMBIC_DIR).get_current_head()
            connection.execute(write_version, {"version": version})


def _refused(url: str, error: Exception) -> OSError:
    """Return an error of one line: which database, and the first line of what it says."""
    database_error = getattr(error, "orig", None) or error
    lines = str(database_error).strip().splitlines()
    why = lines[0] if lines else type(error).__name__
    return OSError(
        f"The gradebook {gradebook_name(url)} refuses: {why}. "
        "Grades are kept; run this again when it is back."
    )
