"""What crosses between the judge and a worker: plain values, one JSON line a message, arrays as .npy inside it.

The idea: a closed encoding. A value is a pair [kind, content], and only the kinds below exist; whatever else arrives
is refused before anything looks at it. Nothing here can run code: arrays are read with the size that their header
claims checked against the bytes that came, and object arrays are no kind.

Both sides carry this file, so it needs torch and NumPy and nothing of qcourse but `answers.py`. `worker.py` is the
one that answers; this file only spells.
"""

import base64
import binascii
import io
import json
import math
from typing import Any

import numpy as np
import torch

from qcourse.checks.answers import Failure

DEEPEST = 6  # tuples within tuples
MOST = 100_000  # values in one message, those inside arrays aside
LONGEST_TEXT = 10_000
INTEGERS = range(-(1 << 63), 1 << 64)
PARTS = {"message": 300, "line": 300, "raised_in": 100}  # of a Failure, and how many characters are kept


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
        return ["tensor", _npy(value.numpy())]
    if isinstance(value, np.ndarray | np.generic):
        return ["array", _npy(np.asarray(value))]
    raise TypeError(f"value is a {kind.__name__}; numbers, text, arrays, tensors and tuples of these cross")


def decode(found: Any) -> Any:
    """The value that `encode` wrote.

    Raises:
        ForgedError: it is no such thing.

    >>> decode(["pickle", "gASVBAAAAAAAAAA="])
    Traceback (most recent call last):
    qcourse.grading.wire.ForgedError: 'pickle' is no kind of value
    """
    return _decode(found, DEEPEST, [MOST])


def write(message: dict[str, Any]) -> bytes:
    """A message as one line."""
    return json.dumps(message).encode() + b"\n"


def read(line: bytes) -> dict[str, Any]:
    """The message of a line.

    Raises:
        ForgedError: it is no JSON object.
    """
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
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
    if (kind == "bool" and type(content) is bool) or (kind == "int" and type(content) is int and content in INTEGERS):
        return content
    if kind == "float" and type(content) is str:
        return _float(content)
    if kind in ("array", "tensor") and type(content) is str:
        array = _array(content)
        return torch.from_numpy(array.copy()) if kind == "tensor" else array
    if kind == "failure" and type(content) is list:
        return _failure(content)
    raise ForgedError(f"{str(kind)[:40]!r} is no kind of value")


def _float(content: str) -> float:
    try:
        return float.fromhex(content[:40])
    except (ValueError, OverflowError) as error:
        raise ForgedError("a float that is no number") from error


def _npy(array: np.ndarray) -> str:
    if array.dtype.itemsize > 8 or not array.dtype.isnative:  # a long double, or bytes the other way round
        array = array.astype(array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64)
    file = io.BytesIO()
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return base64.b64encode(file.getbuffer()).decode()


def _array(content: str) -> np.ndarray:
    """The array of a .npy file; NumPy's own reader would first set aside what the header claims."""
    try:
        file = io.BytesIO(base64.b64decode(content, validate=True))
        if np.lib.format.read_magic(file) != (1, 0):
            raise ForgedError("an array of another version of .npy")
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file, max_header_size=1000)
        data = file.read()
    except (ValueError, binascii.Error, OverflowError, SyntaxError, MemoryError, RecursionError) as error:
        raise ForgedError("an array that is no .npy") from error
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or not dtype.isnative or min(shape, default=0) < 0:
        raise ForgedError("an array of no numbers")
    if len(data) != dtype.itemsize * math.prod(shape):
        raise ForgedError("an array with more or fewer bytes than its shape has")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")


def _failure(content: list) -> Failure:
    if len(content) != 1 + len(PARTS) or not isinstance(content[0], list):
        raise ForgedError("a failure with other parts")
    kinds, texts = content[0][:20], content[1:]
    if not kinds or not all(type(text) is str for text in [*kinds, *texts]):
        raise ForgedError("a failure that is not told in words")
    kept = {part: text[:longest] for (part, longest), text in zip(PARTS.items(), texts, strict=True)}
    return Failure(tuple(kind[:100] for kind in kinds), **kept)
