"""A notebook as the source of its code cells, read as what it is: a file from a stranger.

The idea: a regular file of bounded size, JSON, nbformat 4, Python; then only code cells count, each with its mark.
What else is in the file is not looked at. Nothing is run.

Which cell answers an exercise: of the cells that carry the exercise's mark (the cell's id or nbgrader's grade_id),
the last that defines the function and is not the untouched stub; if there is none, the last such cell of all; if
there is none, the last marked one.

`intake.py` finds the files; this one reads them.
"""

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qcourse.checks.exercise import Exercise

MOST_BYTES = 8 << 20
STUBS = [f"raise NotImplementedError({quote}not written yet{quote})" for quote in "\"'"]
QUOTES = '"""'


class IntakeError(ValueError):
    """A file that is no submission; one sentence, which goes on from its path, says why and what to do."""


def read_file(path: Path) -> bytes:
    """The bytes of a regular file that is not too large; links are not followed.

    Raises:
        IntakeError: it is something else.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise IntakeError(
            f"cannot be opened ({error.strerror}); put a regular file there"
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise IntakeError("is no regular file; put a notebook there")
        if status.st_size > MOST_BYTES:
            size = f"{status.st_size / 2**20:.0f} MiB, more than {MOST_BYTES >> 20}"
            raise IntakeError(f"is {size}; clear its outputs, and hand it in again")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES)
    except OSError as error:
        raise IntakeError(f"cannot be read ({error.strerror}); hand it in again") from error
    finally:
        os.close(descriptor)
    if not data:
        raise IntakeError("is empty; hand it in again")
    return data


def code_cells(data: bytes) -> list[tuple[str, str]]:
    """The mark ("" where there is none) and the source of each code cell, in order.

    Raises:
        IntakeError: it is no notebook for Python in nbformat 4.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntakeError("is not JSON, so it is no notebook; hand it in again") from error
    if not isinstance(found, dict) or type(found.get("nbformat")) is not int:
        raise IntakeError("is no notebook: nbformat is missing; hand it in again")
    if found["nbformat"] != 4:
        raise IntakeError(
            f"is in nbformat {found['nbformat']}; open it in JupyterLab and save it, which makes it nbformat 4"
        )
    language = _inside(found, "metadata", "kernelspec", "language")
    if isinstance(language, str) and language.lower() != "python":
        raise IntakeError(f"is for a {language[:40]!r} kernel; the sheets are in Python")
    if not isinstance(found.get("cells"), list):
        raise IntakeError("is no notebook: its cells are missing; hand it in again")
    return list(_code_cells(found["cells"]))


def _code_cells(cells: list[Any]) -> Iterator[tuple[str, str]]:
    for cell in cells:
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if isinstance(source, str):
            marks = (cell.get("id"), _inside(cell, "metadata", "nbgrader", "grade_id"))
            known = [
                mark
                for mark in marks
                if isinstance(mark, str) and re.fullmatch(r"\d\d-(\d+-\w+|setup)", mark)
            ]
            yield known[0] if known else "", _encodable(source)


def solution_of(exercise: Exercise, cells: Sequence[tuple[str, str]]) -> str | None:
    """The source that answers an exercise, the stub where only that is there, None where nothing is."""
    mark = f"{exercise.id.replace('.', '-')}-solution"
    chosen: str | None = None
    best = -1
    for its, source in cells:
        written = _defines(source, exercise.function) and not _is_stub(source)
        if its != mark and not written:
            continue
        rank = 2 * written + (its == mark)  # written and marked, written, marked
        if rank >= best:
            chosen, best = source, rank
    return chosen


def _encodable(source: str) -> str:
    """The source with lone surrogates, which JSON can hold and no file can, replaced."""
    return source.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _defines(source: str, function: str) -> bool:
    return (
        re.search(
            rf"^(async\s+)?(def\s+{function}\s*\(|{function}\s*(:.*)?=[^=])", source, re.MULTILINE
        )
        is not None
    )


def _is_stub(source: str) -> bool:
    """Whether a cell is a signature, perhaps a docstring, and the word that it is not written.

    Text is all that is looked at: a source can be made that crashes Python's own parser.
    """
    head = source.strip()
    for stub in STUBS:
        head = head.removesuffix(stub).rstrip()
    return head != source.strip() and head.endswith((":", QUOTES)) and head.count(QUOTES) in (0, 2)


def _inside(found: Any, *keys: str) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
