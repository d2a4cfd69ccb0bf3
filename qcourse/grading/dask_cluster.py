"""Grading on many machines, through a Dask scheduler.

The idea: the scheduler hands each job to a worker and repeats the job if that worker is lost. It
is reached over TLS only, because anyone who can speak to a worker can run code on it.

`processes.py` does the same on this machine and needs no other package.
"""

import time
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED
from typing import TYPE_CHECKING, Any

from qcourse.grading.jobs import Done, Job, Work, reason_of
from qcourse.grading.sandbox.mounts import SandboxError

if TYPE_CHECKING:
    from distributed import Client

PATIENCE_S = 60.0  # how long a scheduler may be without any worker
POLL_S = 5  # how long one wait for a finished job lasts


def on_scheduler(jobs: Iterable[Job], work: Work, address: str) -> Generator[Done]:
    """Yield the outcome of each job as it comes from the workers of a Dask scheduler.

    The certificates are those of Dask's own configuration (distributed.comm.tls).

    Raises:
        ValueError: the address is not tls://HOST:PORT, or no certificate is configured.
        OSError: the scheduler cannot be reached, or has had no worker for a minute.
    """
    if not address.startswith("tls://"):
        raise ValueError(
            f"scheduler={address!r} must be tls://HOST:PORT: "
            "without TLS anyone on the network could run code"
        )
    with _client(address) as client:
        running = {client.submit(work, job, pure=False): job for job in jobs}
        # Until a worker is there, silence says nothing about the jobs.
        _require_worker(client, address)
        last_heard = time.monotonic()
        while running:
            _require_worker(client, address)
            finished = _finished(running)
            for future in finished:
                yield _outcome(running.pop(future), future)
                future.release()
            if finished:
                last_heard = time.monotonic()
                continue
            # Silence longer than the longest job means that no worker will answer any more.
            longest_s = max(job.wall_s for job in running.values())
            if time.monotonic() - last_heard > longest_s:
                for job in running.values():
                    yield Done(job, None, f"no worker answered within {longest_s:.0f} s")
                client.cancel([*running])
                return


def _outcome(job: Job, future: Any) -> Done:
    error = future.exception()
    if error is None:
        return Done(job, future.result())
    sandbox_lost = isinstance(error, SandboxError)
    return Done(job, None, reason_of(error), sandbox_lost)


def _client(address: str) -> "Client":
    from distributed import Client
    from distributed.security import Security

    try:
        security = Security(require_encryption=True)
        return Client(address, security=security)
    # Dask raises TypeError if a certificate or a key is missing.
    except TypeError as error:
        raise ValueError(
            "no certificate for TLS: set distributed.comm.tls in Dask's configuration"
        ) from error
    except OSError as error:
        first_line = str(error).splitlines()[0]
        raise OSError(f"The scheduler {address} cannot be reached: {first_line}") from error


def _require_worker(client: "Client", address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=PATIENCE_S)
    except TimeoutError as error:
        raise OSError(
            f"The scheduler {address} has no worker: start one, then run this again."
        ) from error


def _finished(running: Mapping[Any, Job]) -> list:
    """Return the futures that are done; an empty list after a few seconds without any."""
    from distributed import wait as wait_for

    try:
        outcome = wait_for(list(running), timeout=POLL_S, return_when=FIRST_COMPLETED)
    except TimeoutError:
        return []
    return list(outcome.done)
