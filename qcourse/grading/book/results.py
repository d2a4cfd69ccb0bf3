"""What a run leaves on disk: one small file per graded submission, and the secret of its seeds.

The idea: a grade is kept the moment it is known. It is written to another name and then renamed,
so a run that is killed loses at most what was being graded. The seeds follow from a secret that is
stored before the first grade, so a run that was cut short is continued with the same cases. The
next run draws a new secret.

The gradebook can be rebuilt from these files, except for points set by hand (`gradebook.py`).
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcourse.grading.grades import SubmissionGrade
from qcourse.machine import write_whole


@dataclass(frozen=True)
class Run:
    """One run over a class, however often it was cut short."""

    secret: str  # what its seeds come from; no student can know it beforehand
    regrade: bool = False  # whether to grade again what a former run has graded

    def seed(self, sheet: str) -> int:
        """Return the seed of a sheet's cases; all students of one run get the same cases."""
        text = f"{self.secret} {sheet}"
        digest = hashlib.sha256(text.encode()).digest()
        # Six bytes are far below the 2^63 that torch's generator takes.
        return int.from_bytes(digest[:6], "big")


@dataclass(frozen=True)
class Stored:
    """A grade on disk."""

    grade: SubmissionGrade
    version: str  # of the sheet and its check, when it was graded
    recorded: tuple[str, ...] = ()  # the names of the gradebooks that hold it


class Results:
    """The folder of a class's results: run.json, and results/STUDENT/SHEET.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def run(self, *, regrade: bool = False) -> Iterator[Run]:
        """Return the run that was cut short, else a new one; it ends with the block.

        Raises:
            OSError: another run is at work on this folder.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _only_one(self.folder):
            path = self.folder / "run.json"
            found = _read(path)
            if not _is_run(found) or found["finished"]:
                found = {"secret": secrets.token_hex(16), "regrade": False, "finished": False}
            # With a new secret, what the run cut short has graded is graded again, too.
            elif regrade and not found["regrade"]:
                found["secret"] = secrets.token_hex(16)
            found["regrade"] = found["regrade"] or regrade
            write(path, json.dumps(found))
            yield Run(found["secret"], found["regrade"])
            # An error in the block leaves the run unfinished.
            write(path, json.dumps({**found, "finished": True}))

    def path(self, student: str, sheet: str) -> Path:
        """Return the file of a student's grade for a sheet."""
        return self.folder / "results" / student / f"{sheet}.json"

    def load(self, student: str, sheet: str) -> Stored | None:
        """Return what was graded before; None without a file that `save` wrote."""
        found = _read(self.path(student, sheet))
        try:
            grade = SubmissionGrade.from_dict(found["grade"])
            recorded = [str(name) for name in found["recorded"]]
            return Stored(grade, str(found["version"]), tuple(recorded))
        except (TypeError, KeyError, ValueError):
            return None

    def save(self, stored: Stored) -> None:
        """Keep a grade."""
        grade = stored.grade
        content = {
            "version": stored.version,
            "recorded": stored.recorded,
            "grade": grade.to_dict(),
        }
        write(self.path(grade.student, grade.sheet), json.dumps(content, indent=1))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    try:
        write_whole(path, text)
    except OSError as error:
        why = error.strerror or error
        raise OSError(
            f"{path} cannot be written ({why}). Put that right, then run this again."
        ) from error


@contextmanager
def private_files() -> Iterator[None]:
    """Let only their owner read the files and folders that the block makes."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_changed(path: Path, text: str) -> bool:
    """Write a file unless it holds this text already; return whether it was written.

    Raises:
        OSError: as in `write`.
    """
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write(path, text)
    return True


def _read(path: Path) -> Any:
    """Return the JSON in a file; None if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _is_run(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    kinds = {"secret": str, "regrade": bool, "finished": bool}
    return all(isinstance(found.get(name), kind) for name, kind in kinds.items())


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Raise OSError if another run is at work on this folder."""
    # Two runs would grade and record the same submissions twice.
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is graded but with --unsafe
        yield
        return
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(
                f"Another run is at work on {folder}: wait for its end, or stop it."
            ) from error
        yield
