"""What the gradebook says now, as plain values: for feedback, exports, and what it lacks.

The idea: nbgrader's own tables are read in two queries for a whole class, one for points and one
for comments, and joined by student and exercise.

`gradebook.py` writes those tables; this file writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcourse.grading.book.gradebook import CHECK, SOLUTION
from qcourse.grading.grades import SubmissionGrade

if TYPE_CHECKING:
    from nbgrader.api import Gradebook

# What was graded, and the reason, by student, sheet and exercise.
Held = dict[tuple[str, str, str], tuple[float | None, str]]


@dataclass(frozen=True)
class Score:
    """What the gradebook says of one exercise of one student."""

    student: str
    sheet: str  # "01_quantizer"
    exercise: str  # "01.2"
    points: float  # what counts, extra credit included
    max_points: float  # what the exercise is worth
    auto_points: float | None  # what was graded; None before it is
    manual: bool  # whether a person has set the points
    review: bool  # whether a person should look at it
    comment: str  # a person's, or the grader's reason if there is none
    auto_comment: str  # the grader's reason


def scores(book: "Gradebook", sheet: str | None = None) -> list[Score]:
    """Return what the gradebook holds, by sheet, student and exercise, in two queries."""
    comments = _comments(book, sheet)
    found: list[Score] = []
    for row in _grade_rows(book, sheet):
        # A check "01-2-check" holds the points, its solution "01-2-solution" the comment.
        exercise = row.cell.removesuffix(CHECK)
        manual_comment, auto_comment = comments.get((row.sheet, row.student, exercise), ("", ""))
        score = Score(
            student=row.student,
            sheet=row.sheet,
            exercise=_exercise(row.cell),
            points=row.points,
            max_points=row.max_points,
            auto_points=row.auto_points,
            manual=row.manual_points is not None,
            review=row.review,
            comment=manual_comment or auto_comment,
            auto_comment=auto_comment,
        )
        found.append(score)
    return sorted(found, key=_reading_order)


def graded_points(book: "Gradebook") -> Held:
    """Return what was graded and why, for every exercise; what a person has set is left out."""
    held: Held = {}
    for score in scores(book):
        key = (score.student, score.sheet, score.exercise)
        held[key] = (score.auto_points, score.auto_comment)
    return held


def without(held: Held, grades: Sequence[SubmissionGrade]) -> list[SubmissionGrade]:
    """Return the grades that a gradebook does not hold as they are."""
    return [grade for grade in grades if not _is_held(held, grade)]


def _is_held(held: Held, grade: SubmissionGrade) -> bool:
    for one in grade.exercises:
        key = (grade.student, grade.sheet, one.exercise)
        if held.get(key) != (one.points, one.reason):
            return False
    return True


def _comments(book: "Gradebook", sheet: str | None) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Return a person's comment and the grader's, "" for none, by sheet, student and exercise."""
    from nbgrader import api

    columns = [
        api.Comment.manual_comment.label("by_person"),
        api.Comment.auto_comment.label("by_grader"),
    ]
    found: dict[tuple[str, str, str], tuple[str, str]] = {}
    for row in _rows(book, sheet, api.Comment, api.SolutionCell, columns):
        key = (row.sheet, row.student, row.cell.removesuffix(SOLUTION))
        found[key] = (row.by_person or "", row.by_grader or "")
    return found


def _grade_rows(book: "Gradebook", sheet: str | None) -> list:
    from nbgrader import api

    columns = [
        api.Grade.score.label("points"),
        api.GradeCell.max_score.label("max_points"),
        api.Grade.auto_score.label("auto_points"),
        api.Grade.manual_score.label("manual_points"),
        api.Grade.needs_manual_grade.label("review"),
    ]
    return _rows(book, sheet, api.Grade, api.GradeCell, columns)


def _rows(book: "Gradebook", sheet: str | None, table: Any, cell: Any, columns: list) -> list:
    """Return sheet, student, cell and these columns for every row of a table of nbgrader's."""
    from nbgrader import api

    names = [
        api.Assignment.name.label("sheet"),
        api.Student.id.label("student"),
        cell.name.label("cell"),
    ]
    query = book.db.query(*names, *columns).select_from(table)
    # A grade belongs to a cell and to a notebook, which leads to its assignment and student.
    query = query.join(cell, cell.id == table.cell_id)
    query = query.join(api.SubmittedNotebook)
    query = query.join(api.SubmittedAssignment)
    query = query.join(api.Assignment)
    query = query.join(api.Student)
    if sheet:
        query = query.filter(api.Assignment.name == sheet)
    return query.all()


def _reading_order(score: Score) -> tuple[str, str, str]:
    return (score.sheet, score.student, score.exercise)


def _exercise(cell: str) -> str:
    """Return "01.2" for "01-2-check"; a cell of another course keeps its name."""
    if not cell.endswith(CHECK):
        return cell
    return cell.removesuffix(CHECK).replace("-", ".")
