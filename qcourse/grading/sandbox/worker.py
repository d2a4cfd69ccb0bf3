"""The process that runs a student's code: it is given inputs, gives back outputs, and knows no right answer.

The idea: all cells of a sheet share one namespace, as in the notebook. A request runs a cell or calls one function on
one case; the reply carries the request's number and is only an answer, which the judge will compare like any other.
What the student's code prints goes nowhere. Whatever it does to this process, the judge is in another.

`template.py` starts a worker, `confine.py` shuts it in. The file runs without qcourse around it.
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
    """Says why what is forbidden cannot be imported; that it is not there is for the sandbox to see to."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> None:
        if fullname.partition(".")[0] == "qcourse":
            raise ImportError(f"{fullname} {LEFT_OUT}", name=fullname)


def leave_out_qcourse() -> None:
    """Let `from qcourse import check` do nothing, and every other import of qcourse fail with a word."""

    def no_such(name: str) -> Any:
        raise ImportError(f"qcourse.{name} {LEFT_OUT}", name="qcourse")

    for name in list(sys.modules):
        if name.partition(".")[0] == "qcourse" and not name.startswith("qcourse.lab"):
            del sys.modules[name]
    stub: Any = types.ModuleType("qcourse")
    stub.check, stub.__getattr__, stub.__path__ = (lambda *args: None), no_such, []
    stub.lab = sys.modules.get("qcourse.lab")
    sys.modules["qcourse"] = stub
    sys.meta_path.insert(0, _LeftOut())


def serve(channel: socket.socket, reply_bytes: int) -> None:
    """Answer requests until there are no more.

    Args:
        channel: lines in, lines out.
        reply_bytes: how long a line may be.
    """
    warnings.simplefilter("ignore")
    leave_out_qcourse()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for line in channel.makefile("rb"):
        request = wire.read(line)
        reply = wire.write(answer(request, namespace) | {"number": request["number"]})
        if len(reply) > reply_bytes:
            failure = Failure(
                (UnreadableError.__name__,), f"returned more than {reply_bytes >> 20} MiB"
            )
            same = {"args": request["args"]} if "args" in request else {}
            reply = wire.write({"number": request["number"], "output": wire.encode(failure)} | same)
        channel.sendall(reply)


def answer(request: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    """What a request comes to: True for a cell that ran through, the answer of a call, or a Failure.

    With the answer of a call come its arguments as the call has left them.

    >>> namespace = {}
    >>> answer({"cell": "def double(x): return 2 * x", "name": "<01.1>"}, namespace)
    {'output': ['bool', True]}
    >>> answer({"call": "double", "args": ["tuple", [["int", 4]]]}, namespace)
    {'output': ['int', 8], 'args': ['tuple', [['int', 4]]]}
    """
    try:
        if "cell" in request:
            return {
                "output": wire.encode(
                    _run(without_magic(request["cell"]), request["name"], namespace)
                )
            }
        if "names" in request:
            return {"output": wire.encode(used_and_defined(request["names"]))}
        args = wire.decode(request["args"])
        if request["call"] in namespace:
            output = called(namespace[request["call"]], args)
        else:
            output = Failure((NameError.__name__,), f"name '{request['call']}' is not defined")
        return {"output": wire.encode(output), "args": _left(args)}
    except KeyboardInterrupt:  # raised by the student's code: nobody is at a keyboard
        failure = Failure((KeyboardInterrupt.__name__,))
        return {"output": wire.encode(failure)} | (
            {"args": request["args"]} if "args" in request else {}
        )


def _left(args: tuple[Any, ...]) -> list:
    """The arguments as a call has left them; nothing that was sent, where they can be read no more."""
    try:
        return wire.encode(args)
    except Exception:
        return []


def without_magic(source: str) -> str:
    """The source with lines of IPython's own left out, where it is not Python as it stands.

    >>> without_magic("%matplotlib inline\\nx = 7 \\\\\\n% 3")
    '\\nx = 7 \\\\\\n'
    """
    try:
        compile(source, "<cell>", "exec")
    except (SyntaxError, ValueError):
        return re.sub(r"^[ \t]*[%!].*$", "", source, flags=re.MULTILINE)
    return source


def _run(source: str, name: str, namespace: dict[str, Any]) -> Any:
    linecache.cache[name] = (
        len(source),
        None,
        source.splitlines(keepends=True),
        name,
    )  # so that errors can show lines
    try:
        exec(compile(source, name, "exec"), namespace)
        return True
    except BaseException as error:  # exit() too
        said = traceback.TracebackException.from_exception(error, limit=0)
        lines = [
            frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name
        ]
        kinds = tuple(kind.__name__ for kind in type(error).__mro__)
        return Failure(
            kinds,
            str(said)[:LONGEST],
            f"line {lines[-1].lineno}: {lines[-1].line}" if lines else "",
        )
