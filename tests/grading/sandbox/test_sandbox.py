"""The sandbox: what a worker cannot reach or do, what it may use, and how it ends.

Each probe is run in a worker without a sandbox as well, where it must get through: a probe that
fails everywhere shows nothing.
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from standins import ROOT

from qcourse.checks.answers import Failure
from qcourse.grading.grades import BUBBLEWRAP, NONE, Limits
from qcourse.grading.sandbox import dialogue, host, mounts
from qcourse.grading.sandbox.dialogue import Worker, WorkerGoneError
from qcourse.grading.sandbox.host import Sandbox, SandboxError

LIMITS = Limits(case_s=2.0, exercise_s=20.0, memory_mib=256, file_mib=4, reply_mib=1)
pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")

PROBES = {
    "reads a file of the system": "open('/etc/passwd').read()",
    "reads the repository": "open('{ROOT}/README.md').read()",
    "lists the repository": "os.listdir('{ROOT}/solutions')",
    "imports the course from where it lies": "sys.path.insert(0, '{ROOT}'); sys.meta_path.pop(0); "
    "sys.modules.pop('qcourse'); importlib.import_module('qcourse.checks.sheet_01')",
    "writes a file that others see": "open('{MARK}', 'w').close()",
    "sees other processes": "os.stat('/proc/self')",
    "connects to a listener": "socket.create_connection(('127.0.0.1', {PORT}), timeout=1)",
    "listens on the network": "socket.create_server(('127.0.0.1', 0)); "
    "socket.create_connection(('127.0.0.1', {PORT}), timeout=1)",
    "forks": "os.fork() or os._exit(0)",
    "starts a program": "subprocess.run([sys.executable, '-c', ''], check=True)",
    "replaces itself by a program": "os.execv(sys.executable, [sys.executable, '-c', REPLY])",
    "makes a user namespace": "call('unshare', 0x10000000)",
    "makes shared memory": "call('shmget', 0, 4096, 0o1600)",
    "makes a file in memory": "os.memfd_create('a')",
    "keeps a key": "call('syscall', 250, 1, 0)",
    "opens a terminal": "os.openpty()",
    "makes a socket": "socket.socket(socket.AF_UNIX)",
    "moves pages into a pipe": "call('vmsplice', os.pipe()[1], ctypes.byref(Pages()), 1, 0)",
    "moves bytes between pipes": "a, b = os.pipe(), os.pipe(); os.write(a[1], b'x'); "
    "os.splice(a[0], b[1], 1)",
    "writes to the root": "open('/tmp/../qcourse-probe', 'w').close(); os.unlink('/qcourse-probe')",
}
HEAD = """
import ctypes, importlib, os, socket, subprocess, sys
class Pages(ctypes.Structure):
    _fields_ = [("start", ctypes.c_char_p), ("length", ctypes.c_size_t)]
    def __init__(self): super().__init__(b"page", 4)
def call(name, *args):
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) < 0:
        raise OSError(ctypes.get_errno(), name)
"""
ONLY_ROOT = "writes to the root"


@pytest.fixture(scope="module")
def sandboxes() -> Iterator[dict[str, Sandbox]]:
    both = {backend: Sandbox(backend) for backend in (BUBBLEWRAP, NONE)}
    yield both
    for sandbox in both.values():
        sandbox.close()


@pytest.fixture
def worker(sandboxes: dict[str, Sandbox]) -> Iterator[Worker]:
    one = sandboxes[BUBBLEWRAP].worker(LIMITS)
    yield one
    one.close()


def called(worker: Worker, *args: Any) -> Any:
    """The output of a call that has changed no argument."""
    output, changed = worker.call(*args)
    assert changed is None
    return output


def define(worker: Worker, source: str) -> Worker:
    assert worker.run_cell(source, "<cell>", 5.0) is True
    return worker


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_gets_through_without_the_sandbox_and_not_with_it(
    name: str, sandboxes: dict[str, Sandbox], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        probe = PROBES[name]
        for place, value in {"ROOT": ROOT, "MARK": mark, "PORT": listener.getsockname()[1]}.items():
            probe = probe.replace(f"{{{place}}}", str(value))
        source = f"{HEAD}\nREPLY = ''\ndef probe():\n    {probe}\n    return True"
        through = {}
        for backend, sandbox in sandboxes.items():
            worker = define(sandbox.worker(LIMITS), source)
            try:
                through[backend] = called(worker, "probe", (), 3.0) is True
            except WorkerGoneError:
                # The program that replaced the worker does not answer.
                through[backend] = name == "replaces itself by a program"
            worker.close()
    if name == ONLY_ROOT and os.getuid() != 0:
        through[NONE] = True
    assert through == {BUBBLEWRAP: False, NONE: True}
    assert mark.exists() == (name == "writes a file that others see")


def test_every_layer_is_on(worker: Worker) -> None:
    define(
        worker,
        f"""{HEAD}
import resource, struct
def layers():
    libc = ctypes.CDLL(None)
    sets = ctypes.create_string_buffer(24)
    libc.capget(struct.pack("=Ii", 0x20080522, 0), sets)
    ids = os.getpid(), os.getuid(), os.getgid()
    privileges = sum(sets.raw), libc.prctl(39, 0, 0, 0, 0), libc.prctl(21)
    return (*ids, *privileges, *(libc.prctl(23, number) for number in range(38)))
def limits():
    names = "CPU AS FSIZE NOFILE CORE NPROC MEMLOCK".split()
    return [resource.getrlimit(getattr(resource, f"RLIMIT_{{name}}"))[1] for name in names]
def descriptors():
    return [number for number in range(256) if not call_fails(os.fstat, number)]
def call_fails(function, *args):
    try:
        function(*args)
    except OSError:
        return True
""",
    )
    pid, uid, gid, capabilities, no_new_privileges, seccomp, *bounding = called(
        worker, "layers", (), 2.0
    )
    assert (pid, uid, gid) == (1, 65534, 65534)
    assert (capabilities, no_new_privileges, seccomp) == (0, 1, 2)
    assert set(bounding) == {0}
    processor_s, space, file_bytes, files, core, tasks, locked = called(worker, "limits", (), 2.0)
    assert (processor_s, file_bytes, files, core, tasks, locked) == (21, 4 << 20, 64, 0, 18, 0)
    assert 256 << 20 < space < 8 << 30
    assert len(called(worker, "descriptors", (), 2.0)) == 4


def test_namespaces_and_processes_are_bounded_without_the_filter_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = host._program(BUBBLEWRAP)
    assert program.count(b"confine.refuse_calls()") == 1
    without_filter = program.replace(b"confine.refuse_calls()", b"pass")
    monkeypatch.setattr(host, "_program", lambda backend: without_filter)
    sandbox = Sandbox(BUBBLEWRAP)
    worker = define(
        sandbox.worker(LIMITS),
        f"""{HEAD}
def namespace(): call("unshare", 0x10000000)
def forks():
    import signal
    for number in range(100):
        try:
            if os.fork() == 0:
                signal.pause()
        except BlockingIOError:
            return number
""",
    )
    assert called(worker, "namespace", (), 2.0).message == "[Errno 28] unshare"
    assert called(worker, "forks", (), 5.0) == LIMITS.tasks
    before = below(sandbox._process.pid)
    worker.close()
    assert soon(lambda: len(below(sandbox._process.pid)) == len(before) - LIMITS.tasks - 2)
    sandbox.close()


def test_only_libraries_are_there(worker: Worker) -> None:
    define(worker, "import os\ndef names(folder): return sorted(os.listdir(folder))")
    folders = {"dev", "etc", "lib", "lib64", "proc", "python", "site", "tmp", "usr"}
    assert set(called(worker, "names", ("/",), 2.0)) <= folders
    assert called(worker, "names", ("/tmp",), 2.0) == called(worker, "names", ("/proc",), 2.0) == ()
    assert called(worker, "names", ("/etc",), 2.0) == ("ld.so.cache",)
    site = called(worker, "names", ("/site",), 2.0)
    assert {"torch", "numpy"} < set(site)
    assert not [name for name in site if "qcourse" in name or "nbgrader" in name]


def test_nothing_but_its_own_folder_can_be_written(worker: Worker) -> None:
    define(
        worker,
        """
import os
def writable():
    found = []
    for folder, folders, files in os.walk("/"):
        if folder.count("/") > 4:
            folders.clear()
        try:
            open(os.path.join(folder, "probe"), "w").close()
            found.append(folder)
        except OSError:
            pass
    return found
""",
    )
    assert called(worker, "writable", (), 10.0) == ("/tmp",)


def test_its_files_are_bounded_together(worker: Worker) -> None:
    define(
        worker,
        """
def fill():
    for number in range(9):
        with open(f"/tmp/{number}", "wb") as file:
            file.write(bytes(1 << 20))
""",
    )
    failure = called(worker, "fill", (), 5.0)
    assert type(failure) is Failure
    assert "No space left" in failure.message


def test_nothing_of_a_worker_is_left_for_the_next(sandboxes: dict[str, Sandbox]) -> None:
    sandbox = sandboxes[BUBBLEWRAP]
    first = define(
        sandbox.worker(LIMITS), "import torch\ntorch.left = 1\nopen('/tmp/left', 'w').close()"
    )
    second = sandbox.worker(LIMITS)  # while the first is there
    define(
        second,
        "import os, torch\n"
        "def left(): return hasattr(torch, 'left') or os.path.exists('/tmp/left')",
    )
    assert called(second, "left", (), 2.0) is False
    first.close()
    assert called(second, "left", (), 2.0) is False
    second.close()


def test_values_go_in_and_answers_come_out(worker: Worker) -> None:
    define(worker, "import torch\ndef double(x, y):\n    return 2 * x, y[0]")
    doubled, first = called(worker, "double", (torch.tensor([1.5, -2.0]), ("a", 1)), 2.0)
    assert (doubled.tolist(), first) == ([3.0, -4.0], "a")


def test_an_error_names_its_line(worker: Worker) -> None:
    define(worker, "def broken(x):\n    return 1 / x")
    failure = called(worker, "broken", (0,), 2.0)
    assert failure == Failure(failure.kinds, "division by zero", "line 2: return 1 / x", "broken")
    assert failure.kinds[:2] == ("ZeroDivisionError", "ArithmeticError")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit", "SystemExit"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import qcourse.numerics", "ImportError"),
        ("from qcourse import quantize", "ImportError"),
        ("class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd", "Odd"),
    ],
)
def test_a_cell_that_fails_is_a_failure_and_the_next_still_runs(
    worker: Worker, source: str, kind: str
) -> None:
    failure = worker.run_cell(source, "<cell>", 2.0)
    assert type(failure) is Failure
    assert failure.kinds[0] == kind
    define(worker, "from qcourse import check\ncheck('01.1', None)\ndef one(): return 1")
    assert called(worker, "one", (), 2.0) == 1


def test_what_is_left_out_says_so(worker: Worker) -> None:
    for source in (
        "import qcourse.checks.registry",
        "from qcourse import quantize",
        "import qcourse as q\nq.quantize",
    ):
        assert "is left out here" in worker.run_cell(source, "<cell>", 2.0).message


CHANNEL = """\
import os, socket
fd = next(n for n in range(3, 64) if os.path.exists('/dev/null') and stat(n))
"""
STAT = """\
import os
def stat(n):
    try: return os.fstat(n)
    except OSError: return None
"""
UNASKED = b'{"number": 99, "output": ["int", 0]}\n'
PICKLE = b'{"number": 2, "output": ["pickle", ""], "args": []}\n'
GONE = {
    "took longer than 0.5 s and was stopped": "while True: pass",
    r"ended Python itself \(exit status 3\)": "os._exit(3)",
    r"ended Python itself \(signal 11\)": "import ctypes; ctypes.string_at(8)",
    "closed the connection": "os.close(fd); time.sleep(60)",
    "sent a line that is no JSON": "os.write(fd, b'hello\\n')",
    "sent a reply to nothing that was asked": f"os.write(fd, {UNASKED!r})",
    "sent 'pickle' is no kind of value": f"os.write(fd, {PICKLE!r})",
    "sent more than 1 MiB": "[os.write(fd, b'x' * 4096) for _ in range(999)]",
    "used more processor time": "import resource; resource.setrlimit(0, (1, 1))\n"
    "    while True: pass",
}


@pytest.mark.parametrize("why", GONE)
def test_a_worker_that_breaks_off_is_gone_with_a_word(
    sandboxes: dict[str, Sandbox], why: str
) -> None:
    worker = sandboxes[BUBBLEWRAP].worker(LIMITS)
    define(worker, f"{STAT}{CHANNEL}import time\ndef break_off():\n    {GONE[why]}")
    with pytest.raises(WorkerGoneError, match=f"^{why}"):
        called(worker, "break_off", (), 0.5 if "0.5" in why else 30.0)
    with pytest.raises((WorkerGoneError, SandboxError)):
        called(worker, "break_off", (), 1.0)


def test_a_reply_in_the_wrong_place_is_no_reply(sandboxes: dict[str, Sandbox]) -> None:
    """A forged reply with the right number is an answer; the reply after it is out of step."""
    worker = sandboxes[BUBBLEWRAP].worker(LIMITS)
    forged = """os.write(fd, b'{"number": 2, "output": ["int", 7], "args": ["tuple", []]}\\n')"""
    define(worker, f"{STAT}{CHANNEL}\ndef answer():\n    {forged}\n    return 1")
    assert called(worker, "answer", (), 2.0) == 7
    with pytest.raises(WorkerGoneError, match="sent a reply to nothing that was asked"):
        called(worker, "answer", (), 2.0)


def test_an_answer_too_large_is_a_failure_with_a_word(worker: Worker) -> None:
    define(worker, "import torch\ndef large(): return torch.zeros(100_000).double()")
    assert called(worker, "large", (), 2.0).message == "returned more than 1 MiB"


def test_memory_is_bounded(worker: Worker) -> None:
    define(worker, "def hoard(mib): return len(bytearray(mib << 20)) >> 20")
    assert called(worker, "hoard", (64,), 5.0) == 64
    failure = called(worker, "hoard", (LIMITS.memory_mib + 10,), 5.0)
    assert type(failure) is Failure
    assert failure.kinds[0] == "MemoryError"


def test_threads_are_allowed_and_counted(worker: Worker) -> None:
    define(
        worker,
        """
import threading, time
def start(count):
    threads = [threading.Thread(target=time.sleep, args=(0.2,)) for _ in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return count
""",
    )
    assert called(worker, "start", (8,), 3.0) == 8
    assert "can't start new thread" in called(worker, "start", (40,), 3.0).message


def test_closing_twice_is_closing_once(sandboxes: dict[str, Sandbox]) -> None:
    worker = sandboxes[BUBBLEWRAP].worker(LIMITS)
    assert worker.close() == worker.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def soon(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + 5
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


def below(pid: int) -> list[int]:
    """All processes below this one."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text().rpartition(")")[2]
            parents[int(folder.name)] = int(after_name.split()[1])
        except OSError:
            continue
    found = []
    latest = [pid]
    while latest:
        latest = [process for process, parent in parents.items() if parent in latest]
        found += latest
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_grader_that_is_killed_leaves_no_process(number: int) -> None:
    program = """
import time
from qcourse.grading.sandbox.host import Sandbox, Limits
sandbox = Sandbox("bubblewrap")
worker = sandbox.worker(Limits())
print("ready", flush=True)
worker.run_cell("while True: pass", "<cell>", 60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT
    ) as grader:
        assert grader.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        processes = below(grader.pid)
        assert len(processes) >= 4
        grader.send_signal(number)
    assert soon(lambda: all(map(gone, processes)))


GROUP = {
    "kills its group": "os.kill(0, 9)",
    "stops its group": "os.kill(0, 19)",
    "slows its group": "os.setpriority(os.PRIO_PGRP, 0, 19)",
}


@pytest.mark.parametrize("backend", [BUBBLEWRAP, NONE])
@pytest.mark.parametrize("name", GROUP)
def test_what_a_worker_does_to_its_group_reaches_no_other(
    name: str, backend: str, sandboxes: dict[str, Sandbox]
) -> None:
    sandbox = sandboxes[backend]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialogue, "HANGUP_S", 0.1)
        victim = sandbox.worker(LIMITS)
        define(victim, "import os\ndef niceness(): return os.getpriority(os.PRIO_PROCESS, 0)")
        attacker = sandbox.worker(LIMITS)
        with contextlib.suppress(WorkerGoneError):
            attacker.run_cell(f"import os\n{GROUP[name]}", "<cell>", 1.0)
        started = time.monotonic()
        attacker.close()
        assert called(victim, "niceness", (), 2.0) == 0
        define(sandbox.worker(LIMITS), "pass").close()
        assert time.monotonic() - started < 5
        victim.close()


def test_a_reply_that_drips_has_the_deadline_of_any_other(sandboxes: dict[str, Sandbox]) -> None:
    """Megabytes at once, then single bytes without end, each sent alone with a descriptor."""
    worker = sandboxes[BUBBLEWRAP].worker(replace(LIMITS, reply_mib=8))
    drip = """
def drip():
    channel = socket.socket(fileno=os.dup(fd))
    channel.sendall(b" " * (7 << 20))
    end = os.pipe()[0]
    while True:
        try:
            socket.send_fds(channel, [b" "], [end])
        except OSError:  # too many descriptors are on their way
            pass
"""
    define(worker, f"{STAT}{CHANNEL}{drip}")
    started = time.monotonic()
    with pytest.raises(WorkerGoneError, match=r"took longer than 1 s|sent more than 8 MiB"):
        worker.call("drip", (), 1.0)
    assert time.monotonic() - started < 8


def test_a_sandbox_that_was_killed_says_so() -> None:
    sandbox = Sandbox(BUBBLEWRAP)
    assert sandbox._process.poll() is None
    os.kill(sandbox._process.pid, signal.SIGKILL)
    assert soon(lambda: sandbox._process.poll() is not None)
    with pytest.raises(SandboxError, match="the sandbox has ended"):
        sandbox.worker(LIMITS)
    sandbox.close()


def test_without_bubblewrap_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(
        SandboxError, match=r"^no sandbox: bwrap is not here; install bubblewrap .* --unsafe"
    ) as caught:
        Sandbox(BUBBLEWRAP)
    assert "\n" not in str(caught.value)


def test_where_namespaces_are_forbidden_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "bwrap"
    fake.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n",
        encoding="utf-8",
    )
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        SandboxError,
        match=r"^no sandbox: bwrap: No permissions to create new namespace; .*--unsafe",
    ):
        Sandbox(BUBBLEWRAP)


@pytest.mark.parametrize(
    ("backend", "advice"),
    [
        (BUBBLEWRAP, r"^no sandbox: .*; this system must let bwrap .* or pass --unsafe"),
        (NONE, r"^no process to run submissions in: .*; check that Python can import torch"),
    ],
)
def test_a_start_that_takes_too_long_advises_by_backend(
    backend: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "START_S", 0)
    with pytest.raises(SandboxError, match=advice) as caught:
        Sandbox(backend)
    assert ("--unsafe" in str(caught.value)) == (backend == BUBBLEWRAP)


def test_on_another_system_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts.sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="this is not Linux"):
        Sandbox(BUBBLEWRAP)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(
        ValueError, match="backend='docker' is unknown; the backends are bubblewrap, none"
    ):
        Sandbox("docker")


def test_what_is_carried_holds_no_reference() -> None:
    """The program that is sent into the sandbox has none of the checks' own words in it."""
    program = host._program(BUBBLEWRAP)
    assert b"def capture" in program
    secret = (b"SHEET", b"sheet_0", b"class Mistake", b"reference=")
    assert not [word for word in secret if word in program]
