"""A class of 60 in the real sandbox, killed on the way: each gets its score, nothing is lost."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from standins import ROOT, SHEET, WORTH, write_notebook

from qcourse.grading.book.gradebook import default_url, open_gradebook
from qcourse.grading.book.scores import Score, scores
from qcourse.grading.grade_class import Settings, grade_class
from qcourse.grading.grades import Limits

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux's"),
    pytest.mark.skipif(
        shutil.which("bwrap") is None,
        reason="bubblewrap is not installed: apt-get install bubblewrap",
    ),
]
OUTSIDE = (ROOT, Path("/tmp"), Path.home())
FULL = float(sum(WORTH.values()))
QUICK = Limits(case_s=1.5)


def solutions() -> dict[str, str]:
    """The course's own answers, by exercise."""
    cells = json.loads((ROOT / "solutions" / f"{SHEET}.ipynb").read_text(encoding="utf-8"))["cells"]
    marks = {cell["id"]: "".join(cell["source"]) for cell in cells}
    return {exercise: marks[f"{exercise.replace('.', '-')}-solution"] for exercise in WORTH}


ANSWERS = solutions()
NATURAL = """
def code_entropy(codes):
    p = torch.unique(codes, return_counts=True)[1] / codes.numel()
    return -(p * p.log()).sum()
"""
EQUAL_TO_ALL = """
class Yes:
    __eq__ = __ge__ = __le__ = lambda self, other: True
    __array__ = lambda self, *rest, **more: 1 / 0
def code_entropy(codes):
    return Yes()
"""
LOOP = """
def code_entropy(codes):
    while True:
        try:
            pass
        except BaseException:
            continue
"""
WRITES = """
import os
for folder in {folders!r}:
    try:
        open(os.path.join(folder, "was-here"), "w").write("hm")
    except OSError:
        pass
""" + ANSWERS["01.1"]
DIES = "import os\nos._exit(0)\ndef quantize(x, scale, bits):\n    return x"

# What is put in the place of which answer, and what the sheet is worth then.
KINDS: dict[str, tuple[dict[str, str], float]] = {
    "honest": ({}, FULL),
    "wrong": ({"01.5": NATURAL}, 10.0),
    "unfinished": ({"01.3": "", "01.4": "def fake_quantize(x, bits)\n    return x"}, 6.0),
    "equal": ({"01.5": EQUAL_TO_ALL}, 10.0),
    "dies": ({"01.2": DIES}, 9.0),
    "writes": ({"01.1": WRITES}, FULL),
    "loops": ({"01.5": LOOP}, 10.0),
}
PROBLEMS = ("broken", "empty", "link")
HOW_MANY = {"honest": 26, "wrong": 8, "unfinished": 4, "equal": 3, "dies": 3, "writes": 3}
HOW_MANY |= {"loops": 1, "untouched": 4, "broken": 3, "empty": 3, "link": 2}


def hand_in(folder: Path) -> dict[str, float]:
    """Write the class; return what each student should get."""
    expected: dict[str, float] = {}
    aside = folder.parent / "aside.ipynb"
    write_notebook(aside, ANSWERS)
    folders = [str(one) for one in (*OUTSIDE, folder, folder.parent)]
    for kind, count in HOW_MANY.items():
        for number in range(count):
            path = folder / f"{kind}{number:03}" / f"{SHEET}.ipynb"
            change, points = KINDS.get(kind, ({}, 0.0))
            change = {
                exercise: source.replace("{folders!r}", repr(folders))
                for exercise, source in change.items()
            }
            write_notebook(path, {} if kind == "untouched" else {**ANSWERS, **change})
            if kind == "broken":
                path.write_text(path.read_text(encoding="utf-8")[:-100], encoding="utf-8")
            if kind == "empty":
                path.write_bytes(b"")
            if kind == "link":
                path.unlink()
                path.symlink_to(aside)
            expected[path.parent.name] = points
    return expected


def held(folder: Path) -> dict[str, list[Score]]:
    with open_gradebook(default_url(folder)) as book:
        found: dict[str, list[Score]] = {}
        for one in scores(book):
            found.setdefault(one.student, []).append(one)
        return found


def snapshot(folder: Path) -> dict[Path, tuple]:
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


COMMAND = f"""
from pathlib import Path
from qcourse.grading.grade_class import Settings, grade_class
from qcourse.grading.grades import Limits
limits = Limits(case_s={QUICK.case_s})
if __name__ == "__main__":
    grade_class(Settings(Path("submitted"), Path("graded"), workers=2, limits=limits))
"""


def run_and_kill(folder: Path, after: int) -> int:
    """Start to grade, and kill it once this many have been graded; return how many there were."""
    (folder / "command.py").write_text(COMMAND, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "command.py"], cwd=folder, env=env) as run:
        while len(list((folder / "graded").glob("results/*/*.json"))) < after:
            assert run.poll() is None
            time.sleep(0.01)
        processes = psutil.Process(run.pid).children(recursive=True)
        run.kill()
    assert not psutil.wait_procs(processes, timeout=20)[1]
    return len(list((folder / "graded").glob("results/*/*.json")))


def test_everyone_gets_what_they_deserve_also_after_a_kill(tmp_path: Path) -> None:
    expected = hand_in(tmp_path / "submitted")
    assert len(expected) == 60
    before = snapshot(tmp_path / "submitted")
    stopped_at = run_and_kill(tmp_path, random.SystemRandom().randint(5, 40))
    report = grade_class(
        Settings(tmp_path / "submitted", tmp_path / "graded", workers=2, limits=QUICK)
    )
    gradeable = 60 - sum(HOW_MANY[kind] for kind in PROBLEMS)
    assert (len(report.kept), len(report.graded)) == (stopped_at, gradeable - stopped_at)
    assert len(report.problems) == 60 - gradeable
    found = held(tmp_path / "graded")
    points = {student: round(sum(one.points for one in own), 2) for student, own in found.items()}
    assert points == expected
    reviewed = {student for student, own in found.items() if any(one.review for one in own)}
    assert reviewed == {student for student in expected if student.startswith(PROBLEMS)}
    assert "Looks like: the natural logarithm." in found["wrong000"][4].comment
    assert snapshot(tmp_path / "submitted") == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"submitted", "aside.ipynb", "command.py", "graded"}
    assert not [folder for folder in OUTSIDE if (folder / "was-here").exists()]
    same_as_uninterrupted(tmp_path, found)
    again = grade_class(
        Settings(tmp_path / "submitted", tmp_path / "graded", workers=2, limits=QUICK)
    )
    assert (len(again.kept), again.graded) == (gradeable, ())
    assert held(tmp_path / "graded") == found


def same_as_uninterrupted(folder: Path, found: dict[str, list[Score]]) -> None:
    """Grade some of them by the same secret in one go, and compare all that the gradebook says."""
    candidates = [one for one in found if not one.startswith((*PROBLEMS, "loops"))]
    some = random.Random(0).sample(sorted(candidates), 15)
    for student in some:
        shutil.copytree(folder / "submitted" / student, folder / "whole" / student)
    secret = json.loads((folder / "graded" / "run.json").read_text())["secret"]
    (folder / "other").mkdir()
    (folder / "other" / "run.json").write_text(
        json.dumps({"secret": secret, "regrade": False, "finished": False})
    )
    grade_class(Settings(folder / "whole", folder / "other", workers=2, limits=QUICK))
    assert held(folder / "other") == {student: found[student] for student in sorted(some)}
