"""Jobs in processes on this machine: each comes back once, whatever dies; no process is left."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import standins
from standins import by_student, jobs

from qcourse.grading.jobs import Done, Job
from qcourse.grading.processes import on_this_machine

HERE = Path(__file__).resolve().parent


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """What the test has started and not ended, without multiprocessing's own resource tracker."""
    # Another test may have left a warm sandbox, for example.
    before = psutil.Process().children(recursive=True)

    def found() -> list[psutil.Process]:
        new = [child for child in psutil.Process().children(recursive=True) if child not in before]
        return [child for child in new if "resource_tracker" not in "".join(child.cmdline())]

    return found


def ends(processes: list[psutil.Process], within_s: float = 10.0) -> bool:
    return not psutil.wait_procs(processes, timeout=within_s)[1]


def test_each_job_once_past_those_that_fail_or_kill(tmp_path: Path) -> None:
    what = ["ok", "fail", "die", "ok", f"die-once {tmp_path / 'mark'}", "ok"]
    found = by_student(on_this_machine(jobs(*what), standins.work, 2))
    assert len(found) == len(what)
    problems = {student: one.problem for student, one in found.items() if one.grade is None}
    assert problems == {
        "s1": "RuntimeError: no way",
        "s2": "the process that graded it died, twice",
    }
    for student in ("s0", "s3", "s4", "s5"):
        grade = found[student].grade
        assert grade is not None
        assert (grade["student"], grade["pid"] != os.getpid()) == (student, True)


def test_a_job_that_hangs_is_ended_and_no_other_notices() -> None:
    found = by_student(on_this_machine(jobs("sleep 600", "ok", "ok", wall_s=8.0), standins.work, 2))
    assert (found["s0"].grade, found["s0"].problem) == (
        None,
        "took longer than 8 s and was stopped",
    )
    assert found["s1"].grade
    assert found["s2"].grade


def test_a_process_is_used_again() -> None:
    found = by_student(on_this_machine(jobs("ok", "fail", "ok", "ok"), standins.work, 1))
    assert len({one.grade["pid"] for one in found.values() if one.grade}) == 1


def test_a_process_that_dies_between_two_jobs_is_replaced() -> None:
    done: list[Done] = []

    def killing_the_last() -> Iterator[Job]:
        for job in jobs("ok", "ok", "ok"):
            if done:
                process = psutil.Process(done[-1].grade["pid"])
                process.kill()
                psutil.wait_procs([process], timeout=5)
            yield job

    for one in on_this_machine(killing_the_last(), standins.work, 1):
        done.append(one)
    assert [one.grade is not None for one in done] == [True] * 3
    assert len({one.grade["pid"] for one in done if one.grade}) == 3


def test_jobs_are_taken_when_a_process_is_free() -> None:
    taken: list[str] = []

    def one_by_one() -> Iterator[Job]:
        for job in jobs("ok", "ok", "ok", "ok"):
            taken.append(job.submission.student)
            yield job

    outcomes = on_this_machine(one_by_one(), standins.work, 1)
    next(outcomes)
    assert taken == ["s0"]
    outcomes.close()


def test_a_lost_sandbox_is_said_and_the_rest_goes_on(
    children: Callable[[], list[psutil.Process]],
) -> None:
    found = by_student(on_this_machine(jobs("no-sandbox", "ok"), standins.work, 2))
    assert (found["s0"].problem, found["s0"].sandbox_lost) == (
        "no sandbox: bwrap is not here",
        True,
    )
    assert (found["s1"].problem, found["s1"].sandbox_lost) == ("", False)
    assert ends(children())


def test_closing_ends_the_processes_at_once(children: Callable[[], list[psutil.Process]]) -> None:
    outcomes = on_this_machine(jobs("ok", "sleep 60", "sleep 60"), standins.work, 2)
    next(outcomes)
    started = time.monotonic()
    outcomes.close()
    assert time.monotonic() - started < 30
    assert ends(children())


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import standins
from qcourse.grading.processes import on_this_machine
if __name__ == "__main__":
    for one in on_this_machine(standins.jobs("ok", "ok", "sleep 60", "sleep 60"), standins.work, 2):
        print(one.grade["pid"], flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "parent.py"), str(HERE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = {int(parent.stdout.readline()) for _ in range(2)}
        started = psutil.Process(parent.pid).children(recursive=True)
        assert pids <= {child.pid for child in started}
        parent.kill()
    assert ends(started)


def test_no_worker_is_none() -> None:
    with pytest.raises(ValueError, match="workers=0 must be 1 or more"):
        list(on_this_machine(jobs("ok"), standins.work, 0))
