"""The header of a GGUF file: metadata, and where each tensor stands.

A file begins with "GGUF", a version and two counts. Then come the metadata (key, type, value), the
names, shapes, types and offsets of the tensors, and, from the next multiple of the alignment on,
their data. All numbers are little-endian, a string is its length and UTF-8.

Every count and length is compared with the bytes that are left before anything is allocated, so a
damaged header costs an error and no memory.

Source: docs/gguf.md in the public repository of ggml.
`gguf.py` turns this into tensors.
"""

import math
import struct
from itertools import pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from qcourse.formats.ggml_types import TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_AXES = 4
MAX_NESTING = 4  # arrays in arrays

# Metadata types by number. 8 is a string and 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOL = 7
_STRING = 8
_ARRAY = 9
# The fewest bytes that an entry takes: an empty key or name, a type, the smallest value.
_LEAST_METADATA = 8 + 4 + 1
_LEAST_TENSOR = 8 + 4 + 4 + 8


class TensorPlace(NamedTuple):
    """Where a tensor stands in the file; the last axis of shape is contiguous, as in torch."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    start: int  # in bytes from the beginning of the file
    nbytes: int


class Header(NamedTuple):
    """What the file says of itself."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorPlace]


class _Cursor:
    """Read values one after another, and raise ValueError before the end is passed."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.at = 0

    def take(self, count: int, what: str) -> memoryview:
        """Return the next `count` bytes."""
        left = len(self.buffer) - self.at
        if count > left:
            raise ValueError(f"{what} takes {count} bytes at byte {self.at}, but {left} are left")
        start = self.at
        self.at += count
        return self.buffer[start : self.at]

    def number(self, code: str, what: str) -> Any:
        """Return one number of struct's format `code`."""
        size = struct.calcsize("<" + code)
        return struct.unpack("<" + code, self.take(size, what))[0]

    def string(self, what: str) -> str:
        """Return a string: 8 bytes of length, then UTF-8."""
        length = self.number("Q", f"the length of {what}")
        content = self.take(length, what)
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8: {error}") from None

    def require(self, count: int, least_bytes: int, what: str) -> None:
        """Raise ValueError if `count` entries of at least `least_bytes` cannot follow."""
        left = len(self.buffer) - self.at
        if count * least_bytes > left:
            raise ValueError(
                f"{count} {what} need at least {count * least_bytes} bytes, but {left} are left"
            )


def read_header(buffer: memoryview) -> Header:
    """Return the header of the file whose bytes these are.

    Raises:
        ValueError: it is no GGUF file, of another version, or damaged: a count, a length, a type,
            a shape or an offset is impossible, tensors overlap, or a name comes twice.
    """
    cursor = _Cursor(buffer)
    version = _version(cursor)
    tensor_count = cursor.number("Q", "the number of tensors")
    entry_count = cursor.number("Q", "the number of metadata entries")

    cursor.require(entry_count, _LEAST_METADATA, "metadata entries")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"the metadata key {key!r} comes twice")
        kind = cursor.number("I", f"the type of {key!r}")
        metadata[key] = _value(cursor, kind, key)

    alignment = _alignment(metadata)
    cursor.require(tensor_count, _LEAST_TENSOR, "tensors")
    described = [_tensor(cursor, alignment) for _ in range(tensor_count)]
    data = -(-cursor.at // alignment) * alignment  # the next multiple of the alignment
    return Header(version, metadata, _placed(described, data, len(buffer)))


def _version(cursor: _Cursor) -> int:
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != MAGIC:
        raise ValueError(f"it begins with {magic!r}, a GGUF file with {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version in VERSIONS:
        return version
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if swapped in VERSIONS:
        raise ValueError("it is big-endian; this reads little-endian files")
    raise ValueError(f"it has version {version}; this reads {VERSIONS[0]} and {VERSIONS[1]}")


def _value(cursor: _Cursor, kind: int, key: str, depth: int = 0) -> Any:
    """Return one value of a metadata type."""
    if kind == _STRING:
        return cursor.string(f"the value of {key!r}")
    if kind == _BOOL:
        return cursor.number("B", f"the value of {key!r}") != 0
    if kind in _NUMBERS:
        return cursor.number(_NUMBERS[kind], f"the value of {key!r}")
    if kind != _ARRAY:
        raise ValueError(f"{key!r} has the type {kind}; GGUF has types 0 to 12")
    if depth == MAX_NESTING:
        raise ValueError(f"{key!r} has arrays in arrays, more than {MAX_NESTING} deep")
    return _array(cursor, key, depth)


def _array(cursor: _Cursor, key: str, depth: int) -> list[Any]:
    kind = cursor.number("I", f"the type in {key!r}")
    count = cursor.number("Q", f"the length of {key!r}")
    # Numbers are read at once: vocabularies have tens of thousands.
    if kind in _NUMBERS:
        code = _NUMBERS[kind]
        size = struct.calcsize("<" + code)
        content = cursor.take(count * size, f"the array {key!r}")
        return list(struct.unpack(f"<{count}{code}", content))
    # A string takes its length at least; an array in an array its type and length.
    least = {_BOOL: 1, _STRING: 8, _ARRAY: 12}
    cursor.require(count, least.get(kind, 1), f"values of {key!r}")
    return [_value(cursor, kind, key, depth + 1) for _ in range(count)]


def _alignment(metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or alignment < 8 or alignment % 8:
        raise ValueError(f"general.alignment is {alignment!r}; it must be a multiple of 8")
    return alignment


def _tensor(cursor: _Cursor, alignment: int) -> TensorPlace:
    """Return a tensor whose start counts from the beginning of the data."""
    name = cursor.string("a tensor's name")
    axes = cursor.number("I", f"the number of axes of {name!r}")
    if axes > MAX_AXES:
        raise ValueError(f"tensor {name!r} has {axes} axes; ggml has at most {MAX_AXES}")
    sizes = [cursor.number("Q", f"the shape of {name!r}") for _ in range(axes)]
    number = cursor.number("I", f"the type of {name!r}")
    start = cursor.number("Q", f"the offset of {name!r}")

    if number not in TYPES:
        raise ValueError(f"tensor {name!r} has the unknown type {number}")
    if start % alignment:
        raise ValueError(f"tensor {name!r} begins at {start}, no multiple of {alignment}")
    kind = TYPES[number]
    # ggml names the contiguous axis first, torch last.
    shape = tuple(reversed(sizes))
    row = shape[-1] if shape else 1
    if row % kind.block_size:
        raise ValueError(
            f"tensor {name!r} has rows of {row}, no multiple of the {kind.block_size} values in a"
            f" block of {kind.name}"
        )
    # Python's integers have no largest one, so a product that overflows elsewhere is just large.
    nbytes = math.prod(shape) // kind.block_size * kind.block_nbytes
    return TensorPlace(name, shape, kind, start, nbytes)


def _placed(described: list[TensorPlace], data: int, size: int) -> dict[str, TensorPlace]:
    """Return the tensors by name, in the file's order, if all of them lie in it side by side."""
    tensors: dict[str, TensorPlace] = {}
    for tensor in described:
        start = data + tensor.start
        if start + tensor.nbytes > size:
            raise ValueError(
                f"tensor {tensor.name!r} ends at byte {start + tensor.nbytes}, but the file has"
                f" {size}: it is truncated or damaged"
            )
        if tensor.name in tensors:
            raise ValueError(f"the tensor {tensor.name!r} comes twice")
        tensors[tensor.name] = tensor._replace(start=start)

    in_order = sorted(tensors.values(), key=attrgetter("start"))
    for before, after in pairwise(in_order):
        if before.start + before.nbytes > after.start:
            raise ValueError(f"the tensors {before.name!r} and {after.name!r} overlap")
    return tensors
