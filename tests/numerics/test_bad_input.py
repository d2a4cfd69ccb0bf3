"""What quantization refuses, and its messages: the argument, its value, the rule."""

import math
import re
from collections.abc import Callable

import pytest
import torch

from qcourse import (
    IntQuantizer,
    PerChannel,
    PerGroup,
    PerTensor,
    fake_quantize,
    integer_range,
    quantize,
)
from qcourse.numerics.quantized import Parameters

X = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]])
NAN = torch.tensor([[1.0, 2.0], [float("nan"), float("inf")]])
ONE = torch.tensor(1.0)
ZERO = torch.tensor(0, dtype=torch.int8)


TWO_BAD = "x has 2 NaN or infinite values of 4, the first at flat index 2; quantization takes"
ONE_BAD = "x has 1 NaN or infinite values of 1, the first at flat index 0"
INTEGERS = "x has dtype torch.int64; quantization takes floats of 16, 32 or 64 bits"
FUNCTIONS = {"quantize": quantize, "fake": fake_quantize, "fit": IntQuantizer().fit}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (NAN, ValueError, TWO_BAD),
        (torch.tensor(float("-inf")), ValueError, ONE_BAD),
        (torch.tensor([1e5]).half(), ValueError, "x has 1 NaN or infinite values"),
        (torch.empty(0), ValueError, "x is empty (shape (0,)); a range needs at least one value"),
        (torch.empty(3, 0), ValueError, "x is empty (shape (3, 0))"),
        (torch.arange(3), TypeError, INTEGERS),
        (torch.tensor([True]), TypeError, "x has dtype torch.bool"),
        (torch.tensor([1j]), TypeError, "x has dtype torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), TypeError, "x has dtype torch.float8_e4m3fn"),
        ([1.0, 2.0], TypeError, "x is a list; quantization takes a torch.Tensor (use torch.as_"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_x(function: Callable, x: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        function(x)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(2)])
@pytest.mark.parametrize("where", [(0, 0), (1, 3), (6, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_seen_anywhere(
    granularity: object, where: tuple[int, int], value: float
) -> None:
    x = torch.ones(7, 4)
    x[where] = value
    with pytest.raises(ValueError, match=f"first at flat index {4 * where[0] + where[1]}"):
        quantize(x, granularity=granularity)
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(x, scale=1.0)


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", None, True, torch.tensor(4)])
@pytest.mark.usefixtures("unchecked")
def test_bits(bits: object) -> None:
    words = re.escape(f"bits={bits!r} must be a whole number (a Python int) from 2 to 8")
    with pytest.raises(ValueError, match=words):
        IntQuantizer(bits)


@pytest.mark.parametrize("rule", ["mse", "full"])
def test_a_scale_rule_beside_a_scale(rule: str) -> None:
    words = f"scale_rule='{rule}' chooses a scale, but scale was given; give one of the two"
    with pytest.raises(ValueError, match=words):
        quantize(torch.ones(3), scale=1.0, scale_rule=rule)
    assert quantize(torch.ones(3), scale=1.0, scale_rule="amax").scale.item() == 1


def test_the_range_of_no_bits() -> None:
    with pytest.raises(ValueError, match="bits=0 must be at least 1"):
        integer_range(0)


FULL = {"scale_rule": "full", "symmetric": False}
NOT_A_FLOAT = "scale_dtype=torch.int8 must be a floating-point dtype"
NOT_A_VALUE = "must be a value such as PerTensor() or PerGroup(128)"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"scale_rule": "max"},
            ValueError,
            "scale_rule='max' must be one of amax, full, signed, mse",
        ),
        (FULL, ValueError, "scale_rule='full' needs symmetric=True"),
        ({"scale_dtype": torch.int8}, ValueError, NOT_A_FLOAT),
        ({"granularity": PerTensor}, TypeError, NOT_A_VALUE),
        ({"granularity": 128}, TypeError, "granularity=128 must be a value such as"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        IntQuantizer(**options)


NO_AXIS = "group size=1 needs at least one axis to group along; the tensor is a scalar"
NO_DIVISOR = (
    "group size=48 does not divide the last axis of shape (2, 100): 100 = 2 x 48 + 4; "
    "the nearest sizes that divide it are 25 and 50"
)


@pytest.mark.parametrize(
    ("shape", "granularity", "words"),
    [
        ((2, 3), PerChannel(2), "axis=2 is out of range for shape (2, 3): need -2 <= axis < 2"),
        ((2, 3), PerChannel(-3), "axis=-3 is out of range for shape (2, 3)"),
        ((), PerChannel(0), "axis=0 is out of range for shape ()"),
        ((), PerGroup(1), NO_AXIS),
        ((2, 100), PerGroup(48), NO_DIVISOR),
        ((2, 3), PerGroup(128), "3 = 0 x 128 + 3; the nearest sizes that divide it are 3"),
    ],
)
def test_a_granularity_that_does_not_suit_the_shape(
    shape: tuple[int, ...], granularity: object, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(torch.ones(shape), granularity=granularity)
    codes = torch.ones(shape, dtype=torch.int8)
    with pytest.raises(ValueError, match=re.escape(words)):
        IntQuantizer(granularity=granularity).decode(codes, Parameters(ONE, ZERO))


@pytest.mark.parametrize(
    ("amax", "scale_dtype"),
    [
        (1e-7, torch.float16),  # becomes 0
        (1e-4, torch.float16),  # subnormal, and off by 2% or 3%
        (1e9, torch.float16),  # becomes infinite
        (1e-44, torch.float32),
        (1e300, torch.float32),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_that_its_storage_cannot_hold(
    amax: float, scale_dtype: torch.dtype, symmetric: bool
) -> None:
    x = torch.tensor([[1.0, 1.0], [amax, -amax]], dtype=torch.float64)
    exact = amax / 127 if symmetric else 2 * amax / 255
    stored = torch.tensor(exact, dtype=torch.float64).to(scale_dtype).item()
    words = (
        f"scale={exact:.3g} cannot be held in scale_dtype={scale_dtype},"
        f" which makes it {stored:.3g}; use a wider scale_dtype (1 of 2 scales)"
    )
    options = {"symmetric": symmetric, "granularity": PerChannel(0)}
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(x, **options, scale_dtype=scale_dtype)
    # As the message advises.
    quantize(x, **options, scale_dtype=torch.float64)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_every_normal_scale_is_held(scale_dtype: torch.dtype) -> None:
    low = 2 * torch.finfo(scale_dtype).tiny if scale_dtype == torch.float16 else 1e-30
    x = torch.logspace(math.log10(low * 127), 4, 5000, dtype=torch.float64)[:, None]
    quantize(x, granularity=PerChannel(0), scale_dtype=scale_dtype)


BAD_SCALES = [
    (0.0, {}, "scale=0 must be positive and finite"),
    (-0.5, {}, "scale=-0.5 must be positive and finite"),
    (float("nan"), {}, "scale=nan must be positive and finite"),
    (float("inf"), {}, "scale=inf must be positive and finite"),
    (1e-7, {"scale_dtype": torch.float16}, "scale=1e-07 cannot be held in scale_dtype=torch.float"),
    (torch.ones(3), {}, "scale of shape (3,) does not broadcast to the shape ()"),
    (torch.ones(3), {"granularity": PerChannel(0)}, "scale of shape (3,) does not broadcast to"),
    (
        torch.tensor([[1.0], [-1.0]]),
        {"granularity": PerChannel(0)},
        "scale=-1 must be positive and finite (1 of 2 scales is not)",
    ),
]
UINT8 = {"symmetric": False}
UINT4 = {"symmetric": False, "bits": 4}
BAD_ZERO_POINTS = [
    (3, {}, "zero_point=3 must be in [0, 0] when symmetric"),
    (256, UINT8, "zero_point=256 must be in [0, 255]"),
    (-1, UINT4, "zero_point=-1 must be in [0, 15]"),
    (torch.tensor(0.5), {}, "zero_point has dtype torch.float32; a zero point is a code"),
    (torch.tensor(True), {}, "zero_point has dtype torch.bool; a zero point is a code"),
    (torch.zeros(2).int(), {}, "zero_point of shape (2,) does not broadcast to"),
]


@pytest.mark.parametrize(("scale", "options", "words"), BAD_SCALES)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_scale(scale: object, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(X, scale=scale, **options)


@pytest.mark.parametrize(("zero_point", "options", "words"), BAD_ZERO_POINTS)
@pytest.mark.usefixtures("unchecked")
def test_a_bad_zero_point(zero_point: object, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(X, scale=1.0, zero_point=zero_point, **options)


def test_a_zero_point_without_a_scale() -> None:
    with pytest.raises(ValueError, match="zero_point=3 was given without scale"):
        quantize(X, zero_point=3)


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 3)])
def test_parameters_of_another_shape(shape: tuple[int, ...]) -> None:
    parameters = Parameters(torch.ones(shape), torch.zeros(shape, dtype=torch.int8))
    words = re.escape(f"scale of shape {shape} and zero_point of shape {shape} must")
    with pytest.raises(ValueError, match=words):
        IntQuantizer().encode(X, parameters)
    with pytest.raises(ValueError, match=words):
        IntQuantizer().decode(X.to(torch.int8), parameters)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_parameters_with_no_scale(scale: float) -> None:
    parameters = Parameters(torch.tensor(scale), ZERO)
    words = f"scale={scale:g} must be positive and finite"
    with pytest.raises(ValueError, match=words):
        IntQuantizer().encode(X, parameters)
    with pytest.raises(ValueError, match=words):
        IntQuantizer().decode(X.to(torch.int8), parameters)


def test_encode_checks_what_fit_checks() -> None:
    for x, error in ((NAN, ValueError), (torch.empty(0), ValueError), (torch.arange(3), TypeError)):
        with pytest.raises(error):
            IntQuantizer().encode(x, Parameters(ONE, ZERO))


@pytest.mark.parametrize("make", [PerGroup, PerChannel])
@pytest.mark.parametrize("value", [2.0, "2", None, True])
@pytest.mark.usefixtures("unchecked")
def test_a_granularity_of_no_whole_number(make: Callable, value: object) -> None:
    words = re.escape(f"={value!r} must be a whole number (a Python int)")
    with pytest.raises(ValueError, match=words):
        make(value)


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_of_nothing(size: int) -> None:
    words = f"group size={size} must be a whole number .* of at least 1"
    with pytest.raises(ValueError, match=words):
        PerGroup(size)
