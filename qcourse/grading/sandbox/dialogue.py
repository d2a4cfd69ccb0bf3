"""The grader's side of a worker: send a question, one line, and read the reply that comes in time.

The idea: a stranger's code controls the other side. So each question has a number that its reply
must carry, and each reply has a longest length. Each exchange has a deadline by the clock, however
slowly the bytes arrive. A reply that breaks these rules ends the worker. Any other reply is an
answer to one question, right or wrong. It also carries the arguments as the call left them; the
grader still has what it sent, so it makes the comparison.

`host.py` makes workers; `template.py` reports their end; `wire.py` encodes what is sent.
"""

import select
import socket
import time
from collections.abc import Mapping, Set
from typing import Any

from qcourse.grading.grades import Limits
from qcourse.grading.sandbox import wire
from qcourse.grading.sandbox.mounts import LOST, SandboxError

START_S = 120.0  # the first start of a warm Python, which imports torch
WORKER_S = 30.0  # a copy of it starts, or ends, in far less
HANGUP_S = 2.0  # how long a worker may take to end by itself
KILLED = ("-9", "-24")  # by the kernel: out of memory, or out of processor time

OUTPUT_KEYS = frozenset({"number", "output"})
CALL_KEYS = OUTPUT_KEYS | {"args"}


class WorkerGoneError(Exception):
    """A worker ended before it answered; the message goes on from "your function"."""


class Worker:
    """The grader's side of one worker."""

    def __init__(self, channel: socket.socket, life: socket.socket, limits: Limits) -> None:
        self._channel = channel
        self._life = life
        self._limits = limits
        self._number = 0
        self._ended: str | None = None
        self._kept = bytearray()

    def run_cell(self, source: str, name: str, wall_s: float) -> Any:
        """Return True if the cell ran through, else the Failure that it ended in.

        Raises:
            WorkerGoneError: as in `call`.
        """
        output, _ = self._ask({"cell": source, "name": name}, wall_s)
        return output

    def call(self, function: str, args: tuple[Any, ...], wall_s: float) -> tuple[Any, int | None]:
        """Return a function's answer or Failure, and the first argument that it changed, from 0.

        Raises:
            WorkerGoneError: there is no answer; the worker is closed.
        """
        sent = wire.encode(args)
        output, left = self._ask({"call": function, "args": sent}, wall_s, CALL_KEYS)
        return output, _first_changed(sent, left)

    def names(self, source: str, wall_s: float) -> tuple[set[str], set[str]]:
        """Return the names that a cell uses and defines, as `cell_names.used_and_defined` does.

        Raises:
            WorkerGoneError: as in `call`, and if the reply is no such names.
        """
        found, _ = self._ask({"names": source}, wall_s)
        # Anything but a pair stands for both; it is then accepted only if it is names itself.
        is_pair = type(found) is tuple and len(found) == 2
        used, defined = found if is_pair else (found, found)
        if not _are_names(used) or not _are_names(defined):
            self.close()
            raise WorkerGoneError("has names that cannot be listed")
        return set(used), set(defined)

    def close(self, patience_s: float = 0.0) -> str:
        """End the worker if it does not end in time, wait until nothing is left; return how."""
        if self._ended is not None:
            return self._ended
        self._ended = ""
        with self._channel, self._life:
            try:
                select.select([self._life], [], [], patience_s)
                self._life.shutdown(socket.SHUT_WR)
                report = line_of(self._life, WORKER_S, 500) or b""
                self._ended = report.decode(errors="replace")
                # Nothing more comes: this returns when the copy that waited has ended, too.
                self._life.recv(1)
            # The warm Python is gone, and all its workers with it.
            except (OSError, wire.ForgedError):
                pass
        return self._ended

    def _gone(self) -> Exception:
        """Return the error that says why the worker hung up."""
        status = self.close(HANGUP_S)
        if status == wire.HANGUP:
            return WorkerGoneError("closed the connection that its answers go through")
        if not status.lstrip("-").isdigit():
            return SandboxError(f"no sandbox: {status or LOST}")
        if status in KILLED:
            return WorkerGoneError("used more processor time or memory than it may")
        kind = "signal" if status.startswith("-") else "exit status"
        return WorkerGoneError(f"ended Python itself ({kind} {status.lstrip('-')})")

    def _ask(
        self, request: Mapping[str, Any], wall_s: float, keys: Set[str] = OUTPUT_KEYS
    ) -> tuple[Any, Any]:
        """Return the reply's output, decoded, and its arguments, as they came."""
        self._number += 1
        until = time.monotonic() + wall_s
        try:
            self._channel.settimeout(max(wall_s, 0.001))
            self._channel.sendall(wire.write({**request, "number": self._number}))
            return self._reply(until, keys)
        except TimeoutError:
            self.close()
            raise WorkerGoneError(
                f"took longer than {max(wall_s, 0.0):.3g} s and was stopped"
            ) from None
        except wire.ForgedError as error:
            self.close()
            raise WorkerGoneError(f"sent {error}") from error
        except OSError as error:
            raise self._gone() from error

    def _reply(self, until: float, keys: Set[str]) -> tuple[Any, Any]:
        left_s = until - time.monotonic()
        most_bytes = self._limits.reply_mib << 20
        line = line_of(self._channel, left_s, most_bytes, self._kept)
        if line is None:
            raise self._gone()
        reply = wire.read(line)
        if set(reply) != keys or reply["number"] != self._number:
            raise wire.ForgedError("a reply to nothing that was asked")
        return wire.decode(reply["output"]), reply.get("args")


def line_of(
    channel: socket.socket, wall_s: float, most_bytes: int, kept: bytearray | None = None
) -> bytes | None:
    """Return the next line, or None if the other side has hung up.

    Args:
        kept: what came after the last line; what comes after this one is left in it.

    Raises:
        TimeoutError: it did not come in time.
        ForgedError: it is too long.
    """
    until = time.monotonic() + wall_s
    kept = bytearray() if kept is None else kept
    searched = 0
    while True:
        # Only the new bytes are searched, so a reply that drips takes linear time.
        end = kept.find(b"\n", searched)
        if end >= 0:
            break
        searched = len(kept)
        if searched > most_bytes:
            raise wire.ForgedError(f"more than {most_bytes >> 20} MiB")
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        channel.settimeout(left_s)
        part = channel.recv(1 << 16)
        if not part:
            return None
        kept += part
    line = bytes(kept[:end])
    del kept[: end + 1]
    return line


def _first_changed(sent: list, left: Any) -> int | None:
    """Return the first encoded argument that differs from what was sent; None if none does."""
    if not _has_as_many_arguments(sent, left):
        return 0
    # A value has one encoding, so equal encodings are equal values.
    _, sent_args = sent
    _, left_args = left
    for number, (before, after) in enumerate(zip(sent_args, left_args, strict=True)):
        if before != after:
            return number
    return None


def _has_as_many_arguments(sent: list, left: Any) -> bool:
    """Return whether what came back is a tuple of as many arguments as were sent."""
    if not isinstance(left, list) or len(left) != 2:
        return False
    kind, arguments = left
    if kind != "tuple" or not isinstance(arguments, list):
        return False
    return len(arguments) == len(sent[1])


def _are_names(found: Any) -> bool:
    """Return whether a decoded value is a tuple of text."""
    return type(found) is tuple and all(type(name) is str for name in found)
