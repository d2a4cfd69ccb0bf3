"""A warm Python, with torch imported and no student's code in it, that is copied for each worker.

The idea: importing torch takes longer than grading a sheet, so it is done once. For each request the template forks
twice: the first copy makes new namespaces and waits; the second is the first process of them, confines itself, and
only then serves the student's code (`worker.py`). A worker is thus as apart from the next as two programs started
anew: what it changes in memory is its own copy. Both copies have a session and a process group of their own, because
kill(0) and setpriority reach every process of a group, whatever namespace it is in.

When the worker ends, or the judge hangs up, the waiting copy ends it and reports how; the kernel ends a namespace's
first process only after all others in it are gone, so that report means that nothing is left. `host.py` is the
other end of all this.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
from typing import Any

import torch  # what makes the template warm

with contextlib.suppress(ImportError):  # and this, where there is one
    import triton.language  # noqa: F401

from qcourse.grading.sandbox import confine, worker

HANGUP, FDS = "hangup", 2


def main() -> None:
    """Serve requests on the descriptor in the first argument until it closes; "isolate" as the second confines."""
    control, isolate = socket.socket(fileno=int(sys.argv[1])), sys.argv[2] == "isolate"
    torch.set_num_threads(1)
    torch.ones(2, 2).matmul(
        torch.ones(2, 2)
    ).round().tolist()  # a first use costs more than the next
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies here
    with open("/proc/self/statm", encoding="ascii") as file:
        baseline_bytes = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    control.sendall(b"ready\n")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 4096, FDS)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            _watch(
                json.loads(message) | {"baseline_bytes": baseline_bytes},
                isolate,
                *map(_socket, descriptors),
            )
        for descriptor in descriptors:
            os.close(descriptor)


def _socket(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


def _watch(
    limits: dict[str, Any], isolate: bool, channel: socket.socket, life: socket.socket
) -> None:
    """Start a worker, wait until it ends or the judge hangs up, and tell how it ended; never returns."""
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if isolate:
            confine.new_namespaces()
        pid = os.fork()
        if pid == 0:
            _work(limits, isolate, channel, life)
        channel.close()
        ended = os.pidfd_open(pid)
        ready, _, _ = select.select([ended, life.fileno()], [], [])
        if ended not in ready:
            os.kill(pid, signal.SIGKILL)
        if not isolate:  # no namespace ends the others of its group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        life.sendall(f"{HANGUP if ended not in ready else code}\n".encode())
    except BaseException as error:
        life.sendall(f"failed: {error}\n".encode())
    os._exit(0)


def _work(
    limits: dict[str, Any], isolate: bool, channel: socket.socket, life: socket.socket
) -> None:
    """Confine this process, then serve; never returns."""
    try:
        os.setsid()
        if isolate:
            confine.own_files(limits["file_mib"] << 20)
            os.chdir("/tmp")
            confine.give_up_privileges()
            confine.limit(limits, limits["baseline_bytes"], alone=isolate)
            confine.refuse_calls()
        else:
            confine.limit(limits, limits["baseline_bytes"], alone=isolate)
        _keep_only(channel)
    except BaseException as error:
        life.sendall(f"failed: {error}\n".encode())
        os._exit(0)
    try:
        channel.sendall(b"ready\n")
        worker.serve(channel, limits["reply_mib"] << 20)
    finally:
        os._exit(0)


def _keep_only(channel: socket.socket) -> None:
    """Close every descriptor but the channel's; what the student's code prints goes nowhere, what it reads is empty."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    kept = channel.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, 1 << 16)
