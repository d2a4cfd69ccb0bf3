"""What every benchmark shares: timing a call, and results stamped with where and when they were measured."""

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
    """The least and the median time of a call in ms, after one call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return spread(times)


def spread(values: list[float]) -> dict[str, float]:
    """The least and the median, to four digits."""
    return {
        name: float(f"{f(values):.4g}") for name, f in (("min", min), ("median", statistics.median))
    }


def peak_bytes() -> int:
    """The most memory that this process has held (VmHWM, so on Linux alone); 0 where the system does not tell."""
    status = Path("/proc/self/status")
    found = (
        re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if status.exists()
        else None
    )
    return 1024 * int(found[1]) if found else 0


def stamp(device: str = "cpu") -> dict[str, str | int]:
    """Where and when: device, processor, cores that this process may use, threads of torch, versions, date."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {
        "device": device,
        "cpu": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy")},
        "date": date.today().isoformat(),
    }


def report(name: str, rows: list[dict], *, device: str = "cpu") -> None:
    """Print the rows as a table and write them, stamped, to results/NAME.json.

    Args:
        name: the file's name.
        rows: what (a text), unit, min, median, and target (the most that min should be, or None).
    """
    stamped = {"stamp": stamp(device), "results": rows}
    print(", ".join(f"{key} {value}" for key, value in stamped["stamp"].items()))
    print(f"{'':52}{'min':>10}{'median':>10}{'target':>10}")
    for row in rows:
        target = "" if row["target"] is None else f"{row['target']:g}"
        missed = "  missed" if target and row["min"] > row["target"] else ""
        print(
            f"{row['what']:46}{row['unit']:>6}{row['min']:>10g}{row['median']:>10g}{target:>10}{missed}"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(stamped, indent=2) + "\n", encoding="utf-8")
