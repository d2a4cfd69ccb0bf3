"""The integer product: every bit equals the integer oracle, with and without zero points.

No sum wraps.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcourse import PerChannel, PerGroup, PerTensor, quantize
from qcourse.kernels import int8_matmul as module
from qcourse.kernels.int8_matmul import INT32_MAX, int8_matmul, quantized_matmul

DTYPES = [torch.int8, torch.uint8]
KINDS = [
    {"symmetric": True, "granularity": PerTensor()},
    {"symmetric": True, "granularity": PerChannel(0)},
    {"symmetric": False, "granularity": PerTensor()},
    {"symmetric": False, "granularity": PerChannel(0)},
]


def codes(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> Tensor:
    info = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=dtype)


def without_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 7), (17, 9, 64), (33, 130, 257)])
def test_it_equals_python_s_integers(
    shape: tuple[int, int, int],
    x_dtype: torch.dtype,
    w_dtype: torch.dtype,
    fallback: bool,
    monkeypatch,
) -> None:
    if fallback:
        without_the_product(monkeypatch)
    M, N, K = shape
    x = codes((M, K), x_dtype, 0)
    w = codes((N, K), w_dtype, 1)
    y = int8_matmul(x, w)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), x.long() @ w.long().T)


def saturating_product(x: Tensor, w: Tensor) -> Tensor:
    """As oneDNN computes it without VNNI: one factor unsigned, pairs of products added in int16."""
    products = (x.int() + 128)[:, :, None] * w.int()[None]  # (M, K, N)
    pairs = products.unflatten(1, (-1, 2)).sum(dim=2)  # (M, K / 2, N)
    sums = pairs.clamp(-(2**15), 2**15 - 1).sum(dim=1)
    return (sums - 128 * w.int().sum(dim=0)).int()


def test_a_product_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = codes((20, 4096), torch.int8, 0)
    w = codes((24, 4096), torch.int8, 1)
    exact = x.long() @ w.long().T
    assert not torch.equal(saturating_product(x, w.T).long(), exact)
    monkeypatch.setattr(torch, "_int_mm", saturating_product)
    module._sums_are_exact.cache_clear()
    try:
        assert torch.equal(int8_matmul(x, w).long(), exact)
    finally:
        module._sums_are_exact.cache_clear()


def test_codes_that_do_not_lie_side_by_side() -> None:
    x = codes((12, 20), torch.uint8, 0).T
    w = codes((6, 24), torch.int8, 1)[:, ::2]
    assert torch.equal(int8_matmul(x, w).long(), x.long() @ w.long().T)


@pytest.mark.parametrize(
    ("x", "w", "longest"),
    [
        (127, 127, 133_144),
        (-128, -128, 131_071),
        (-128, 127, 132_104),
        (255, 127, 66_311),
        (255, -128, 65_793),
        (1, 1, INT32_MAX),
    ],
)
def test_the_longest_sum_that_int32_holds(x: int, w: int, longest: int) -> None:
    if longest < INT32_MAX:
        a = torch.full((1, longest), x, dtype=torch.uint8 if x > 127 else torch.int8)
        b = torch.full((1, longest), w, dtype=torch.int8)
        assert int8_matmul(a, b).item() == x * w * longest
        longer_a = torch.cat([a, a[:, :1]], 1)
        longer_b = torch.cat([b, b[:, :1]], 1)
        message = rf"K={longest + 1} is too long for int32: .* allow {longest:,}; split K"
        with pytest.raises(ValueError, match=message):
            int8_matmul(longer_a, longer_b)
    assert abs(x * w * longest) <= INT32_MAX < abs(x * w * (longest + 1))


@given(
    st.integers(0, 2**31),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.integers(2, 8),
)
def test_the_quantized_product_is_that_of_what_the_codes_stand_for(
    seed: int, of_x: dict, of_w: dict, bits: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 40, generator=generator) + torch.randn(1, generator=generator)
    w = torch.randn(7, 40, generator=generator)
    qx = quantize(x, bits, scale_dtype=torch.float64, **of_x)
    qw = quantize(w, bits, scale_dtype=torch.float64, **of_w)
    expected = qx.dequantize() @ qw.dequantize().T
    torch.testing.assert_close(quantized_matmul(qx, qw), expected, rtol=1e-12, atol=1e-12)


def test_float16_scales_give_float32() -> None:
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    q = quantize(x, 8, granularity=PerChannel(0), scale_dtype=torch.float16)
    y = quantized_matmul(q, q)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, q.dequantize() @ q.dequantize().T)


def test_a_scale_along_the_sum_is_refused() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    for granularity in (PerGroup(8), PerChannel(1)):
        message = r"w has the granularity .* does not come out of the sum"
        with pytest.raises(ValueError, match=message):
            quantized_matmul(quantize(x), quantize(x, granularity=granularity))


INT8 = torch.ones(2, 3, dtype=torch.int8)
EMPTY = torch.ones(2, 0, dtype=torch.int8)


@pytest.mark.parametrize(
    ("x", "w", "error", "words"),
    [
        (INT8.float(), INT8, TypeError, "x has dtype torch.float32"),
        (INT8, INT8.int(), TypeError, "w has dtype torch.int32"),
        (INT8[0], INT8, ValueError, r"x of shape \(3,\)"),
        (EMPTY, EMPTY, ValueError, "at least one code"),
        (INT8, INT8[:, :2], ValueError, "same K"),
    ],
)
def test_bad_input(x: Tensor, w: Tensor, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        int8_matmul(x, w)
