"""How fast a class is graded, in the sandbox and with everything that belongs to it, and how much memory that takes.

A submission is the course's own solution of a sheet, so every case of every exercise is run and judged. "One, warm" is
the judge and the sandbox alone, in a process that has graded before, for each sheet; "class" is the command from start
to end, its own start, the gradebook and the feedback included, over the number of submissions. Memory is what the
processes of a run hold together at their peak (PSS, so what they share counts once), sampled ten times a second.

    python benchmarks/grading.py [--class-size 120]
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _stamp import report, spread

from qcourse.checks.registry import sheet_ids
from qcourse.grading import grade_submission as grading_process
from qcourse.grading import intake
from qcourse.grading.grades import Limits

WORKERS = 2


def row(what: str, unit: str, values: list[float], target: float | None = None) -> dict:
    """One line of the table."""
    return {"what": what, "unit": unit, **spread(values), "target": target}


def one_warm(sheet: str, repeats: int) -> dict:
    """The time of one submission of a sheet, in a process that has graded before."""
    found = intake.Found("ada", intake.master(sheet).stem, intake.master(sheet))
    submission, times = intake.read_submission(found), []
    grading_process.check_backend("bubblewrap")
    for seed in range(repeats):
        start = time.perf_counter()
        grade = grading_process.grade_submission(submission, seed=seed)
        times.append(time.perf_counter() - start)
        assert grade.points == grade.max_points, grade
    return row(f"one, warm, sheet {sheet}", "s", times, 1.5)


def whole_class(size: int, sheet: str = "01") -> list[dict]:
    """The command over a class, per submission, and the most memory that it holds."""
    with tempfile.TemporaryDirectory(prefix="qcourse-class-") as name:
        submitted = Path(name) / "submitted"
        for number in range(size):
            (submitted / f"student-{number}").mkdir(parents=True)
            shutil.copy(intake.master(sheet), submitted / f"student-{number}")
        command = [
            sys.executable,
            "-m",
            "qcourse.cli",
            "grade",
            str(submitted),
            "--workers",
            str(WORKERS),
        ]
        start, peak = time.perf_counter(), 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            while run.poll() is None:
                peak = max(peak, held_bytes(run.pid))
                time.sleep(0.1)
        assert run.returncode == 0
        time_s = time.perf_counter() - start
    worst = WORKERS * Limits().memory_mib
    return [
        row(f"class of {size}, sheet {sheet}, {WORKERS} workers: each", "s", [time_s / size], 1.0),
        row(f"class of {size}: submissions a minute", "", [60 * size / time_s]),
        row("memory, all processes", "MiB", [peak / 2**20]),
        row("what submissions could add to it", "MiB", [worst]),
    ]


def held_bytes(pid: int) -> int:
    """What a process and its descendants hold."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--class-size", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sheets = [one_warm(sheet, options.repeats) for sheet in sheet_ids()]
    mean = statistics.mean(one["median"] for one in sheets)
    grading_process.close()
    report(
        "grading",
        [
            *sheets,
            row("one, warm, mean of the sheets", "s", [mean], 1.5),
            *whole_class(options.class_size),
        ],
    )
