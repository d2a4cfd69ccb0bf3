"""What students may hand in to get unearned points, or by accident: a cell of exercise 01.2 each.

A source may hold places for paths and a port, as {ROOT}; test_attacks.py fills them in. `points` is
what exercise 01.2 must earn, `naive` what the grader that runs assertions in the student's process
does with it.
"""

from dataclasses import dataclass

FULL = "full marks"
NOTHING = "no grade for the whole submission"
RIGHT = """
def quantize(x, scale, bits):
    qmax = 2 ** (bits - 1) - 1
    return torch.round(x / scale).clamp(-qmax - 1, qmax).to(torch.int8)
"""
WRONG = """
def quantize(x, scale, bits):
    return x * 0 + 100.5
"""


@dataclass(frozen=True)
class Attack:
    """One row of the table.

    Args:
        name: what it is.
        source: the cell.
        points: of 3 that it must earn.
        naive: what the naive grader makes of it; "" if only the test can see what goes wrong.
        by_pickle: the naive grader fetches answers as pickles.
    """

    name: str
    source: str
    points: float = 0.0
    naive: str = FULL
    by_pickle: bool = False


def taken(read: str) -> str:
    """A cell that finds the answer in another notebook."""
    return f"""
import json
{read}
cells = json.loads(text)["cells"]
exec(next("".join(cell["source"]) for cell in cells if cell.get("id") == "01-2-solution"))
"""


ATTACKS = [
    Attack(
        "an input transformer that rewrites the tests",
        f"""{WRONG}
get_ipython().input_transformers_cleanup.append(
    lambda lines: [line.replace("assert", "pass #") for line in lines]
)
""",
    ),
    Attack(
        "an object equal to everything",
        """
class Everything:
    def __eq__(self, other):
        return True

def quantize(x, scale, bits):
    return Everything()
""",
    ),
    Attack(
        "the gradebook's database is opened and changed",
        f"""{WRONG}
import sqlite3
with sqlite3.connect("{{DATABASE}}") as database:
    database.execute("update grade set score = 99")
""",
        naive="",
    ),
    Attack(
        "solutions are read from disk",
        taken('text = open("{ROOT}/solutions/01_quantizer.ipynb").read()'),
    ),
    Attack("another submission is read from disk", taken('text = open("{OTHER}").read()')),
    Attack(
        "the hidden tests are imported from disk",
        """
import sys
sys.path.insert(0, "{ROOT}")
sys.modules.pop("qcourse", None)
from qcourse.checks.registry import find_exercise

def quantize(x, scale, bits):
    return torch.tensor(find_exercise("01.2").reference(x, scale, bits))
""",
    ),
    Attack(
        "the test framework is patched",
        f"""{WRONG}
import unittest.mock
torch.as_tensor = torch.equal = torch.allclose = lambda *args, **kwargs: torch.ones(1)
torch.testing.assert_close = lambda *args, **kwargs: None
try:
    import qcourse.checks.judge as judge
    judge.difference = judge.judge = lambda *args, **kwargs: None
except ImportError:
    pass
""",
    ),
    Attack(
        "a pickle that runs code in the grader",
        """
import os

class Payload:
    def __reduce__(self):
        return os.mkdir, ("{MARK}",)

def quantize(x, scale, bits):
    return Payload()
""",
        naive="",
        by_pickle=True,
    ),
    Attack(
        "a module of a known name beside the notebook",
        f"""{WRONG}
import numpy
""",
    ),
    Attack("Python is ended in the cell", f"{WRONG}\nimport os\nos._exit(0)", naive=NOTHING),
    Attack(
        "Python is ended in the function",
        "import os\ndef quantize(x, scale, bits):\n    os._exit(0)",
        naive=NOTHING,
    ),
    Attack(
        "Python crashes in the function",
        "import ctypes\ndef quantize(x, scale, bits):\n    return ctypes.string_at(8)",
        naive=NOTHING,
    ),
    Attack(
        "an endless loop in the cell that ignores SIGINT",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass",
        naive=NOTHING,
    ),
    Attack(
        "an endless loop in the function that ignores every signal",
        """
import signal

def quantize(x, scale, bits):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass
""",
        naive=NOTHING,
    ),
    Attack(
        "sleep without end, in a thread that holds on",
        "import time, threading\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "time.sleep(1000)",
        naive=NOTHING,
    ),
    Attack("a memory bomb", f"hoard = bytearray(300 << 20)\n{RIGHT}"),
    Attack(
        "a memory bomb in many small pieces",
        f"hoard = [bytearray(1 << 20) for _ in range(300)]\n{RIGHT}",
    ),
    Attack(
        "a fork bomb",
        f"""
import os, time
for _ in range(30):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)
{RIGHT}
""",
    ),
    Attack(
        "programs are started",
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-c', 'pass'], check=True)\n{RIGHT}",
    ),
    Attack(
        "a thread bomb",
        f"""
import threading, time
for _ in range(500):
    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
{RIGHT}
""",
    ),
    Attack(
        "a disk bomb",
        f"""
for number in range(5):
    with open(f"/tmp/qcourse-bomb-{{PORT}}-{{{{number}}}}", "wb") as file:
        file.write(bytes(20 << 20))
{RIGHT}
""".replace("{{number}}", "{number}"),
    ),
    Attack(
        "100 MB of prints",
        f'for _ in range(1000): print("x" * 100_000)\n{RIGHT}',
        points=3.0,
        naive="",
    ),
    Attack(
        "the network is used",
        f"""
import socket
socket.create_connection(("127.0.0.1", {{PORT}}), timeout=1).sendall(b"the answers, please")
{RIGHT}
""",
    ),
    Attack(
        "qcourse's own implementation is called",
        """
import qcourse

def quantize(x, scale, bits):
    from qcourse.numerics import affine
    return affine.quantize(x, bits, symmetric=True, scale=torch.tensor(scale)).codes
""",
    ),
    Attack(
        "forged replies on the worker's pipe",
        """
import os
def forge():
    forged = b'{"points": 3.0}\\n{"number": 3, "output": ["int", 0]}\\n'
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, forged)
        except OSError:
            pass

def quantize(x, scale, bits):
    forge()
    return 0
""",
    ),
    Attack(
        "forged replies from a thread, as soon as the cell runs",
        """
import os, threading
def forge():
    while True:
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b'{"points": 3.0}\\n{"number": 3, "output": ["int", 0]}\\n')
            except OSError:
                pass

threading.Thread(target=forge, daemon=True).start()
def quantize(x, scale, bits):
    return 0
""",
    ),
    Attack(
        "a right answer that warns on stderr",
        f"""
import sys, warnings
print("careful", file=sys.stderr)
warnings.warn("quite careful")
{RIGHT}
""",
        points=3.0,
        naive="0 points",
    ),
]
