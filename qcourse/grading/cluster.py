"""Where submissions are graded: in processes on this machine, or on many machines through Dask.

The idea: grading one submission is a function of plain data to plain data, so where it runs does not matter. Here are
the two places: a pool of processes, which needs no port and no other package, and a Dask scheduler, whose workers are
reached over TLS alone, for whoever can speak to a worker can run code on it. Either way a process that dies takes no
grade along: what it was at is graded again, and each submission comes back once.

The workers know neither the gradebook nor the results; the process that asked writes those (`grade.py`).
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcourse.grading.grades import Limits, Submission
from qcourse.grading.mounts import SandboxError

if TYPE_CHECKING:
    from distributed import Client

PATIENCE_S = 60.0  # how long a scheduler may be without any worker
HANG_S = 600.0  # no submission takes as long: it is stopped before, unless something is wrong with its process
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


@dataclass(frozen=True)
class Job:
    """One submission to grade, with the seed of its cases."""

    submission: Submission
    seed: int


@dataclass(frozen=True)
class Done:
    """What became of a job: the grade as plain data, or None and the reason why there is none."""

    job: Job
    grade: dict[str, Any] | None
    problem: str = ""


Work = Callable[[Job], dict[str, Any]]


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def grade_job(job: Job, *, limits: Limits, backend: str) -> dict[str, Any]:
    """Grade one submission, as plain data; once more where the sandbox was lost on the way, as to a lack of memory.

    Raises:
        SandboxError: there is no sandbox to be had.
    """
    from qcourse.grading.judge import grade_submission  # torch and the sheets: only where grading is done

    try:
        return grade_submission(job.submission, seed=job.seed, limits=limits, backend=backend).to_dict()
    except SandboxError:
        return grade_submission(job.submission, seed=job.seed, limits=limits, backend=backend).to_dict()


def on_this_machine(jobs: Sequence[Job], work: Work, workers: int) -> Iterator[Done]:
    """Each job's outcome as it comes, from this many processes.

    Where a process dies, whatever was in work then is graded again, one job at a time: a job that kills a process of
    its own has no grade, and no other job suffers. Closing the iterator ends the processes at once.

    Raises:
        ValueError: workers is below 1.
        SandboxError: there is no sandbox to be had.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    waiting = deque(jobs)
    while waiting:
        suspects: list[Job] = []
        yield from _until_broken(waiting, suspects, work, workers)
        for job in suspects:
            broken: list[Job] = []
            yield from _until_broken(deque([job]), broken, work, 1)
            if broken:
                yield Done(job, None, "the process that graded it died or hung, twice")


def on_scheduler(jobs: Sequence[Job], work: Work, address: str) -> Iterator[Done]:
    """Each job's outcome as it comes, from the workers of a Dask scheduler, which repeats what a lost worker was at.

    Certificates are those of Dask's own configuration (distributed.comm.tls).

    Raises:
        ValueError: the address is not tls://HOST:PORT, or no certificate is configured.
        OSError: the scheduler cannot be reached, or has had no worker for a minute; a worker has no
            sandbox.
    """
    if not address.startswith("tls://"):
        raise ValueError(
            f"scheduler={address!r} must be tls://HOST:PORT: without TLS anyone on the network could run code"
        )
    with _client(address) as client:
        running = {client.submit(work, job, pure=False): job for job in jobs}
        while running:
            _some_worker(client, address)
            for future in _finished(running):
                yield _outcome(running.pop(future), future)
                future.release()


def _until_broken(waiting: deque[Job], suspects: list[Job], work: Work, workers: int) -> Iterator[Done]:
    """Take jobs and give outcomes until none is waiting or a process died; what was in work then is suspect."""
    context = multiprocessing.get_context("spawn")
    running: dict[Future, Job] = {}
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_as_worker, initargs=(os.getpid(),))
    try:
        while running or (waiting and not suspects):
            while waiting and len(running) < workers and not suspects:
                job = waiting.popleft()
                try:
                    running[pool.submit(work, job)] = job
                except BrokenProcessPool:  # a process died just now
                    suspects.append(job)
            done = wait(running, timeout=HANG_S, return_when=FIRST_COMPLETED).done
            if not done:
                _end_processes()  # which makes the outcome of each job in work BrokenProcessPool
            for future in done:
                job = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    suspects.append(job)
                else:
                    yield _outcome(job, future)
    finally:
        _end_processes()  # at once: the pool itself would wait for what they are at
        pool.shutdown(wait=True, cancel_futures=True)


def _end_processes() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def _outcome(job: Job, future: Any) -> Done:
    error = future.exception()
    if isinstance(error, SandboxError):
        raise error  # no other submission would fare better
    return Done(job, future.result()) if error is None else Done(job, None, f"{type(error).__name__}: {error}")


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
        raise ValueError("no certificate for TLS: set distributed.comm.tls in Dask's configuration") from error
    except OSError as error:
        raise OSError(f"The scheduler {address} cannot be reached: {str(error).splitlines()[0]}") from error


def _some_worker(client: "Client", address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE_S)
    except TimeoutError as error:
        raise OSError(f"The scheduler {address} has no worker: start one, then run this again.") from error


def _finished(running: dict[Any, Job]) -> list:
    """Futures that are done; none where in a few seconds none was."""
    from distributed import wait as wait_for

    try:
        return list(wait_for(list(running), timeout=5, return_when=FIRST_COMPLETED).done)
    except TimeoutError:
        return []
