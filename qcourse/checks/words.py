"""Arguments and answers as text: in full if they are small, else their size or the wrong entry.

A small call is shown so that it can be pasted into a cell and tried. Anything too large to read is
counted, never walked through to its end.
"""

import math
from typing import Any

import numpy as np
import torch

LARGEST = 24  # values of an answer that are written out
LONGEST = 100  # characters of a text


def call(name: str, args: tuple[Any, ...]) -> str:
    """Return the call as text, ready to paste if its arguments are small.

    >>> call("quantize", (torch.tensor([0.5, -0.41]), 0.25, 4))
    'quantize(torch.tensor([0.5, -0.41]), 0.25, 4)'
    """
    arguments = ", ".join(_argument(arg) for arg in args)
    return f"{name}({arguments})"


def show(value: Any) -> str:
    """Return a plain answer as text, floats with six digits.

    >>> show((np.array([[1.0], [0.1 + 0.2]]), 3)), show(np.zeros((8, 8)))
    ('([[1.0], [0.3]], 3)', 'float64 numbers of shape (8, 8)')
    """
    if isinstance(value, tuple):
        return f"({_listed(value)})" if is_small(value) else f"{len(value)} values"
    if isinstance(value, np.ndarray | np.generic):
        if is_small(value):
            return show(value.tolist())
        return f"{value.dtype} numbers of shape {value.shape}"
    if isinstance(value, list):
        return f"[{_listed(value)}]"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r} and {len(value) - LONGEST} characters more"
    if isinstance(value, float):
        value = float(f"{value:.6g}")
    return repr(value)


def _listed(values: Any) -> str:
    return ", ".join(show(value) for value in values)


def is_small(value: Any) -> bool:
    """Return whether an answer is written out: at most 24 values.

    >>> is_small(((1, 2), 3)), is_small(np.zeros((20_000_000, 0)))
    (True, False)
    """
    return _count(value, LARGEST) <= LARGEST


def pinpoint(answer: np.ndarray, expected: np.ndarray, wrong: np.ndarray) -> tuple[str, str]:
    """Return both arrays as text, or their first entries that differ, if they are large.

    >>> pinpoint(np.zeros(99), np.arange(99), np.arange(99) > 0)
    ('returned 0.0 at [1] (98 of 99 values differ)', '1')
    """
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    is_matrix = answer.ndim == 2
    got = show(answer[place])
    wanted = show(expected[place])

    # A row and a column for a matrix, else an index such as [0, 3, 1].
    index = f"[{_listed(place)}]"
    preposition = "at"
    if is_matrix:
        index = f"row {place[0]}, column {place[1]}"
        preposition = "in"
    if answer.size > LARGEST:
        differ = f"{wrong.sum()} of {wrong.size} values differ"
        return f"returned {got} {preposition} {index} ({differ})", wanted
    whole = f"returned {show(answer)}"
    if is_matrix and answer.size > 1:
        return f"{whole} ({index}: {got})", f"{show(expected)} ({index}: {wanted})"
    return whole, show(expected)


def _count(value: Any, most: int) -> int:
    """Return how many values would be written; stop counting beyond `most`."""
    if not isinstance(value, tuple):
        # An array without values is written as its empty rows, and there may be many of them.
        return math.prod(size or 1 for size in np.shape(value))
    count = 0
    for part in value:
        if count > most:
            break
        count += _count(part, most - count)
    return max(count, 1)


def _argument(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if not isinstance(value, tuple):
        return show(value)
    parts = ", ".join(_argument(part) for part in value)
    return f"({parts},)" if len(value) == 1 else f"({parts})"


def _tensor(value: torch.Tensor) -> str:
    if value.numel() > LARGEST:
        dtype = str(value.dtype).removeprefix("torch.")
        return f"<{dtype} of shape {tuple(value.shape)}>"

    # The dtype is written only where torch.tensor would choose another one.
    is_float = value.is_floating_point() or not value.numel()
    default = torch.float32 if is_float else torch.int64
    dtype = "" if value.dtype == default else f", dtype={value.dtype}"
    return f"torch.tensor({show(value.numpy())}{dtype})"
