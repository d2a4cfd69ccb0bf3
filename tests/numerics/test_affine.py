"""The affine quantizer: its laws, torch's own quantizers as oracles, and values worked by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcourse import (
    IntQuantizer,
    PerChannel,
    PerGroup,
    PerTensor,
    QuantizedTensor,
    fake_quantize,
    integer_range,
    quantize,
)
from qcourse.numerics.chunks import CHUNK
from qcourse.numerics.granularity import Granularity
from qcourse.numerics.metrics import relative_error
from qcourse.numerics.quantized import Parameters

BITS = range(2, 9)
# Half the distance from 1 to the next float32: the relative error of one rounding.
FLOAT32 = 2.0**-24


def is_normal(value: float) -> bool:
    """Whether a scale for this value is far from float32's subnormal numbers."""
    return value == 0 or abs(value) > 2.0**-100


# With -0.0, ties and repeated values among them.
special = st.sampled_from([0.0, -0.0, 0.5, -1.5, 1.0, 127.0, -128.0])
numbers = st.one_of(special, st.floats(-(2.0**100), 2.0**100, width=32).filter(is_normal))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A float32 matrix of up to 4 x 12."""
    rows = draw(st.integers(1, 4))
    columns = draw(st.integers(1, 12))
    values = draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(values).reshape(rows, columns)


@st.composite
def granularities(draw: st.DrawFn, x: Tensor) -> Granularity:
    """Any granularity that suits the matrix x."""
    divisors = [size for size in range(1, x.shape[1] + 1) if x.shape[1] % size == 0]
    groups = [PerGroup(size) for size in divisors]
    return draw(
        st.sampled_from([PerTensor(), PerChannel(0), PerChannel(1), PerChannel(-1), *groups])
    )


@st.composite
def cases(draw: st.DrawFn, **options: object) -> tuple[Tensor, IntQuantizer]:
    """A matrix and a quantizer for it."""
    x = draw(tensors())
    bits = draw(st.sampled_from(BITS))
    symmetric = draw(st.booleans())
    return x, IntQuantizer(bits, symmetric, draw(granularities(x)), **options)


def step_errors(x: Tensor, q: QuantizedTensor) -> Tensor:
    """|x - x_hat| in steps of the scale, computed in float64."""
    x_rows = q.granularity.rows(x).double()
    x_hat_rows = q.granularity.rows(q.dequantize()).double()
    scale = q.scale.double().reshape(-1, 1)
    return (x_rows - x_hat_rows).abs() / scale


# The laws


@given(cases())
def test_the_error_is_at_most_half_a_step(case: tuple[Tensor, IntQuantizer]) -> None:
    x, quantizer = case
    # A value of up to 2^bits steps is rounded in float32 three times: with the scale, in the
    # division and in the product.
    slack = 3 * 2**quantizer.bits * FLOAT32
    assert step_errors(x, quantizer(x)).max() <= 0.5 + slack


above_1 = st.floats(-1000, 1000, width=16).filter(lambda v: v == 0 or abs(v) > 1)


@given(
    st.sampled_from(BITS),
    st.booleans(),
    st.lists(above_1, min_size=1, max_size=12),
    st.sampled_from([(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)]),
)
def test_a_narrow_scale_costs_its_own_rounding(
    bits: int, symmetric: bool, values: list[float], storage: tuple[torch.dtype, float]
) -> None:
    dtype, rounding = storage
    x = torch.tensor(values)
    q = quantize(x, bits, symmetric=symmetric, scale_dtype=dtype)
    # The range is 2^bits - 1 steps of the exact scale, and a fraction of a step more if the stored
    # scale is rounded down.
    assert step_errors(x, q).max() <= 0.5 + 2**bits * rounding
    assert q.scale.dtype == dtype


@given(cases())
def test_codes_are_codes(case: tuple[Tensor, IntQuantizer]) -> None:
    x, quantizer = case
    codes = quantizer(x).codes
    assert codes.shape == x.shape
    assert codes.dtype == (torch.int8 if quantizer.symmetric else torch.uint8)
    assert quantizer.qmin <= codes.min()
    assert codes.max() <= quantizer.qmax


@given(cases(), st.floats(0.01, 100))
def test_any_scale_saturates(case: tuple[Tensor, IntQuantizer], factor: float) -> None:
    x, quantizer = case
    fitted = quantizer.fit(x)
    codes = quantizer.encode(x, Parameters(fitted.scale * factor, fitted.zero_point)).int()
    assert quantizer.qmin <= codes.min()
    assert codes.max() <= quantizer.qmax


@given(cases())
def test_quantizing_x_hat_gives_the_same_codes(case: tuple[Tensor, IntQuantizer]) -> None:
    x, quantizer = case
    q = quantizer(x)
    assert torch.equal(quantizer.encode(q.dequantize(), q.parameters), q.codes)


@given(cases())
def test_nearest_is_encode_and_decode_in_one(case: tuple[Tensor, IntQuantizer]) -> None:
    x, quantizer = case
    q = quantizer(x)
    codes, x_hat = quantizer.nearest(x, q.parameters)
    assert torch.equal(codes, q.codes)
    assert torch.equal(x_hat, q.dequantize())


@given(cases())
def test_order_is_kept(case: tuple[Tensor, IntQuantizer]) -> None:
    x, quantizer = case
    parameters = quantizer.fit(x)
    smaller = torch.minimum(x, x.flip(0))
    x_hat = quantizer.decode(quantizer.encode(x, parameters), parameters)
    smaller_hat = quantizer.decode(quantizer.encode(smaller, parameters), parameters)
    assert (smaller_hat <= x_hat).all()


@given(cases(), st.integers(-20, 20))
def test_a_power_of_two_changes_the_scale_alone(
    case: tuple[Tensor, IntQuantizer], exponent: int
) -> None:
    x, quantizer = case
    q = quantizer(x)
    scaled = quantizer(x * 2.0**exponent)
    assert torch.equal(scaled.codes, q.codes)
    amax = q.granularity.rows(x).abs().amax(dim=1).reshape(q.scale.shape)
    # A row of zeros has scale 1.
    assert torch.equal(scaled.scale, torch.where(amax == 0, 1.0, q.scale * 2.0**exponent))


@given(cases())
def test_zero_is_on_the_grid(case: tuple[Tensor, IntQuantizer]) -> None:
    x, quantizer = case
    parameters = quantizer.fit(x)
    zero = torch.zeros_like(x)
    assert torch.equal(quantizer.decode(quantizer.encode(zero, parameters), parameters), zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_the_mse_rule_never_loses_to_the_full_range(bits: int, symmetric: bool) -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(bits))
    options = {"symmetric": symmetric, "granularity": PerGroup(32)}
    error = {}
    for rule in ("amax", "mse"):
        x_hat = fake_quantize(x, bits, scale_rule=rule, **options)
        error[rule] = (x_hat - x).square().reshape(-1, 32).sum(dim=1)
    assert (error["mse"] <= error["amax"] * (1 + 1e-5)).all()  # summed here in float32
    # With more bits the full range may be the best.
    assert error["mse"].sum() < error["amax"].sum() or bits > 4


@pytest.mark.parametrize(
    ("dtype", "unit"),
    [
        (torch.float16, 2.0**-8),
        *((dtype, 2.0**e) for dtype in (torch.bfloat16, torch.float32) for e in (-90, 90)),
    ],
)
def test_the_mse_rule_does_not_depend_on_the_unit(dtype: torch.dtype, unit: float) -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = quantize(x, 4, scale_rule="mse")
    scaled = quantize(x * unit, 4, scale_rule="mse")
    assert torch.equal(scaled.scale, plain.scale * unit)
    assert torch.equal(scaled.codes, plain.codes)


def test_the_mse_rule_works_where_float32_ends() -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"scale_rule": "mse", "scale_dtype": torch.float64}
    plain = quantize(x, 4, **options)
    huge = quantize(x * 2.0**300, 4, **options)
    assert torch.equal(huge.codes, plain.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(8)])
def test_work_in_chunks_leaves_no_seam(granularity: Granularity, symmetric: bool) -> None:
    # More than two chunks, the last one short.
    x = torch.randn(1000, 1072, generator=torch.Generator().manual_seed(0))
    assert 2 * CHUNK < x.numel() < 3 * CHUNK
    q = quantize(x, 4, symmetric=symmetric, granularity=granularity)
    scale = q.scale
    zero_point = q.zero_point.int()
    if isinstance(granularity, PerGroup):
        scale = scale.repeat_interleave(8, dim=-1)
        zero_point = zero_point.repeat_interleave(8, dim=-1)
    codes = torch.clamp((x / scale).round() + zero_point, *integer_range(4, signed=symmetric)).int()
    assert torch.equal(q.codes.int(), codes)
    assert torch.equal(q.dequantize(), (codes - zero_point) * scale)


# Outside oracles

deprecated = pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning"
)
# torch multiplies by 1/scale, which is exact only for powers of two.
DYADIC = [2.0**-10, 0.25, 1.0, 8.0]


def ties_and_others(scale: Tensor | float) -> Tensor:
    """Ties from -300 to 300 steps, their neighbors in float32, and normal values, per scale."""
    steps = torch.arange(-600, 601) / 2
    steps = torch.cat([steps, torch.randn(500, generator=torch.Generator().manual_seed(0)) * 100])
    x = steps * torch.as_tensor(scale).reshape(-1, 1)
    return torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)], dim=1)


@deprecated
@pytest.mark.parametrize("scale", DYADIC)
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_quantize_per_tensor(scale: float, symmetric: bool) -> None:
    x = ties_and_others(scale)
    theirs = torch.quantize_per_tensor(x, scale, 0, torch.qint8 if symmetric else torch.quint8)
    ours = quantize(x, 8, symmetric=symmetric, scale=scale)
    assert torch.equal(ours.codes, theirs.int_repr())
    assert torch.equal(ours.dequantize(), theirs.dequantize())


@deprecated
@pytest.mark.parametrize("zero_point", [2, 17, 128, 255])
def test_quantize_per_tensor_adds_the_zero_point_before_it_rounds(zero_point: int) -> None:
    x = ties_and_others(0.25)
    theirs = torch.quantize_per_tensor(x, 0.25, zero_point, torch.quint8).int_repr()
    ours = quantize(x, 8, symmetric=False, scale=0.25, zero_point=zero_point).codes
    steps = x / 0.25
    # x/scale + zero_point drops the last bits of x/scale, so a value near to a tie becomes one;
    # and an odd zero point turns the even neighbor into the odd one.
    tie = (steps - steps.floor() - 0.5).abs() <= 2**9 * FLOAT32
    assert torch.equal(ours[~tie], theirs[~tie])
    assert (ours.int() - theirs.int()).abs().max() == 1
    assert torch.equal(theirs.int(), (steps + zero_point).round().clamp(0, 255).int())


@deprecated
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_quantize_per_channel(axis: int, symmetric: bool) -> None:
    scale = torch.tensor(DYADIC)
    x = ties_and_others(scale).movedim(0, axis)
    dtype = torch.qint8 if symmetric else torch.quint8
    theirs = torch.quantize_per_channel(x, scale, torch.zeros(4, dtype=torch.int64), axis, dtype)
    scale_given = scale[:, None].movedim(0, axis)
    ours = quantize(x, symmetric=symmetric, granularity=PerChannel(axis), scale=scale_given)
    assert torch.equal(ours.codes, theirs.int_repr())
    assert torch.equal(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize("scale", DYADIC)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_equals_fake_quantize_per_tensor(bits: int, symmetric: bool, scale: float) -> None:
    x = ties_and_others(scale)
    qmin, qmax = integer_range(bits, signed=symmetric)
    zero_point = 0 if symmetric else qmax // 3
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    ours = fake_quantize(x, bits, symmetric=symmetric, scale=scale, zero_point=zero_point)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_equals_fake_quantize_per_channel(bits: int, symmetric: bool) -> None:
    scale = torch.tensor(DYADIC)
    qmin, qmax = integer_range(bits, signed=symmetric)
    zero_point = torch.zeros(4).int() if symmetric else torch.tensor([0, 1, qmax // 2, qmax]).int()
    x = ties_and_others(scale)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, qmin, qmax)
    columns = {"scale": scale[:, None], "zero_point": zero_point[:, None]}
    ours = fake_quantize(x, bits, symmetric=symmetric, granularity=PerChannel(0), **columns)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_differs_from_fake_quantize_at_near_ties_alone(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    qmin, qmax = integer_range(bits, signed=symmetric)
    zero_point = 0 if symmetric else qmax // 3
    no_powers_of_two = torch.rand(20, generator=generator) + 0.01
    for scale in no_powers_of_two.tolist():
        x = ties_and_others(scale)
        theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
        ours = fake_quantize(x, bits, symmetric=symmetric, scale=scale, zero_point=zero_point)
        steps = (x.double() / torch.tensor(scale).double()).squeeze()
        moved = ((ours - theirs) / scale).squeeze().abs()
        # Theirs rounds 1/scale and then the product, ours the quotient: they differ by 2 roundings
        # of up to 300 steps.
        from_tie = (steps - steps.floor() - 0.5).abs()
        assert moved.max() < 1.001
        assert (from_tie[moved > 0.5] <= 2 * 301 * FLOAT32).all()
        assert torch.equal(ours.squeeze()[from_tie > 1e-4], theirs.squeeze()[from_tie > 1e-4])


def test_the_division_is_a_true_one() -> None:
    generator = torch.Generator().manual_seed(0)
    differ = 0
    for scale in (torch.rand(20, generator=generator) + 0.01).numpy():
        x = ties_and_others(scale.item()).squeeze().numpy()
        # rint rounds half to even, in float32 as x and scale are.
        expected = np.rint(x / scale)
        by_product = np.rint(x * (1 / scale))
        codes = quantize(torch.from_numpy(x), scale=scale.item()).codes
        assert codes.tolist() == expected.clip(-128, 127).tolist()
        differ += (expected != by_product).sum()
    assert differ > 0  # the cases tell a product with 1/scale apart


# Values worked by hand, from the literature that the lessons check


def test_ties_go_to_even() -> None:
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert quantize(ties, scale=1.0).codes.tolist() == [0, 2, 2, 0, -2, -2]


def test_both_ends_of_int4() -> None:
    x = torch.tensor([-9.0, -8.0, -7.6, 6.5, 7.4, 8.0])
    assert quantize(x, 4, scale=1.0).codes.tolist() == [-8, -8, -8, 6, 7, 7]
    shifted = quantize(x, 4, symmetric=False, scale=1.0, zero_point=8)
    assert shifted.codes.tolist() == [0, 0, 0, 14, 15, 15]


def test_a_symmetric_vector_in_int8() -> None:  # claim 5
    x = torch.tensor([-0.51, 0.02, 0.33, -0.18, 0.6])
    q = quantize(x)
    assert q.scale.item() == pytest.approx(0.6 / 127, rel=1e-7)
    assert q.codes.tolist() == [-108, 4, 70, -38, 127]
    q = quantize(x, symmetric=False)
    assert q.scale.item() == pytest.approx(1.11 / 255, rel=1e-7)
    assert (q.zero_point.item(), q.codes.tolist()) == (117, [0, 122, 193, 76, 255])


def test_the_scale_of_an_int8_range() -> None:  # claim 8
    q = quantize(torch.tensor([-2.8, 0.70, 3.1]))
    assert q.scale.item() == pytest.approx(0.0244, abs=5e-5)
    assert q.codes[1] == 29
    assert q.dequantize()[1].item() == pytest.approx(29 * 3.1 / 127, rel=1e-6)


def test_the_zero_point_of_a_uint8_range() -> None:  # claim 9
    q = quantize(torch.tensor([-0.4, 5.7]), symmetric=False)
    assert q.scale.item() == pytest.approx(0.0239, abs=5e-5)
    assert -q.zero_point.item() * q.scale.item() == pytest.approx(-0.4, abs=q.scale.item() / 2)
    assert (q.zero_point.item(), q.codes.tolist()) == (17, [0, 255])


def test_four_weights_in_int4() -> None:  # claim 10
    q = quantize(torch.tensor([-0.33, -0.10, 0.02, 0.41]), 4)
    assert q.scale.item() == pytest.approx(0.41 / 7, rel=1e-7)
    assert q.codes.tolist() == [-6, -2, 0, 7]


def test_codes_minus_3_and_6_at_a_scale_of_a_twentieth() -> None:  # claim 11
    codes = torch.tensor([-3, 6], dtype=torch.int8)
    parameters = Parameters(torch.tensor(0.05), torch.tensor(0, dtype=torch.int8))
    x_hat = IntQuantizer(4).decode(codes, parameters)
    assert x_hat.tolist() == pytest.approx([-0.15, 0.30])


def test_a_small_row_beside_a_large_one() -> None:  # claim 15
    x = torch.stack([torch.linspace(-0.2, 0.2, 41), torch.linspace(-2, 2, 41)])
    tensor = quantize(x, 4)
    rows = quantize(x, 4, granularity=PerChannel(0))
    assert tensor.scale.item() == pytest.approx(2 / 7)
    assert tensor.codes[0].unique().tolist() == [-1, 0, 1]
    assert rows.scale.squeeze().tolist() == pytest.approx([0.2 / 7, 2 / 7])
    assert rows.codes[0].unique().tolist() == list(range(-7, 8))


@pytest.fixture(scope="module")
def outlier_columns() -> Tensor:
    """512 x 512 standard normal, 8 columns times 20."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 512))
    x[:, rng.choice(512, size=8, replace=False)] *= 20
    return torch.from_numpy(x)


@pytest.mark.parametrize(
    ("bits", "granularity", "error", "kib"),
    [
        (8, PerTensor(), 0.0702, 256),
        (8, PerChannel(1), 0.0079, 258),
        (4, PerTensor(), 0.4021, 128),
        (4, PerChannel(1), 0.1450, 130),
        (8, PerChannel(0), 0.0314, 258),
        (4, PerChannel(0), 0.3571, 130),
    ],
)
def test_the_table_of_outlier_columns(  # claim 14
    outlier_columns: Tensor, bits: int, granularity: Granularity, error: float, kib: int
) -> None:
    q = quantize(outlier_columns, bits, granularity=granularity)
    assert round(relative_error(outlier_columns, q.dequantize()), 4) == error
    assert q.nbytes / 1024 == pytest.approx(kib, abs=0.005)  # per tensor 4 bytes more


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    """1024 x 1024 standard normal."""
    return torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, 0.1173),
        ({"scale_rule": "full"}, 0.1107),
        ({"symmetric": False}, 0.1005),
    ],
)
def test_the_error_of_int4_by_groups_of_128(gaussian: Tensor, options: dict, error: float) -> None:
    x_hat = fake_quantize(gaussian, 4, granularity=PerGroup(128), **options)
    measured = relative_error(gaussian, x_hat)
    assert measured == pytest.approx(error, abs=0.0006)  # seeds move it by up to 0.0003


def test_the_mse_rule_finds_the_best_clip_of_a_gaussian(gaussian: Tensor) -> None:
    # Max (1960), table II: 16 uniform levels leave at least 0.01154 of a Gaussian's power.
    x = gaussian[:128]
    error = relative_error(x, fake_quantize(x, 4, scale_rule="mse"))
    # Ours has a level at 0, so one side has a level less.
    assert error == pytest.approx(math.sqrt(0.01154), rel=0.03)


# Dtypes, layouts, gradients


@pytest.mark.parametrize(
    "scale_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_comes_in_and_goes_out(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 24, dtype=dtype).reshape(4, 6)
    options = {"granularity": PerGroup(3), "scale_dtype": scale_dtype}
    q = quantize(x, **options)
    assert q.scale.dtype == scale_dtype
    decoded_dtype = torch.float64 if scale_dtype == torch.float64 else torch.float32
    assert q.dequantize().dtype == decoded_dtype
    assert fake_quantize(x, **options).dtype == dtype
    assert torch.equal(q.codes, quantize(x.double(), **options).codes)


def test_a_float64_is_not_narrowed_before_it_is_rounded() -> None:
    # In float32 the first is a tie, which goes to 0.
    x = torch.tensor([0.5 + 1e-12, 127.0], dtype=torch.float64)
    assert quantize(x).codes.tolist() == [1, 127]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(5)])
def test_a_transposed_view_is_the_tensor_it_shows(granularity: Granularity) -> None:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0)).T
    view = quantize(x, 4, granularity=granularity)
    copy = quantize(x.contiguous(), 4, granularity=granularity)
    assert not x.is_contiguous()
    assert torch.equal(view.codes, copy.codes)
    assert torch.equal(view.dequantize(), copy.dequantize())
    assert view.codes.is_contiguous()


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(2)])
def test_gradients_stop_and_the_input_is_untouched(granularity: Granularity) -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = x.detach().clone()
    q = quantize(x, 4, granularity=granularity)
    assert not q.scale.requires_grad
    assert not q.dequantize().requires_grad
    assert not fake_quantize(x, 4, granularity=granularity).requires_grad
    assert torch.equal(x.detach(), before)
    assert x.requires_grad


def test_a_scale_with_a_gradient_is_taken_as_a_number() -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    q = quantize(torch.tensor([1.0]), scale=scale)
    assert not q.scale.requires_grad
    assert not q.dequantize().requires_grad
    assert not IntQuantizer().decode(q.codes, Parameters(scale, q.zero_point)).requires_grad


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scalar_is_a_tensor_of_its_own(symmetric: bool) -> None:
    q = quantize(torch.tensor(-3.0), symmetric=symmetric)
    assert q.codes.shape == q.scale.shape == torch.Size([])
    assert q.dequantize().item() == pytest.approx(-3.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), PerChannel(0), PerChannel(2), PerChannel(-1), PerChannel(-4), PerGroup(3)],
)
def test_four_axes(granularity: Granularity, symmetric: bool) -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    q = quantize(x, symmetric=symmetric, granularity=granularity)
    assert q.codes.shape == x.shape
    assert step_errors(x, q).max() <= 0.5001


def test_a_vector_by_channel_has_one_scale_per_value() -> None:
    q = quantize(torch.tensor([3.0, -0.5]), 4, granularity=PerChannel(0))
    assert q.codes.tolist() == [7, -7]
    assert q.dequantize().tolist() == pytest.approx([3.0, -0.5])


@pytest.mark.parametrize("rule", ["amax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_all_zero_channel_has_scale_1_and_codes_0(symmetric: bool, rule: str) -> None:
    x = torch.tensor([[0.0, -0.0], [1.0, 2.0]])
    q = quantize(x, 4, symmetric=symmetric, granularity=PerChannel(0), scale_rule=rule)
    assert q.scale[0].item() == 1
    assert q.codes[0].tolist() == [0, 0]
    assert q.dequantize()[0].tolist() == [0, 0]


def test_one_sided_data_keep_zero_on_the_grid() -> None:
    q = quantize(torch.tensor([3.0, 4.0, 5.0]), 4, symmetric=False)
    assert (q.zero_point.item(), q.codes.tolist()) == (0, [9, 12, 15])
    q = quantize(torch.tensor([-3.0, -4.0, -5.0]), 4, symmetric=False)
    assert (q.zero_point.item(), q.codes.tolist()) == (15, [6, 3, 0])


# A scale or zero point that is given


def test_a_given_scale_is_stored_as_a_fitted_one() -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    options = {"symmetric": False, "granularity": PerGroup(3), "scale_dtype": torch.float16}
    fitted = quantize(x, 4, **options)
    zero_point = fitted.zero_point.long()
    given_ = quantize(x, 4, **options, scale=fitted.scale, zero_point=zero_point)
    assert torch.equal(given_.codes, fitted.codes)
    assert given_.scale.dtype == fitted.scale.dtype
    assert given_.zero_point.dtype == fitted.zero_point.dtype
    assert given_.nbytes == fitted.nbytes


def test_one_given_number_serves_every_scale() -> None:
    q = quantize(torch.ones(4, 6), granularity=PerGroup(3), scale=0.5)
    assert q.scale.tolist() == [[0.5, 0.5]] * 4
    assert (q.codes == 2).all()


def test_a_given_float64_scale_keeps_its_digits() -> None:
    assert quantize(torch.ones(1), scale=0.1, scale_dtype=torch.float64).scale.item() == 0.1


def test_from_range_widens_to_hold_zero() -> None:
    low = torch.tensor([3.0, -6.0])
    high = torch.tensor([7.5, -3.0])
    parameters = IntQuantizer(4, symmetric=False).from_range(low, high)
    assert parameters.scale.tolist() == pytest.approx([0.5, 0.4])
    assert parameters.zero_point.tolist() == [0, 15]


def test_what_rounds_beyond_a_narrow_dtype_saturates() -> None:
    # On 256 levels -65504 is decoded as -65631.
    x = torch.tensor([-65504.0, 65504.0], dtype=torch.float16)
    assert fake_quantize(x, 8, symmetric=False).isfinite().all()


def test_quantized_tensors_are_compared_by_identity() -> None:
    q = quantize(torch.ones(3))
    same = q
    assert q == same
    assert q != quantize(torch.ones(3))


def test_the_signed_rule_gives_the_largest_value_the_code_qmin() -> None:
    x = torch.tensor([[-1.0, 0.5, 4.0, 0.0], [-4.0, 0.5, 1.0, 0.0]])
    q = IntQuantizer(4, granularity=PerChannel(), scale_rule="signed")(x)
    assert q.scale.flatten().tolist() == [-0.5, 0.5]
    assert q.codes.tolist() == [[2, -1, -8, 0], [-8, 1, 2, 0]]
    assert torch.equal(q.dequantize(), x)


def test_the_signed_rule_has_the_finer_grid_by_8_to_7() -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    amax = IntQuantizer(4, granularity=PerGroup(32))(x)
    signed = IntQuantizer(4, granularity=PerGroup(32), scale_rule="signed")(x)
    ratio = signed.scale.abs() / amax.scale
    assert torch.allclose(ratio, torch.full_like(ratio, 7 / 8))


def test_the_signed_rule_needs_a_symmetric_grid() -> None:
    with pytest.raises(ValueError, match="scale_rule='signed' needs symmetric=True"):
        IntQuantizer(4, symmetric=False, scale_rule="signed")
