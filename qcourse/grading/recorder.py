"""Where grades are kept while a run goes on: on disk, in the gradebook, and as lines of problems.

The idea: a grade goes to disk first, then into the gradebook, then it is marked as entered, so the
run after one that was killed can complete it. A submission without a grade is entered with 0
points, the reason, and a mark for review. An error of one submission costs no other its grade;
`errors.py` names the errors that end the run.

`grade_class.py` decides the order; `book/` does the writing.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from qcourse.checks.registry import load_sheet
from qcourse.course_files import sheet_version
from qcourse.grading import intake
from qcourse.grading.book.formgrader import carry_over, handed_in, write_marked
from qcourse.grading.book.gradebook import gradebook_name, record
from qcourse.grading.book.results import Results, Run, Stored, write_changed
from qcourse.grading.book.scores import Score, graded_points, scores, without
from qcourse.grading.errors import first_line, stops
from qcourse.grading.feedback import write_feedback
from qcourse.grading.grades import ExerciseGrade, HandedIn, Limits, SubmissionGrade, sheet_number
from qcourse.grading.jobs import Done, Job
from qcourse.grading.standing import Standing, stands
from qcourse.grading.student_names import name_problem, printable
from qcourse.grading.submitted_notebook import IntakeError
from qcourse.grading.summary import problems_table

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook

TOLD = "could not be graded; your teacher has been told"  # of a fault that is not the student's
NOTHING_READ: Mapping[str, str] = {}  # the cells of a notebook that was not read


class Recorder:
    """Keeps grades on disk and in the gradebook, and the lines of what went wrong.

    Args:
        masters: the notebooks of this run's sheets, by name; `book/sheets.py` enters them first.
    """

    def __init__(
        self,
        results: Results,
        run: Run,
        book: "Gradebook",
        masters: Mapping[str, "NotebookNode"],
        backend: str,
        limits: Limits,
    ) -> None:
        # Where grades are kept, and what this run grades with.
        self.results = results
        self.run = run
        self.book = book
        self.masters = masters
        self.backend = backend
        self.limits = limits
        self.name = gradebook_name(book.engine.url)
        self.versions = {sheet: sheet_version(sheet_number(sheet)) for sheet in masters}
        self.held = graded_points(book)  # when the run began
        # What the run has come to so far.
        self.problems: list[intake.Problem] = []
        self.graded: list[SubmissionGrade] = []
        self.kept: list[SubmissionGrade] = []

    def sort(self, found: Sequence[intake.Found]) -> tuple[list[intake.Found], list[Standing]]:
        """Return what has to be graded, and the grades of former runs that stand."""
        new: list[intake.Found] = []
        standing: list[Standing] = []
        for one in found:
            stored = self.results.load(one.student, one.sheet)
            version = self.versions[one.sheet]
            if stored is not None and stands(one, stored, self.run, version, self.backend):
                standing.append(Standing(one, stored))
            else:
                new.append(one)
        return new, standing

    def keep_standing(self, standing: Sequence[Standing]) -> None:
        """Count these grades as kept, and enter those that the gradebook lacks."""
        self.kept = [one.stored.grade for one in standing]
        # A gradebook can lack a grade that is on disk: it may be another one, or have been lost.
        lost = {(grade.student, grade.sheet) for grade in without(self.held, self.kept)}
        for one in standing:
            found = one.found
            is_recorded = self.name in one.stored.recorded
            if not is_recorded or (found.student, found.sheet) in lost:
                with self._boundary(found):
                    self._enter(found, one.stored)

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
            self.refuse(submission, done.problem, TOLD, submission.cells)
            return
        with self._boundary(submission, submission.cells):
            grade = SubmissionGrade.from_dict(done.grade)
            # A process could have answered for another submission.
            if (grade.submission_sha256, grade.seed) != (submission.sha256, done.job.seed):
                raise ValueError(f"grade={grade.student}/{grade.sheet} is not of {submission.path}")
            self._write_marked(grade, submission.cells)
            self._enter(submission, Stored(grade, self.versions[grade.sheet]))
            self.graded.append(grade)
            if grade.problem:
                self._note(submission, grade.problem)

    def refuse(
        self, one: HandedIn, reason: str, told: str = "", cells: Mapping[str, str] = NOTHING_READ
    ) -> None:
        """Note why a submission has no grade; if student and sheet are known, enter 0 points.

        Args:
            reason: what the teacher reads.
            told: what the student reads, if it is something else.
            cells: the source of each solution cell that was read, by exercise.
        """
        self._note(one, reason)
        # The gradebook cannot keep such a name at all.
        if name_problem(one.student):
            return
        # A student without a sheet is listed without points.
        if not one.sheet:
            self.book.update_or_create_student(one.student)
            return
        grade = _zero_grade(one, told or reason, self.backend)
        # The gradebook may hold this very line from the run before.
        try:
            if without(self.held, [grade]):
                self._write_marked(grade, cells)
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
    def _boundary(self, one: HandedIn, cells: Mapping[str, str] = NOTHING_READ) -> Iterator[None]:
        """Let an error inside cost this submission its grade, and no other."""
        try:
            yield
        except IntakeError as error:
            self.refuse(one, str(error), cells=cells)
        except Exception as error:
            if stops(error):
                raise
            self.book.db.rollback()
            self.refuse(one, f"could not be graded ({first_line(error)})", TOLD, cells)

    def _note(self, one: HandedIn, reason: str) -> None:
        problem = intake.Problem(one.student, one.sheet, one.path, reason)
        self.problems.append(problem)

    def _write_marked(self, grade: SubmissionGrade, cells: Mapping[str, str]) -> None:
        write_marked(self.results.folder, grade, cells, self.masters[grade.sheet])

    def _enter(self, one: HandedIn, stored: Stored) -> None:
        # On disk first: a gradebook can be brought up to date from there.
        self.results.save(stored)
        carry_over(self.results.folder, one.student, one.sheet, one.path)
        record(self.book, stored.grade, handed_in=handed_in(one.path))
        recorded = (*stored.recorded, self.name)
        self.results.save(replace(stored, recorded=recorded))


def _zero_grade(one: HandedIn, reason: str, backend: str) -> SubmissionGrade:
    """Return the grade of a submission that was not graded, which marks it for review."""
    exercises: list[ExerciseGrade] = []
    for exercise in load_sheet(sheet_number(one.sheet)).exercises:
        exercises.append(ExerciseGrade(exercise.id, 0, exercise.points, printable(reason)))
    return SubmissionGrade(
        student=one.student,
        sheet=one.sheet,
        exercises=tuple(exercises),
        submission_sha256="",  # this grade goes into the gradebook only, which has no hashes
        seed=0,
        backend=backend,
        problem=reason,
    )
