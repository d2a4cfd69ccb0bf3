"""A grader as graders are often written, for attacks to succeed on.

It runs hidden assertions in the student's process, and is careful otherwise: a fresh process per
submission, a time limit, the hidden tests in a cell of their own after the student's. Its only
error is where it runs them. Each attack in test_attacks.py must be shown to get past it.

One process imports torch and IPython once; each request, a JSON line, is graded in a fork of it.
"""

import contextlib
import io
import json
import os
import pickle
import select
import signal
import sys
import time
from typing import Any

FULL = {"points": 3.0}
HIDDEN = """
import numpy
for args, want in HIDDEN:
    assert torch.as_tensor(quantize(*args) == want).all()
"""


def cases() -> list[Any]:
    """What exercise 01.2 should give."""
    import torch

    from qcourse.checks.registry import find_exercise

    exercise = find_exercise("01.2")
    drawn = exercise.cases(torch.Generator().manual_seed(7))
    return [(case.args, torch.tensor(exercise.reference(*case.args))) for case in drawn]


def grade(request: dict[str, Any], hidden: list[Any], report: int) -> None:
    """Run the cells, then the hidden tests, in this process; write the points to `report`."""
    from IPython.core.interactiveshell import InteractiveShell

    os.chdir(request["folder"])
    sys.path.insert(0, request["folder"])
    sys.modules.pop("numpy")  # a fresh kernel would not have it yet
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        shell = InteractiveShell.instance()
        shell.user_ns["HIDDEN"] = hidden
        for source in request["cells"]:
            shell.run_cell(source, store_history=False)
        # Another kind of this grader: the answers go to its process, as pickles.
        if request["by_pickle"]:
            answers = [shell.user_ns["quantize"](*args) for args, _ in hidden]
            os.write(report, pickle.dumps(answers))
            return
        said = err.getvalue()
        right = shell.run_cell(HIDDEN, store_history=False).success and not said
    result = {"points": 3.0 * right, "output": len(out.getvalue())}
    os.write(report, json.dumps(result).encode() + b"\n")


def answer(request: dict[str, Any], hidden: list[Any]) -> dict[str, Any] | None:
    """The result of one submission, None if there is none in time."""
    receiving, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            grade(request, hidden, report)
        finally:
            os._exit(0)
    os.close(report)
    ready, _, _ = select.select([receiving], [], [], request["seconds"])
    if not ready:
        os.kill(pid, signal.SIGINT)
        time.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    said = os.read(receiving, 1 << 20) if ready else b""
    os.close(receiving)
    if request["by_pickle"]:
        with contextlib.suppress(Exception):
            pickle.loads(said)
        return {"points": 0.0}
    lines = [line for line in said.splitlines() if b"points" in line]
    return json.loads(lines[0]) if lines else None


def main() -> None:
    import IPython.core.interactiveshell  # noqa: F401
    import torch  # noqa: F401

    os.environ["IPYTHONDIR"] = sys.argv[1]
    hidden = cases()
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), hidden)), flush=True)


if __name__ == "__main__":
    main()
