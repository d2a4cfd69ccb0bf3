"""Where student code runs: a read-only system without network, and workers inside it.

The idea: bubblewrap mounts the system's libraries, Python, torch and NumPy, and nothing else, so
everything secret (qcourse and its checks, solutions/, other submissions, the gradebook) is absent.
Inside waits a warm Python (`template.py`) that makes a confined worker in a few hundredths of a
second. Only a socket connects the two sides; `wire.py` decodes what comes out of it.

The grader may be root, but the sandbox never is (`mounts.py`). `worker.py` runs inside; this file
is the trusted side.
"""

import json
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict

from qcourse.course_files import sandbox_sources
from qcourse.grading.grades import BACKENDS, BUBBLEWRAP, NONE, Limits
from qcourse.grading.sandbox import wire
from qcourse.grading.sandbox.dialogue import START_S, WORKER_S, Worker, line_of
from qcourse.grading.sandbox.mounts import (
    ENVIRONMENT,
    INSTALL,
    LOST,
    SITE,
    SandboxError,
    bubblewrap,
    libraries,
)

# The packages of the modules that the sandbox is given; they hold nothing else.
PACKAGES = (
    "qcourse",
    "qcourse.checks",
    "qcourse.grading",
    "qcourse.grading.sandbox",
    "qcourse.lab",
)
END_S = 2.0  # a warm Python that has nothing to wait for ends in far less
# What is missing if a start fails, and what to do then.
MISSING = {BUBBLEWRAP: "no sandbox", NONE: "no process to run submissions in"}
ADVICE = {
    BUBBLEWRAP: INSTALL,
    NONE: "check that Python can import torch, and run this again when the machine is idle",
}
START = "import sys; exec(sys.stdin.read())"  # Python reads its program from standard input


class Sandbox:
    """A warm Python behind bubblewrap, from which workers are copied; one per grading process.

    Args:
        backend: "bubblewrap", or "none" for another process with limits, but without a sandbox.

    Raises:
        SandboxError: it does not start.
        ValueError: there is no such backend.
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(
                f"backend={backend!r} is unknown; the backends are {', '.join(BACKENDS)}"
            )
        self._backend = backend
        command = _command(backend)
        self._control, inner = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        with inner, tempfile.TemporaryFile() as program:
            program.write(_program(backend))
            program.seek(0)
            self._process = subprocess.Popen(
                [*command, str(inner.fileno()), _mode(backend)],
                stdin=program,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[inner.fileno()],
                env=ENVIRONMENT,
                cwd=tempfile.gettempdir(),
            )
        if not _says_ready(self._control, START_S):
            said = self.close()
            raise SandboxError(_why_not_started(backend, said))

    def worker(self, limits: Limits) -> Worker:
        """Return a fresh worker; close it before asking for the same student's next.

        Raises:
            SandboxError: it could not be confined.
        """
        channel, worker_channel = socket.socketpair()
        life, worker_life = socket.socketpair()
        # The worker's ends are sent to the warm Python and closed here.
        with worker_channel, worker_life:
            message = json.dumps(asdict(limits)).encode()
            descriptors = [worker_channel.fileno(), worker_life.fileno()]
            try:
                socket.send_fds(self._control, [message], descriptors)
            except OSError as error:
                channel.close()
                life.close()
                raise SandboxError(LOST) from error
        # The copy says "ready" when it is confined, before it runs anything of the student.
        worker = Worker(channel, life, limits)
        if not _says_ready(channel, WORKER_S):
            how = worker.close() or LOST
            raise SandboxError(f"{MISSING[self._backend]}: {how}; {ADVICE[self._backend]}")
        return worker

    def close(self) -> str:
        """End it, and every worker that is left; return what it said on stderr."""
        # The warm Python ends when its control socket closes.
        self._control.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._stderr:
            self._stderr.seek(0)
            return self._stderr.read().decode(errors="replace").strip()


def _why_not_started(backend: str, said: str) -> str:
    """Return one sentence from what a warm Python that did not start said on stderr."""
    last_line = said.splitlines()[-1] if said else "it did not start"
    advice = ADVICE[backend]
    if backend == BUBBLEWRAP:
        advice = f"this system must let bwrap make user namespaces, or {advice}"
    return f"{MISSING[backend]}: {last_line}; {advice}"


def _command(backend: str) -> list[str]:
    """Return the command that starts Python and lets it read its program."""
    python = [sys.executable] if backend == NONE else bubblewrap()
    # No environment, no site-packages, no compiled files written.
    return [*python, "-I", "-S", "-B", "-c", START]


def _mode(backend: str) -> str:
    return "open" if backend == NONE else "isolate"


def _says_ready(channel: socket.socket, wall_s: float) -> bool:
    try:
        return line_of(channel, wall_s, 100) == b"ready"
    except (OSError, wire.ForgedError):
        return False


def _program(backend: str) -> bytes:
    """Return what the warm Python runs: the files it needs, as the only modules of a qcourse."""
    sources = sandbox_sources()
    # Without a sandbox the packages are where this Python has them.
    path = [SITE]
    if backend == NONE:
        path = sorted({str(folder.parent) for folder in libraries().values()})
    return f"""
import sys, types
sys.path += {path!r}
for name in {PACKAGES!r}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = []
for name, source in {sources!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = name
    setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    exec(compile(source, name, "exec"), module.__dict__)
sys.modules["qcourse.grading.sandbox.template"].main()
""".encode()
