"""Metrics against NumPy's and torch's own formulas, and at their edges."""

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

from qcourse.numerics.metrics import code_entropy, cosine, kl_divergence, relative_error, sqnr_db

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 300, generator=GENERATOR)
NOISE = torch.randn(5, 300, generator=GENERATOR)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_relative_error_and_sqnr(dtype: torch.dtype) -> None:
    x = X.to(dtype)
    x_hat = (X + 0.03 * NOISE).to(dtype)
    a = x.double().numpy()
    b = x_hat.double().numpy()
    expected = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert relative_error(x, x_hat) == pytest.approx(expected, rel=1e-12)
    power = 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())
    assert sqnr_db(x, x_hat) == pytest.approx(power, rel=1e-12)


def test_nothing_lost() -> None:
    assert relative_error(X, X) == 0
    assert sqnr_db(X, X) == math.inf


def test_a_tenth_is_20_db() -> None:
    assert sqnr_db(torch.tensor([10.0]), torch.tensor([9.0])) == pytest.approx(20)


def test_an_error_relative_to_nothing() -> None:
    for metric in (relative_error, sqnr_db):
        with pytest.raises(ValueError, match="x is all zero; the relative error is undefined"):
            metric(torch.zeros(3), torch.ones(3))


def test_cosine() -> None:
    a = X.double().numpy()
    b = NOISE.double().numpy()
    expected = (a * b).sum(axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert cosine(X, NOISE).numpy() == pytest.approx(expected, abs=1e-6)
    assert cosine(X, 3 * X).numpy() == pytest.approx(1, abs=1e-6)
    assert cosine(X[0], NOISE[0]).shape == ()


def test_kl_divergence() -> None:
    log_p_hat = NOISE.double().log_softmax(-1)
    p = X.double().softmax(-1)
    expected = torch.nn.functional.kl_div(log_p_hat, p, reduction="none").sum(-1)
    assert kl_divergence(X, NOISE).numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    # A constant added to logits changes nothing.
    assert kl_divergence(X, X + 7).numpy() == pytest.approx(0, abs=1e-6)


def test_kl_divergence_of_tokens_that_are_masked() -> None:
    inf = math.inf
    both = kl_divergence(torch.tensor([0.0, 1.0, -inf]), torch.tensor([1.0, 0.0, -inf]))
    without = kl_divergence(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert both.item() == pytest.approx(without.item())
    one_of_two = kl_divergence(torch.tensor([0.0, -inf]), torch.tensor([0.0, 0.0]))
    assert one_of_two.item() == pytest.approx(math.log(2))
    assert kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -inf])).item() == inf
    assert kl_divergence(torch.tensor([0.0, math.nan]), torch.tensor([0.0, 0.0])).isnan()


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_entropy_of_equally_many_codes_is_their_bits(bits: int) -> None:
    assert code_entropy(torch.arange(1 << bits).repeat(3)) == pytest.approx(bits)


def test_code_entropy() -> None:
    codes = (X * 2).round().to(torch.int8)
    p = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    assert code_entropy(codes) == pytest.approx(-(p * np.log2(p)).sum())
    single = code_entropy(torch.zeros(9, dtype=torch.uint8))
    assert single == 0
    assert math.copysign(1, single) == 1


@pytest.mark.parametrize("metric", [relative_error, sqnr_db, cosine, kl_divergence])
def test_nothing_broadcasts(metric: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=re.escape("shapes (3, 4) and (4,) differ")):
        metric(torch.ones(3, 4), torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_floats_are_compared_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for metric in (cosine, kl_divergence):
        assert torch.equal(metric(x, x.flip(0)), metric(x.float(), x.flip(0).float()))
    assert not kl_divergence(x, x).any()
