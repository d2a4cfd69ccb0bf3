"""Where submissions are graded: in processes on this machine, or on many machines through Dask.

The idea: grading one submission is a function of plain data to plain data, so where it runs does not matter. Here are
the two places: processes on this machine, which need no port and no other package, and a Dask scheduler, whose workers
are reached over TLS alone, because whoever can speak to a worker can run code on it.

Each process holds one job at a time and has a pipe of its own. A process that dies, or that is at one job for too long,
is ended and replaced, and no other process notices. A job whose process died is tried once more. So each job comes
back once, with a grade or with the reason why there is none, and the end of a run is bounded.

The workers know neither the gradebook nor the results; the process that asked writes those (`grade_class.py`).
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from qcourse.grading.grades import Limits, Submission
from qcourse.grading.sandbox.mounts import SandboxError

if TYPE_CHECKING:
    from distributed import Client

PATIENCE_S = 60.0  # how long a scheduler may be without any worker
READY = "ready"
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


@dataclass(frozen=True)
class Job:
    """One submission to grade, with the seed of its cases and the longest time that it may take."""

    submission: Submission
    seed: int
    wall_s: float = 600.0


@dataclass(frozen=True)
class Done:
    """What became of a job.

    Args:
        grade: the grade as plain data; None where there is none.
        problem: the reason why there is none.
        sandbox_lost: whether the reason is that the sandbox did not start, or ended.
    """

    job: Job
    grade: dict[str, Any] | None
    problem: str = ""
    sandbox_lost: bool = False


Work = Callable[[Job], dict[str, Any]]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grade_job(job: Job, *, limits: Limits, backend: str) -> dict[str, Any]:
    """Grade one submission, as plain data.

    Raises:
        SandboxError: there is no sandbox to be had.
    """
    from qcourse.grading.grade_submission import (
        grade_submission,  # torch and the sheets: only where grading is done
    )

    return grade_submission(job.submission, seed=job.seed, limits=limits, backend=backend).to_dict()


def check_sandbox(backend: str) -> None:
    """Have the sandbox start once, in a process that ends afterwards.

    Raises:
        SandboxError: it does not; one sentence says why and what to do.
    """
    from qcourse.grading.grade_submission import check_backend, close

    check_backend(backend)
    close()


def on_this_machine(jobs: Iterable[Job], work: Work, workers: int) -> Generator[Done]:
    """Each job's outcome as it comes, from this many processes; closing the iterator ends them at once.

    Args:
        jobs: taken one at a time, when a process is free.

    Raises:
        ValueError: workers is below 1.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    waiting = iter(jobs)
    free: list[_Process] = []
    busy: list[_Process] = []
    try:
        while True:
            while len(busy) < workers and (job := next(waiting, None)) is not None:
                process = free.pop() if free else _Process(work)
                process.begin(job)
                busy.append(process)
            if not busy:
                return
            first_s = min(process.until for process in busy) - time.monotonic()
            wait([process.pipe for process in busy], timeout=max(first_s, 0.0))
            for process in [*busy]:
                done = process.outcome()
                if done is not None:
                    busy.remove(process)
                    if process.alive:
                        free.append(process)
                    yield done
    finally:
        for process in [*free, *busy]:
            process.end()


class _Process:
    """A process that grades one job at a time, started when it gets the first."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.alive = False

    def begin(self, job: Job, *, again: bool = False) -> None:
        """Give it a job; its time begins now."""
        self.job, self._again = job, again
        self.until = time.monotonic() + job.wall_s
        try:
            if self.alive:
                self.pipe.send(job)
        except OSError:  # it has died since its last job
            self.end()
        if not self.alive:
            self._start()  # the job is sent when it says that it is ready to read

    def outcome(self) -> Done | None:
        """What became of its job; None while it is at it. A process that hung or died is ended."""
        try:
            while self.pipe.poll():
                said = self.pipe.recv()
                if said != READY:
                    return Done(self.job, *said)
                self.pipe.send(self.job)
        except (EOFError, OSError):
            return self._died()
        if time.monotonic() < self.until:
            return None
        self.end()
        return Done(self.job, None, f"took longer than {self.job.wall_s:.0f} s and was stopped")

    def end(self) -> None:
        """End it at once."""
        if self.alive:
            self._process.kill()
            self._process.join()
            self.pipe.close()
        self.alive = False

    def _died(self) -> Done | None:
        """Start it again with its job; the second time, give the job up."""
        self.end()
        if self._again:
            return Done(self.job, None, "the process that graded it died, twice")
        self.begin(self.job, again=True)
        return None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._work, os.getpid()), daemon=True
        )
        self._process.start()
        theirs.close()
        self.alive = True


def _serve(pipe: Connection, work: Work, parent: int) -> None:
    """Do jobs until the parent ends it; here any exception that a job causes becomes a reason."""
    _as_worker(parent)
    pipe.send(READY)
    while True:
        job = pipe.recv()
        try:
            pipe.send((work(job), "", False))
        except Exception as error:
            pipe.send((None, _said(error), isinstance(error, SandboxError)))


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, SandboxError) else f"{type(error).__name__}: {error}"


def on_scheduler(jobs: Iterable[Job], work: Work, address: str) -> Generator[Done]:
    """Each job's outcome as it comes, from the workers of a Dask scheduler, which repeats what a lost worker was at.

    Certificates are those of Dask's own configuration (distributed.comm.tls).

    Raises:
        ValueError: the address is not tls://HOST:PORT, or no certificate is configured.
        OSError: the scheduler cannot be reached, or has had no worker for a minute.
    """
    if not address.startswith("tls://"):
        raise ValueError(
            f"scheduler={address!r} must be tls://HOST:PORT: without TLS anyone on the network could run code"
        )
    with _client(address) as client:
        running = {client.submit(work, job, pure=False): job for job in jobs}
        heard = time.monotonic()
        while running:
            _some_worker(client, address)
            finished = _finished(running)
            for future in finished:
                yield _outcome(running.pop(future), future)
                future.release()
            longest_s = max((job.wall_s for job in running.values()), default=0.0)
            if finished:
                heard = time.monotonic()
            elif (
                time.monotonic() - heard > longest_s
            ):  # every worker is at a job that should have ended
                for job in running.values():
                    yield Done(job, None, f"no worker answered within {longest_s:.0f} s")
                client.cancel([*running])
                return


def _outcome(job: Job, future: Any) -> Done:
    error = future.exception()
    if error is None:
        return Done(job, future.result())
    return Done(job, None, _said(error), isinstance(error, SandboxError))


def _as_worker(parent: int) -> None:
    """Out of reach of the terminal's Ctrl-C, which is the parent's to answer, and dead when the parent is."""
    import torch

    os.setsid()
    torch.set_num_threads(1)  # as many processes as cores
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _client(address: str) -> "Client":
    from distributed import Client
    from distributed.security import Security

    try:
        return Client(address, security=Security(require_encryption=True))
    except TypeError as error:
        raise ValueError(
            "no certificate for TLS: set distributed.comm.tls in Dask's configuration"
        ) from error
    except OSError as error:
        raise OSError(
            f"The scheduler {address} cannot be reached: {str(error).splitlines()[0]}"
        ) from error


def _some_worker(client: "Client", address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE_S)
    except TimeoutError as error:
        raise OSError(
            f"The scheduler {address} has no worker: start one, then run this again."
        ) from error


def _finished(running: dict[Any, Job]) -> list:
    """Futures that are done; none where none was for a few seconds."""
    from distributed import wait as wait_for

    try:
        return list(wait_for(list(running), timeout=5, return_when=FIRST_COMPLETED).done)
    except TimeoutError:
        return []
