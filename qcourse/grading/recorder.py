"""Where grades are kept while a run goes on: on disk, in the gradebook, and as lines of problems.

The idea: a grade goes to disk first, then into the gradebook, then it is marked as entered, so the
run after one that was killed can complete it. A submission without a grade is entered with 0
points, the reason, and a mark for review. An error of one submission costs no other its grade;
`errors.py` names the errors that end the run.

`grade_class.py` decides the order; `book/` does the writing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qcourse.checks.registry import load_sheet
from qcourse.course_files import master, sheet_version
from qcourse.grading import intake
from qcourse.grading.book.formgrader import (
    blank_master,
    carry_over,
    handed_in,
    write_course,
    write_marked,
)
from qcourse.grading.book.gradebook import gradebook_name, record, register
from qcourse.grading.book.results import Results, Run, Stored, write_changed
from qcourse.grading.book.scores import Held, Score, graded_points, scores, without
from qcourse.grading.errors import first_line, stops
from qcourse.grading.feedback import write_feedback
from qcourse.grading.grades import NONE, ExerciseGrade, Limits, Submission, SubmissionGrade
from qcourse.grading.jobs import Done, Job
from qcourse.grading.student_names import name_problem, printable
from qcourse.grading.submitted_notebook import IntakeError, read_file
from qcourse.grading.summary import problems_table

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook

TOLD = "could not be graded; your teacher has been told"  # of a fault that is not the student's


class Recorder:
    """Keeps grades on disk and in the gradebook, and the lines of what went wrong."""

    def __init__(
        self, results: Results, run: Run, book: "Gradebook", backend: str, limits: Limits
    ) -> None:
        # Where grades are kept, and what this run grades with.
        self.results = results
        self.run = run
        self.book = book
        self.backend = backend
        self.limits = limits
        self.name = gradebook_name(book.engine.url)
        # What the run has come to so far.
        self.problems: list[intake.Problem] = []
        self.graded: list[SubmissionGrade] = []
        self.kept: list[SubmissionGrade] = []
        self.held: Held = {}  # by the gradebook, when the run began
        self.masters: dict[str, NotebookNode] = {}  # by sheet
        self.versions: dict[str, str] = {}  # by sheet

    def open(self, sheets: set[str]) -> None:
        """Enter the sheets in the gradebook, and prepare the folder for the formgrader."""
        self.versions = {sheet: sheet_version(sheet[:2]) for sheet in sheets}
        self.masters = {sheet: blank_master(master(sheet[:2])) for sheet in sorted(sheets)}
        for sheet, notebook in self.masters.items():
            register(self.book, sheet, notebook)
        write_course(self.results.folder, self.masters)

    def sort(self, found: Sequence[intake.Found]) -> list[intake.Found]:
        """Return what has to be graded; enter grades that stand, if the gradebook lacks them."""
        new: list[intake.Found] = []
        current: list[tuple[intake.Found, Stored]] = []
        for one in found:
            stored = self.results.load(one.student, one.sheet)
            if stored is not None and self._stands(one, stored):
                current.append((one, stored))
            else:
                new.append(one)

        # A gradebook can lack a grade that is on disk: it may be another one, or have been lost.
        self.kept = [stored.grade for _, stored in current]
        self.held = graded_points(self.book)
        lost = {(grade.student, grade.sheet) for grade in without(self.held, self.kept)}
        for one, stored in current:
            if self.name not in stored.recorded or (one.student, one.sheet) in lost:
                with self._boundary(one):
                    self._enter(one, stored)
        return new

    def jobs(self, found: Sequence[intake.Found]) -> Iterator[Job]:
        """Yield the submissions, read one at a time; refuse what cannot be read."""
        for one in found:
            # A submission that cannot be read leaves no job behind.
            job: Job | None = None
            with self._boundary(one):
                submission = intake.read_submission(one)
                wall_s = self.limits.submission_s(len(submission.cells))
                job = Job(submission, self.run.seed(one.sheet), wall_s)
            if job is not None:
                yield job

    def keep(self, done: Done) -> None:
        """Keep a grade on disk and in the gradebook; if there is none, enter why."""
        submission = done.job.submission
        if done.grade is None:
            self.refuse(submission, done.problem, TOLD)
            return
        with self._boundary(submission):
            grade = SubmissionGrade.from_dict(done.grade)
            # A process could have answered for another submission.
            if (grade.submission_sha256, grade.seed) != (submission.sha256, done.job.seed):
                raise ValueError(f"grade={grade.student}/{grade.sheet} is not of {submission.path}")
            write_marked(self.results.folder, submission, grade, self.masters[grade.sheet])
            self._enter(submission, Stored(grade, self.versions[grade.sheet]))
            self.graded.append(grade)
            if grade.problem:
                self._note(submission, grade.problem)

    def refuse(
        self, one: intake.Found | intake.Problem | Submission, reason: str, told: str = ""
    ) -> None:
        """Note why a submission has no grade; if student and sheet are known, enter 0 points.

        Args:
            reason: what the teacher reads.
            told: what the student reads, if it is something else.
        """
        self._note(one, reason)
        # The gradebook cannot keep such a name at all.
        if name_problem(one.student):
            return
        # A student without a sheet is listed without points.
        if not one.sheet:
            self.book.update_or_create_student(one.student)
            return
        submission = one
        if not isinstance(submission, Submission):
            submission = Submission(one.student, one.sheet, one.path, {}, "")
        grade = _zero_grade(submission, told or reason, self.backend)
        # The gradebook may hold this very line from the run before.
        try:
            if without(self.held, [grade]):
                write_marked(self.results.folder, submission, grade, self.masters[one.sheet])
                record(self.book, grade)
        except Exception as error:
            if stops(error):
                raise
            self.book.db.rollback()
            self._note(one, f"is not in the gradebook either ({first_line(error)})")

    def explain(self) -> list[Score]:
        """Write the students' pages and the list of problems; return this run's scores."""
        found: list[Score] = []
        for sheet in self.masters:
            found += scores(self.book, sheet)
        write_feedback(self.results.folder, found)
        write_changed(self.results.folder / "problems.csv", problems_table(self.problems))
        return found

    @contextmanager
    def _boundary(self, one: intake.Found | Submission) -> Iterator[None]:
        """Let an error inside cost this submission its grade, and no other."""
        try:
            yield
        except IntakeError as error:
            self.refuse(one, str(error))
        except Exception as error:
            if stops(error):
                raise
            self.book.db.rollback()
            self.refuse(one, f"could not be graded ({first_line(error)})", TOLD)

    def _note(self, one: intake.Found | intake.Problem | Submission, reason: str) -> None:
        problem = intake.Problem(one.student, one.sheet, one.path, reason)
        self.problems.append(problem)

    def _stands(self, found: intake.Found, stored: Stored) -> bool:
        """Return whether a grade is of this very file, by the check as it is, and still wanted."""
        grade = stored.grade
        if grade.problem is not None or stored.version != self.versions[found.sheet]:
            return False
        # A grade made without a sandbox does not count in a run with one.
        if grade.backend == NONE and self.backend != NONE:
            return False
        # This run's seed marks the grades that a regrading run has already made anew.
        if self.run.regrade and grade.seed != self.run.seed(found.sheet):
            return False
        try:
            return intake.fingerprint(read_file(found.path)) == grade.submission_sha256
        except IntakeError:
            return False

    def _enter(self, one: intake.Found | Submission, stored: Stored) -> None:
        # On disk first: a gradebook can be brought up to date from there.
        self.results.save(stored)
        carry_over(self.results.folder, one.student, one.sheet, one.path)
        record(self.book, stored.grade, handed_in=handed_in(one.path))
        recorded = (*stored.recorded, self.name)
        self.results.save(replace(stored, recorded=recorded))


def _zero_grade(submission: Submission, reason: str, backend: str) -> SubmissionGrade:
    """Return the grade of a submission that was not graded, which marks it for review."""
    exercises: list[ExerciseGrade] = []
    for exercise in load_sheet(submission.sheet[:2]).exercises:
        exercises.append(ExerciseGrade(exercise.id, 0, exercise.points, printable(reason)))
    return SubmissionGrade(
        student=submission.student,
        sheet=submission.sheet,
        exercises=tuple(exercises),
        submission_sha256=submission.sha256,
        seed=0,
        backend=backend,
        problem=reason,
    )
