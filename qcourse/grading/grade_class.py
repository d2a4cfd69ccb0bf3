"""A whole run: read what was handed in, grade it, keep it, enter it, and explain it to students.

The idea: everything that can be wrong before the first grade (no folder, no sandbox, a database
that refuses) is found before it, in one sentence. From then on each grade is kept as it comes, so
a run that is cut short is continued by the next. A submission that was graded before and has not
changed is not graded again. A disk or database that refuses halfway stops the run, and the summary
says so.

The parts do not know each other: `intake.py` reads, `processes.py` or `dask_cluster.py` grades,
`recorder.py` keeps what comes, `summary.py` sums up. This file is the order they come in.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.grading import dask_cluster, intake, jobs, processes
from qcourse.grading.book.gradebook import default_url, open_gradebook
from qcourse.grading.book.results import Results, private_files
from qcourse.grading.book.sheets import enter_sheets
from qcourse.grading.grades import BUBBLEWRAP, NONE, Limits
from qcourse.grading.recorder import Recorder
from qcourse.grading.summary import RunSummary, Totals, totals, totals_of


@dataclass(frozen=True)
class Settings:
    """How to grade a class."""

    submitted: Path  # the folder with STUDENT/SHEET.ipynb
    into: Path  # the folder of the results
    sheet: str | None = None  # "01" for this sheet alone; None for all
    url: str | None = None  # of the gradebook; None for SQLite in `into`
    workers: int | None = None  # processes on this machine; None for one per core
    scheduler: str | None = None  # tls://HOST:PORT of a Dask scheduler, instead of processes
    unsafe: bool = False  # grade without a sandbox
    regrade: bool = False  # grade again what was graded before
    limits: Limits = field(default_factory=Limits)

    @property
    def backend(self) -> str:
        """The sandbox that grades are marked with."""
        return NONE if self.unsafe else BUBBLEWRAP


def grade_class(settings: Settings) -> RunSummary:
    """Grade what is new or changed, and bring the gradebook and the feedback up to date.

    Raises:
        ValueError: no such sheet, or not the address of a gradebook or a scheduler.
        OSError: nothing was graded (no folder, no sandbox, another run, a disk that refuses).
    """
    found, problems = intake.find_submissions(settings.submitted, settings.sheet)
    results = Results(settings.into)
    url = settings.url or default_url(settings.into)
    recorder: Recorder | None = None
    try:
        with (
            private_files(),
            results.run(regrade=settings.regrade) as run,
            open_gradebook(url) as book,
        ):
            masters = enter_sheets(results.folder, book, _sheets(found, problems))
            backend = settings.backend
            recorder = Recorder(results, run, book, masters, backend, settings.limits)
            held = _grade_and_record(recorder, found, problems, settings)
    except OSError as error:
        if recorder is None or not recorder.graded:
            raise
        # The gradebook may be out of reach, so the table shows what this run itself knows.
        known = totals_of((*recorder.kept, *recorder.graded))
        return _summary(recorder, known, stopped=str(error))
    return _summary(recorder, held)


def _grade_and_record(
    recorder: Recorder,
    found: list[intake.Found],
    problems: list[intake.Problem],
    settings: Settings,
) -> Totals:
    """Do what follows once the sheets are entered; return what the gradebook then holds."""
    new, standing = recorder.sort(found)
    recorder.keep_standing(standing)
    # A sandbox that does not start is found here, before any submission gets 0 points for it.
    if new and not settings.scheduler:
        jobs.check_sandbox(settings.backend)

    for problem in problems:
        recorder.refuse(problem, problem.reason)
    _grade(recorder, new, settings)
    return totals(recorder.explain())


def _sheets(found: list[intake.Found], problems: list[intake.Problem]) -> set[str]:
    """Return the sheets of a run; the sheet of a problem may be unknown."""
    graded_sheets = {one.sheet for one in found}
    problem_sheets = {one.sheet for one in problems if one.sheet}
    return graded_sheets | problem_sheets


def _grade(recorder: Recorder, new: list[intake.Found], settings: Settings) -> None:
    """Have the submissions graded, and keep each grade as it comes.

    Raises:
        OSError: a disk, a database or the sandbox refuses.
    """
    outcomes = _outcomes(recorder.jobs(new), len(new), settings)
    with tqdm(total=len(new), unit="", disable=None) as bar:
        try:
            for done in outcomes:
                # If the sandbox starts again, the submission ended it; if not, the run ends.
                if done.sandbox_lost and not settings.scheduler:
                    jobs.check_sandbox(settings.backend)
                recorder.keep(done)
                bar.update()
        # This ends the processes, also if keeping a grade failed.
        finally:
            outcomes.close()


def _outcomes(waiting: Iterable[jobs.Job], count: int, settings: Settings) -> Generator[jobs.Done]:
    work = partial(jobs.grade_job, limits=settings.limits, backend=settings.backend)
    if settings.scheduler:
        return dask_cluster.on_scheduler(waiting, work, settings.scheduler)
    workers = settings.workers
    # One process per core, but no more than there are submissions.
    if workers is None:
        workers = min(processes.cores(), max(1, count))
    return processes.on_this_machine(waiting, work, workers)


def _summary(recorder: Recorder, held: Totals, *, stopped: str = "") -> RunSummary:
    lines = sorted(problem.line for problem in recorder.problems)
    return RunSummary(
        graded=tuple(recorder.graded),
        kept=tuple(recorder.kept),
        held=held,
        problems=tuple(lines),
        stopped=stopped,
    )
