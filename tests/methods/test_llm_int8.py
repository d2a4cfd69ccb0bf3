"""LLM.int8(): the two parts by hand, which columns are outliers, and what the split gains."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import normal, outliers

from qcourse import IntQuantizer, PerChannel, PerTensor, fake_quantize
from qcourse.methods.llm_int8 import OutlierColumns, llm_int8_matmul, outlier_columns

INT8 = IntQuantizer(8, granularity=PerChannel(0))


def by_hand(x: np.ndarray, w: np.ndarray, threshold: float) -> np.ndarray:
    """Column by column, with Python's integers, and float64 elsewhere."""
    out = np.zeros((len(x), len(w)))
    kept = [j for j in range(x.shape[1]) if any(abs(row[j]) > threshold for row in x)]
    rest = [j for j in range(x.shape[1]) if j not in kept]
    for t, row in enumerate(x):
        for o, column in enumerate(w):
            y = sum(row[j] * column[j] for j in kept)
            s_x = max((abs(row[j]) for j in rest), default=0) / 127 or 1
            s_w = max((abs(column[j]) for j in rest), default=0) / 127 or 1
            products = [round(row[j] / s_x) * round(column[j] / s_w) for j in rest]
            out[t, o] = y + s_x * s_w * sum(products)
    return out


@pytest.mark.parametrize("threshold", [0.5, 2.0, 6.0, math.inf])
@pytest.mark.parametrize("seed", range(3))
def test_the_product_by_hand(threshold: float, seed: int) -> None:
    x = outliers(5, 32, seed=seed).double()
    w = normal(6, 32, seed=seed + 1).double()
    expected = by_hand(x.numpy(), w.numpy(), threshold)
    found = llm_int8_matmul(x, w, threshold).numpy()
    # Scales are kept in float32.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_at_the_ends_it_is_one_of_the_two_products() -> None:
    x = outliers(20, 64)
    w = normal(16, 64, seed=1)
    torch.testing.assert_close(llm_int8_matmul(x, w, 1e-30), x @ w.T, rtol=1e-5, atol=1e-4)
    w8a8 = INT8(x).dequantize() @ INT8(w).dequantize().T
    torch.testing.assert_close(llm_int8_matmul(x, w, math.inf), w8a8, rtol=1e-5, atol=1e-4)
    assert float((w8a8 - x @ w.T).norm()) > 1e-3


def test_whole_numbers_come_out_exactly() -> None:
    """Rows that reach 127 have scale 1: nothing is rounded, even for sums beyond float32's 2^24."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 4096), generator=generator).double()
    w = torch.randint(100, 128, (4, 4096), generator=generator).double()
    x[:, 0] = w[:, 0] = 127
    x[0] = w[0]
    x[:, [5, 9]] = 1000.5
    assert float((x @ w.T).max()) > 2**24
    assert torch.equal(llm_int8_matmul(x, w, 128), x @ w.T)


@given(st.floats(0.1, 40), st.integers(1, 6), st.integers(0, 1000))
def test_a_column_is_an_outlier_by_one_magnitude(threshold: float, tokens: int, seed: int) -> None:
    x = outliers(tokens, 32, seed=seed)
    expected = [any(abs(float(value)) > threshold for value in column) for column in x.T]
    assert outlier_columns(x, threshold).tolist() == expected
    assert outlier_columns(-x[None], threshold).tolist() == expected
    assert torch.equal(outlier_columns(x[0], threshold), x[0].abs() > threshold)


def test_the_threshold_is_in_the_units_of_x() -> None:
    x = torch.tensor([[1.0, 6.0, 6.01, 5.0]])
    assert outlier_columns(x).tolist() == [False, False, True, False]
    assert not outlier_columns(x / 2).any()
    assert outlier_columns(x * 10).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_others_get_finer_steps(seed: int) -> None:
    x = outliers(300, 128, seed=seed)
    w = normal(64, 128, seed=seed + 10)
    y = x @ w.T
    split = float((llm_int8_matmul(x, w, 6.0) - y).norm() / y.norm())
    plain = float((llm_int8_matmul(x, w, math.inf) - y).norm() / y.norm())
    # Seeds 0 to 7: 0.0009 against 0.0130.
    assert split < 0.2 * plain
    x_hat = OutlierColumns(INT8)(x)
    rest = ~outlier_columns(x)
    error = float((x_hat - x)[:, rest].norm())
    plain_error = float((INT8(x).dequantize() - x)[:, rest].norm())
    assert error < 0.2 * plain_error


@pytest.mark.parametrize(
    "quantizer", [INT8, IntQuantizer(8, symmetric=False, granularity=PerTensor())]
)
def test_outlier_columns_stay_as_they_are(quantizer: IntQuantizer) -> None:
    x = outliers(12, 32)
    x_hat = OutlierColumns(quantizer, 5.0)(x)
    columns = outlier_columns(x, 5.0)
    assert 0 < int(columns.sum()) < 32
    assert torch.equal(x_hat[:, columns], x[:, columns])
    rest = x[:, ~columns]
    expected = fake_quantize(
        rest, 8, symmetric=quantizer.symmetric, granularity=quantizer.granularity
    )
    assert torch.equal(x_hat[:, ~columns], expected)


def test_all_leading_axes_are_tokens_of_one_batch() -> None:
    x = outliers(12, 32)
    w = normal(4, 32, seed=1)
    x[:, 4] /= 100
    x[7, 4] = 9  # one token makes a column an outlier for all
    x_hat = OutlierColumns(INT8)(x)
    y = llm_int8_matmul(x, w)
    for shape in ((3, 4, 32), (12, 1, 32), (12, 32)):
        batch = x.reshape(shape)
        assert torch.equal(OutlierColumns(INT8)(batch), x_hat.reshape(shape))
        assert torch.equal(llm_int8_matmul(batch, w), y.reshape(*shape[:-1], 4))
    assert torch.equal(llm_int8_matmul(x[0], w), llm_int8_matmul(x[:1], w)[0])
    assert outlier_columns(x)[4]
    assert not outlier_columns(x[:7])[4]


def test_zeros_and_columns_that_are_all_outliers() -> None:
    w = normal(4, 32)
    assert torch.equal(llm_int8_matmul(torch.zeros(3, 32), w), torch.zeros(3, 4))
    assert torch.equal(llm_int8_matmul(normal(3, 32), torch.zeros(4, 32)), torch.zeros(3, 4))
    x = torch.full((2, 32), 7.5)
    assert torch.equal(OutlierColumns(INT8)(x), x)
    torch.testing.assert_close(llm_int8_matmul(x, w), x @ w.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_is_that_of_x(dtype: torch.dtype) -> None:
    x = outliers(8, 32).to(dtype)
    w = normal(4, 32, seed=1)
    y = llm_int8_matmul(x, w)
    assert y.dtype == OutlierColumns(INT8)(x).dtype == dtype
    torch.testing.assert_close(y, llm_int8_matmul(x.float(), w).to(dtype), rtol=1e-5, atol=1e-4)
    assert torch.equal(OutlierColumns(INT8)(x), OutlierColumns(INT8)(x.float()).to(dtype))


# What is refused


@pytest.mark.parametrize("threshold", [0, -6.0, math.nan, "6", None, True])
@pytest.mark.usefixtures("unchecked")
def test_a_threshold_is_above_0(threshold: Any) -> None:
    x = normal(3, 32)
    w = normal(4, 32)
    words = re.escape(f"threshold={threshold!r} must be a number above 0")
    with pytest.raises(ValueError, match=words):
        outlier_columns(x, threshold)
    with pytest.raises(ValueError, match=words):
        llm_int8_matmul(x, w, threshold)
    with pytest.raises(ValueError, match=words):
        OutlierColumns(INT8, threshold)


OTHER_INPUTS = "x (3, 16) and w (4, 32) must have the same inputs"


@pytest.mark.parametrize(
    ("x", "w", "error", "words"),
    [
        (normal(3, 16), normal(4, 32), ValueError, OTHER_INPUTS),
        (normal(3, 32), normal(32), ValueError, "w of shape (32,) must be a matrix"),
        (torch.tensor(1.0), normal(4, 32), ValueError, "x of shape () must have an axis"),
        (torch.zeros(0, 32), normal(4, 32), ValueError, "x is empty"),
        (normal(3, 32), torch.zeros(0, 32), ValueError, "w is empty"),
        (normal(3, 32).long(), normal(4, 32), TypeError, "x has dtype torch.int64"),
        (normal(3, 32), [[1.0]], TypeError, "w is a list"),
        (normal(3, 32) * math.nan, normal(4, 32), ValueError, "x has 96 NaN or infinite values"),
        (normal(3, 32) / 0, normal(4, 32), ValueError, "x has 96 NaN or infinite values"),
        (normal(3, 32), normal(4, 32) / 0, ValueError, "w has 128 NaN or infinite values"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_matrices(x: Any, w: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        llm_int8_matmul(x, w)
    if words.startswith("x") and "same" not in words:
        with pytest.raises(error, match=re.escape(words)):
            OutlierColumns(INT8)(x)


@pytest.mark.parametrize("quantizer", ["int8", IntQuantizer, None])
@pytest.mark.usefixtures("unchecked")
def test_a_quantizer_is_a_value(quantizer: Any) -> None:
    with pytest.raises(TypeError, match="must be a quantizer such as"):
        OutlierColumns(quantizer)
