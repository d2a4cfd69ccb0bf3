"""A class of forty on disk: thirty submissions that try to stop the grading, and ten honest ones.

Each row hands in one sheet and says what it must earn. Rows that are cells replace exercise 01.2,
with the course's own solutions around them, so that their effect on the other exercises shows.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attacks import ATTACKS, RIGHT, WRONG
from standins import ROOT, SHEET, WORTH

from qcourse.checks.registry import find_exercise

FULL = float(sum(WORTH.values()))
OTHERS = FULL - WORTH["01.2"]  # what is left if 01.2 earns nothing
CHANNEL = """
import os, socket, stat
def is_socket(number):
    try:
        return stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        return False
channel = socket.socket(fileno=os.dup(next(number for number in range(3, 64) if is_socket(number))))
"""


def table_of_hand_made(exercise_id: str) -> str:
    """A cell that knows only the answers of the hand-made cases, which anyone can read."""
    exercise = find_exercise(exercise_id)
    cases = [case for case in exercise.cases(torch.Generator().manual_seed(0)) if case.by_hand]
    table = {repr(case.args): exercise.reference(*case.args).tolist() for case in cases}
    return f"""
TABLE = {table!r}
def {exercise.function}(*args):
    return torch.tensor(TABLE.get(repr(args), 0), dtype=torch.int8)
"""


CELLS = {
    "kills its group": (f"{WRONG}\nimport os\nos.kill(0, 9)", OTHERS),
    "stops its group": (f"{WRONG}\nimport os\nos.kill(0, 19)", OTHERS),
    "slows its group": (f"{WRONG}\nimport os\nos.setpriority(os.PRIO_PGRP, 0, 19)", OTHERS),
    "tuples of 99,000 values": (
        "def quantize(x, scale, bits):\n    return tuple(range(99_000))",
        OTHERS,
    ),
    "a reply that drips": (
        f"""{CHANNEL}
def quantize(x, scale, bits):
    channel.sendall(b" " * (7 << 20))
    end = os.pipe()[0]
    while True:
        try:
            socket.send_fds(channel, [b" "], [end])
        except OSError:
            pass
""",
        OTHERS,
    ),
    "a reply that no reader of arrays expects": (
        f"""{CHANNEL}
import base64
def npy(header):
    data = b"\\x93NUMPY\\x01\\x00" + len(header).to_bytes(2, "little") + header.encode()
    return base64.b64encode(data).decode()
def quantize(x, scale, bits):
    for number in range(1, 40):
        forged = {{"number": number, "output": ["array", npy("{{1:1,'a':2}}")], "args": []}}
        channel.sendall(json.dumps(forged).encode() + b"\\n")
import json
""",
        OTHERS,
    ),
    "a name of 750,000 letters": (f"{'A' * 750_000} = 1\n{RIGHT}", FULL),
    "slow in each case, then hangs": (
        f"""{RIGHT}
import time
whole, times = quantize, []
def quantize(x, scale, bits):
    times.append(0)
    while len(times) > 6:
        pass
    time.sleep(0.9)
    return whole(x, scale, bits)
""",
        OTHERS,
    ),
    "changes its arguments, and the test for that": (
        f"""{RIGHT}
import sys
whole = quantize
def quantize(x, scale, bits):
    frame = sys._getframe(1)
    while frame is not None:
        frame.f_globals["_same"] = lambda before, after: True
        frame = frame.f_back
    codes = whole(x, scale, bits)
    x.zero_()
    return codes
""",
        OTHERS,
    ),
    "a table of the cases that stand in the source": (table_of_hand_made("01.2"), OTHERS),
    "sockets of the host": (
        f"import socket\nsocket.socket(40, socket.SOCK_STREAM)\n{RIGHT}",
        OTHERS,
    ),
    "patches torch for the other exercises": (
        f"{RIGHT}\ntorch.round = torch.clamp = torch.Tensor.round = lambda *args: None",
        OTHERS,
    ),
}
# A cell of 01.3, which 01.4 calls.
EMPTY_ROWS = "def affine_parameters(x, bits):\n    return torch.empty(20_000_000, 0)"
# The quick ones of attacks.py.
QUICK = [
    "an object equal to everything",
    "the hidden tests are imported from disk",
    "the test framework is patched",
    "Python is ended in the cell",
    "Python crashes in the function",
    "an endless loop in the function that ignores every signal",
    "a memory bomb",
    "a fork bomb",
    "a thread bomb",
    "forged replies on the worker's pipe",
]
CELLS |= {
    attack.name: (attack.source, OTHERS + attack.points)
    for attack in ATTACKS
    if attack.name in QUICK
}


def solved() -> dict[str, Any]:
    """The sheet with the course's own solutions."""
    return json.loads((ROOT / "solutions" / f"{SHEET}.ipynb").read_text(encoding="utf-8"))


def with_cell(source: str, exercise: str = "01.2") -> str:
    """The sheet with one answer replaced."""
    notebook = solved()
    for cell in notebook["cells"]:
        if cell["id"] == f"{exercise.replace('.', '-')}-solution":
            cell["source"] = source
    return json.dumps(notebook)


def surrogate(folder: Path) -> None:
    (folder / f"{SHEET}.ipynb").write_text(with_cell(f"{RIGHT}\n# \ud800"), encoding="utf-8")


def name_of_another_system(folder: Path) -> None:
    (folder / f"{SHEET}.ipynb").write_text(with_cell(RIGHT), encoding="utf-8")
    os.close(os.open(os.fsencode(folder) + b"/01_\xfcbung.ipynb", os.O_CREAT | os.O_WRONLY))


def many_cells(folder: Path) -> None:
    notebook = solved()
    notebook["cells"] += [{"cell_type": "code", "source": "x", "id": "01-2-solution"}] * 100_000
    (folder / f"{SHEET}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def deep(folder: Path) -> None:
    (folder / f"{SHEET}.ipynb").write_text("[" * 1_000_000, encoding="utf-8")


def empty(folder: Path) -> None:
    (folder / f"{SHEET}.ipynb").touch()


def link(folder: Path) -> None:
    (folder / f"{SHEET}.ipynb").symlink_to("/etc/passwd")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / f"{SHEET}.ipynb")


@dataclass(frozen=True)
class Row:
    """One student.

    Args:
        student: the folder's name.
        make: fills the folder.
        points: what the sheet must earn.
        problem: whether the report has a line for it.
    """

    student: str
    make: Callable[[Path], None]
    points: float
    problem: bool = False


def handing_in(source: str, exercise: str = "01.2") -> Callable[[Path], None]:
    """A function that hands in the sheet with one answer replaced."""

    def make(folder: Path) -> None:
        (folder / f"{SHEET}.ipynb").write_text(with_cell(source, exercise), encoding="utf-8")

    return make


ROWS = [
    *(Row(name, handing_in(source), points) for name, (source, points) in CELLS.items()),
    Row(
        "twenty million empty rows",
        handing_in(EMPTY_ROWS, "01.3"),
        FULL - WORTH["01.3"] - WORTH["01.4"],
    ),
    Row("a lone surrogate", surrogate, FULL),
    Row("a name of another system", name_of_another_system, 0.0, problem=True),
    Row("a hundred thousand cells", many_cells, FULL),
    Row("a million brackets", deep, 0.0, problem=True),
    Row("an empty file", empty, 0.0, problem=True),
    Row("a link", link, 0.0, problem=True),
    Row("a pipe", pipe, 0.0, problem=True),
]
HONEST = [Row(f"honest {number}", handing_in(RIGHT), FULL) for number in range(9)]
HONEST.append(Row("honest Rene\u0301e", handing_in(RIGHT), FULL))


def hand_in(submitted: Path, rows: list[Row]) -> None:
    """Write the class."""
    for row in rows:
        (submitted / row.student).mkdir(parents=True)
        row.make(submitted / row.student)
