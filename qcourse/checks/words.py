"""Arguments and answers written out for a learner: whole where they are small, their place where they are not.

The idea: what is shown of a call can be pasted into a cell and tried. What is too large to be read is counted, not
written, and never walked through to its end.
"""

import math
from typing import Any

import numpy as np
import torch

LARGEST = 24  # values of an answer that are written out
LONGEST = 100  # characters of a text


def call(name: str, args: tuple[Any, ...]) -> str:
    """The call, ready to paste where its arguments are small.

    >>> call("quantize", (torch.tensor([0.5, -0.41]), 0.25, 4))
    'quantize(torch.tensor([0.5, -0.41]), 0.25, 4)'
    """
    return f"{name}({', '.join(map(_argument, args))})"


def show(value: Any) -> str:
    """A plain answer, six digits a float.

    >>> show((np.array([[1.0], [0.1 + 0.2]]), 3)), show(np.zeros((8, 8)))
    ('([[1.0], [0.3]], 3)', 'float64 numbers of shape (8, 8)')
    """
    if isinstance(value, tuple):
        return f"({', '.join(map(show, value))})" if is_small(value) else f"{len(value)} values"
    if isinstance(value, np.ndarray | np.generic):
        return (
            show(value.tolist())
            if is_small(value)
            else f"{value.dtype} numbers of shape {value.shape}"
        )
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]!r} and {len(value) - LONGEST} characters more"
    return repr(float(f"{value:.6g}")) if isinstance(value, float) else repr(value)


def is_small(value: Any) -> bool:
    """Whether an answer is written out: at most 24 values.

    >>> is_small(((1, 2), 3)), is_small(np.zeros((20_000_000, 0)))
    (True, False)
    """
    return _count(value, LARGEST) <= LARGEST


def pinpoint(answer: np.ndarray, expected: np.ndarray, wrong: np.ndarray) -> tuple[str, str]:
    """What came and what was expected: whole arrays where small, and the first place that is wrong.

    >>> pinpoint(np.eye(2), np.ones((2, 2)), np.eye(2) == 0)
    ('returned [[1.0, 0.0], [0.0, 1.0]] (row 0, column 1: 0.0)', '[[1.0, 1.0], [1.0, 1.0]] (row 0, column 1: 1.0)')
    """
    place = tuple(int(i) for i in np.argwhere(wrong)[0])
    first, wanted = show(answer[place]), show(expected[place])
    matrix = answer.ndim == 2
    index = f"row {place[0]}, column {place[1]}" if matrix else f"[{', '.join(map(str, place))}]"
    if answer.size > LARGEST:
        where = f"{'in' if matrix else 'at'} {index}"
        return f"returned {first} {where} ({wrong.sum()} of {wrong.size} values differ)", wanted
    if matrix and answer.size > 1:
        return (
            f"returned {show(answer)} ({index}: {first})",
            f"{show(expected)} ({index}: {wanted})",
        )
    return f"returned {show(answer)}", show(expected)


def _count(value: Any, most: int) -> int:
    """How many values there are to write, counted until they are more than `most`."""
    if not isinstance(value, tuple):
        # An array without values is written as its empty rows, of which there may be many.
        return math.prod(size or 1 for size in np.shape(value))
    count = 0
    for part in value:
        if count > most:
            break
        count += _count(part, most - count)
    return max(count, 1)


def _argument(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        if not isinstance(value, tuple):
            return show(value)
        return f"({', '.join(map(_argument, value))}{',' * (len(value) == 1)})"
    if value.numel() > LARGEST:
        return f"<{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}>"
    by_itself = torch.float32 if value.is_floating_point() or not value.numel() else torch.int64
    dtype = "" if value.dtype == by_itself else f", dtype={value.dtype}"
    return f"torch.tensor({show(value.numpy())}{dtype})"
