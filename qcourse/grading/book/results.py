"""What a run leaves on disk: one small file a graded submission, and the secret that its seeds come from.

The idea: a grade is kept the moment it is known, written aside and then renamed, so that a run that is killed loses at
most what was being graded. A run's seeds follow from a secret that is stored before the first grade, and a run that was
cut short goes on with it: what it then adds is what it would have given anyway. The next run draws another.

`gradebook.py` is brought up to date from these files; it can be lost and built again, manual scores aside.
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
    """One run over a class, however often it was cut short.

    Args:
        secret: what its seeds come from; no student can know it beforehand.
        regrade: whether it grades again what a former run has graded.
    """

    secret: str
    regrade: bool = False

    def seed(self, sheet: str) -> int:
        """The seed of a sheet's cases: the same for everybody in one run, so that all are asked the same."""
        digest = hashlib.sha256(f"{self.secret} {sheet}".encode()).digest()
        return int.from_bytes(digest[:6], "big")


@dataclass(frozen=True)
class Stored:
    """A grade as it lies on disk.

    Args:
        grade: the grade.
        version: of the sheet and its check, when it was graded.
        recorded: the gradebooks that hold it, by name.
    """

    grade: SubmissionGrade
    version: str
    recorded: tuple[str, ...] = ()


class Results:
    """The folder of a class's results: run.json, and results/STUDENT/SHEET.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def run(self, *, regrade: bool = False) -> Iterator[Run]:
        """The run that was cut short, else a new one; over when the block ends without an error.

        Raises:
            OSError: another run is at work on this folder.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _only_one(self.folder):
            path = self.folder / "run.json"
            found = _read(path)
            if not _is_run(found) or found["finished"]:
                found = {"secret": secrets.token_hex(16), "regrade": False, "finished": False}
            elif regrade and not found["regrade"]:
                found["secret"] = secrets.token_hex(
                    16
                )  # what the run cut short has graded is to be graded again, too
            found["regrade"] = found["regrade"] or regrade
            write(path, json.dumps(found))
            yield Run(found["secret"], found["regrade"])
            write(path, json.dumps({**found, "finished": True}))

    def path(self, student: str, sheet: str) -> Path:
        """The file of a student's grade for a sheet."""
        return self.folder / "results" / student / f"{sheet}.json"

    def load(self, student: str, sheet: str) -> Stored | None:
        """What was graded before; None where nothing was, or where the file is not one that `save` wrote."""
        found = _read(self.path(student, sheet))
        try:
            grade = SubmissionGrade.from_dict(found["grade"])
            return Stored(grade, str(found["version"]), tuple(map(str, found["recorded"])))
        except (TypeError, KeyError, ValueError):
            return None

    def save(self, stored: Stored) -> None:
        """Keep a grade."""
        text = {
            "version": stored.version,
            "recorded": stored.recorded,
            "grade": stored.grade.to_dict(),
        }
        write(self.path(stored.grade.student, stored.grade.sheet), json.dumps(text, indent=1))

    def all(self) -> list[SubmissionGrade]:
        """Every grade there is, by sheet and student."""
        paths = (self.folder / "results").glob("*/*.json")
        found = [
            stored.grade for path in paths if (stored := self.load(path.parent.name, path.stem))
        ]
        return sorted(found, key=lambda grade: (grade.sheet, grade.student))


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
    """Files and folders that are made inside may be read by their owner alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_changed(path: Path, text: str) -> bool:
    """Write a file where it does not hold this text already; whether it did not.

    Raises:
        OSError: as in `write`.
    """
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write(path, text)
    return True


def _read(path: Path) -> Any:
    """The JSON in a file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _is_run(found: Any) -> bool:
    kinds = {"secret": str, "regrade": bool, "finished": bool}
    return isinstance(found, dict) and all(
        isinstance(found.get(name), kind) for name, kind in kinds.items()
    )


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Two runs on one folder would grade and record the same submissions twice."""
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is graded but by --unsafe
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
