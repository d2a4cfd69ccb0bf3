"""How fast a class is graded, with everything that belongs to it, and how much memory that takes.

A submission is the course's own solution of a sheet, so every case of every exercise is run and
judged. "One, warm" is grading and the sandbox alone, in a process that has graded before, for each
sheet. "Class" is the command from start to end, per submission; it includes its own start, the
gradebook and the feedback. Memory is what the processes of a run hold together at their peak (PSS,
so what they share counts once), sampled ten times per second.

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
from qcourse.course_files import master
from qcourse.grading import grade_submission as grading
from qcourse.grading.grades import BUBBLEWRAP, Limits
from qcourse.grading.intake import Found, read_submission

WORKERS = 2
ONE_S = 1.5  # the target for one warm submission
CLASS_S = 1.0  # the target per submission of a class
SAMPLE_S = 0.1


def row(what: str, unit: str, values: list[float], target: float | None = None) -> dict:
    """Return one line of the table."""
    return {"what": what, "unit": unit, **spread(values), "target": target}


def one_warm(sheet: str, repeats: int) -> dict:
    """Measure one submission of a sheet, in a process that has graded before."""
    path = master(sheet)
    submission = read_submission(Found("ada", path.stem, path))
    # This starts the sandbox, which the times below leave out.
    grading.check_backend(BUBBLEWRAP)
    times: list[float] = []
    for seed in range(repeats):
        start = time.perf_counter()
        grade = grading.grade_submission(submission, seed=seed)
        times.append(time.perf_counter() - start)
        assert grade.points == grade.max_points, grade
    return row(f"one, warm, sheet {sheet}", "s", times, ONE_S)


def whole_class(size: int, sheet: str = "01") -> list[dict]:
    """Measure the command over a class, and the most memory that it holds."""
    with tempfile.TemporaryDirectory(prefix="qcourse-class-") as name:
        submitted = Path(name) / "submitted"
        for number in range(size):
            student = submitted / f"student-{number}"
            student.mkdir(parents=True)
            shutil.copy(master(sheet), student)
        time_s, peak_bytes = graded(submitted)
    worst_mib = WORKERS * Limits().memory_mib
    each = f"class of {size}, sheet {sheet}, {WORKERS} workers: each"
    return [
        row(each, "s", [time_s / size], CLASS_S),
        row(f"class of {size}: submissions per minute", "", [60 * size / time_s]),
        row("memory, all processes", "MiB", [peak_bytes / 2**20]),
        row("what submissions could add to it", "MiB", [worst_mib]),
    ]


def graded(submitted: Path) -> tuple[float, int]:
    """Grade a folder; return the time in seconds and the peak of the memory in bytes."""
    command = [sys.executable, "-m", "qcourse.cli", "grade", str(submitted)]
    command += ["--workers", str(WORKERS)]
    peak_bytes = 0
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None:
            peak_bytes = max(peak_bytes, held_bytes(run.pid))
            time.sleep(SAMPLE_S)
    time_s = time.perf_counter() - start
    assert run.returncode == 0
    return time_s, peak_bytes


def held_bytes(pid: int) -> int:
    """Return the memory that a process and its descendants hold."""
    try:
        parent = psutil.Process(pid)
        processes = [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it has just ended
            continue
    return total


def main() -> None:
    """Measure every sheet and a class, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--class-size", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    sheets = [one_warm(sheet, options.repeats) for sheet in sheet_ids()]
    mean_s = statistics.mean(one["median"] for one in sheets)
    mean = row("one, warm, mean of the sheets", "s", [mean_s], ONE_S)
    # The class is graded by a process of its own, so this one's sandbox would only take memory.
    grading.close()
    report("grading", [*sheets, mean, *whole_class(options.class_size)])


if __name__ == "__main__":
    main()
