"""The system calls that a worker is refused, as the program that the kernel runs at each call.

The idea: seccomp takes a small program for classic BPF, a machine with one register. It loads the
call's number, compares it with each refused number, and returns what the kernel does: allow the
call, fail it with an error, or kill the process.

Source: seccomp(2), and linux/filter.h for the operations. `confine.py` installs the program. This
file needs nothing of qcourse.
"""

import errno
import struct

PROCESSORS = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as seccomp knows them

# The number of each refused system call by processor; None if the processor has no such call.
REFUSED = {
    # Other processes and other programs: so one limit on memory holds for all of a worker.
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    # Memory that no limit counts: System V objects and keys.
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # Ways to get privileges back, and large parts of the kernel that no exercise needs.
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # Pages moved into a pipe stay there when the process that they were counted for frees them.
    "vmsplice": (278, 75),
    "splice": (275, 76),
    "tee": (276, 77),
    # A network namespace does not hold every family of sockets (AF_VSOCK reaches the host); pairs
    # can still be made.
    "socket": (41, 198),
}
CLONE = (56, 220)
CLONE3 = 435
CLONE_THREAD = 0x10000
OTHER_ABI = 0x40000000  # x86-64's calls with 32-bit pointers begin here

# Operations: (operation, steps to skip if true, steps to skip if false, operand).
LOAD = 0x20
EQUAL = 0x15
AT_LEAST = 0x35
ANY_BIT = 0x45
RETURN = 0x06
Step = tuple[int, int, int, int]

# Where the parts of a call are, in bytes.
NUMBER = 0
PROCESSOR = 4
FIRST_ARGUMENT = 16

# What the kernel does with a call.
ALLOW = 0x7FFF0000
KILL = 0x80000000
ERROR = 0x00050000


def program(machine: str) -> bytes:
    """Return the filter for a processor, 8 bytes per step.

    Raises:
        OSError: the processor is not one of PROCESSORS.
    """
    if machine not in PROCESSORS:
        raise OSError(errno.ENOSYS, f"no list of system calls for the processor {machine}")
    column = [*PROCESSORS].index(machine)
    steps = _only_this_abi(PROCESSORS[machine])

    # The C library then uses clone, whose flags can be looked at.
    steps += _refuse(CLONE3, errno.ENOSYS)
    for numbers in REFUSED.values():
        number = numbers[column]
        if number is not None:
            steps += _refuse(number, errno.EPERM)
    steps += _threads_only(CLONE[column])

    steps.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _only_this_abi(processor: int) -> list[Step]:
    """Kill the process at a call of another processor or ABI; leave the number loaded."""
    return [
        (LOAD, 0, 0, PROCESSOR),
        (EQUAL, 1, 0, processor),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, KILL),
    ]


def _refuse(number: int, error: int) -> list[Step]:
    return [
        (EQUAL, 0, 1, number),
        (RETURN, 0, 0, ERROR | error),
    ]


def _threads_only(clone: int) -> list[Step]:
    """Refuse clone unless it makes a thread of the same process."""
    return [
        (EQUAL, 0, 3, clone),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, ERROR | errno.EPERM),
    ]
