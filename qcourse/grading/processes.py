"""Grading in processes on this machine.

The idea: each process holds one job at a time and has a pipe of its own. A process that dies, or
that takes too long over one job, is ended and replaced, and the other processes do not notice. A
job whose process died is tried once more. So each job comes back exactly once, with a grade or
with a reason, and the time of a run is bounded.

`dask_cluster.py` does the same on many machines. Neither knows the gradebook or the results.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.connection import Connection, wait

from qcourse.grading.jobs import Done, Job, Work, reason_of
from qcourse.grading.sandbox.mounts import SandboxError

READY = "ready"  # what a process says when it can read its first job
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_this_machine(jobs: Iterable[Job], work: Work, workers: int) -> Generator[Done]:
    """Yield the outcome of each job as it comes; closing the iterator ends all processes at once.

    Args:
        jobs: taken one at a time, when a process is free.
        workers: how many processes grade at the same time.

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
            _begin_jobs(waiting, work, workers, free, busy)
            if not busy:
                return
            _wait_for_one(busy)
            for process in [*busy]:
                done = process.outcome()
                if done is None:
                    continue
                busy.remove(process)
                if process.alive:
                    free.append(process)
                yield done
    finally:
        for process in [*free, *busy]:
            process.end()


def _begin_jobs(
    waiting: Iterator[Job],
    work: Work,
    workers: int,
    free: list["_Process"],
    busy: list["_Process"],
) -> None:
    """Give waiting jobs to free or new processes until `workers` of them are busy."""
    while len(busy) < workers:
        job = next(waiting, None)
        if job is None:
            return
        process = free.pop() if free else _Process(work)
        process.begin(job)
        busy.append(process)


def _wait_for_one(busy: list["_Process"]) -> None:
    """Wait until a process says something, dies, or reaches the end of its job's time."""
    pipes = [process.pipe for process in busy]
    next_deadline = min(process.until for process in busy)
    left_s = next_deadline - time.monotonic()
    wait(pipes, timeout=max(left_s, 0.0))


class _Process:
    """A process that grades one job at a time, started when it gets the first."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.alive = False

    def begin(self, job: Job, *, again: bool = False) -> None:
        """Give it a job; the job's time begins now."""
        self.job = job
        self._again = again
        self.until = time.monotonic() + job.wall_s
        try:
            if self.alive:
                self.pipe.send(job)
        except OSError:  # it has died since its last job
            self.end()
        # A new process asks for the job when it is ready to read.
        if not self.alive:
            self._start()

    def outcome(self) -> Done | None:
        """Return the outcome of its job, or None while it runs; a hung or dead process is ended."""
        try:
            while self.pipe.poll():
                message = self.pipe.recv()
                if message != READY:
                    grade, problem, sandbox_lost = message
                    return Done(self.job, grade, problem, sandbox_lost)
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
        # A spawned process shares no memory, threads or sockets with this one.
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        arguments = (child_pipe, self._work, os.getpid())
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        # With our copy of the child's end closed, the pipe reports the child's death.
        child_pipe.close()
        self.alive = True


def _serve(pipe: Connection, work: Work, parent: int) -> None:
    """Do jobs until the parent ends this process; an exception of a job becomes a reason."""
    _prepare_process(parent)
    pipe.send(READY)
    while True:
        job = pipe.recv()
        try:
            pipe.send((work(job), "", False))
        except Exception as error:
            sandbox_lost = isinstance(error, SandboxError)
            pipe.send((None, reason_of(error), sandbox_lost))


def _prepare_process(parent: int) -> None:
    """Leave the terminal's Ctrl-C to the parent, and die when the parent does."""
    import torch

    os.setsid()
    # There are as many processes as cores, so each computes with one thread.
    torch.set_num_threads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(KILL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before prctl was called.
    if os.getppid() != parent:
        os._exit(1)
