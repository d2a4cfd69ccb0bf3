"""Small floats against torch's and ml_dtypes' casts, and against exact fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from qcourse.numerics.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    E8M0,
    FloatFormat,
    decode,
)
from qcourse.numerics.minifloat_encoding import encode, encode_finite

FORMATS = [E4M3, E5M2, E3M2, E2M3, E2M1, E8M0]
SIGNED = [format for format in FORMATS if format.signed]
THEIRS = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E2M1: ml_dtypes.float4_e2m1fn,
    E8M0: ml_dtypes.float8_e8m0fnu,
}
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all are equal, NaN to NaN and -0 to -0."""
    bits_a = a.nan_to_num(0).view(torch.int32)
    bits_b = b.nan_to_num(0).view(torch.int32)
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(bits_a, bits_b)


def cast(x: Tensor, format: FloatFormat) -> Tensor:
    """Cast x to the format and back with ml_dtypes."""
    with np.errstate(invalid="ignore", over="ignore"):
        narrow = x.float().numpy().astype(THEIRS[format])
    return torch.from_numpy(narrow.astype(np.float32))


def every(dtype: torch.dtype) -> Tensor:
    """Return all 65,536 numbers of a 16-bit float, in float32."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_code_means_what_it_does_elsewhere(format: FloatFormat) -> None:
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    ours = decode(codes, format)
    assert same(ours, torch.from_numpy(codes.numpy().view(THEIRS[format]).astype(np.float32)))
    if format in TORCH:
        assert same(ours, codes.view(TORCH[format]).float())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_number_encodes_to_its_own_code(format: FloatFormat) -> None:
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    values = decode(codes, format)
    finite = torch.isfinite(values)
    for saturate in (True, False):
        assert torch.equal(encode(values[finite], format, saturate=saturate), codes[finite])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_float_of_16_bits_rounds_as_elsewhere(
    format: FloatFormat, dtype: torch.dtype
) -> None:
    x = every(dtype)
    if format.specials == "none":
        x = x[~x.isnan()]
    if not format.signed:
        x = x[(x >= 2.0**-126) | x.isnan()]  # below, ml_dtypes does not round to nearest
        x = x[~x.signbit()]
    inside = x.abs() <= format.max
    assert same(decode(encode(x, format), format)[inside], cast(x, format)[inside])
    # Beyond the largest number ml_dtypes does not saturate.
    if format.specials != "none":
        assert same(decode(encode(x, format, saturate=False), format), cast(x, format))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_float_of_16_bits_rounds_as_in_torch_once_overflow_is_settled(
    dtype: torch.dtype,
) -> None:
    x = every(dtype)
    assert same(decode(encode(x, E5M2, saturate=False), E5M2), x.to(torch.float8_e5m2).float())
    inside = x.clamp(-448, 448)  # beyond, versions of torch differ
    assert same(decode(encode(x, E4M3), E4M3), inside.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("format", SIGNED, ids=str)
def test_random_bits_round_as_elsewhere(format: FloatFormat) -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 24,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    normal = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x, normal * format.max / 3])
    x = x[torch.isfinite(x) & (x.abs() <= format.max)]
    assert same(decode(encode(x, format), format), cast(x, format))


@pytest.mark.parametrize("format", SIGNED, ids=str)
def test_each_tie_goes_to_the_even_code(format: FloatFormat) -> None:
    codes = torch.arange(format.max_code, dtype=torch.uint8)
    values = decode(torch.arange(format.max_code + 1), format).double()
    ties = (values[1:] + values[:-1]) / 2
    even = codes + codes % 2
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    above = torch.nextafter(ties, infinity)
    below = torch.nextafter(ties, -infinity)
    # float32 holds the ties, but not the numbers beside them.
    for dtype in (torch.float64, torch.float32):
        assert torch.equal(encode(ties.to(dtype), format), even)
    assert torch.equal(encode(above, format), codes + 1)
    assert torch.equal(encode(below, format), codes)
    assert torch.equal(encode(-ties, format), even + (1 << format.bits - 1))


OTHERS = [FloatFormat("E3M4", 3, 4, 3), FloatFormat("E4M2", 4, 2, 7, "ieee")]


@pytest.mark.parametrize("format", [*OTHERS, *SIGNED], ids=str)
def test_the_nearest_of_all_codes_in_exact_fractions(format: FloatFormat) -> None:
    numbers = decode(torch.arange(format.max_code + 1), format)
    values = [Fraction(number) for number in numbers.tolist()]
    x = torch.randn(200, generator=torch.Generator().manual_seed(2)).abs() * format.max / 4
    for number, code in zip(x.tolist(), encode(x, format).tolist(), strict=True):
        exact = Fraction(number)
        best = min(range(len(values)), key=lambda c: (abs(values[c] - exact), c % 2))
        assert code == best


def test_the_ends_of_each_format() -> None:
    assert [format.max for format in FORMATS] == [448, 57344, 28, 7.5, 6, 2.0**127]
    smallest = [2.0**-9, 2.0**-16, 2.0**-4, 2.0**-3, 0.5, 2.0**-127]
    assert [format.smallest for format in FORMATS] == smallest
    assert decode(torch.tensor([0x7F, 0xFF]), E4M3).isnan().all()
    assert decode(torch.tensor([0x7C, 0xFC]), E5M2).tolist() == [torch.inf, -torch.inf]
    ties = encode(torch.tensor([0.25, 2.5, 5.0]), E2M1)
    assert torch.equal(ties, encode(torch.tensor([0.0, 2, 4]), E2M1))


# Beyond the largest number


def test_overflow_saturates_or_becomes_what_the_format_has() -> None:
    x = torch.tensor([464.0, 464.1, -1e30, torch.inf, -torch.inf])
    assert decode(encode(x, E4M3), E4M3).tolist() == [448, 448, -448, 448, -448]
    plain = decode(encode(x, E4M3, saturate=False), E4M3)
    assert plain[0] == 448  # the tie with 480 goes to the even code, 448
    assert plain[1:].isnan().all()
    x = torch.tensor([61439.0, 61440.0, -1e30, torch.inf])
    assert decode(encode(x, E5M2), E5M2).tolist() == [57344, 57344, -57344, 57344]
    plain = decode(encode(x, E5M2, saturate=False), E5M2)
    assert plain.tolist() == [57344, torch.inf, -torch.inf, torch.inf]
    assert decode(encode(torch.tensor([1e38, 3e38]), E8M0), E8M0).tolist() == [2.0**126, 2.0**127]


def test_nan_and_the_sign_of_zero_are_kept() -> None:
    x = torch.tensor([torch.nan, -0.0, 0.0, -1e-30])
    for format in (E4M3, E5M2):
        back = decode(encode(x, format), format)
        assert back[0].isnan()
        assert back[1:].signbit().tolist() == [True, False, True]
    assert encode(x[1:], E2M1).tolist() == [8, 0, 8]


BEYOND = "x has 2 values beyond 6, for which E2M1 has no code; use saturate=True"


@pytest.mark.parametrize(
    ("x", "format", "saturate", "words"),
    [
        ([1.0, torch.nan], E2M1, True, "x has 1 NaN, for which E2M1 has no code"),
        ([1.0, 7.1, torch.inf], E2M1, False, BEYOND),
        ([1.0, -1.0], E8M0, True, "x has 1 negative values; E8M0 has no sign"),
        ([], E4M3, True, "x is empty"),
    ],
)
def test_what_a_format_has_no_code_for(
    x: list[float], format: FloatFormat, saturate: bool, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        encode(torch.tensor(x), format, saturate=saturate)


def test_codes_that_no_number_has() -> None:
    with pytest.raises(ValueError, match=r"codes of E2M1 must be from 0 to 15, got 0 to 16"):
        decode(torch.tensor([0, 16]), E2M1)
    with pytest.raises(TypeError, match=r"x has dtype torch.int64"):
        encode(torch.tensor([1]), E4M3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((8, 3, 7), "8 exponent and 3 mantissa bits make 12 with the sign; need 3 to 8"),
        ((0, 3, 1), "at least one of them for the exponent"),
        ((1, 0, 1), "make 2 with the sign"),
        ((4, -1, 1), "-1 mantissa bits"),
        ((4, 3, 200), "bias=200 of X is too far from 0"),
        ((4, 3, -120), "bias=-120 of X is too far from 0: float32 does not hold every number"),
        ((5, 0, 15, "ieee"), "specials='ieee' of X needs a mantissa bit"),
        ((4, 3, 7, "inf"), "specials='inf' must be"),
    ],
)
def test_formats_that_cannot_be(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FloatFormat("X", *arguments)


def test_a_number_that_is_rounded_up_at_random_has_no_code() -> None:
    x = torch.full((200,), 6.3)  # the nearest is 6, but at random it may be the next, which is none
    with pytest.raises(ValueError, match="values beyond 6, for which E2M1 has no code"):
        encode(x, E2M1, saturate=False, stochastic=torch.Generator().manual_seed(0))
    saturated = encode(x, E2M1, stochastic=torch.Generator().manual_seed(0))
    assert decode(saturated, E2M1).unique().tolist() == [6.0]


def test_both_zeros_are_the_smallest_of_a_format_without_zero() -> None:
    assert encode(torch.tensor([0.0, -0.0]), E8M0).tolist() == [0, 0]


@pytest.mark.parametrize("bias", [-100, 110, 126])
def test_formats_near_the_ends_of_float32(bias: int) -> None:
    format = FloatFormat("far", 4, 3, bias)
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    values = decode(codes, format)
    assert torch.equal(encode(values, format), codes)
    assert torch.equal(encode_finite(values, format).to(torch.uint8), codes)


# Other ways in


def test_shapes_dtypes_and_long_tensors() -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    assert encode(x, E4M3).shape == x.shape
    assert torch.equal(encode(x.mT, E4M3), encode(x, E4M3).mT)
    assert torch.equal(encode(x.half(), E4M3), encode(x.half().float(), E4M3))
    long = torch.linspace(-500, 500, (1 << 19) * 2 + 3)
    assert torch.equal(encode(long, E4M3)[::1000], encode(long[::1000], E4M3))
    assert torch.equal(encode_finite(long, E4M3).to(torch.uint8), encode(long, E4M3))
    assert encode(torch.tensor(1.0), E4M3).shape == ()


def test_float64_is_rounded_once() -> None:
    # float32 would make it a tie, and the tie 1.0.
    x = torch.tensor([1.0625 + 2.0**-40], dtype=torch.float64)
    assert decode(encode(x, E4M3), E4M3).item() == 1.125


def test_stochastic_rounding_has_the_mean_of_x_and_repeats() -> None:
    x = torch.full((20_000,), 1.03)
    codes = [encode(x, E4M3, stochastic=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    back = decode(codes[0], E4M3)
    assert set(back.tolist()) == {1.0, 1.125}
    assert back.mean().item() == pytest.approx(1.03, abs=0.002)  # five standard errors of the mean
    # Between 0 and the smallest subnormal number.
    small = torch.full((20_000,), 0.3 * E4M3.smallest)
    back = decode(encode(small, E4M3, stochastic=torch.Generator().manual_seed(0)), E4M3)
    assert (back / E4M3.smallest).mean().item() == pytest.approx(0.3, abs=0.017)
    exact = decode(torch.arange(127), E4M3)
    codes_of_exact = encode(exact, E4M3, stochastic=torch.Generator().manual_seed(0))
    assert torch.equal(decode(codes_of_exact, E4M3), exact)
