"""What quantization refuses, and in which words: the argument, its value, the rule."""

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
ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int8)


@pytest.mark.parametrize(
    "function", [quantize, fake_quantize, IntQuantizer().fit], ids=["quantize", "fake", "fit"]
)
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (
            NAN,
            ValueError,
            "x has 2 NaN or infinite values of 4, the first at flat index 2; quantization takes finite",
        ),
        (
            torch.tensor(float("-inf")),
            ValueError,
            "x has 1 NaN or infinite values of 1, the first at flat index 0",
        ),
        (torch.tensor([1e5]).half(), ValueError, "x has 1 NaN or infinite values"),
        (torch.empty(0), ValueError, "x is empty (shape (0,)); a range needs at least one value"),
        (torch.empty(3, 0), ValueError, "x is empty (shape (3, 0))"),
        (
            torch.arange(3),
            TypeError,
            "x has dtype torch.int64; quantization takes floats of 16, 32 or 64 bits",
        ),
        (torch.tensor([True]), TypeError, "x has dtype torch.bool"),
        (torch.tensor([1j]), TypeError, "x has dtype torch.complex64"),
        (torch.ones(2).to(torch.float8_e4m3fn), TypeError, "x has dtype torch.float8_e4m3fn"),
        (
            [1.0, 2.0],
            TypeError,
            "x is a list; quantization takes a torch.Tensor (use torch.as_tensor)",
        ),
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
    with pytest.raises(
        ValueError,
        match=re.escape(f"bits={bits!r} must be a whole number (a Python int) from 2 to 8"),
    ):
        IntQuantizer(bits)


def test_the_range_of_no_bits() -> None:
    with pytest.raises(ValueError, match="bits=0 must be at least 1"):
        integer_range(0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scale_rule": "max"}, ValueError, "scale_rule='max' must be one of amax, full, mse"),
        (
            {"scale_rule": "full", "symmetric": False},
            ValueError,
            "scale_rule='full' needs symmetric=True",
        ),
        (
            {"scale_dtype": torch.int8},
            ValueError,
            "scale_dtype=torch.int8 must be a floating-point dtype",
        ),
        (
            {"granularity": PerTensor},
            TypeError,
            "must be a value such as PerTensor() or PerGroup(128)",
        ),
        ({"granularity": 128}, TypeError, "granularity=128 must be a value such as"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        IntQuantizer(**options)


@pytest.mark.parametrize(
    ("shape", "granularity", "words"),
    [
        ((2, 3), PerChannel(2), "axis=2 is out of range for shape (2, 3): need -2 <= axis < 2"),
        ((2, 3), PerChannel(-3), "axis=-3 is out of range for shape (2, 3)"),
        ((), PerChannel(0), "axis=0 is out of range for shape ()"),
        (
            (),
            PerGroup(1),
            "group size=1 needs at least one axis to group along; the tensor is a scalar",
        ),
        (
            (2, 100),
            PerGroup(48),
            "group size=48 does not divide the last axis of shape (2, 100): 100 = 2 x 48 + 4; "
            "the nearest sizes that divide it are 25 and 50",
        ),
        ((2, 3), PerGroup(128), "3 = 0 x 128 + 3; the nearest sizes that divide it are 3"),
    ],
)
def test_a_granularity_that_does_not_suit_the_shape(
    shape: tuple[int, ...], granularity: object, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(torch.ones(shape), granularity=granularity)
    with pytest.raises(ValueError, match=re.escape(words)):
        IntQuantizer(granularity=granularity).decode(
            torch.ones(shape, dtype=torch.int8), Parameters(ONE, ZERO)
        )


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
        f"scale={exact:.3g} cannot be held in scale_dtype={scale_dtype}, which makes it {stored:.3g}; use a wider "
        "scale_dtype (1 of 2 scales)"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(x, symmetric=symmetric, granularity=PerChannel(0), scale_dtype=scale_dtype)
    quantize(
        x, symmetric=symmetric, granularity=PerChannel(0), scale_dtype=torch.float64
    )  # as the message advises


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_every_normal_scale_is_held(scale_dtype: torch.dtype) -> None:
    low = 2 * torch.finfo(scale_dtype).tiny if scale_dtype == torch.float16 else 1e-30
    x = torch.logspace(math.log10(low * 127), 4, 5000, dtype=torch.float64)[:, None]
    quantize(x, granularity=PerChannel(0), scale_dtype=scale_dtype)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_point": 3}, "zero_point=3 was given without scale"),
        ({"scale": 0.0}, "scale=0 must be positive and finite"),
        ({"scale": -0.5}, "scale=-0.5 must be positive and finite"),
        ({"scale": float("nan")}, "scale=nan must be positive and finite"),
        ({"scale": float("inf")}, "scale=inf must be positive and finite"),
        (
            {"scale": 1e-7, "scale_dtype": torch.float16},
            "scale=1e-07 cannot be held in scale_dtype=torch.float16",
        ),
        ({"scale": torch.ones(3)}, "scale of shape (3,) does not broadcast to the shape ()"),
        (
            {"scale": torch.ones(3), "granularity": PerChannel(0)},
            "scale of shape (3,) does not broadcast to",
        ),
        (
            {"scale": torch.tensor([[1.0], [-1.0]]), "granularity": PerChannel(0)},
            "scale=-1 must be positive and finite (1 of 2 scales is not)",
        ),
        ({"scale": 1.0, "zero_point": 3}, "zero_point=3 must be in [0, 0] when symmetric"),
        (
            {"scale": 1.0, "zero_point": 256, "symmetric": False},
            "zero_point=256 must be in [0, 255]",
        ),
        (
            {"scale": 1.0, "zero_point": -1, "symmetric": False, "bits": 4},
            "zero_point=-1 must be in [0, 15]",
        ),
        (
            {"scale": 1.0, "zero_point": torch.tensor(0.5)},
            "zero_point has dtype torch.float32; a zero point is a code",
        ),
        (
            {"scale": 1.0, "zero_point": torch.tensor(True)},
            "zero_point has dtype torch.bool; a zero point is a code",
        ),
        (
            {"scale": 1.0, "zero_point": torch.zeros(2).int()},
            "zero_point of shape (2,) does not broadcast to",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_scale_or_zero_point_given_wrongly(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        quantize(X, **options)


@pytest.mark.parametrize("shape", [(3,), (1,), (1, 3)])
def test_parameters_of_another_shape(shape: tuple[int, ...]) -> None:
    parameters = Parameters(torch.ones(shape), torch.zeros(shape, dtype=torch.int8))
    for function, argument in (
        (IntQuantizer().encode, X),
        (IntQuantizer().decode, X.to(torch.int8)),
    ):
        with pytest.raises(
            ValueError,
            match=re.escape(f"scale of shape {shape} and zero_point of shape {shape} must"),
        ):
            function(argument, parameters)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_parameters_with_no_scale(scale: float) -> None:
    parameters = Parameters(torch.tensor(scale), ZERO)
    for function, argument in (
        (IntQuantizer().encode, X),
        (IntQuantizer().decode, X.to(torch.int8)),
    ):
        with pytest.raises(ValueError, match=f"scale={scale:g} must be positive and finite"):
            function(argument, parameters)


def test_encode_asks_what_fit_asks() -> None:
    for x, error in ((NAN, ValueError), (torch.empty(0), ValueError), (torch.arange(3), TypeError)):
        with pytest.raises(error):
            IntQuantizer().encode(x, Parameters(ONE, ZERO))


@pytest.mark.parametrize("make", [PerGroup, PerChannel])
@pytest.mark.parametrize("value", [2.0, "2", None, True])
@pytest.mark.usefixtures("unchecked")
def test_a_granularity_of_no_whole_number(make: Callable, value: object) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"={value!r} must be a whole number (a Python int)")
    ):
        make(value)


@pytest.mark.parametrize("size", [0, -1])
def test_a_group_of_nothing(size: int) -> None:
    with pytest.raises(
        ValueError, match=f"group size={size} must be a whole number .* of at least 1"
    ):
        PerGroup(size)
