"""Shuts a process in: namespaces of its own, no privileges, limits, and a list of system calls that are refused.

The idea: the kernel can do all of it, so a copy of a warm Python is as shut in as a fresh one that bubblewrap starts.
This file is the system calls alone, through ctypes; `template.py` says in which order. `host.py` builds the
read-only system around.

What each layer is for: namespaces (no network, no other process, no files but the sandbox's, a folder of its own in
memory); no capabilities and no new user namespaces (no way to mount or to get privileges back); limits on processor
time, memory, file size, descriptors and tasks; and seccomp, which refuses other processes and programs (so the limit
on memory is one for all), memory that no limit counts (System V shared memory, keys, pages moved into pipes) and
sockets.

Source: unshare(2), user_namespaces(7), mount(2), capabilities(7), seccomp(2). It needs nothing of qcourse.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
from collections.abc import Mapping

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 1 << 14, 1 << 18
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
CAPABILITY_VERSION = 0x20080522
LAST_CAPABILITY = 63

# The number of each system call by the processor; None where it has no such call.
PROCESSORS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp knows them
REFUSED = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # Pages moved into a pipe stay there when the process that they were counted for lets them go.
    "vmsplice": (278, 75),
    "splice": (275, 76),
    "tee": (276, 77),
    # A network namespace does not hold every family of sockets (AF_VSOCK reaches the host); pairs are still made.
    "socket": (41, 198),
}
CLONE, CLONE3 = (56, 220), 435
CLONE_THREAD = 0x10000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # operations of the filter
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
OTHER_ABI = 0x40000000  # x86-64's calls with 32-bit pointers begin here

_libc = ctypes.CDLL(None, use_errno=True)


def new_namespaces() -> None:
    """Give this process and its children namespaces of their own, in which no further ones can be made.

    Raises:
        OSError: the system refuses.
    """
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS)
    for file, text in {
        "setgroups": "deny",
        "uid_map": f"{uid} {uid} 1",
        "gid_map": f"{gid} {gid} 1",
    }.items():
        _write(f"/proc/self/{file}", text)
    _write("/proc/sys/user/max_user_namespaces", "0")


def own_files(size_bytes: int) -> None:
    """A folder of its own at /tmp, in memory; nothing where terminals and other processes show.

    Raises:
        OSError: the system refuses.
    """
    _call("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    hidden = MS_NOSUID | MS_NODEV | MS_NOEXEC
    for folder in (b"/proc", b"/dev/pts"):
        _call("mount", b"tmpfs", folder, b"tmpfs", hidden | MS_RDONLY, b"size=4k,nr_inodes=2")
    _call(
        "mount",
        b"tmpfs",
        b"/tmp",
        b"tmpfs",
        hidden,
        f"size={size_bytes},nr_inodes=1000,mode=700".encode(),
    )


def limit(limits: Mapping[str, int], baseline_bytes: int, *, alone: bool) -> None:
    """The kernel's own limits on this process.

    Args:
        limits: `Limits` as a dict.
        baseline_bytes: the address space that Python and torch take up.
        alone: whether the user has no process outside: only then can tasks be counted.
    """
    seconds = int(limits["exercise_s"]) + 1
    file_bytes = limits["file_mib"] << 20
    bounds = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: baseline_bytes + (limits["memory_mib"] << 20),
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if alone:
        bounds[resource.RLIMIT_NPROC] = (
            limits["tasks"] + 2
        )  # the process itself and the one that waits for it
    for name, bound in bounds.items():
        most = resource.getrlimit(name)[1]
        least = bound if most == resource.RLIM_INFINITY else min(bound, most)
        resource.setrlimit(name, (least, least))


def give_up_privileges() -> None:
    """No capability is left, and none can be had again.

    Raises:
        OSError: the system refuses.
    """
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(LAST_CAPABILITY + 1):
        if (
            _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0
            and ctypes.get_errno() == errno.EINVAL
        ):
            break  # past the last that this kernel knows
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    _call("capset", header, bytes(24))


def refuse_calls() -> None:
    """Refuse the system calls of REFUSED, and new processes, to this process for good.

    Raises:
        OSError: the system refuses, or its processor is none of PROCESSORS.
    """
    program = ctypes.create_string_buffer(_filter(platform.machine()))
    whole = struct.pack("@HP", (len(program) - 1) // 8, ctypes.addressof(program))
    _call("prctl", PR_SET_SECCOMP, 2, ctypes.c_char_p(whole), 0, 0)


def _filter(machine: str) -> bytes:
    """The program that seccomp runs at each call: number at byte 0, processor at 4, first argument at 16."""
    if machine not in PROCESSORS:
        raise OSError(errno.ENOSYS, f"no list of system calls for the processor {machine}")
    column = [*PROCESSORS].index(machine)
    refused = [numbers[column] for numbers in REFUSED.values()]
    return b"".join(
        struct.pack("=HBBI", *step)
        for step in [
            (LOAD, 0, 0, 4),
            (EQUAL, 1, 0, PROCESSORS[machine]),
            (RETURN, 0, 0, KILL),
            (LOAD, 0, 0, 0),
            (AT_LEAST, 0, 1, OTHER_ABI),
            (RETURN, 0, 0, KILL),
            (EQUAL, 0, 1, CLONE3),
            (
                RETURN,
                0,
                0,
                ERROR | errno.ENOSYS,
            ),  # the C library then uses clone, whose flags can be looked at
            *(step for number in refused if number is not None for step in _refuse(number)),
            (EQUAL, 0, 3, CLONE[column]),
            (LOAD, 0, 0, 16),
            (ANY_BIT, 1, 0, CLONE_THREAD),
            (RETURN, 0, 0, ERROR | errno.EPERM),
            (RETURN, 0, 0, ALLOW),
        ]
    )


def _refuse(number: int) -> list[tuple[int, int, int, int]]:
    return [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | errno.EPERM)]


def _call(name: str, *args: object) -> None:
    if getattr(_libc, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)
