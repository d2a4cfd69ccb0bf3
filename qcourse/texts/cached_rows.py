"""What takes seconds to read is read once: rows kept as JSON in the user's cache folder.

The idea: the standard library's texts are parsed from thousands of files, the same ones at each start. What came out is
kept under a key of all that it depends on, the Python that runs and the code that reads. A file that is not there yet,
or damaged, or cannot be written, costs time and nothing else.

Source: none.

How it differs from ``storage.py``: that keeps what cannot be made again.
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
    """What read() gives, or gave an earlier process.

    Args:
        name: of the file.
        row: the dataclass of a row; its fields are what JSON can hold.
        read: takes seconds.
        readers: the source files that decide what is read; a change in one is a change of key.
    """
    about = f"{sys.version} {sysconfig.get_path('stdlib')}".encode()
    key = hashlib.sha256(about + b"".join(Path(each).read_bytes() for each in readers)).hexdigest()[
        :16
    ]
    path = platformdirs.user_cache_path("qcourse", appauthor=False) / f"{name}_{key}.json"
    with suppress(OSError, ValueError, TypeError):  # not there yet, or damaged
        return tuple(row(*fields) for fields in json.loads(path.read_bytes()))
    rows = tuple(read())
    with suppress(OSError):  # where nothing can be kept, the next process reads again
        write_whole(path, json.dumps([astuple(each) for each in rows]))  # type: ignore[call-overload]
    return rows
