"""What a run says at its end: a line per student, what each sheet came to, and what went wrong.

The idea: the table shows what the gradebook holds now, points set by hand and zeros included, so that it agrees with
the exports. Only where a run was stopped half-way does it show the grades that the run itself knows of.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from qcourse.grading.book.scores import Score
from qcourse.grading.grades import SubmissionGrade

NOTHING = "-"  # in the table, where nothing was handed in
REVIEW = "*"  # beside points that a person should look at


@dataclass(frozen=True)
class Total:
    """What one student has for one sheet."""

    points: float
    max_points: float
    review: bool = False

    def __str__(self) -> str:
        return f"{self.points:.2f}".rstrip("0").rstrip(".") + REVIEW * self.review


Totals = dict[tuple[str, str], Total]  # by student and sheet


@dataclass(frozen=True)
class RunSummary:
    """What a run did.

    Args:
        graded, kept: the grades of this run, and of former ones.
        held: what the gradebook holds now, by student and sheet.
        problems: a line for each submission that could not be graded.
        stopped: why the run was stopped half-way; "" where it was not.
    """

    graded: tuple[SubmissionGrade, ...]
    kept: tuple[SubmissionGrade, ...]
    held: Totals = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    stopped: str = ""

    @property
    def exit_status(self) -> int:
        """0 where every submission was graded, 1 where some could not be, 3 where the run was stopped half-way."""
        if self.stopped:
            return 3
        return 1 if self.problems else 0

    def __str__(self) -> str:
        lines = [*_table(self.held), *self._counts()]
        if any(total.review for total in self.held.values()):
            lines.append(f"{REVIEW} to be looked at by a person")
        environments = {grade.environment for grade in (*self.graded, *self.kept)}
        if len(environments) > 1:
            lines.append(
                f"{len(environments)} sets of versions have graded these: pass --regrade to have one."
            )
        if self.problems:
            lines += ["", f"Not graded, or not wholly ({len(self.problems)}):", *self.problems]
        if self.stopped:
            lines += ["", f"Stopped half-way: {self.stopped}"]
        return "\n".join(lines)

    def _counts(self) -> list[str]:
        sheets = sorted({grade.sheet for grade in (*self.graded, *self.kept)})
        return [
            f"{sheet}: {_count(self.graded, sheet)} graded now, {_count(self.kept, sheet)} graded before"
            for sheet in sheets
        ]


def totals(scores: Iterable[Score]) -> Totals:
    """The sums over the exercises of each student and sheet."""
    found: Totals = {}
    for score in scores:
        key = score.student, score.sheet
        before = found.get(key, Total(0.0, 0.0))
        found[key] = Total(
            before.points + score.points,
            before.max_points + score.max_points,
            before.review or score.review,
        )
    return found


def totals_of(grades: Iterable[SubmissionGrade]) -> Totals:
    """The same for grades that may not be in the gradebook."""
    return {
        (one.student, one.sheet): Total(one.points, one.max_points, one.problem is not None)
        for one in grades
    }


def _table(held: Totals) -> list[str]:
    """A line per student and a column per sheet; then the mean of those who handed in, and what a sheet is worth."""
    students = sorted({student for student, _ in held})
    sheets = sorted({sheet for _, sheet in held})
    width = max(map(len, (*students, "mean")), default=0) + 2

    def row(name: str, cells: Iterable[str]) -> str:
        return f"{name:{width}}" + "".join(f"{cell:>9}" for cell in cells)

    of_sheet = {
        sheet: [total for (_, its), total in held.items() if its == sheet] for sheet in sheets
    }
    means = [sum(one.points for one in totals) / len(totals) for totals in of_sheet.values()]
    return [
        row("student", (sheet[:2] for sheet in sheets)),
        *(
            row(student, (str(held.get((student, sheet), NOTHING)) for sheet in sheets))
            for student in students
        ),
        row("mean", (f"{mean:.2f}" for mean in means)),
        row("of", (str(Total(totals[0].max_points, 0.0)) for totals in of_sheet.values())),
    ]


def _count(grades: Iterable[SubmissionGrade], sheet: str) -> int:
    return sum(grade.sheet == sheet for grade in grades)
