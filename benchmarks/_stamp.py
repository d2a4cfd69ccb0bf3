"""Timing a call, and results stamped with the machine and the date they were measured on."""

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from qcourse.machine import processor

RESULTS = Path(__file__).resolve().parent / "results"


def timed_ms(call: Callable[[], object], *, repeats: int = 9) -> dict[str, float]:
    """Return the minimum and the median time of a call in ms, after one uncounted call."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return spread(times)


def spread(values: list[float]) -> dict[str, float]:
    """Return the minimum and the median, to four digits."""
    return {"min": four_digits(min(values)), "median": four_digits(statistics.median(values))}


def four_digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.4g}")


def peak_bytes() -> int:
    """Return the peak memory of this process (VmHWM, Linux only); 0 where it is unknown."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def available_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stamp(device: str = "cpu") -> dict[str, str | int]:
    """Return the device, processor, cores, torch's threads, versions and the date."""
    return {
        "device": device,
        "cpu": processor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "date": date.today().isoformat(),
    }


def report(name: str, rows: list[dict], *, device: str = "cpu") -> None:
    """Print the rows as a table and write them, stamped, to results/NAME.json.

    Args:
        name: the file's name.
        rows: what (a string), unit, min, median, and target (the most that min should be, or None).
    """
    where = stamp(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print(f"{'':52}{'min':>10}{'median':>10}{'target':>10}")
    for row in rows:
        print(table_line(row))
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"stamp": where, "results": rows}, indent=2) + "\n"
    (RESULTS / f"{name}.json").write_text(text, encoding="utf-8")


def table_line(row: dict) -> str:
    """Return a row as a line of the table, marked where it misses its target."""
    has_target = row["target"] is not None
    target = f"{row['target']:g}" if has_target else ""
    missed = "  missed" if has_target and row["min"] > row["target"] else ""
    times = f"{row['min']:>10g}{row['median']:>10g}"
    return f"{row['what']:46}{row['unit']:>6}{times}{target:>10}{missed}"
