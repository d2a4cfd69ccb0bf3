"""What crosses between the grader and a worker: plain values, one JSON line per message.

The idea: a closed encoding. A value is a pair [kind, content], and only the kinds below exist;
anything else is refused before it is looked at. Nothing here can run code or parse a language: an
array is a dtype's name from a list, a shape, and the bytes in base64, which must match the shape.
A value has one encoding, so two values are equal in every bit if their encodings are.

Both sides carry this file, so it needs nothing of qcourse but `answers.py`. `worker.py` answers
and `dialogue.py` asks; this file only encodes.
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
MOST_BRACKETS = 8 * MOST  # of a line; in memory a bracket takes a hundred times its length
MOST_AXES = 64  # of an array, as torch allows
LONGEST_AXIS = 1 << 31
LONGEST_TEXT = 10_000
INTEGERS = range(-(1 << 63), 1 << 64)
# The texts of a Failure, and how many characters of each are kept.
PARTS = {"message": 300, "line": 300, "raised_in": 100}
NAMES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64"
DTYPES = {name: np.dtype(name) for name in NAMES.split()}
HANGUP = "hangup"  # the template's report about a worker that did not end by itself


class ForgedError(ValueError):
    """What arrived is nothing that this file writes."""


def encode(value: Any) -> list:
    """Return a plain value or tensor as JSON's own types.

    >>> encode((1, 0.5, "a"))
    ['tuple', [['int', 1], ['float', '0x1.0000000000000p-1'], ['str', 'a']]]
    >>> decode(encode((1, 0.5, True)))
    (1, 0.5, True)
    """
    kind = type(value)
    if kind in (bool, int, str):
        return [kind.__name__, value]
    # Hexadecimal keeps every bit of a float, and NaN and infinities too.
    if kind is float:
        return ["float", value.hex()]
    if kind is tuple:
        return ["tuple", [encode(part) for part in value]]
    if kind is Failure:
        texts = [getattr(value, part) for part in PARTS]
        return ["failure", [list(value.kinds), *texts]]
    if isinstance(value, torch.Tensor):
        return ["tensor", _encode_array(value.detach().numpy())]
    if isinstance(value, np.ndarray | np.generic):
        return ["array", _encode_array(np.asarray(value))]
    raise TypeError(
        f"value is a {kind.__name__}; numbers, text, arrays, tensors and tuples of these cross"
    )


def decode(found: Any) -> Any:
    """Return the value that `encode` wrote.

    Raises:
        ForgedError: it is anything else.

    >>> decode(["pickle", "gASVBAAAAAAAAAA="])
    Traceback (most recent call last):
    qcourse.grading.sandbox.wire.ForgedError: 'pickle' is no kind of value
    """
    try:
        return _decode(found, DEEPEST, [MOST])
    except ForgedError:
        raise
    # This is the one boundary: whatever a stranger sends raises nothing else here.
    except Exception as error:
        raise ForgedError("a value that cannot be read") from error


def write(message: dict[str, Any]) -> bytes:
    """Return a message as one line."""
    return json.dumps(message).encode() + b"\n"


def read(line: bytes) -> dict[str, Any]:
    """Return the message of a line.

    Raises:
        ForgedError: it is not a JSON object.
    """
    if line.count(b"[") + line.count(b"{") > MOST_BRACKETS:
        raise ForgedError("a line of too many parts")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError, MemoryError) as error:
        raise ForgedError("a line that is no JSON") from error
    if not isinstance(found, dict):
        raise ForgedError("a line that is no message")
    return found


def _decode(found: Any, depth: int, left: list[int]) -> Any:
    """Decode a value that may be this deep; `left` holds how many more the message may have."""
    left[0] -= 1
    if not isinstance(found, list) or len(found) != 2 or depth < 0 or left[0] < 0:
        raise ForgedError("a value that is no pair of kind and content, or too many of them")
    kind, content = found
    if kind == "tuple" and type(content) is list:
        return tuple(_decode(part, depth - 1, left) for part in content)
    if kind == "str" and type(content) is str:
        return content[:LONGEST_TEXT]
    if kind == "bool" and type(content) is bool:
        return content
    if kind == "int" and type(content) is int and content in INTEGERS:
        return content
    if kind == "float" and type(content) is str:
        return _decode_float(content)
    if kind == "array" and type(content) is list:
        return _decode_array(content)
    if kind == "tensor" and type(content) is list:
        return torch.from_numpy(_decode_array(content))
    if kind == "failure" and type(content) is list:
        return _decode_failure(content)
    raise ForgedError(f"{str(kind)[:40]!r} is no kind of value")


def _decode_float(content: str) -> float:
    try:
        return float.fromhex(content[:40])
    except (ValueError, OverflowError) as error:
        raise ForgedError("a float that is no number") from error


def _encode_array(array: np.ndarray) -> list:
    """Return the name of the dtype, the shape, and the bytes row by row."""
    # A long double has no name on the list.
    if array.dtype.name not in DTYPES:
        array = array.astype(np.float64)
    name = array.dtype.name
    # The dtype from the list has this machine's byte order; the array's own may have another.
    native = np.asarray(array, dtype=DTYPES[name])
    text = base64.b64encode(native.tobytes()).decode()
    return [name, list(array.shape), text]


def _decode_array(content: list) -> np.ndarray:
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
    # A bytearray, because the array must be writable.
    return np.frombuffer(bytearray(data), DTYPES[name]).reshape(shape)


def _decode_failure(content: list) -> Failure:
    if len(content) != 1 + len(PARTS) or not isinstance(content[0], list):
        raise ForgedError("a failure with other parts")
    kinds = content[0][:20]
    texts = content[1:]
    if not kinds or not all(type(text) is str for text in [*kinds, *texts]):
        raise ForgedError("a failure that is not told in words")
    kept: dict[str, str] = {}
    for (part, longest), text in zip(PARTS.items(), texts, strict=True):
        kept[part] = text[:longest]
    short_kinds = [kind[:100] for kind in kinds]
    return Failure(tuple(short_kinds), **kept)
