"""Rows that take seconds to read, kept as JSON in the user's cache folder.

The file's name has a hash of all that the rows depend on: the running Python and the reading code.
A missing, damaged or unwritable file costs time and nothing else.

`storage.py` keeps what cannot be made again.
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import TypeVar

import platformdirs

from qcourse.machine import write_whole

Row = TypeVar("Row")


def cached_rows(
    name: str,
    row: Callable[..., Row],
    read: Callable[[], Iterable[Row]],
    readers: Iterable[str | Path],
) -> tuple[Row, ...]:
    """Return read(), or what it gave an earlier process.

    Args:
        row: the dataclass of a row, with fields that JSON can hold.
        readers: the source files that decide what is read; a changed file is a changed key.
    """
    path = _cache_path(name, readers)
    # Not there yet, or damaged: read again.
    with suppress(OSError, ValueError, TypeError):
        stored = json.loads(path.read_bytes())
        return tuple(row(*fields) for fields in stored)
    rows = tuple(read())
    # If the folder cannot be written, the next process reads again.
    with suppress(OSError):
        content = json.dumps([astuple(each) for each in rows])  # type: ignore[call-overload]
        write_whole(path, content)
    return rows


def _cache_path(name: str, readers: Iterable[str | Path]) -> Path:
    about = f"{sys.version} {sysconfig.get_path('stdlib')}"
    digest = hashlib.sha256(about.encode())
    for reader in readers:
        digest.update(Path(reader).read_bytes())
    key = digest.hexdigest()[:16]
    return platformdirs.user_cache_path("qcourse", appauthor=False) / f"{name}_{key}.json"
