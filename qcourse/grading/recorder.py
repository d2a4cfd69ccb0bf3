"""Where grades are kept while a run goes on: on disk, in the gradebook, and as lines of what went wrong.

The idea: a grade goes to disk first, then into the gradebook, then it is marked as entered; a run that is killed in
between leaves something that the next one can tell and put right. Whatever has no grade is entered with 0 points and
the reason, and marked for a person to look at, so that nobody is missing.

Here is the boundary between one submission and the run: whatever one submission causes becomes a line and 0 points,
and the run goes on. Only a disk or a database that refuses ends it (`STOPS`), because the next grade would fare no
better.

`grade_class.py` decides what comes when; `results.py` and `gradebook.py` do the writing.
"""

import csv
import errno
import io
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
from qcourse.grading.cluster import Done, Job
from qcourse.grading.feedback import write_feedback
from qcourse.grading.grades import NONE, ExerciseGrade, Limits, Submission, SubmissionGrade
from qcourse.grading.submitted_notebook import IntakeError, read_file

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook

LONGEST = 200  # characters of an error
TOLD = "could not be graded; your teacher has been told"  # what a student reads of a fault that is not the student's
OF_ONE_NAME = {
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}


class Recorder:
    """What a run keeps grades with: the results on disk, the gradebook, and the lines of what went wrong."""

    def __init__(
        self, results: Results, run: Run, book: "Gradebook", backend: str, limits: Limits
    ) -> None:
        self.results, self.run, self.book, self.backend, self.limits = (
            results,
            run,
            book,
            backend,
            limits,
        )
        self.name = gradebook_name(book.engine.url)
        self.problems: list[intake.Problem] = []
        self.graded: list[SubmissionGrade] = []
        self.kept: list[SubmissionGrade] = []
        self.held: Held = {}  # by the gradebook, when the run began
        self.masters: dict[str, NotebookNode] = {}
        self.versions: dict[str, str] = {}

    def open(self, sheets: set[str]) -> None:
        """Have the sheets in the gradebook, and the folder ready for the formgrader."""
        self.versions = {sheet: sheet_version(sheet[:2]) for sheet in sheets}
        self.masters = {sheet: blank_master(master(sheet[:2])) for sheet in sorted(sheets)}
        for sheet, notebook in self.masters.items():
            register(self.book, sheet, notebook)
        write_course(self.results.folder, self.masters)

    def sort(self, found: Sequence[intake.Found]) -> list[intake.Found]:
        """What is to be graded; the grades that stand are in the gradebook afterwards."""
        new: list[intake.Found] = []
        current: list[tuple[intake.Found, Stored]] = []
        for one in found:
            stored = self.results.load(one.student, one.sheet)
            if stored is not None and self._stands(one, stored):
                current.append((one, stored))
            else:
                new.append(one)
        self.kept = [stored.grade for _, stored in current]
        self.held = graded_points(self.book)
        lost = {(grade.student, grade.sheet) for grade in without(self.held, self.kept)}
        for one, stored in current:
            if self.name not in stored.recorded or (one.student, one.sheet) in lost:
                with self._of_one(one):
                    self._enter(one, stored)
        return new

    def jobs(self, found: Sequence[intake.Found]) -> Iterator[Job]:
        """The submissions, read one at a time; what cannot be read is refused."""
        for one in found:
            job: Job | None = None
            with self._of_one(one):
                submission = intake.read_submission(one)
                wall_s = self.limits.submission_s(len(submission.cells))
                job = Job(submission, self.run.seed(one.sheet), wall_s)
            if job is not None:
                yield job

    def keep(self, done: Done) -> None:
        """Keep a grade on disk and in the gradebook; where there is none, enter why."""
        submission = done.job.submission
        if done.grade is None:
            self.refuse(submission, done.problem, TOLD)
            return
        with self._of_one(submission):
            grade = SubmissionGrade.from_dict(done.grade)
            if (grade.submission_sha256, grade.seed) != (submission.sha256, done.job.seed):
                raise ValueError(f"grade={grade.student}/{grade.sheet} is not of {submission.path}")
            write_marked(self.results.folder, submission, grade, self.masters[grade.sheet])
            self._enter(submission, Stored(grade, self.versions[grade.sheet]))
            self.graded.append(grade)
            if grade.problem:
                self._say(submission, grade.problem)

    def refuse(
        self, one: intake.Found | intake.Problem | Submission, reason: str, told: str = ""
    ) -> None:
        """Say why a submission has no grade; where it is clear whose and of which sheet, enter 0 points for review.

        Args:
            reason: what the teacher reads.
            told: what the student reads, where it is something else.
        """
        self._say(one, reason)
        if intake.name_problem(one.student):
            return
        if not one.sheet:
            self.book.update_or_create_student(one.student)
            return
        submission = (
            one
            if isinstance(one, Submission)
            else Submission(one.student, one.sheet, one.path, {}, "")
        )
        grade = _nothing(submission, told or reason, self.backend)
        try:
            if without(self.held, [grade]):
                write_marked(self.results.folder, submission, grade, self.masters[one.sheet])
                record(self.book, grade)
        except Exception as error:
            if stops(error):
                raise
            self.book.db.rollback()
            self._say(one, f"is not in the gradebook either ({_said(error)})")

    def explain(self) -> list[Score]:
        """Write the students' pages of the sheets of this run, and the list of problems; what the gradebook says."""
        found = [score for sheet in self.masters for score in scores(self.book, sheet)]
        write_feedback(self.results.folder, found)
        table = io.StringIO(newline="")
        rows = [(one.student, one.path.name, one.reason) for one in self.problems]
        printable = [[intake.printable(text) for text in row] for row in rows]
        csv.writer(table, lineterminator="\n").writerows(
            [("student", "file", "reason"), *printable]
        )
        write_changed(self.results.folder / "problems.csv", table.getvalue())
        return found

    @contextmanager
    def _of_one(self, one: intake.Found | Submission) -> Iterator[None]:
        """Whatever goes wrong inside costs this submission its grade, and no other."""
        try:
            yield
        except IntakeError as error:
            self.refuse(one, str(error))
        except Exception as error:
            if stops(error):
                raise
            self.book.db.rollback()
            self.refuse(one, f"could not be graded ({_said(error)})", TOLD)

    def _say(self, one: intake.Found | intake.Problem | Submission, reason: str) -> None:
        self.problems.append(intake.Problem(one.student, one.sheet, one.path, reason))

    def _stands(self, found: intake.Found, stored: Stored) -> bool:
        """Whether a grade is of this very file, by the check as it is now, and nobody wants another."""
        grade = stored.grade
        safe = grade.backend != NONE or self.backend == NONE
        again = self.run.regrade and grade.seed != self.run.seed(found.sheet)
        if (
            grade.problem is not None
            or not safe
            or again
            or stored.version != self.versions[found.sheet]
        ):
            return False
        try:
            return intake.fingerprint(read_file(found.path)) == grade.submission_sha256
        except IntakeError:
            return False

    def _enter(self, one: intake.Found | Submission, stored: Stored) -> None:
        """On disk first: a database can be brought up to date from there."""
        self.results.save(stored)
        carry_over(self.results.folder, one.student, one.sheet, one.path)
        record(self.book, stored.grade, handed_in=handed_in(one.path))
        self.results.save(replace(stored, recorded=(*stored.recorded, self.name)))


def stops(error: BaseException | None) -> bool:
    """Whether an error is the machine's, or was raised over one, so that it would meet every other submission too."""
    from sqlalchemy.exc import OperationalError

    if error is None:
        return False
    under = error.__cause__ or error.__context__
    if isinstance(error, OSError) and (error.errno is not None or under is None):
        return error.errno not in OF_ONE_NAME
    return isinstance(error, OperationalError) or stops(under)


def _said(error: Exception) -> str:
    """The kind of an error, and its first line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:LONGEST]}"


def _nothing(submission: Submission, reason: str, backend: str) -> SubmissionGrade:
    exercises = load_sheet(submission.sheet[:2]).exercises
    zeros = tuple(
        ExerciseGrade(one.id, 0, one.points, intake.printable(reason)) for one in exercises
    )
    return SubmissionGrade(
        submission.student, submission.sheet, zeros, submission.sha256, 0, backend, problem=reason
    )
