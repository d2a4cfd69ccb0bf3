"""Small pieces that stand for large ones: a class on disk, and work that needs no sandbox.

Processes import this file by its name, so what is here can be sent to them.
"""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qcourse.grading.grades import ExerciseGrade, Limits, Submission, SubmissionGrade
from qcourse.grading.jobs import Done, Job, Work
from qcourse.grading.sandbox.mounts import SandboxError

ROOT = Path(__file__).resolve().parent.parent.parent
SHEET = "01_quantizer"
WORTH = {"01.1": 1, "01.2": 3, "01.3": 3, "01.4": 3, "01.5": 2}


def submission(student: str, cells: Mapping[str, str] | None = None) -> Submission:
    """One that was never in a file."""
    return Submission(
        student, SHEET, Path(f"{student}.ipynb"), dict(cells or {}), f"sha of {student}"
    )


def grade(student: str, points: Mapping[str, float] | None = None, **more: Any) -> SubmissionGrade:
    """A grade of sheet 01; exercises that are not named have all their points."""
    points = dict(points or {})
    exercises = tuple(
        ExerciseGrade(one, points.get(one, worth), worth, f"{one} is off" if one in points else "")
        for one, worth in WORTH.items()
    )
    return SubmissionGrade(student, SHEET, exercises, f"sha of {student}", 7, "bubblewrap", **more)


def write_notebook(path: Path, cells: Mapping[str, str]) -> None:
    """The sheet with these answers, by exercise; the others are left as they are handed out."""
    notebook = json.loads((ROOT / "exercises" / f"{SHEET}.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        exercise = cell["id"].removesuffix("-solution").replace("-", ".")
        if exercise in cells:
            cell["source"] = cells[exercise]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")


def grade_by_words(job: Job, *, limits: Limits, backend: str) -> dict[str, Any]:
    """A stand-in for grading: a cell with "right" in it has its points; the reason has the seed."""
    cells = job.submission.cells
    exercises = []
    for one, worth in WORTH.items():
        points = worth if "right" in cells.get(one, "") else 0
        exercises.append(ExerciseGrade(one, points, worth, f"asked with {job.seed}"))
    one = job.submission
    found = SubmissionGrade(one.student, one.sheet, tuple(exercises), one.sha256, job.seed, backend)
    return found.to_dict()


def in_this_process(jobs: Iterable[Job], work: Work, workers: int) -> Iterator[Done]:
    """A stand-in for processes."""
    for job in jobs:
        yield Done(job, work(job))


def work(job: Job) -> dict[str, Any]:
    """What the submission's one cell asks for."""
    what, *argument = job.submission.cells["do"].split(" ", 1)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "die-once" and not Path(argument[0]).exists():
        Path(argument[0]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(float(argument[0]))
    if what == "fail":
        raise RuntimeError("no way")
    if what == "no-sandbox":
        raise SandboxError("no sandbox: bwrap is not here")
    return {"student": job.submission.student, "seed": job.seed, "pid": os.getpid()}


def free_port() -> int:
    """A port on loopback that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def jobs(*what: str, wall_s: float = 600.0) -> list[Job]:
    """Submissions by s0, s1, ... that ask `work` for these."""
    return [
        Job(submission(f"s{number}", {"do": one}), number, wall_s)
        for number, one in enumerate(what)
    ]


def by_student(outcomes: Iterator[Done]) -> dict[str, Done]:
    """The outcomes, of which there must be one per student."""
    found: dict[str, Done] = {}
    for one in outcomes:
        assert one.job.submission.student not in found
        found[one.job.submission.student] = one
    return found


def as_nobody() -> list[str]:
    """What runs a command as an unprivileged user who can read this repository and this Python."""
    command = ["bwrap", "--dev-bind", "/", "/"]
    for needed in (Path(sys.base_prefix), ROOT):
        above = [*reversed(needed.parents)]
        closed = next((folder for folder in above if not folder.stat().st_mode & 1), None)
        if closed is not None:
            command += ["--perms", "755", "--tmpfs", str(closed)]
            for folder in above[above.index(closed) + 1 :]:
                command += ["--perms", "755", "--dir", str(folder)]
            command += ["--ro-bind", str(needed), str(needed)]
    return [*command, "--", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
