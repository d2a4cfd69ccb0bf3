"""A warm Python, with torch imported and no student's code in it, that is copied for each worker.

The idea: importing torch takes longer than grading a sheet, so it is done once. For each request
this process forks twice. The first copy makes new namespaces and waits. The second is the first
process inside them; it confines itself and then serves the student's code (`worker.py`). So two
workers are as separate as two programs: what one changes in memory is its own copy.

When the worker ends, or the grader hangs up, the waiting copy ends it and reports how. The kernel
ends a namespace's first process only after all others in it are gone, so that report means that
nothing is left. `host.py` and `dialogue.py` are the other side of the sockets.
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

with contextlib.suppress(ImportError):  # and this, if it is installed
    import triton.language  # noqa: F401

from qcourse.grading.sandbox import confine, wire, worker

DESCRIPTORS = 2  # of a request: the worker's channel, and the socket that reports its end
MESSAGE_BYTES = 4096


def main() -> None:
    """Serve requests on the descriptor in the first argument until it closes.

    "isolate" as the second argument confines the workers.
    """
    control = _socket(int(sys.argv[1]))
    isolate = sys.argv[2] == "isolate"
    torch.set_num_threads(1)
    # The first use of an operation costs more than the next, so the copies need not pay for it.
    ones = torch.ones(2, 2)
    ones.matmul(torch.ones(2, 2)).round().tolist()
    # The kernel reaps the copies, because nothing here waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    baseline_bytes = _address_space_bytes()
    control.sendall(b"ready\n")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE_BYTES, DESCRIPTORS)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            limits = json.loads(message)
            limits["baseline_bytes"] = baseline_bytes
            channel, life = map(_socket, descriptors)
            _watch(limits, isolate, channel, life)
        for descriptor in descriptors:
            os.close(descriptor)


def _socket(descriptor: int) -> socket.socket:
    return socket.socket(fileno=descriptor)


def _address_space_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _watch(
    limits: dict[str, Any], isolate: bool, channel: socket.socket, life: socket.socket
) -> None:
    """Start a worker, wait until it ends or the grader hangs up, report how; never return."""
    try:
        # kill(0) and setpriority reach every process of a group, whatever namespace it is in, so
        # both copies have a session and a group of their own.
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if isolate:
            confine.new_namespaces()
        pid = os.fork()
        if pid == 0:
            _work(limits, isolate, channel, life)
        channel.close()
        status = _end_of(pid, isolate, life)
        life.sendall(f"{status}\n".encode())
    except BaseException as error:
        life.sendall(f"failed: {error}\n".encode())
    os._exit(0)


def _end_of(pid: int, isolate: bool, life: socket.socket) -> int | str:
    """Wait for the worker's end or the grader's; return the exit code, or wire.HANGUP."""
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, life.fileno()], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    # Without a namespace, nothing else ends the other processes of the worker's group.
    if not isolate:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if ended not in ready:
        return wire.HANGUP
    return os.waitstatus_to_exitcode(status)


def _work(
    limits: dict[str, Any], isolate: bool, channel: socket.socket, life: socket.socket
) -> None:
    """Confine this process, then serve; never return."""
    try:
        os.setsid()
        baseline_bytes = limits["baseline_bytes"]
        if isolate:
            confine.own_files(limits["file_mib"] << 20)
            os.chdir("/tmp")
            confine.give_up_privileges()
            confine.limit(limits, baseline_bytes, alone=isolate)
            confine.refuse_calls()
        else:
            confine.limit(limits, baseline_bytes, alone=isolate)
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
    """Close every descriptor but the channel's; standard input is empty, output goes nowhere."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    kept = channel.fileno()
    os.closerange(3, kept)
    os.closerange(kept + 1, 1 << 16)
