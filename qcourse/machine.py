"""What any floor may ask of the machine that it runs on: its processor's name, and how long a call takes.

Source: none.

How it differs from ``cost/devices.py``: that says what a device can do; this looks at the clock and at a name.
"""

import platform
import time
from collections.abc import Callable
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
