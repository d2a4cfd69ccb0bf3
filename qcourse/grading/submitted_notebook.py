"""A submitted notebook as the sources of its code cells, read as a file from a stranger.

The idea: a regular file of bounded size, JSON, nbformat 4, Python; then only code cells count,
each with its mark. Nothing else in the file is looked at, and nothing is run.

Which cell answers an exercise: of the cells that carry the exercise's mark (the cell's id or
nbgrader's grade_id), the last that defines the function and is not the untouched stub. If there is
none, the last cell of any mark that does so; if there is none, the last marked cell.

`intake.py` finds the files; this one reads them.
"""

import json
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcourse.checks.exercise import Exercise

MOST_BYTES = 8 << 20
# The last line of an untouched exercise, in either spelling.
STUBS = (
    'raise NotImplementedError("not written yet")',
    "raise NotImplementedError('not written yet')",
)
QUOTES = '"""'
# "01-2-solution", "01-2-check" or "01-setup".
MARK = re.compile(r"\d\d-(\d+-\w+|setup)")


class IntakeError(ValueError):
    """A file that is not a submission; one sentence goes on from its path: why, and what to do."""


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file that is not too large; links are not followed.

    Raises:
        IntakeError: it is something else.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise IntakeError(
            f"cannot be opened ({error.strerror}); put a regular file there"
        ) from error
    try:
        # The open descriptor is asked, so the file cannot be exchanged in between.
        _check_status(os.fstat(descriptor))
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
    """Return the mark ("" if it has none) and the source of each code cell, in order.

    Raises:
        IntakeError: it is not a notebook for Python in nbformat 4.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntakeError("is not JSON, so it is not a notebook; hand it in again") from error
    if not isinstance(found, dict) or type(found.get("nbformat")) is not int:
        raise IntakeError("is not a notebook: nbformat is missing; hand it in again")
    version = found["nbformat"]
    if version != 4:
        raise IntakeError(
            f"is in nbformat {version}; "
            "open it in JupyterLab and save it, which makes it nbformat 4"
        )
    # A notebook may leave its kernel out; only one of another language is refused.
    language = _inside(found, "metadata", "kernelspec", "language")
    if isinstance(language, str) and language.lower() != "python":
        raise IntakeError(f"is for a {language[:40]!r} kernel; the sheets are in Python")
    if not isinstance(found.get("cells"), list):
        raise IntakeError("is not a notebook: its cells are missing; hand it in again")
    return _marked_sources(found["cells"])


def solution_of(exercise: Exercise, cells: Sequence[tuple[str, str]]) -> str | None:
    """Return the source that answers an exercise: the stub if only that is there, else None."""
    wanted = f"{exercise.id.replace('.', '-')}-solution"
    chosen: str | None = None
    best_rank = -1
    for mark, source in cells:
        is_marked = mark == wanted
        is_written = _defines(source, exercise.function) and not _is_stub(source)
        if not is_marked and not is_written:
            continue
        # 3: written and marked; 2: written; 1: marked. Of equal ranks the last counts.
        rank = 2 * is_written + is_marked
        if rank >= best_rank:
            chosen = source
            best_rank = rank
    return chosen


def _check_status(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IntakeError("is not a regular file; put a notebook there")
    if status.st_size > MOST_BYTES:
        size_mib = status.st_size / 2**20
        most_mib = MOST_BYTES >> 20
        raise IntakeError(
            f"is {size_mib:.0f} MiB, more than {most_mib}; clear its outputs, and hand it in again"
        )


def _marked_sources(cells: list[Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for cell in cells:
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        # nbformat allows one text, or a list of lines.
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if isinstance(source, str):
            found.append((_mark_of(cell), _encodable(source)))
    return found


def _mark_of(cell: dict[str, Any]) -> str:
    """Return the cell's id or nbgrader's grade_id, the first that is a mark of this course."""
    for mark in (cell.get("id"), _inside(cell, "metadata", "nbgrader", "grade_id")):
        if isinstance(mark, str) and MARK.fullmatch(mark):
            return mark
    return ""


def _encodable(source: str) -> str:
    """Return the source with lone surrogates replaced: JSON can hold them, a file cannot."""
    return source.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _defines(source: str, function: str) -> bool:
    """Return whether a line begins with `def function(` or `function =`."""
    pattern = rf"^(async\s+)?(def\s+{function}\s*\(|{function}\s*(:.*)?=[^=])"
    return re.search(pattern, source, re.MULTILINE) is not None


def _is_stub(source: str) -> bool:
    """Return whether a cell is a signature, perhaps a docstring, and the stub's raise."""
    # Only the text is looked at: some sources crash Python's own parser.
    whole = source.strip()
    head = whole
    for stub in STUBS:
        head = head.removesuffix(stub).rstrip()
    if head == whole or not head.endswith((":", QUOTES)):
        return False
    return head.count(QUOTES) in (0, 2)


def _inside(found: Any, *keys: str) -> Any:
    """Return found[key][key]..., or None if one of them is missing."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
