"""Confine a process: namespaces, no privileges, resource limits, a list of refused system calls.

The idea: the kernel can do all of it, so a copy of a warm Python is as confined as a fresh one
that bubblewrap starts. Each layer has its own task. Namespaces: no network, no other process, no
files but the sandbox's, an own folder in memory. No capabilities: nothing can be mounted, and
privileges do not come back. Limits: processor time, memory, file size, descriptors, tasks.

Source: unshare(2), user_namespaces(7), mount(2), capabilities(7), seccomp(2). `template.py` says
in which order; `call_filter.py` lists the calls. This file needs nothing else of qcourse.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Mapping

from qcourse.grading.sandbox import call_filter

# Flags of unshare(2).
NEWNS = 0x20000
NEWUTS = 0x4000000
NEWIPC = 0x8000000
NEWUSER = 0x10000000
NEWPID = 0x20000000
NEWNET = 0x40000000

# Flags of mount(2).
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18

# Operations of prctl(2).
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

CAPABILITY_VERSION = 0x20080522
LAST_CAPABILITY = 63

_libc = ctypes.CDLL(None, use_errno=True)


def new_namespaces() -> None:
    """Give this process and its children namespaces, in which no further ones can be made.

    Raises:
        OSError: the system refuses.
    """
    uid = os.getuid()
    gid = os.getgid()
    _call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    # The same user and group inside as outside, and no other; setgroups comes before gid_map.
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{uid} {uid} 1")
    _write("/proc/self/gid_map", f"{gid} {gid} 1")
    _write("/proc/sys/user/max_user_namespaces", "0")


def own_files(size_bytes: int) -> None:
    """Mount a folder in memory at /tmp, and empty ones over /proc and the terminals.

    Raises:
        OSError: the system refuses.
    """
    # What is mounted from here on does not show in other namespaces.
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)

    no_programs = MS_NOSUID | MS_NODEV | MS_NOEXEC
    empty = b"size=4k,nr_inodes=2"
    for folder in (b"/proc", b"/dev/pts"):
        _call("mount", b"tmpfs", folder, b"tmpfs", no_programs | MS_RDONLY, empty)

    bounded = f"size={size_bytes},nr_inodes=1000,mode=700".encode()
    _call("mount", b"tmpfs", b"/tmp", b"tmpfs", no_programs, bounded)


def limit(limits: Mapping[str, int], baseline_bytes: int, *, alone: bool) -> None:
    """Set the kernel's own limits on this process.

    Args:
        limits: `Limits` as a dict.
        baseline_bytes: the address space that Python and torch take up.
        alone: whether the user has no process outside: only then can tasks be counted.
    """
    memory_bytes = limits["memory_mib"] << 20
    bounds = {
        resource.RLIMIT_CPU: int(limits["exercise_s"]) + 1,
        resource.RLIMIT_AS: baseline_bytes + memory_bytes,
        resource.RLIMIT_FSIZE: limits["file_mib"] << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    # Two more tasks: the process itself and the one that waits for it.
    if alone:
        bounds[resource.RLIMIT_NPROC] = limits["tasks"] + 2
    for name, bound in bounds.items():
        _, hard_limit = resource.getrlimit(name)
        # A hard limit can only be lowered.
        if hard_limit != resource.RLIM_INFINITY:
            bound = min(bound, hard_limit)
        resource.setrlimit(name, (bound, bound))


def give_up_privileges() -> None:
    """Drop every capability, for good.

    Raises:
        OSError: the system refuses.
    """
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        dropped = _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
        # EINVAL: past the last capability that this kernel knows.
        if dropped < 0 and ctypes.get_errno() == errno.EINVAL:
            break
    # The effective, permitted and inheritable sets are empty: 24 bytes of zeros.
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    _call("capset", header, bytes(24))


def refuse_calls() -> None:
    """Refuse the system calls of `call_filter`, and new processes, to this process for good.

    Raises:
        OSError: the system refuses, or has no list for this processor.
    """
    steps = call_filter.program(platform.machine())
    # struct sock_fprog: the number of steps, 8 bytes each, and the address of the first.
    program = ctypes.create_string_buffer(steps)
    whole = struct.pack("@HP", len(steps) // 8, ctypes.addressof(program))
    _call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(whole), 0, 0)


def _call(name: str, *args: object) -> None:
    """Call a function of the C library.

    Raises:
        OSError: it failed.
    """
    function = getattr(_libc, name)
    if function(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
