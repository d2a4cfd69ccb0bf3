"""Where students' code runs: a read-only system without network, built by bubblewrap, and workers inside it.

The idea: bubblewrap mounts the system's libraries, Python, torch and NumPy, and nothing else, so what is not to be
read (qcourse and its checks, solutions/, other submissions, the gradebook) is not there. Inside waits a template
(`template.py`) that makes a confined worker in a few hundredths of a second. Only a socket connects the two sides,
and what comes out of it is read as `wire.py` says.

The grader may be root, but the sandbox never is: root first becomes an unprivileged user, for whom Python is mounted
anew where that user may read it. `worker.py` is what runs inside; this file is the trusted side.
"""

import json
import socket
import subprocess
import sys
import tempfile
from dataclasses import asdict

from qcourse.course_files import sandbox_sources
from qcourse.grading.grades import BACKENDS, NONE, Limits
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

# What the modules that the sandbox is given lie in; empty but for them.
PACKAGES = (
    "qcourse",
    "qcourse.checks",
    "qcourse.grading",
    "qcourse.grading.sandbox",
    "qcourse.lab",
)
END_S = 2.0  # a template that has nothing to wait for ends in far less


class Sandbox:
    """A warm Python behind bubblewrap, which workers are copied from; one a grading process.

    Args:
        backend: "bubblewrap", or "none" for no sandbox at all: only limits, and another process.

    Raises:
        SandboxError: it does not start.
        ValueError: there is no such backend.
    """

    def __init__(self, backend: str) -> None:
        if backend not in BACKENDS:
            raise ValueError(
                f"backend={backend!r} is unknown; the backends are {', '.join(BACKENDS)}"
            )
        command = [sys.executable] if backend == NONE else bubblewrap()
        self._control, inner = socket.socketpair()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        with inner, tempfile.TemporaryFile() as program:
            program.write(_program(backend))
            program.seek(0)
            python = [
                "-I",
                "-S",
                "-B",
                "-c",
                "import sys; exec(sys.stdin.read())",
                str(inner.fileno()),
            ]
            python += ["open"] if backend == NONE else ["isolate"]
            self._process = subprocess.Popen(
                [*command, *python],
                stdin=program,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[inner.fileno()],
                env=ENVIRONMENT,
                cwd=tempfile.gettempdir(),
            )
        try:
            started = line_of(self._control, START_S, 100)
        except (OSError, wire.ForgedError):
            started = None
        if started != b"ready":
            raise SandboxError(self._why())

    def worker(self, limits: Limits) -> Worker:
        """A fresh worker; close it before the next is asked for anything of the same student.

        Raises:
            SandboxError: it could not be confined.
        """
        channel, theirs = socket.socketpair()
        life, their_life = socket.socketpair()
        with theirs, their_life:
            message = json.dumps(asdict(limits)).encode()
            try:
                socket.send_fds(self._control, [message], [theirs.fileno(), their_life.fileno()])
            except OSError as error:
                channel.close()
                life.close()
                raise SandboxError(LOST) from error
        worker = Worker(channel, life, limits)
        try:
            started = line_of(channel, WORKER_S, 100)
        except (OSError, wire.ForgedError):
            started = None
        if started != b"ready":
            raise SandboxError(f"no sandbox: {worker.close() or LOST}; {INSTALL}")
        return worker

    def close(self) -> str:
        """End it, and with it every worker that is left; what it said on stderr."""
        self._control.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._stderr:
            self._stderr.seek(0)
            return self._stderr.read().decode(errors="replace").strip()

    def _why(self) -> str:
        said = self.close().splitlines()[-1:] or ["it did not start"]
        return (
            f"no sandbox: {said[0]}; this system must let bwrap make user namespaces, or {INSTALL}"
        )


def _program(backend: str) -> bytes:
    """What the template runs: the few files that it needs, as modules of a qcourse that has no others."""
    sources = sandbox_sources()
    if backend == NONE:
        path = sorted({str(folder.parent) for folder in libraries().values()})
    else:
        path = [SITE]
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
