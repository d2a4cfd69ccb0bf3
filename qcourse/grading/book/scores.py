"""What the gradebook says now, as plain values: for feedback, for exports, and to tell what it lacks.

The idea: nbgrader's own tables are read in two queries for a whole class, points and comments, and put together by
student and exercise. `gradebook.py` writes them; this file writes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcourse.grading.book.gradebook import CHECK, SOLUTION
from qcourse.grading.grades import SubmissionGrade

if TYPE_CHECKING:
    from nbgrader.api import Gradebook


@dataclass(frozen=True)
class Score:
    """What the gradebook says of one exercise of one student.

    Args:
        student, sheet, exercise: "ada", "01_quantizer", "01.2".
        points, max_points: what counts, extra credit included, of what it is worth.
        auto_points: what was graded; None before it is.
        manual: whether a person has set the points.
        review: whether a person should look at it.
        comment: a person's, or where there is none, the grader's reason; auto_comment is the latter.
    """

    student: str
    sheet: str
    exercise: str
    points: float
    max_points: float
    auto_points: float | None
    manual: bool
    review: bool
    comment: str
    auto_comment: str


def scores(book: "Gradebook", sheet: str | None = None) -> list[Score]:
    """What the gradebook holds, by sheet, student and exercise, in two queries."""
    from nbgrader import api

    where = [api.Assignment.name == sheet] if sheet else []

    def rows(table: Any, cell: Any, *columns: Any) -> list:
        query = book.db.query(api.Assignment.name, api.Student.id, cell.name, *columns).select_from(
            table
        )
        query = (
            query.join(cell, cell.id == table.cell_id)
            .join(api.SubmittedNotebook)
            .join(api.SubmittedAssignment)
        )
        return query.join(api.Assignment).join(api.Student).filter(*where).all()

    said = {
        (sheet, student, name.removesuffix(SOLUTION)): (manual or auto or "", auto or "")
        for sheet, student, name, manual, auto in rows(
            api.Comment, api.SolutionCell, api.Comment.manual_comment, api.Comment.auto_comment
        )
    }
    grade = api.Grade
    columns = (
        grade.score,
        api.GradeCell.max_score,
        grade.auto_score,
        grade.manual_score,
        grade.needs_manual_grade,
    )
    found = [
        Score(
            student,
            sheet,
            _exercise(name),
            points,
            worth,
            auto,
            manual is not None,
            review,
            *said.get((sheet, student, name.removesuffix(CHECK)), ("", "")),
        )
        for sheet, student, name, points, worth, auto, manual, review in rows(
            grade, api.GradeCell, *columns
        )
    ]
    return sorted(found, key=lambda score: (score.sheet, score.student, score.exercise))


Held = dict[tuple[str, str, str], tuple[float | None, str]]


def graded_points(book: "Gradebook") -> Held:
    """What was graded, and the reason, by student, sheet and exercise; what a person has set is left out."""
    return {
        (one.student, one.sheet, one.exercise): (one.auto_points, one.auto_comment)
        for one in scores(book)
    }


def without(held: Held, grades: Sequence[SubmissionGrade]) -> list[SubmissionGrade]:
    """Those of the grades that a gradebook does not hold as they are."""

    def is_held(grade: SubmissionGrade) -> bool:
        return all(
            held.get((grade.student, grade.sheet, one.exercise)) == (one.points, one.reason)
            for one in grade.exercises
        )

    return [grade for grade in grades if not is_held(grade)]


def _exercise(cell: str) -> str:
    return (
        cell.removesuffix(CHECK).replace("-", ".") if cell.endswith(CHECK) else cell
    )  # of another course, perhaps
