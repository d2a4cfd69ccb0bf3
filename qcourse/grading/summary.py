"""What a run says at its end: a line per student, what each sheet came to, and what went wrong.

The idea: the table shows what the gradebook holds now, with points set by hand and zeros, so it
agrees with the exports. Only if a run was stopped halfway does it show the grades that the run
itself knows.

`book/export.py` writes the tables for other systems.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, field

from qcourse.grading.book.scores import Score
from qcourse.grading.grades import SubmissionGrade, sheet_number
from qcourse.grading.intake import Problem
from qcourse.grading.student_names import printable

NOTHING = "-"  # in the table, if nothing was handed in
REVIEW = "*"  # beside points that a person should look at


@dataclass(frozen=True)
class Total:
    """What one student has for one sheet."""

    points: float
    max_points: float
    review: bool = False

    def __str__(self) -> str:
        number = f"{self.points:.2f}".rstrip("0").rstrip(".")
        return number + REVIEW if self.review else number


Totals = dict[tuple[str, str], Total]  # by student and sheet


@dataclass(frozen=True)
class RunSummary:
    """What a run did."""

    graded: tuple[SubmissionGrade, ...]  # in this run
    kept: tuple[SubmissionGrade, ...]  # from former runs
    held: Totals = field(default_factory=dict)  # by the gradebook, now
    problems: tuple[str, ...] = ()  # a line for each submission that could not be graded
    stopped: str = ""  # why the run was stopped halfway; "" if it was not

    @property
    def exit_status(self) -> int:
        """0 if every submission was graded, 1 if some could not be, 3 if the run was stopped."""
        if self.stopped:
            return 3
        return 1 if self.problems else 0

    def __str__(self) -> str:
        lines = [*_table(self.held), *self._counts()]
        if any(total.review for total in self.held.values()):
            lines.append(f"{REVIEW} to be looked at by a person")

        # Grades made by different versions may not be comparable.
        environments = {grade.environment for grade in (*self.graded, *self.kept)}
        if len(environments) > 1:
            lines.append(
                f"{len(environments)} sets of versions have graded these: "
                "pass --regrade to have one."
            )
        if self.problems:
            heading = f"Not graded, or not wholly ({len(self.problems)}):"
            lines += ["", heading, *self.problems]
        if self.stopped:
            lines += ["", f"Stopped half-way: {self.stopped}"]
        return "\n".join(lines)

    def _counts(self) -> list[str]:
        """Return a line per sheet: how many were graded now, and how many before."""
        lines: list[str] = []
        for sheet in sorted({grade.sheet for grade in (*self.graded, *self.kept)}):
            now = _count(self.graded, sheet)
            before = _count(self.kept, sheet)
            lines.append(f"{sheet}: {now} graded now, {before} graded before")
        return lines


def totals(scores: Iterable[Score]) -> Totals:
    """Return the sums over the exercises of each student and sheet."""
    found: Totals = {}
    for score in scores:
        key = (score.student, score.sheet)
        before = found.get(key, Total(0.0, 0.0))
        found[key] = Total(
            points=before.points + score.points,
            max_points=before.max_points + score.max_points,
            review=before.review or score.review,
        )
    return found


def totals_of(grades: Iterable[SubmissionGrade]) -> Totals:
    """Return the same for grades that may not be in the gradebook."""
    found: Totals = {}
    for grade in grades:
        needs_review = grade.problem is not None
        total = Total(grade.points, grade.max_points, needs_review)
        found[grade.student, grade.sheet] = total
    return found


def problems_table(problems: Iterable[Problem]) -> str:
    """Return the problems as CSV: student, file and reason of each."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["student", "file", "reason"])
    for problem in problems:
        cells = (problem.student, problem.path.name, problem.reason)
        writer.writerow([printable(text) for text in cells])
    return table.getvalue()


def _table(held: Totals) -> list[str]:
    """Return a line per student with a column per sheet, then the means and the maximum points."""
    students = sorted({student for student, _ in held})
    sheets = sorted({sheet for _, sheet in held})
    width = max(map(len, (*students, "mean")), default=0) + 2

    means: list[str] = []
    worths: list[str] = []
    for sheet in sheets:
        own = [total for key, total in held.items() if key[1] == sheet]
        # The mean is over the students who handed this sheet in.
        mean = sum(total.points for total in own) / len(own)
        worth = Total(own[0].max_points, 0.0)
        means.append(f"{mean:.2f}")
        worths.append(str(worth))

    numbers = [sheet_number(sheet) for sheet in sheets]
    lines = [_row("student", numbers, width)]
    for student in students:
        cells = [str(held.get((student, sheet), NOTHING)) for sheet in sheets]
        lines.append(_row(student, cells, width))
    lines.append(_row("mean", means, width))
    lines.append(_row("of", worths, width))
    return lines


def _row(name: str, cells: Iterable[str], width: int) -> str:
    columns = [f"{cell:>9}" for cell in cells]
    return f"{name:{width}}" + "".join(columns)


def _count(grades: Iterable[SubmissionGrade], sheet: str) -> int:
    return sum(grade.sheet == sheet for grade in grades)
