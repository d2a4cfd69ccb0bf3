"""Jobs on this machine and on a real Dask scheduler: each comes back once, whatever dies, and no process is left."""

import datetime
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest
import standins
from standins import free_port, jobs

from qcourse.grading import cluster
from qcourse.grading.cluster import Done, Job, on_scheduler, on_this_machine

HERE = Path(__file__).resolve().parent


def by_student(outcomes: Iterator[Done]) -> dict[str, Done]:
    """The outcomes, of which there must be one a student."""
    found: dict[str, Done] = {}
    for one in outcomes:
        assert one.job.submission.student not in found
        found[one.job.submission.student] = one
    return found


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """What the test has started and not ended; multiprocessing keeps one process that cleans up after all."""
    before = psutil.Process().children(
        recursive=True
    )  # a sandbox that another test has left warm, say

    def found() -> list[psutil.Process]:
        new = [child for child in psutil.Process().children(recursive=True) if child not in before]
        return [child for child in new if "resource_tracker" not in "".join(child.cmdline())]

    return found


@pytest.fixture(autouse=True)
def _no_client_is_left() -> Iterator[None]:
    """A client of Dask that is collected while another starts would hold the lock that this one waits for."""
    yield
    gc.collect()


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
from qcourse.grading.cluster import on_this_machine
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


def write_certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that is its own authority, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    )
    builder = (
        builder.serial_number(1)
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(
        x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
    )
    pem = serialization.Encoding.PEM
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = folder / "both.pem"
    path.write_bytes(text + builder.sign(key, hashes.SHA256()).public_bytes(pem))
    return path


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Dask's settings for TLS, in this process and for others."""
    import dask
    import distributed  # brings defaults, which setting something first would keep out

    assert distributed.Client
    path = str(write_certificate(tmp_path))
    names = [
        "ca-file",
        *(
            f"{role}.{part}"
            for role in ("scheduler", "worker", "client")
            for part in ("cert", "key")
        ),
    ]
    prefix = "DASK_DISTRIBUTED__COMM__"
    settings = {
        f"{prefix}TLS__{name}".upper().replace(".", "__").replace("-", "_"): path for name in names
    }
    with dask.config.set({f"distributed.comm.tls.{name}": path for name in names}):
        yield {
            **os.environ,
            **settings,
            "PYTHONPATH": str(HERE),
            f"{prefix}REQUIRE_ENCRYPTION": "true",
        }


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(stack: ExitStack, env: dict[str, str], *arguments: str) -> subprocess.Popen:
    """A part of Dask, until the test ends."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-m", "dask", *arguments], env=env, **quiet)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def test_a_scheduler_over_tls_whose_worker_dies(
    tls: dict[str, str], stack: ExitStack, tmp_path: Path
) -> None:
    port = str(free_port())
    address = f"tls://127.0.0.1:{port}"
    start(
        stack,
        tls,
        "scheduler",
        "--protocol",
        "tls",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--no-dashboard",
    )
    there = [
        "worker",
        address,
        "--no-nanny",
        "--nthreads",
        "1",
        "--no-dashboard",
        "--local-directory",
        str(tmp_path),
    ]
    workers = [start(stack, tls, *there) for _ in range(2)]
    what = ["sleep 0.3"] * 20
    found: dict[str, Done] = {}
    by_pid: set[int] = set()
    for one in on_scheduler(jobs(*what), standins.work, address):
        assert one.grade is not None, one.problem
        assert one.job.submission.student not in found
        found[one.job.submission.student] = one
        by_pid.add(one.grade["pid"])
        if (
            len(by_pid) == 2
            and len(found) < 15
            and all(worker.poll() is None for worker in workers)
        ):
            workers[0].send_signal(signal.SIGKILL)
            killed_after = len(found)
    assert by_pid == {worker.pid for worker in workers}
    assert killed_after < len(found) == len(what)
    assert {one.grade["student"] for one in found.values() if one.grade} == {
        f"s{number}" for number in range(20)
    }


def test_workers_that_answer_no_more_do_not_hold_the_run(
    tls: dict[str, str], stack: ExitStack
) -> None:
    port = str(free_port())
    address = f"tls://127.0.0.1:{port}"
    start(
        stack,
        tls,
        "scheduler",
        "--protocol",
        "tls",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--no-dashboard",
    )
    start(stack, tls, "worker", address, "--nthreads", "1", "--no-dashboard")
    found = by_student(
        on_scheduler(jobs("ok", "sleep 600", "sleep 600", wall_s=6.0), standins.work, address)
    )
    assert found["s0"].grade
    assert {found[student].problem for student in ("s1", "s2")} == {"no worker answered within 6 s"}


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "127.0.0.1:8786"])
def test_without_tls_it_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"must be tls://HOST:PORT"):
        list(on_scheduler(jobs("ok"), standins.work, address))


def test_without_a_certificate_it_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"no certificate for TLS: set distributed\.comm\.tls in Dask's configuration",
    ):
        list(on_scheduler(jobs("ok"), standins.work, "tls://127.0.0.1:1"))


def test_a_scheduler_that_is_not_there(tls: dict[str, str]) -> None:
    import dask

    unreached = pytest.raises(
        OSError, match=r"The scheduler tls://127\.0\.0\.1:1 cannot be reached: "
    )
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}), unreached:
        list(on_scheduler(jobs("ok"), standins.work, "tls://127.0.0.1:1"))


def test_a_scheduler_without_workers(
    tls: dict[str, str], stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 1.0)
    port = str(free_port())
    start(
        stack,
        tls,
        "scheduler",
        "--protocol",
        "tls",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--no-dashboard",
    )
    with pytest.raises(OSError, match="has no worker: start one, then run this again"):
        list(on_scheduler(jobs("ok"), standins.work, f"tls://127.0.0.1:{port}"))
