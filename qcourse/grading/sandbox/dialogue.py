"""The judge's end of a worker: questions go in, one line each, and what comes back in time is read as `wire.py` says.

The idea: the other end is in a stranger's hands. So each question has a number that its reply must carry, each reply
has a longest length, and each exchange has a deadline by the clock, whatever arrives and however slowly. What breaks
these rules ends the worker. What is left is an answer to one question, right or wrong.

A reply also carries the arguments as the call left them. The judge holds what it sent, so the comparison is made here.

`host.py` makes workers; `template.py` is what reports their end.
"""

import select
import socket
import time
from collections.abc import Mapping, Set
from typing import Any

from qcourse.grading.grades import Limits
from qcourse.grading.sandbox import wire
from qcourse.grading.sandbox.mounts import LOST, SandboxError

START_S = 120.0  # a template's first start, which imports torch
WORKER_S = 30.0  # a copy of it starts, or ends, in far less
KILLED = ("-9", "-24")  # by the kernel, for the limit on processor time or for want of memory
HANGUP, HANGUP_S = (
    "hangup",
    2.0,
)  # what is said of a worker that did not end by itself, and how long it may take to


class WorkerGoneError(Exception):
    """A worker ended, or was ended, before it answered; the message goes on from "your function"."""


class Worker:
    """The judge's end of one worker."""

    def __init__(self, channel: socket.socket, life: socket.socket, limits: Limits) -> None:
        self._channel, self._life, self._limits, self._number = channel, life, limits, 0
        self._ended: str | None = None
        self._kept = bytearray()

    def run_cell(self, source: str, name: str, wall_s: float) -> Any:
        """True where the cell ran through, else the Failure that it ended in.

        Raises:
            WorkerGoneError: as in `call`.
        """
        return self._ask({"cell": source, "name": name}, wall_s)[0]

    def call(self, function: str, args: tuple[Any, ...], wall_s: float) -> tuple[Any, int | None]:
        """What the function gives back as plain data, or a Failure; and the first argument that it changed, from 0.

        Raises:
            WorkerGoneError: there is no answer; the worker is closed.
        """
        sent = wire.encode(args)
        output, left = self._ask(
            {"call": function, "args": sent}, wall_s, keys={"number", "output", "args"}
        )
        pairs = zip(sent[1], left[1], strict=True) if _is_like(sent, left) else [(sent, left)]
        changed = [number for number, (before, after) in enumerate(pairs) if before != after]
        return output, (changed[0] if changed else None)

    def names(self, source: str, wall_s: float) -> tuple[set[str], set[str]]:
        """The names that a cell uses and defines, as `names.used_and_defined` finds them.

        Raises:
            WorkerGoneError: as in `call`, and where the reply is no such names.
        """
        found, _ = self._ask({"names": source}, wall_s)
        both = found if type(found) is tuple and len(found) == 2 else (found, found)
        if not all(
            type(names) is tuple and all(type(name) is str for name in names) for names in both
        ):
            self.close()
            raise WorkerGoneError("has names that cannot be listed")
        used, defined = both
        return set(used), set(defined)

    def close(self, patience_s: float = 0.0) -> str:
        """End the worker if it does not end by itself in time, and wait until nothing of it is left; how it ended."""
        if self._ended is None:
            self._ended = ""
            with self._channel, self._life:
                try:
                    select.select([self._life], [], [], patience_s)
                    self._life.shutdown(socket.SHUT_WR)
                    self._ended = (line_of(self._life, WORKER_S, 500) or b"").decode(
                        errors="replace"
                    )
                    self._life.recv(1)  # nothing: the one that waited for it has ended too
                except (OSError, wire.ForgedError):
                    pass  # the template is gone, and all its workers with it
        return self._ended

    def _gone(self) -> Exception:
        """Why it hung up."""
        status = self.close(HANGUP_S)
        if status == HANGUP:
            return WorkerGoneError("closed the connection that its answers go through")
        if not status.lstrip("-").isdigit():
            return SandboxError(f"no sandbox: {status or LOST}")
        if status in KILLED:
            return WorkerGoneError("used more processor time or memory than it may")
        kind = "signal" if status.startswith("-") else "exit status"
        return WorkerGoneError(f"ended Python itself ({kind} {status.lstrip('-')})")

    def _ask(
        self,
        request: Mapping[str, Any],
        wall_s: float,
        keys: Set[str] = frozenset({"number", "output"}),
    ) -> tuple[Any, Any]:
        """The output of the reply, decoded, and what the reply says of the arguments, as it came."""
        self._number += 1
        until = time.monotonic() + wall_s
        try:
            self._channel.settimeout(max(wall_s, 0.001))
            self._channel.sendall(wire.write({**request, "number": self._number}))
            line = line_of(
                self._channel, until - time.monotonic(), self._limits.reply_mib << 20, self._kept
            )
            if line is None:
                raise self._gone()
            reply = wire.read(line)
            if set(reply) != keys or reply["number"] != self._number:
                raise wire.ForgedError("a reply to nothing that was asked")
            return wire.decode(reply["output"]), reply.get("args")
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


def line_of(
    channel: socket.socket, wall_s: float, most_bytes: int, kept: bytearray | None = None
) -> bytes | None:
    """The next line, or None where the other side has hung up.

    Args:
        kept: what came after the last line; what comes after this one is left in it.

    Raises:
        TimeoutError: it did not come in time.
        ForgedError: it is too long.
    """
    until = time.monotonic() + wall_s
    kept = bytearray() if kept is None else kept
    searched = 0
    while (end := kept.find(b"\n", searched)) < 0:
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


def _is_like(sent: list, left: Any) -> bool:
    """Whether what came back is a tuple of as many arguments as were sent."""
    shaped = (
        isinstance(left, list)
        and len(left) == 2
        and left[0] == "tuple"
        and isinstance(left[1], list)
    )
    return shaped and len(left[1]) == len(sent[1])
