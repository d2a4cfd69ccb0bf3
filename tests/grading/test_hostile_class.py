"""Thirty submissions that try to stop the grading, and ten honest ones, on a real disk.

One run grades the whole class; each test then looks at one row.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from hostile_class import FULL, HONEST, ROWS, Row, hand_in
from standins import ROOT, as_nobody

from qcourse.grading.book.gradebook import default_url, open_gradebook
from qcourse.grading.book.scores import Score, scores
from qcourse.grading.grades import Limits

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's"),
    pytest.mark.skipif(
        shutil.which("bwrap") is None,
        reason="bubblewrap is not installed: apt-get install bubblewrap",
    ),
]
LIMITS = Limits(case_s=1.0, exercise_s=4.0, memory_mib=256)
COMMAND = f"""
from pathlib import Path
from qcourse.grading.grade_class import Settings, grade_class
from qcourse.grading.grades import Limits
if __name__ == "__main__":
    report = grade_class(Settings(Path("submitted"), Path("graded"), workers=2, limits={LIMITS!r}))
    print(report)
    raise SystemExit(report.exit_status)
"""


@dataclass(frozen=True)
class Outcome:
    """What the run came to."""

    exit_status: int
    out: str
    time_s: float
    held: dict[str, list[Score]]
    left_over: list[str]


def graded(folder: Path, rows: list[Row], command: list[str]) -> Outcome:
    """Hand the class in, grade it, and look at the gradebook and at what is left."""
    hand_in(folder / "submitted", rows)
    (folder / "command.py").write_text(COMMAND, encoding="utf-8")
    started = time.monotonic()
    seen: set[psutil.Process] = set()
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
        run = subprocess.Popen(
            [*command, sys.executable, "-B", "command.py"],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=err,
        )
        while run.poll() is None:
            with contextlib.suppress(psutil.Error):
                seen.update(psutil.Process(run.pid).children(recursive=True))
            time.sleep(0.2)
    time_s = time.monotonic() - started
    said = (folder / "out").read_text()
    assert run.returncode in (0, 1), said[-2000:] + (folder / "err").read_text()[-3000:]
    left_over = psutil.wait_procs(seen, timeout=10)[1]
    held: dict[str, list[Score]] = {}
    with open_gradebook(default_url(folder / "graded")) as book:
        for one in scores(book):
            held.setdefault(one.student, []).append(one)
    return Outcome(run.returncode, said, time_s, held, [str(process) for process in left_over])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return graded(tmp_path_factory.mktemp("class"), [*ROWS, *HONEST], [])


@pytest.mark.parametrize("row", [*ROWS, *HONEST], ids=lambda row: row.student)
def test_each_earns_what_it_deserves(row: Row, outcome: Outcome) -> None:
    student = unicodedata.normalize("NFC", row.student)
    found = outcome.held[student]
    assert sum(one.points for one in found) == row.points, [
        (one.exercise, one.points, one.comment) for one in found
    ]
    assert any(one.review for one in found) == row.problem
    assert (f"{student}/" in outcome.out) == row.problem


def test_the_run_ends_in_time_and_leaves_nothing(outcome: Outcome) -> None:
    assert len(outcome.held) == len(ROWS) + len(HONEST) == 40
    assert outcome.time_s < 40 * LIMITS.submission_s(5)
    assert outcome.exit_status == 1
    assert outcome.left_over == []
    assert outcome.out.count("\n") < 70


@pytest.mark.skipif(
    os.getuid() != 0, reason="the tests above have been run by an unprivileged user already"
)
def test_the_same_for_an_unprivileged_user(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"qcourse-class-{os.getpid()}"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    try:
        rows = [row for row in ROWS if "group" in row.student or "drips" in row.student]
        rows += HONEST[:2]
        found = graded(folder, rows, as_nobody())
        totals = {student: sum(one.points for one in own) for student, own in found.held.items()}
        assert totals == {row.student: row.points for row in rows}
        assert sum(own[0].points == 1 for own in found.held.values()) == len(rows)
        assert FULL in totals.values()
    finally:
        shutil.rmtree(folder)


def test_a_disk_that_fills_up_is_said_in_status_table_and_line(tmp_path: Path) -> None:
    """A real one: a file system in memory, for the gradebook and a few of the submissions."""
    honest = [replace(HONEST[0], student=f"student {number:02}") for number in range(12)]
    hand_in(tmp_path / "submitted", honest)
    (tmp_path / "graded").mkdir()
    small = ["--size", str(440 << 10), "--tmpfs", str(tmp_path / "graded")]
    command = ["bwrap", "--dev-bind", "/", "/", *small, "--", sys.executable]
    command += ["-B", "-m", "qcourse.cli", "grade", "submitted", "--workers", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = [line.split() for line in lines if line.startswith("student ")]
    assert 1 <= sum(row[-1] == "12" for row in rows) < len(honest)
    assert "Stopped half-way: " in lines[-1]
    full = ("No space left on device", "disk is full", "disk I/O error")
    assert any(word in lines[-1] for word in full)
