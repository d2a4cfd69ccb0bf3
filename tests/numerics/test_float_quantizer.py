"""FloatQuantizer, MX, NVFP4 and codebooks, against torchao's rules and values worked by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcourse import PerChannel, PerGroup, PerTensor, pack
from qcourse.numerics.codebook import (
    NF4,
    CodebookQuantizer,
    lloyd_max,
    normal_float,
)
from qcourse.numerics.double_quantization import double_quantize
from qcourse.numerics.float_quantizer import POWER_RULES, FloatQuantizer
from qcourse.numerics.metrics import relative_error
from qcourse.numerics.microscaling import NVFP4Quantizer, mx
from qcourse.numerics.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    FloatFormat,
    code_values,
    decode,
)
from qcourse.numerics.minifloat_encoding import encode
from qcourse.numerics.quantized import Quantizer
from qcourse.numerics.scaled import ScaledQuantizer

ELEMENTS = [E4M3, E5M2, E3M2, E2M3, E2M1]
QUANTIZERS = [
    FloatQuantizer(),
    FloatQuantizer(E5M2, PerChannel(0)),
    FloatQuantizer(E2M1, PerGroup(16), "mse", torch.float16),
    FloatQuantizer(E2M3, PerGroup(32), "unit"),
    *(mx(format, rule) for format in ELEMENTS for rule in POWER_RULES),
    NVFP4Quantizer(),
    NVFP4Quantizer(per_tensor=False),
    CodebookQuantizer(NF4, PerGroup(64)),
    CodebookQuantizer((-1.0, 0.0, 1.0), PerChannel(0), "mse"),
]


def wild(rows: int = 64, columns: int = 128) -> Tensor:
    """Rows of very different sizes, a block of zeros, single large values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.randn(rows, 1, generator=generator).mul(4).exp()
    x[3, :32] = 0
    x[5, 7] *= 1000
    return x


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_each_is_a_quantizer_whose_parts_agree(quantizer: Quantizer) -> None:
    assert isinstance(quantizer, Quantizer)
    x = wild()
    q = quantizer(x)
    assert torch.equal(q.codes, quantizer.encode(x, q.parameters))
    codes, x_hat = quantizer.nearest(x, q.parameters)
    assert torch.equal(codes, q.codes)
    assert torch.equal(x_hat, q.dequantize())
    assert q.dequantize().dtype == torch.float32
    assert int(q.codes.max()) < 1 << quantizer.bits
    assert q.nbytes == x.numel() * quantizer.bits // 8 + quantizer.parameter_nbytes(q.parameters)
    assert torch.equal(q.dequantize()[3, :32], torch.zeros(32))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_each_refuses_values_that_are_not_finite(quantizer: Quantizer) -> None:
    for bad in (torch.nan, torch.inf):
        x = torch.ones(2, 64)
        x[1, 3] = bad
        with pytest.raises(ValueError, match="1 NaN or infinite values of 128"):
            quantizer(x)
        with pytest.raises(ValueError, match="1 NaN or infinite values of 128"):
            quantizer.encode(x, quantizer.fit(torch.ones(2, 64)))


@pytest.mark.parametrize("format", ELEMENTS, ids=str)
def test_the_codes_are_those_of_the_quotient(format: FloatFormat) -> None:
    x = wild()
    q = FloatQuantizer(format, PerChannel(0))(x)
    torch.testing.assert_close(q.scale, x.abs().amax(1, keepdim=True) / format.max)
    assert torch.equal(q.codes, encode(x / q.scale, format))
    assert torch.equal(q.dequantize(), decode(q.codes, format) * q.scale)
    exact = FloatQuantizer(format, scale_dtype=torch.float64)(x.double())
    assert torch.equal(exact.codes, encode(x.double() / exact.scale, format))


def test_a_unit_scale_saturates() -> None:
    q = FloatQuantizer(E4M3, scale_rule="unit")(torch.tensor([1000.0, 0.3]))
    assert q.dequantize().tolist() == [448.0, 0.3125]


def test_a_searched_scale_is_no_worse() -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    searched = FloatQuantizer(E2M1, PerGroup(32), "mse")(x).dequantize()
    plain = FloatQuantizer(E2M1, PerGroup(32), "amax")(x).dequantize()
    assert relative_error(x, searched) < 0.95 * relative_error(x, plain)


# The MX formats: an independent computation, with math's frexp and numbers one by one


def shared_exponent(amax: float, format: FloatFormat, rule: str) -> int:
    if not amax:
        return -127
    top = {E4M3: 8, E5M2: 15, E3M2: 4, E2M3: 2, E2M1: 2}[format]
    if rule == "rceil":
        return max(-127, math.ceil(math.log2(amax / format.max)))
    power = math.floor(math.log2(amax))
    mantissa = amax / 2.0**power
    if rule == "ceil":
        power += mantissa > 1
    if rule == "even":
        power += mantissa >= 2 - 2.0 ** -(format.mantissa_bits + 1)
    return max(-127, power - top)


@pytest.mark.parametrize("rule", POWER_RULES)
@pytest.mark.parametrize("format", ELEMENTS, ids=str)
def test_mx_shares_the_exponent_that_the_rule_says(format: FloatFormat, rule: str) -> None:
    x = wild()
    x[10, :4] = torch.tensor([format.max, 1.0, 2.0, 2.0**format.mantissa_bits])
    x[11, 32:64] = 2.0**-130
    x[12, :32] = 7.0
    x[12, 32:64] = 2 - 2.0 ** -(format.mantissa_bits + 1)  # where "even" just carries over
    q = mx(format, rule)(x)
    expected = []
    for row in x.unflatten(1, (-1, 32)).abs().amax(-1).tolist():
        expected.append([shared_exponent(amax, format, rule) for amax in row])
    assert (q.scale.view(torch.uint8).int() - 127).tolist() == expected
    scale = torch.exp2(torch.tensor(expected, dtype=torch.float64)).repeat_interleave(32, 1)
    assert torch.equal(q.codes, encode(x.double() / scale, format))
    assert q.bits_per_weight == format.bits + 8 / 32


def test_mx_on_gaussian_data_has_the_known_errors() -> None:
    x = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))

    def loss(quantizer: Quantizer, deviation: float) -> float:
        return float(relative_error(deviation * x, quantizer(deviation * x).dequantize()))

    at_002 = {rule: loss(mx(E2M1, rule), 0.02) for rule in POWER_RULES}
    expected = {"floor": 0.1140, "even": 0.1120, "rceil": 0.1185, "ceil": 0.1369}
    assert at_002 == pytest.approx(expected, rel=0.01)
    assert loss(mx(E2M1, "ceil"), 1) == pytest.approx(0.1442, rel=0.01)
    assert loss(mx(E2M1, "rceil"), 1) == pytest.approx(0.1155, rel=0.01)
    assert loss(mx(E4M3, "rceil"), 0.02) == pytest.approx(0.0265, rel=0.01)
    assert loss(mx(E4M3, "floor"), 0.02) == pytest.approx(0.0293, rel=0.01)
    assert loss(NVFP4Quantizer(), 0.02) == pytest.approx(0.0951, rel=0.01)
    blocks_alone = NVFP4Quantizer(per_tensor=False)
    without = [loss(blocks_alone, deviation) for deviation in (1, 0.1, 0.02, 0.01)]
    assert without == sorted(without)
    assert without[-1] > 2 * loss(NVFP4Quantizer(), 0.01)


def test_scales_beyond_the_ends_of_e8m0() -> None:
    q = mx(E2M1)(torch.full((1, 32), 2.0**-140))
    assert q.scale.view(torch.uint8).item() == 0  # 2^-127: what is smaller still rounds to 0
    assert torch.equal(q.dequantize(), torch.zeros(1, 32))
    with pytest.raises(ValueError, match=r"cannot be held in scale_dtype=torch.float8_e8m0fnu"):
        mx(E2M1)(torch.full((1, 32), 1e300, dtype=torch.float64))


# NVFP4


def test_nvfp4_counts_the_tensor_scale_only_if_it_has_one() -> None:
    assert NVFP4Quantizer(per_tensor=False)(torch.ones(1, 16)).nbytes == 8 + 1
    assert NVFP4Quantizer()(torch.ones(1, 16)).nbytes == 8 + 1 + 4


def test_nvfp4_refuses_what_is_too_small_for_its_arithmetic() -> None:
    x = torch.tensor([[1.0, -0.5, *14 * [0.0]]])
    x_hat = NVFP4Quantizer()(1e-34 * x).dequantize()
    torch.testing.assert_close(x_hat, 1e-34 * x, rtol=0.02, atol=0)
    with pytest.raises(ValueError, match=r"x reaches 1e-37 at most, too small for float32"):
        NVFP4Quantizer()(1e-37 * x)


def test_nvfp4_by_hand() -> None:
    x = torch.zeros(2, 16)
    x[0, :2] = torch.tensor([12.0, -1.0])
    x[1, :3] = torch.tensor([0.5, 0.25, 0.04])
    q = NVFP4Quantizer()(x)
    tensor_scale = 12 / (6 * 448)
    assert q.parameters.tensor_scale.item() == pytest.approx(tensor_scale)
    second_code = encode(torch.tensor(0.5 / 6 / tensor_scale), E4M3)
    expected = [448.0, code_values(E4M3)[second_code.int()].item()]
    assert q.scale.float().flatten().tolist() == expected
    steps = x / (torch.tensor(expected)[:, None] * tensor_scale)
    assert torch.equal(q.codes, encode(steps, E2M1))
    assert q.bits_per_weight == 4 + 8 / 16 + 32 / 32


def test_nvfp4_of_zeros_and_of_scales_that_are_wrong() -> None:
    quantizer = NVFP4Quantizer()
    q = quantizer(torch.zeros(2, 32))
    assert torch.equal(q.dequantize(), torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"scale of shape \(2, 2\) must have the shape \(2, 3\)"):
        quantizer.encode(torch.ones(2, 48), q.parameters)
    with pytest.raises(ValueError, match="group size=16 does not divide"):
        quantizer(torch.ones(2, 24))


# Codebooks

BITSANDBYTES_NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def test_nf4_is_derived_and_is_that_of_bitsandbytes() -> None:
    assert normal_float(4) == NF4
    assert pytest.approx(BITSANDBYTES_NF4, abs=1e-6) == NF4


def test_a_code_is_that_of_the_nearest_level() -> None:
    x = wild()
    q = CodebookQuantizer(NF4, PerGroup(64))(x)
    levels = torch.tensor(NF4)
    blocks = x.unflatten(1, (-1, 64)) / q.scale[..., None]
    steps = blocks.flatten(1)
    nearest = (steps[..., None] - levels).abs().argmin(-1)
    # They differ where float32 cannot tell which of two levels is nearer.
    differs = q.codes != nearest
    assert differs.float().mean() < 1e-3
    distance = (steps - levels[q.codes.int()]).abs()
    least = (steps - levels[nearest]).abs()
    assert (distance - least).abs().max() < 1e-6


def test_a_transposed_tensor_gets_the_same_codes_without_a_warning() -> None:
    quantizer = CodebookQuantizer(granularity=PerChannel(0))
    w = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantizer(w.T).codes, quantizer(w.T.contiguous()).codes)


def test_a_tie_goes_to_the_lower_level() -> None:
    x = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    assert CodebookQuantizer((-1.0, 0.0, 1.0))(x).codes.tolist() == [0, 0, 1, 2]


def test_lloyd_max_finds_the_known_levels_of_a_normal_distribution() -> None:
    x = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)
    assert lloyd_max(x, 2) == pytest.approx([-0.7979, 0.7979], abs=1e-3)  # Max 1960, table I
    assert lloyd_max(x, 4, steps=1000) == pytest.approx([-1.510, -0.4528, 0.4528, 1.510], abs=2e-3)


def test_lloyd_max_beats_every_other_grid_on_its_data() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    fitted = CodebookQuantizer(lloyd_max(x, 16))
    end = torch.tensor(max(-fitted.levels[0], fitted.levels[-1]))
    # A scale of 1 (the last bit depends on the instruction set): "amax" would stretch the levels.
    parameters = fitted.from_range(-end, end)
    assert parameters.scale.item() == pytest.approx(1, rel=1e-6)
    x_hat = fitted.decode(fitted.encode(x, parameters), parameters)
    nf4_searched = CodebookQuantizer(NF4, scale_rule="mse")
    for other in (CodebookQuantizer(NF4), FloatQuantizer(E2M1), nf4_searched):
        assert relative_error(x, x_hat) < relative_error(x, other(x).dequantize())


def test_double_quantization_of_scales() -> None:
    generator = torch.Generator().manual_seed(0)
    # 700 scales: the last group of 256 is filled up.
    scale = 0.05 + 0.01 * torch.randn(100, 7, generator=generator)
    double = double_quantize(scale)
    scale_hat = double.dequantize()
    assert scale_hat.shape == scale.shape
    assert relative_error(scale, scale_hat) < 0.01
    exact = (scale.flatten() - scale.mean())[:256]
    step = exact.abs().max() / 448
    in_e4m3 = decode(encode(exact / step, E4M3), E4M3) * exact.abs().max() / 448
    expected = in_e4m3 + scale.mean()
    torch.testing.assert_close(scale_hat.flatten()[:256], expected, rtol=1e-4, atol=1e-6)
    assert double.nbytes == 768 + 3 * 4 + 4
    # 2^14 scales of blocks of 64 are those of 2^20 weights.
    bits_per_weight = 8 * double_quantize(torch.rand(1 << 14)).nbytes / (1 << 20)
    assert bits_per_weight == pytest.approx(0.127, abs=1e-3)


# What is refused


INT_SCALE = {"scale_dtype": torch.int8}
E3M4 = FloatFormat("E3M4", 3, 4, 3)
REFUSED = [
    (lambda: FloatQuantizer(E8M0), "format=E8M0 has no sign"),
    (lambda: FloatQuantizer(scale_rule="full"), "scale_rule='full' must be one of amax, mse, unit"),
    (lambda: FloatQuantizer(**INT_SCALE), "scale_dtype=torch.int8 must be a floating"),
    (lambda: mx(E3M4), "format=E3M4 must be a float format of MX"),
    (lambda: mx(E2M1, "amax"), "scale_rule='amax' must make a power of two"),
    (lambda: mx(E2M1)(torch.ones(2, 48)), "group size=32 does not divide"),
    (lambda: CodebookQuantizer((0.0, 0.0)), "must be 2 to 256 finite numbers in ascending order"),
    (lambda: CodebookQuantizer((0.0,)), "must be 2 to 256"),
    (lambda: CodebookQuantizer(NF4, scale_rule="full"), "'full' must be one of amax, mse"),
    (lambda: normal_float(9), "bits=9 must be"),
    (lambda: double_quantize(torch.ones(4), 0), "group size=0 must be"),
    (lambda: double_quantize(torch.tensor([1.0, torch.nan])), "scale has 1 NaN or infinite values"),
    (lambda: lloyd_max(torch.ones(5), 2), "count=2 must be .* at most the 1 different values"),
]


@pytest.mark.parametrize(("make", "words"), REFUSED)
def test_what_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_class_is_no_granularity() -> None:
    with pytest.raises(TypeError, match="must be a value such as PerTensor"):
        FloatQuantizer(E4M3, PerTensor)  # type: ignore[arg-type]


def test_a_subclass_without_a_part_makes_no_value() -> None:
    class Incomplete(ScaledQuantizer):
        """Has no grid and no fields."""

    with pytest.raises(TypeError, match="_to_codes"):
        Incomplete()  # type: ignore[abstract]


def test_codes_of_four_bits_pack_low_nibble_first() -> None:
    codes = NVFP4Quantizer()(torch.tensor([[6.0, -6.0, *14 * [0.0]]])).codes
    assert pack(codes, 4)[0] == 0xF7
