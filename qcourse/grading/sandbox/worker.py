"""The process that runs a student's code: it gets inputs, gives back outputs, knows no answers.

The idea: all cells share one namespace, as in the notebook. A request runs a cell or calls one
function on one case; the reply carries the request's number and an answer, which the grader
compares as it would any other. Output that the student's code prints is dropped. Nothing that it
does to this process reaches the grader, which is another one.

`template.py` starts a worker, `confine.py` confines it. This file runs without qcourse around it.
"""

import importlib.abc
import linecache
import re
import socket
import sys
import traceback
import types
import warnings
from collections.abc import Sequence
from typing import Any

from qcourse.checks.answers import LONGEST, Failure, UnreadableError, called
from qcourse.grading.sandbox import wire
from qcourse.grading.sandbox.cell_names import used_and_defined

LEFT_OUT = "is left out here: a sheet is graded without qcourse"


class _LeftOut(importlib.abc.MetaPathFinder):
    """Says why qcourse cannot be imported; that it is not there is the sandbox's task."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "qcourse":
            raise ImportError(f"{fullname} {LEFT_OUT}", name=fullname)


def leave_out_qcourse() -> None:
    """Let `from qcourse import check` do nothing, and other imports of qcourse say why not."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "qcourse" and not name.startswith("qcourse.lab"):
            del sys.modules[name]
    stub: Any = types.ModuleType("qcourse")
    stub.check = _no_check
    stub.__getattr__ = _no_such
    stub.__path__ = []
    # Sheet 11 runs its kernels in qcourse.lab.tiny_triton.
    stub.lab = sys.modules.get("qcourse.lab")
    sys.modules["qcourse"] = stub
    sys.meta_path.insert(0, _LeftOut())


def _no_check(*args: Any) -> None:
    """Stand in for `qcourse.check`."""


def _no_such(name: str) -> Any:
    raise ImportError(f"qcourse.{name} {LEFT_OUT}", name="qcourse")


def serve(channel: socket.socket, reply_bytes: int) -> None:
    """Answer requests, one line each, until there are no more.

    Args:
        reply_bytes: how long a reply may be.
    """
    warnings.simplefilter("ignore")
    leave_out_qcourse()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in channel.makefile("rb"):
        request = wire.read(line)
        number = {"number": request["number"]}
        reply = wire.write(answer(request, namespace) | number)
        if len(reply) > reply_bytes:
            too_long = f"returned more than {reply_bytes >> 20} MiB"
            failure = Failure((UnreadableError.__name__,), too_long)
            reply = wire.write(_reply_without_call(request, failure) | number)
        channel.sendall(reply)


def answer(request: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    """Return what a request comes to: True for a cell that ran, a call's answer, or a Failure.

    With a call's answer come its arguments as the call has left them.

    >>> namespace = {}
    >>> answer({"cell": "def double(x): return 2 * x", "name": "<01.1>"}, namespace)
    {'output': ['bool', True]}
    >>> answer({"call": "double", "args": ["tuple", [["int", 4]]]}, namespace)
    {'output': ['int', 8], 'args': ['tuple', [['int', 4]]]}
    """
    try:
        if "cell" in request:
            source = without_magic(request["cell"])
            return {"output": wire.encode(_run(source, request["name"], namespace))}
        if "names" in request:
            return {"output": wire.encode(used_and_defined(request["names"]))}
        return _answer_to_call(request, namespace)
    # The student's code raised it, because no keyboard is attached here.
    except KeyboardInterrupt:
        failure = Failure((KeyboardInterrupt.__name__,))
        return _reply_without_call(request, failure)


def without_magic(source: str) -> str:
    """Return the source without IPython's own lines, if it is not Python as it stands.

    >>> without_magic("%matplotlib inline\\nx = 7 \\\\\\n% 3")
    '\\nx = 7 \\\\\\n'
    """
    try:
        compile(source, "<cell>", "exec")
    except (SyntaxError, ValueError):
        return re.sub(r"^[ \t]*[%!].*$", "", source, flags=re.MULTILINE)
    return source


def _answer_to_call(request: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    name = request["call"]
    args = wire.decode(request["args"])
    if name in namespace:
        output = called(namespace[name], args)
    else:
        output = Failure((NameError.__name__,), f"name '{name}' is not defined")
    return {"output": wire.encode(output), "args": _encoded_or_empty(args)}


def _reply_without_call(request: dict[str, Any], failure: Failure) -> dict[str, Any]:
    """Return a reply with a failure; a call's arguments are sent back as they came."""
    reply = {"output": wire.encode(failure)}
    if "args" in request:
        reply["args"] = request["args"]
    return reply


def _encoded_or_empty(args: tuple[Any, ...]) -> list:
    """Return the arguments as a call has left them; [] if they cannot be read any more."""
    # An empty list equals nothing that was sent, so the grader sees a changed argument.
    try:
        return wire.encode(args)
    except Exception:
        return []


def _run(source: str, name: str, namespace: dict[str, Any]) -> Any:
    """Run a cell; return True, or the Failure that it ended in."""
    # Tracebacks look here for the lines of a file that does not exist.
    lines = source.splitlines(keepends=True)
    linecache.cache[name] = (len(source), None, lines, name)
    try:
        exec(compile(source, name, "exec"), namespace)
        return True
    # exit() ends the cell, too, not the worker.
    except BaseException as error:
        return _failure_of_cell(error, name)


def _failure_of_cell(error: BaseException, name: str) -> Failure:
    said = traceback.TracebackException.from_exception(error, limit=0)
    # The innermost line of the cell itself, which may have called a library.
    frames = traceback.extract_tb(error.__traceback__)
    own_frames = [frame for frame in frames if frame.filename == name]
    line = f"line {own_frames[-1].lineno}: {own_frames[-1].line}" if own_frames else ""
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return Failure(tuple(kinds), str(said)[:LONGEST], line)
