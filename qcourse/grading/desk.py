"""Where grades are kept while a run goes on: on disk, in the gradebook, and as lines of what went wrong.

The idea: a grade goes to disk first, then into the gradebook, then it is marked as entered; a run that is killed in
between leaves something that the next one can tell and put right. Whatever has no grade is entered with 0 points and
the reason, and marked for a person to look at, so that nobody is missing.

`grade.py` decides what comes when; `results.py` and `gradebook.py` do the writing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import qcourse.checks
from qcourse.checks.registry import load_sheet
from qcourse.grading import intake
from qcourse.grading.cluster import Done, Job
from qcourse.grading.feedback import write_feedback
from qcourse.grading.formgrader import blank_master, carry_over, handed_in, write_course, write_marked
from qcourse.grading.gradebook import gradebook_name, record, register
from qcourse.grading.grades import NONE, ExerciseGrade, Submission, SubmissionGrade
from qcourse.grading.results import Results, Run, Stored
from qcourse.grading.scores import scores, without

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from nbgrader.api import Gradebook

LONGEST_NAME = 128  # characters that nbgrader's database has for a student's name
CHECKED_BY = ("exercise", "answers", "common", "judge", "words")  # of qcourse/checks, besides the sheet's own file


class Desk:
    """What a run keeps grades with: the results on disk, the gradebook, and the lines of what went wrong."""

    def __init__(self, results: Results, run: Run, book: "Gradebook", backend: str) -> None:
        self.results, self.run, self.book, self.backend = results, run, book, backend
        self.name = gradebook_name(book.engine.url)
        self.problems: list[str] = []
        self.masters: dict[str, NotebookNode] = {}
        self.versions: dict[str, str] = {}

    def open(self, sheets: set[str]) -> None:
        """Have the sheets in the gradebook, and the folder ready for the formgrader."""
        self.versions = {sheet: version(sheet) for sheet in sheets}
        self.masters = {sheet: blank_master(intake.master(sheet[:2])) for sheet in sorted(sheets)}
        for sheet, master in self.masters.items():
            register(self.book, sheet, master)
        write_course(self.results.folder, self.masters)

    def sort(self, submissions: Sequence[Submission]) -> tuple[list[Job], list[SubmissionGrade]]:
        """What is to be graded, and the grades that stand; these are in the gradebook afterwards."""
        found = [self.results.load(one.student, one.sheet) for one in submissions]
        stands = [self._stands(*pair) for pair in zip(submissions, found, strict=True)]
        new = [Job(one, self.run.seed(one.sheet)) for one, kept in zip(submissions, stands, strict=True) if not kept]
        current = [(one, its) for one, its, kept in zip(submissions, found, stands, strict=True) if its and kept]
        grades = [stored.grade for _, stored in current]
        lost = {(grade.student, grade.sheet) for grade in without(self.book, grades)}
        for one, stored in current:
            if self.name not in stored.recorded or (one.student, one.sheet) in lost:
                self._enter(one, stored)
        return new, grades

    def keep(self, done: Done) -> SubmissionGrade | None:
        """Keep a grade on disk and in the gradebook; where there is none, enter why.

        Raises:
            ValueError: it is the grade of something else, or none that can be.
        """
        submission = done.job.submission
        if done.grade is None:
            self.refuse([(submission, done.problem)])
            return None
        grade = SubmissionGrade.from_dict(done.grade)
        if (grade.submission_sha256, grade.seed) != (submission.sha256, done.job.seed):
            raise ValueError(f"grade={grade.student}/{grade.sheet} is not of {submission.path}")
        write_marked(self.results.folder, submission, grade, self.masters[grade.sheet])
        self._enter(submission, Stored(grade, self.versions[grade.sheet]))
        if grade.problem:
            self.problems.append(_line(submission, grade.problem))
        return grade

    def refuse(self, refused: Sequence[tuple[Submission, str]]) -> None:
        """Say why submissions have no grade; where it is clear whose, enter 0 points, marked for review."""
        zeros = {}
        for one, reason in refused:
            self.problems.append(_line(one, reason))
            if one.sheet and not intake.ODD.search(one.student) and len(one.student) <= LONGEST_NAME:
                zeros[one.student, one.sheet] = one, _nothing(one, reason, self.backend)
        for grade in without(self.book, [grade for _, grade in zeros.values()]):
            one = zeros[grade.student, grade.sheet][0]
            write_marked(self.results.folder, one, grade, self.masters[one.sheet])
            record(self.book, grade)

    def explain(self) -> None:
        """Write the students' pages of the sheets of this run."""
        for sheet in self.masters:
            write_feedback(self.results.folder, scores(self.book, sheet))

    def _stands(self, submission: Submission, stored: Stored | None) -> bool:
        """Whether a grade is of this very submission, by the check as it is now, and nobody wants another."""
        if stored is None:
            return False
        grade = stored.grade
        same = grade.submission_sha256 == submission.sha256 and stored.version == self.versions[submission.sheet]
        safe = grade.backend != NONE or self.backend == NONE
        again = self.run.regrade and grade.seed != self.run.seed(submission.sheet)
        return same and safe and not again and grade.problem is None

    def _enter(self, submission: Submission, stored: Stored) -> None:
        """On disk first: a database can be brought up to date from there."""
        self.results.save(stored)
        carry_over(self.results.folder, submission)
        record(self.book, stored.grade, handed_in=handed_in(submission.path))
        self.results.save(replace(stored, recorded=(*stored.recorded, self.name)))


def _line(submission: Submission, reason: str) -> str:
    """One line, whatever is in the names."""
    said = f"{submission.student}/{submission.path.name}: {reason}"
    return "".join(letter if letter.isprintable() else "?" for letter in said)


def _nothing(submission: Submission, reason: str, backend: str) -> SubmissionGrade:
    exercises = load_sheet(submission.sheet[:2]).exercises
    zeros = tuple(ExerciseGrade(one.id, 0, one.points, reason) for one in exercises)
    return SubmissionGrade(submission.student, submission.sheet, zeros, submission.sha256, 0, backend, problem=reason)


def version(sheet: str) -> str:
    """A hash of what a sheet's grades depend on besides the submission: its check, and its master notebook."""
    folder = Path(qcourse.checks.__file__).parent
    texts = [(folder / f"{name}.py").read_bytes() for name in (f"sheet_{sheet[:2]}", *CHECKED_BY)]
    texts.append(intake.master(sheet[:2]).read_bytes())
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]
