"""A whole run: what was handed in is read, graded, kept, entered in the gradebook and explained to the students.

The idea: everything that can be wrong before the first grade (no folder, no sandbox, a database that refuses) is found
before it, in one sentence. From then on each grade is kept as it comes, so that whenever the run is cut short, the next
one goes on where it was; what was graded before and has not changed since is not graded again. A disk or a database
that refuses on the way stops the run, and the report says so.

The parts do not know of each other: `intake.py` reads, `cluster.py` grades somewhere, `recorder.py` keeps what comes,
`report.py` sums up. This file is the order they come in.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.grading import cluster, intake
from qcourse.grading.book.gradebook import default_url, open_gradebook
from qcourse.grading.book.results import Results, private_files
from qcourse.grading.cluster import Done, Job
from qcourse.grading.grades import BUBBLEWRAP, NONE, Limits
from qcourse.grading.recorder import Recorder
from qcourse.grading.summary import RunSummary, totals, totals_of


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


def grade_class(settings: Settings) -> RunSummary:
    """Grade what is new or changed in a folder of submissions, and bring the gradebook and the feedback up to date.

    Raises:
        ValueError: no such sheet, a gradebook or a scheduler that is none.
        OSError: nothing was graded: no such folder, no sandbox, a database or a disk that refuses, another run at work.
    """
    found, problems = intake.find_submissions(settings.submitted, settings.sheet)
    results, url = Results(settings.into), settings.url or default_url(settings.into)
    recorder: Recorder | None = None
    try:
        with (
            private_files(),
            results.run(regrade=settings.regrade) as run,
            open_gradebook(url) as book,
        ):
            recorder = Recorder(results, run, book, settings.backend, settings.limits)
            recorder.open(
                {one.sheet for one in found} | {one.sheet for one in problems if one.sheet}
            )
            new = recorder.sort(found)
            if new and not settings.scheduler:
                cluster.check_sandbox(settings.backend)
            for problem in problems:
                recorder.refuse(problem, problem.reason)
            _grade(recorder, new, settings)
            held = totals(recorder.explain())
    except OSError as error:
        if recorder is None or not recorder.graded:
            raise
        return _report(recorder, totals_of((*recorder.kept, *recorder.graded)), stopped=str(error))
    return _report(recorder, held)


def _grade(recorder: Recorder, new: list[intake.Found], settings: Settings) -> None:
    """Have the submissions graded somewhere, and keep each grade as it comes.

    Raises:
        OSError: a disk, a database or the sandbox refuses.
    """
    outcomes = _outcomes(recorder.jobs(new), len(new), settings)
    with tqdm(total=len(new), unit="", disable=None) as bar:
        try:
            for done in outcomes:
                if done.sandbox_lost and not settings.scheduler:
                    cluster.check_sandbox(
                        settings.backend
                    )  # if that works, the submission is what ended it
                recorder.keep(done)
                bar.update()
        finally:
            outcomes.close()  # ends the processes, also where keeping a grade went wrong


def _outcomes(jobs: Iterable[Job], count: int, settings: Settings) -> Generator[Done]:
    work = partial(cluster.grade_job, limits=settings.limits, backend=settings.backend)
    if settings.scheduler:
        return cluster.on_scheduler(jobs, work, settings.scheduler)
    most = min(cluster.cores(), max(1, count)) if settings.workers is None else settings.workers
    return cluster.on_this_machine(jobs, work, most)


def _report(recorder: Recorder, held: dict, *, stopped: str = "") -> RunSummary:
    return RunSummary(
        graded=tuple(recorder.graded),
        kept=tuple(recorder.kept),
        held=held,
        problems=tuple(sorted(one.line for one in recorder.problems)),
        stopped=stopped,
    )
