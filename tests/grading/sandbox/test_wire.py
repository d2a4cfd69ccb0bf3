"""What crosses comes out as it went in, and anything else is refused before it is looked at."""

import base64
import contextlib
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qcourse.checks.answers import Failure
from qcourse.checks.registry import load_sheet, sheet_ids
from qcourse.grading.sandbox import wire

DTYPES = st.sampled_from(["?", "i1", "u1", "i4", "i8", "u8", "f2", "f4", "f8"])
SHAPES = arrays.array_shapes(min_dims=0, min_side=0, max_dims=4)
NUMBERS = st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats(width=64)
LEAVES = NUMBERS | st.text(max_size=50) | arrays.arrays(DTYPES, SHAPES)
VALUES = st.recursive(LEAVES, lambda parts: st.lists(parts, max_size=4).map(tuple), max_leaves=8)


def same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.tobytes() == other.tobytes()
        )
    return one == other or (one != one and other != other)


def crossed(value: Any) -> Any:
    return wire.decode(wire.read(wire.write({"value": wire.encode(value)}))["value"])


def depth(value: Any) -> int:
    return 1 + max(map(depth, value), default=0) if isinstance(value, tuple) else 0


@given(VALUES.filter(lambda value: depth(value) <= wire.DEEPEST))
def test_a_value_comes_out_as_it_went_in(value: Any) -> None:
    assert same(crossed(value), value)


def test_the_sign_of_zero_and_every_bit_of_a_float_cross() -> None:
    assert math.copysign(1, crossed(-0.0)) == -1
    assert crossed(0.1 + 0.2) == 0.1 + 0.2


@pytest.mark.parametrize("sheet_id", sheet_ids())
def test_all_arguments_of_all_sheets_cross(sheet_id: str) -> None:
    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, torch.Tensor):
            return (
                isinstance(other, torch.Tensor)
                and one.dtype == other.dtype
                and torch.equal(one, other)
            )
        if isinstance(one, tuple):
            return type(other) is tuple and len(one) == len(other) and all(map(equal, one, other))
        return type(one) is type(other) and one == other

    for exercise in load_sheet(sheet_id).exercises:
        for case in exercise.cases(torch.Generator().manual_seed(3)):
            assert equal(case.args, crossed(case.args))


def test_a_failure_crosses_and_is_cut_to_length() -> None:
    failure = Failure(("ValueError", "Exception"), "group_size=3", "line 2: raise", "quantize")
    assert crossed(failure) == failure
    assert len(crossed(Failure(("E",), "x" * 10_000)).message) == 300


@pytest.mark.parametrize(
    "odd", [np.array([1.5], dtype=np.longdouble), np.array([1.5], dtype=">f4")]
)
def test_odd_floats_cross_as_usual_ones(odd: np.ndarray) -> None:
    found = crossed(odd)
    assert found.tolist() == [1.5]
    assert found.dtype.isnative
    assert found.dtype.itemsize <= 8


@pytest.mark.parametrize("value", [None, {}, [1], object(), torch.zeros])
def test_what_is_no_value_is_not_written(value: Any) -> None:
    with pytest.raises(TypeError, match="numbers, text, arrays"):
        wire.encode(value)


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("the pickle ran",)


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def npy(header: str) -> str:
    """A file as NumPy saves it, with this header: how arrays crossed once."""
    length = len(header).to_bytes(2, "little")
    return text(b"\x93NUMPY\x01\x00" + length + header.encode() + bytes(8))


NESTED: Any = ["int", 1]
for _ in range(wire.DEEPEST + 2):
    NESTED = ["tuple", [NESTED]]

FORGED = {
    "nothing": None,
    "a number": 1,
    "a kind alone": ["int"],
    "an unknown kind": ["pickle", base64.b64encode(pickle.dumps(1)).decode()],
    "a kind that is no text": [["int"], 1],
    "a bool for an int": ["int", True],
    "an int for a bool": ["bool", 1],
    "a float for an int": ["int", 1.0],
    "an int of 65 bits": ["int", 1 << 64],
    "a bare float": ["float", 0.5],
    "a float that is no number": ["float", "0x1.zp0"],
    "a float too large": ["float", "0x1p99999"],
    "text that is a list": ["str", ["a"]],
    "a tuple of bare values": ["tuple", [1, 2]],
    "tuples too deep": NESTED,
    "too many values": ["tuple", [["int", 1]] * (wire.MOST + 1)],
    "an array that is no base64": ["array", ["float64", [1], "not base 64"]],
    "an array that is text": ["array", text(bytes(8))],
    "an array of too few parts": ["array", ["float64", [1]]],
    "a pickle for an array": ["array", ["float64", [1], text(pickle.dumps(Bomb()))]],
    "an array of objects": ["array", ["object", [1], text(bytes(8))]],
    "an array of text": ["array", ["<U1", [1], text(bytes(4))]],
    "an array of times": ["array", ["datetime64[s]", [1], text(bytes(8))]],
    "an array of records": ["array", [[["a", "f4"]], [1], text(bytes(4))]],
    "complex numbers": ["array", ["complex64", [1], text(bytes(8))]],
    "a dtype that is no text": ["array", [["float64"], [1], text(bytes(8))]],
    "an array with a byte too many": ["array", ["float64", [1], text(bytes(9))]],
    "an array that claims terabytes": ["array", ["float64", [1 << 30, 1 << 10], text(bytes(8))]],
    "an array of negative size": ["array", ["float64", [-1], text(bytes(8))]],
    "a shape of truth values": ["array", ["float64", [True], text(bytes(8))]],
    "a shape of floats": ["array", ["float64", [1.0], text(bytes(8))]],
    "a shape that is a number": ["array", ["float64", 1, text(bytes(8))]],
    "a shape beyond every number": ["array", ["float64", [0, 10**30], ""]],
    "a shape of 65 axes": ["array", ["float64", [1] * 65, text(bytes(8))]],
    "data that is a list": ["array", ["float64", [1], [0] * 8]],
    "a .npy whose header stops": ["array", npy("{")],
    "a .npy whose header has mixed keys": ["array", npy("{1:1,'a':2}")],
    "a .npy whose shape is a truth value": [
        "array",
        npy("{'descr':'<f8','fortran_order':False,'shape':(True,)}"),
    ],
    "a .npy without a dtype": ["array", npy("{'descr':(),'fortran_order':False,'shape':(1,)}")],
    "a .npy of 65 axes": [
        "array",
        npy(f"{{'descr':'<f8','fortran_order':False,'shape':({'1,' * 65})}}"),
    ],
    "a .npy of no size and every size": [
        "array",
        npy(f"{{'descr':'<f8','fortran_order':False,'shape':(0,{10**30})}}"),
    ],
    "a failure without words": ["failure", [[], "", "", ""]],
    "a failure of numbers": ["failure", [["ValueError"], 1, "", ""]],
    "a failure with too little": ["failure", [["ValueError"]]],
}


@pytest.mark.parametrize("name", FORGED)
def test_what_was_never_written_is_refused(name: str) -> None:
    with pytest.raises(wire.ForgedError):
        wire.decode(FORGED[name])


LINES = [b"", b"\n", b"{", b"[1]", b"1", b"\xff\xfe", b"[" * 50_000, b'"' + b"9" * 10_000]
LINES += [b'{"number": ' + b"9" * 10_000 + b"}", b'{"output": [' + b"[]," * 2_000_000 + b"[]]}"]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_line_that_is_no_message_is_refused(line: bytes) -> None:
    with pytest.raises(wire.ForgedError):
        wire.read(line)


SMALL = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(["int", 1])
)
JSON = (
    SMALL
    | st.lists(SMALL | st.lists(SMALL, max_size=3), max_size=4)
    | st.dictionaries(st.text(max_size=3), SMALL)
)


@settings(max_examples=2000)
@given(
    st.sampled_from(["tuple", "array", "tensor", "failure", "float", "int", "bool", "str"]), JSON
)
def test_anything_else_is_decoded_or_refused(kind: str, found: Any) -> None:
    with contextlib.suppress(wire.ForgedError):
        wire.decode(json.loads(json.dumps([kind, found])))


ANSWERS = [
    1,
    -0.5,
    "a",
    (1, (2.0, "b")),
    np.zeros((2, 3)),
    torch.arange(3),
    Failure(("ValueError",), "3", "line", "f"),
]


@settings(max_examples=2000)
@given(st.sampled_from(ANSWERS), st.integers(0, 400), st.binary(max_size=4), st.integers(0, 4))
def test_a_reply_with_bytes_changed_is_decoded_or_refused(
    value: Any, place: int, new: bytes, removed: int
) -> None:
    line = wire.write({"number": 1, "output": wire.encode(value), "args": ["tuple", []]})
    place %= len(line)
    with contextlib.suppress(wire.ForgedError):
        wire.decode(wire.read(line[:place] + new + line[place + removed :]).get("output"))
