"""Jobs on a real Dask scheduler over TLS: each comes back once, also if a worker dies or hangs."""

import datetime
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest
import standins
from standins import by_student, free_port, jobs

from qcourse.grading import dask_cluster
from qcourse.grading.dask_cluster import on_scheduler
from qcourse.grading.jobs import Done

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _no_client_is_left() -> Iterator[None]:
    """Collect garbage: a Dask client collected while another starts would hold a lock it needs."""
    yield
    gc.collect()


def write_certificate(folder: Path) -> Path:
    """A key and a certificate for 127.0.0.1 that is its own authority, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    host = x509.IPAddress(ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name)
    builder = builder.public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
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
    names = ["ca-file"]
    for role in ("scheduler", "worker", "client"):
        names += [f"{role}.cert", f"{role}.key"]
    prefix = "DASK_DISTRIBUTED__COMM__"
    env = {**os.environ, "PYTHONPATH": str(HERE), f"{prefix}REQUIRE_ENCRYPTION": "true"}
    for name in names:
        variable = f"{prefix}TLS__{name}".upper().replace(".", "__").replace("-", "_")
        env[variable] = path
    with dask.config.set({f"distributed.comm.tls.{name}": path for name in names}):
        yield env


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


def start_scheduler(stack: ExitStack, env: dict[str, str]) -> str:
    """Start a scheduler over TLS until the test ends; return its address."""
    port = str(free_port())
    where = ["--protocol", "tls", "--host", "127.0.0.1", "--port", port]
    start(stack, env, "scheduler", *where, "--no-dashboard")
    return f"tls://127.0.0.1:{port}"


def test_a_scheduler_over_tls_whose_worker_dies(
    tls: dict[str, str], stack: ExitStack, tmp_path: Path
) -> None:
    address = start_scheduler(stack, tls)
    worker = ["worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    worker += ["--local-directory", str(tmp_path)]
    workers = [start(stack, tls, *worker) for _ in range(2)]
    what = ["sleep 0.3"] * 20
    found: dict[str, Done] = {}
    by_pid: set[int] = set()
    for one in on_scheduler(jobs(*what), standins.work, address):
        assert one.grade is not None, one.problem
        assert one.job.submission.student not in found
        found[one.job.submission.student] = one
        by_pid.add(one.grade["pid"])
        both_alive = all(worker.poll() is None for worker in workers)
        if len(by_pid) == 2 and len(found) < 15 and both_alive:
            workers[0].send_signal(signal.SIGKILL)
            killed_after = len(found)
    assert by_pid == {worker.pid for worker in workers}
    assert killed_after < len(found) == len(what)
    graded = {one.grade["student"] for one in found.values() if one.grade}
    assert graded == {f"s{number}" for number in range(20)}


def test_workers_that_answer_no_more_do_not_hold_the_run(
    tls: dict[str, str], stack: ExitStack
) -> None:
    address = start_scheduler(stack, tls)
    start(stack, tls, "worker", address, "--nthreads", "1", "--no-dashboard")
    # The first job waits until the worker has imported everything: minutes on a busy machine.
    warm = by_student(on_scheduler(jobs("ok", wall_s=300.0), standins.work, address))
    assert warm["s0"].grade
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
    monkeypatch.setattr(dask_cluster, "PATIENCE_S", 1.0)
    address = start_scheduler(stack, tls)
    with pytest.raises(OSError, match="has no worker: start one, then run this again"):
        list(on_scheduler(jobs("ok"), standins.work, address))
