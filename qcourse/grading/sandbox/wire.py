"""What crosses between the judge and a worker: plain values, one JSON line per message.

The idea: a closed encoding. A value is a pair [kind, content], and only the kinds below exist; whatever else arrives
is refused before anything looks at it. Nothing here can run code or parse a language: an array is the name of a dtype
from a list, a shape, and the bytes in base64, and the shape is checked against the bytes that came.

A value has one spelling, so two values are equal in every bit where their encodings are equal.

Both sides carry this file, so it needs torch and NumPy and nothing of qcourse but `answers.py`. `worker.py` is the
one that answers; this file only spells.
"""

import base64
import json
import math
from typing import Any

import numpy as np
import torch

from qcourse.checks.answers import Failure

DEEPEST = 6  # tuples within tuples
MOST = 10_000  # values in one message, those inside arrays aside
MOST_AXES, LONGEST_AXIS = 64, 1 << 31  # of an array; torch allows 64 axes
LONGEST_TEXT = 10_000
INTEGERS = range(-(1 << 63), 1 << 64)
PARTS = {
    "message": 300,
    "line": 300,
    "raised_in": 100,
}  # of a Failure, and how many characters are kept
NAMES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
DTYPES = {name: np.dtype(name) for name in NAMES.split()}


class ForgedError(ValueError):
    """What arrived is nothing that this file writes."""


def encode(value: Any) -> list:
    """A plain value or tensor as JSON's own types.

    >>> encode((1, 0.5, "a")), decode(encode((1, 0.5, True)))
    (['tuple', [['int', 1], ['float', '0x1.0000000000000p-1'], ['str', 'a']]], (1, 0.5, True))
    """
    kind = type(value)
    if kind in (bool, int, str):
        return [kind.__name__, value]
    if kind is float:
        return ["float", value.hex()]  # every bit, NaN and infinities too
    if kind is tuple:
        return ["tuple", [encode(part) for part in value]]
    if kind is Failure:
        return ["failure", [list(value.kinds), *(getattr(value, part) for part in PARTS)]]
    if isinstance(value, torch.Tensor):
        return ["tensor", _spelled(value.detach().numpy())]
    if isinstance(value, np.ndarray | np.generic):
        return ["array", _spelled(np.asarray(value))]
    raise TypeError(
        f"value is a {kind.__name__}; numbers, text, arrays, tensors and tuples of these cross"
    )


def decode(found: Any) -> Any:
    """The value that `encode` wrote.

    Raises:
        ForgedError: it is no such thing, for whatever reason.

    >>> decode(["pickle", "gASVBAAAAAAAAAA="])
    Traceback (most recent call last):
    qcourse.grading.sandbox.wire.ForgedError: 'pickle' is no kind of value
    """
    try:
        return _decode(found, DEEPEST, [MOST])
    except ForgedError:
        raise
    except Exception as error:  # the one boundary: what a stranger sends raises nothing else here
        raise ForgedError("a value that cannot be read") from error


def write(message: dict[str, Any]) -> bytes:
    """A message as one line."""
    return json.dumps(message).encode() + b"\n"


def read(line: bytes) -> dict[str, Any]:
    """The message of a line.

    Raises:
        ForgedError: it is no JSON object.
    """
    if (
        line.count(b"[") + line.count(b"{") > 8 * MOST
    ):  # in memory such a line would take a hundred times its length
        raise ForgedError("a line of too many parts")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ForgedError("a line that is no JSON") from error
    if not isinstance(found, dict):
        raise ForgedError("a line that is no message")
    return found


def _decode(found: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    if not isinstance(found, list) or len(found) != 2 or depth < 0 or left[0] < 0:
        raise ForgedError("a value that is no pair of kind and content, or too many of them")
    kind, content = found
    if kind == "tuple" and type(content) is list:
        return tuple(_decode(part, depth - 1, left) for part in content)
    if kind == "str" and type(content) is str:
        return content[:LONGEST_TEXT]
    if (kind == "bool" and type(content) is bool) or (
        kind == "int" and type(content) is int and content in INTEGERS
    ):
        return content
    if kind == "float" and type(content) is str:
        return _float(content)
    if kind in ("array", "tensor") and type(content) is list:
        array = _array(content)
        return torch.from_numpy(array) if kind == "tensor" else array
    if kind == "failure" and type(content) is list:
        return _failure(content)
    raise ForgedError(f"{str(kind)[:40]!r} is no kind of value")


def _float(content: str) -> float:
    try:
        return float.fromhex(content[:40])
    except (ValueError, OverflowError) as error:
        raise ForgedError("a float that is no number") from error


def _spelled(array: np.ndarray) -> list:
    """The name of the dtype, the shape, and the bytes row by row."""
    if array.dtype.name not in DTYPES:
        array = array.astype(np.float64)  # a long double
    usual = np.asarray(array, dtype=DTYPES[array.dtype.name])  # bytes in this machine's order
    return [array.dtype.name, list(array.shape), base64.b64encode(usual.tobytes()).decode()]


def _array(content: list) -> np.ndarray:
    name, shape, text = content
    if not isinstance(name, str) or name not in DTYPES:
        raise ForgedError("an array of no numbers")
    if not isinstance(shape, list) or len(shape) > MOST_AXES:
        raise ForgedError("an array whose shape is none")
    if not all(type(length) is int and 0 <= length < LONGEST_AXIS for length in shape):
        raise ForgedError("an array whose shape is none")
    data = base64.b64decode(text, validate=True)
    if len(data) != DTYPES[name].itemsize * math.prod(shape):
        raise ForgedError("an array with more or fewer bytes than its shape has")
    return np.frombuffer(bytearray(data), DTYPES[name]).reshape(shape)


def _failure(content: list) -> Failure:
    if len(content) != 1 + len(PARTS) or not isinstance(content[0], list):
        raise ForgedError("a failure with other parts")
    kinds, texts = content[0][:20], content[1:]
    if not kinds or not all(type(text) is str for text in [*kinds, *texts]):
        raise ForgedError("a failure that is not told in words")
    kept = {
        part: text[:longest] for (part, longest), text in zip(PARTS.items(), texts, strict=True)
    }
    return Failure(tuple(kind[:100] for kind in kinds), **kept)
