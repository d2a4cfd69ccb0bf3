"""A whole run: what was handed in is read, graded, kept, entered in the gradebook and explained to the students.

The idea: everything that can be wrong before the first grade (no folder, no sandbox, a database that refuses) is found
before it, in one sentence. From then on each grade is kept as it comes, so that whenever the run is cut short, the next
one goes on where it was; what was graded before and has not changed since is not graded again.

The parts do not know of each other: `intake.py` reads, `cluster.py` grades somewhere, `desk.py` keeps what comes.
This file is the order they come in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.grading import cluster, intake
from qcourse.grading.cluster import Done, Job
from qcourse.grading.desk import LONGEST_NAME, Desk
from qcourse.grading.gradebook import default_url, open_gradebook
from qcourse.grading.grades import BUBBLEWRAP, NONE, Limits, Submission, SubmissionGrade
from qcourse.grading.results import Results


@dataclass(frozen=True)
class Settings:
    """How to grade.

    Args:
        submitted: the folder with STUDENT/SHEET.ipynb.
        into: the folder of the results.
        sheet: "01" for this sheet alone; None for all.
        url: of the gradebook; None for SQLite in `into`.
        workers: processes on this machine; None for one a core.
        scheduler: tls://HOST:PORT of a Dask scheduler, instead.
        unsafe: without a sandbox.
        regrade: also what was graded before.
        limits: what a submission may use.
    """

    submitted: Path
    into: Path
    sheet: str | None = None
    url: str | None = None
    workers: int | None = None
    scheduler: str | None = None
    unsafe: bool = False
    regrade: bool = False
    limits: Limits = field(default_factory=Limits)

    @property
    def backend(self) -> str:
        """What grades are marked with."""
        return NONE if self.unsafe else BUBBLEWRAP


@dataclass(frozen=True)
class Report:
    """What a run did.

    Args:
        graded, kept: of this run, and of former ones.
        problems: a line for each submission that could not be graded.
    """

    graded: tuple[SubmissionGrade, ...]
    kept: tuple[SubmissionGrade, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        rows = [f"{'sheet':28}{'graded':>8}{'kept':>8}{'points, mean':>16}"]
        for sheet in sorted({grade.sheet for grade in (*self.graded, *self.kept)}):
            new, old = ([one for one in part if one.sheet == sheet] for part in (self.graded, self.kept))
            both = [*new, *old]
            mean = sum(one.points for one in both) / len(both)
            rows.append(f"{sheet:28}{len(new):>8}{len(old):>8}{f'{mean:.2f} of {both[0].max_points:g}':>16}")
        environments = {grade.environment for grade in (*self.graded, *self.kept)}
        if len(environments) > 1:
            rows.append(f"{len(environments)} sets of versions have graded these: pass --regrade to have one.")
        return "\n".join([*rows, *self.problems])


def grade_class(settings: Settings) -> Report:
    """Grade what is new or changed in a folder of submissions, and bring the gradebook and the feedback up to date.

    Raises:
        ValueError: no such sheet, a gradebook or a scheduler that is none.
        OSError: no such folder, no sandbox, a database or a disk that refuses, another run at work. Grades are kept.
    """
    submissions, problems = _taken_in(settings.submitted, settings.sheet)
    results, url = Results(settings.into), settings.url or default_url(settings.into)
    with results.run(regrade=settings.regrade) as run, open_gradebook(url) as book:
        desk = Desk(results, run, book, settings.backend)
        refused = [(Submission(one.student, one.sheet, one.path, {}, ""), one.reason) for one in problems]
        desk.open({one.sheet for one in (*submissions, *(one for one, _ in refused)) if one.sheet})
        jobs, kept = desk.sort(submissions)
        desk.refuse(refused)
        with_bar = tqdm(_outcomes(jobs, settings), total=len(jobs), unit="", disable=None)
        try:
            graded = [grade for done in with_bar if (grade := desk.keep(done))]
        finally:
            with_bar.iterable.close()  # ends the processes, also where keeping a grade went wrong
            with_bar.close()
        desk.explain()
    return Report(tuple(graded), tuple(kept), tuple(sorted(desk.problems)))


def _taken_in(folder: Path, sheet: str | None) -> tuple[list[Submission], list[intake.Problem]]:
    """What can be graded, and what cannot."""
    found, problems = intake.find_submissions(folder, sheet)
    submissions = []
    for one in found:
        try:
            if len(one.student) > LONGEST_NAME:
                raise intake.IntakeError(f"is in a folder whose name is longer than {LONGEST_NAME} letters; rename it")
            submissions.append(intake.read_submission(one))
        except intake.IntakeError as error:
            problems.append(intake.Problem(one.student, one.sheet, one.path, str(error)))
    return submissions, problems


def _outcomes(jobs: Sequence[Job], settings: Settings) -> Iterator[Done]:
    work = partial(cluster.grade_job, limits=settings.limits, backend=settings.backend)
    if settings.scheduler:
        yield from cluster.on_scheduler(jobs, work, settings.scheduler)
    else:
        most = min(cluster.cores(), max(1, len(jobs)))
        yield from cluster.on_this_machine(jobs, work, most if settings.workers is None else settings.workers)
