"""What any floor may ask of the machine that it runs on: its processor's name, the clock, a file written as a whole.

Source: none but the standard library; a rename within a folder is atomic (POSIX ``rename``).

How it differs from ``cost/devices.py``: that says what a device can do.
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
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def least_time_s(work: Callable[[], object], repeats: int) -> float:
    """The shortest of several calls in seconds, after one that is not counted."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give a path to write to beside the file, and rename it once all is written.

    Whoever reads the file finds the old one or the new one, never half of it. Missing folders are
    made. If the writing fails, the old file stays and nothing else does.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        yield aside
        with aside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in full or not at all, as ``written_aside`` does."""
    with written_aside(path) as aside, aside.open("x", encoding="utf-8") as file:
        file.write(text)
