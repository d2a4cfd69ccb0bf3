"""The table of attacks: each scores what it deserves, costs no other exercise, leaves nothing.

Each row is run three times: on the naive grader, where it must succeed, so that a row which proves
nothing is found; on ours; and on ours once more as an unprivileged user, if root runs the tests.
"""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from attacks import ATTACKS, FULL, NOTHING, RIGHT, Attack
from standins import ROOT, as_nobody

from qcourse.grading import grade_submission
from qcourse.grading.grades import Limits, SubmissionGrade
from qcourse.grading.intake import Found, find_submissions, read_submission

MASTER = ROOT / "solutions" / "01_quantizer.ipynb"
NAIVE = ROOT / "tests" / "grading" / "naive_grader.py"
LIMITS = Limits(case_s=1.0, exercise_s=30.0, memory_mib=256)
needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None, reason="bubblewrap is not installed"
)
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)


@dataclass(frozen=True)
class World:
    """What an attack must not reach."""

    folder: Path
    database: Path
    other: Path
    mark: Path
    listener: socket.socket

    def filled(self, source: str) -> str:
        places = {"ROOT": ROOT, "DATABASE": self.database, "OTHER": self.other, "MARK": self.mark}
        for name, place in {**places, "PORT": self.listener.getsockname()[1]}.items():
            source = source.replace(f"{{{name}}}", str(place))
        return source

    def bombs(self) -> list[Path]:
        return [*Path("/tmp").glob(f"qcourse-bomb-{self.listener.getsockname()[1]}-*")]

    def damage(self) -> list[str]:
        """What has been done to it."""
        with sqlite3.connect(self.database) as database:
            scores = database.execute("select score from grade").fetchall()
        try:
            self.listener.accept()[0].close()
            heard = True
        except BlockingIOError:
            heard = False
        found = {
            "scores": scores != [(1,)],
            "mark": self.mark.exists(),
            "network": heard,
            "files": bool(self.bombs()),
        }
        return [name for name, done in found.items() if done]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    (tmp_path / "submitted" / "ada").mkdir(parents=True)
    other = Path(shutil.copy(MASTER, tmp_path / "submitted" / "ada"))
    folder = tmp_path / "submitted" / "mallory"
    folder.mkdir()
    mark = tmp_path / "mark"
    forge = f"""
import os
open({str(mark)!r}, "w").close()
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b'{{"points": 3.0}}\\n')
    except OSError:
        pass
os._exit(0)
"""
    (folder / "numpy.py").write_text(forge, encoding="utf-8")
    with sqlite3.connect(tmp_path / "gradebook.db") as database:
        database.execute("create table grade (score)")
        database.execute("insert into grade values (1)")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        world = World(folder, tmp_path / "gradebook.db", other, mark, listener)
        yield world
        for bomb in world.bombs():
            bomb.unlink()


def hand_in(folder: Path, source: str, exercise: str = "01.2") -> Path:
    """The sheet with all solutions, but for one that is this source."""
    notebook = nbformat.read(MASTER, as_version=4)
    mark = f"{exercise.replace('.', '-')}-solution"
    next(cell for cell in notebook.cells if cell.id == mark).source = source
    path = folder / MASTER.name
    nbformat.write(notebook, path)
    return path


def graded(folder: Path, seed: int = 11) -> SubmissionGrade:
    submission = read_submission(Found(folder.name, MASTER.stem, folder / MASTER.name))
    return grade_submission.grade_submission(submission, seed=seed, limits=LIMITS)


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it holds within a second: a process that has ended is in the list for a moment."""
    until = time.monotonic() + 1
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def processes() -> int:
    """How many processes there are below this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2]
            parents[int(folder.name)] = int(after_name.split()[1])
        except OSError:
            continue  # it has just ended
    below = {os.getpid()}
    found = 0
    while below:
        below = {process for process, parent in parents.items() if parent in below}
        found += len(below)
    return found


@needs_sandbox
@each_attack
def test_an_attack_earns_what_it_deserves_and_nothing_else_changes(
    attack: Attack, world: World
) -> None:
    grade_submission.check_backend("bubblewrap")
    time.sleep(0.05)
    before = processes()
    hand_in(world.folder, world.filled(attack.source))
    grade = graded(world.folder)
    points = {exercise.exercise: exercise.points for exercise in grade.exercises}
    assert points == {"01.1": 1, "01.2": attack.points, "01.3": 3, "01.4": 3, "01.5": 2}, (
        grade.exercises[1].reason
    )
    assert grade.problem is None
    assert world.damage() == []
    assert soon(lambda: processes() == before)
    assert len(json.dumps(grade.to_dict())) < 5000


class Naive:
    """The naive grader's end of the pipe."""

    def __init__(self, scratch: Path) -> None:
        self.name = str(scratch)
        command = [sys.executable, str(NAIVE), self.name]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def grade(
        self, cells: list[str], folder: Path, by_pickle: bool = False, seconds: float = 60.0
    ) -> dict[str, Any] | None:
        request = {
            "cells": cells,
            "folder": str(folder),
            "by_pickle": by_pickle,
            "seconds": seconds,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def left_over(self) -> list[int]:
        """Processes that bear its command line and are not it; they are ended."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                pid = int(folder.name)
                is_its_own = self.name.encode() in (folder / "cmdline").read_bytes()
                if is_its_own and pid != self.process.pid:
                    os.kill(pid, 9)
                    found.append(pid)
            except (OSError, ProcessLookupError):
                continue
        return found


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Naive]:
    grader = Naive(tmp_path_factory.mktemp("naive"))
    with grader.process:
        yield grader
        grader.process.stdin.close()


SETUP = "import torch\nfrom torch import Tensor\nfrom qcourse import check"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forks")
def test_the_naive_grader_grades_honest_work(naive: Naive, world: World) -> None:
    (world.folder / "numpy.py").unlink()
    assert naive.grade([SETUP, RIGHT], world.folder) == {"points": 3.0, "output": 0}
    wrong = naive.grade([SETUP, RIGHT.replace("- 1)", "+ 0)")], world.folder)
    assert wrong is not None
    assert wrong["points"] == 0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it forks")
@each_attack
def test_an_attack_gets_past_the_naive_grader(attack: Attack, world: World, naive: Naive) -> None:
    if attack.name != "a module of a known name beside the notebook":
        (world.folder / "numpy.py").unlink()
    seconds = 1.0 if attack.naive == NOTHING else 60.0
    result = naive.grade(
        [SETUP, world.filled(attack.source)], world.folder, attack.by_pickle, seconds
    )
    if attack.naive == NOTHING:
        assert result is None
    elif attack.naive:
        assert result is not None
        assert result["points"] == (3.0 if attack.naive == FULL else 0.0)
    else:
        assert world.damage() or (result or {})["output"] > 1_000_000
    assert bool(naive.left_over()) == (attack.name == "a fork bomb")


@needs_sandbox
@pytest.mark.skipif(
    os.getuid() != 0, reason="the tests above have been run by an unprivileged user already"
)
def test_the_same_holds_for_an_unprivileged_user() -> None:
    command = [sys.executable, "-B", "-m", "pytest", "-q"]
    for plugin in ("cacheprovider", "xdist", "randomly"):
        command += ["-p", f"no:{plugin}"]
    command += ["-k", "earns_what_it_deserves", str(Path(__file__))]
    done = subprocess.run(
        [*as_nobody(), *command],
        cwd=ROOT,
        env={**os.environ, "HOME": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{len(ATTACKS)} passed" in done.stdout


def test_a_link_to_a_file_of_the_system_is_not_followed(world: World) -> None:
    (world.folder / MASTER.name).symlink_to("/etc/passwd")
    found, problems = find_submissions(world.folder.parent)
    assert [one.student for one in found] == ["ada"]
    assert [(one.student, one.sheet, one.reason.split(",")[0]) for one in problems] == [
        ("mallory", "01_quantizer", "is a symbolic link")
    ]
    # As a collector that follows links does.
    copied = shutil.copy(world.folder / MASTER.name, world.folder / "copied")
    assert Path(copied).read_text().startswith("root:")
