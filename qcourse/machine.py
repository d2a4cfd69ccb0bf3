"""What any floor may ask of the machine: the processor's name, the time, a file written in full.

How it differs from ``cost/devices.py``: that lists what devices can do; this looks at this machine.
"""

import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """Return the processor's name as the system reports it."""
    # Linux has the full name here; the standard library does not read it
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def least_time_s(work: Callable[[], object], repeats: int) -> float:
    """Return the shortest time of several calls in seconds."""
    # the first call also fills caches, so it is not counted
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path to write to beside the file, and rename it when all is written.

    Missing folders are created. If the block fails, the old file stays.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        yield aside
        # the content must be on disk before the name points to it
        with aside.open("r+b") as file:
            os.fsync(file.fileno())
        # atomic (POSIX rename): a reader finds the old content or the new one, never a part
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in full or not at all, as ``written_aside`` does."""
    with written_aside(path) as aside, aside.open("x", encoding="utf-8") as file:
        file.write(text)
