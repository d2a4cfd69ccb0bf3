"""SmoothQuant: s by the formula, an unchanged layer, and channels that have no range."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import normal, outliers
from torch import Tensor

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor, fake_quantize
from qcourse.methods.smoothquant import LEAST, SmoothQuant, smooth

INT8 = IntQuantizer(8, granularity=PerChannel(0))


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.75, 1])
def test_s_is_the_formula(alpha: float) -> None:
    w = normal(24, 32)
    x = outliers(50, 32, seed=1)
    w_smoothed, s = smooth(w, x.abs().amax(0), alpha)
    w_np = w.double().numpy()
    x_np = x.double().numpy()
    expected = np.abs(x_np).max(0) ** alpha / np.abs(w_np).max(0) ** (1 - alpha)
    np.testing.assert_allclose(s.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(w_smoothed.numpy(), w_np * expected, rtol=1e-6)
    # As in the paper: x / s reaches (amax_x amax_w)^(1 - alpha), w s reaches (amax_x amax_w)^alpha.
    both = np.abs(x_np).max(0) * np.abs(w_np).max(0)
    np.testing.assert_allclose((x / s).abs().amax(0).numpy(), both ** (1 - alpha), rtol=1e-5)
    np.testing.assert_allclose(w_smoothed.abs().amax(0).numpy(), both**alpha, rtol=1e-5)


DEAD = {"none": [], "one": [3], "several": [0, 3, 31], "all": list(range(32))}


@given(
    st.sampled_from(sorted(DEAD)),
    st.sampled_from(sorted(DEAD)),
    st.floats(0, 1),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    st.integers(0, 100),
)
def test_the_layer_computes_the_same(
    of_x: str, of_w: str, alpha: float, size_x: float, size_w: float, seed: int
) -> None:
    w = normal(8, 32, seed=seed).double() * size_w
    x = outliers(20, 32, seed=seed + 1).double() * size_x
    x[:, DEAD[of_x]] = 0
    w[:, DEAD[of_w]] = 0
    w_smoothed, s = smooth(w, x.abs().amax(0), alpha)
    assert torch.isfinite(s).all()
    assert (s > 0).all()
    y = x @ w.T
    atol = 1e-12 * (float(y.abs().max()) or 1)
    torch.testing.assert_close((x / s) @ w_smoothed.T, y, rtol=0, atol=atol)


@pytest.mark.parametrize("unit", [2.0**-60, 1.0, 2.0**40])
@pytest.mark.parametrize("alpha", [0.5, 1])
def test_a_channel_that_is_always_0_counts_as_a_small_one(alpha: float, unit: float) -> None:
    w = normal(8, 32)
    x_amax = outliers(50, 32, seed=1).abs().amax(0) * unit
    x_amax[[5, 7]] = torch.tensor([0.0, 1e-9 * unit])
    w[:, 6] = 0
    w_smoothed, s = smooth(w, x_amax, alpha)
    least_x = float(x_amax.max()) * LEAST
    least_w = float(w.abs().max()) * LEAST
    w_amax = w.abs().amax(0).tolist()
    for dead in (5, 7):
        expected = least_x**alpha / w_amax[dead] ** (1 - alpha)
        assert float(s[dead]) == pytest.approx(expected, rel=1e-6)
    expected = float(x_amax[6]) ** alpha / least_w ** (1 - alpha)
    assert float(s[6]) == pytest.approx(expected, rel=1e-6)
    # So the weights of a dead channel do not set the scale of the others.
    assert float(w_smoothed[:, 5].abs().max()) < 0.2 * float(w_smoothed.abs().max())


@pytest.mark.parametrize("seed", range(4))
def test_shared_scales_lose_less(seed: int) -> None:
    """Activations with one scale per tensor, weights with one per output."""
    w = normal(64, 128, seed=seed)
    x = outliers(300, 128, seed=seed + 10)

    def lost(x: Tensor, w: Tensor, y: Tensor) -> float:
        y_hat = fake_quantize(x, 8) @ fake_quantize(w, 8, granularity=PerChannel(0)).T
        return float((y_hat - y).norm() / y.norm())

    y = x @ w.T
    x_amax = x.abs().amax(0)
    errors = {}
    for alpha in (0.25, 0.5, 0.75):
        w_smoothed, s = smooth(w, x_amax, alpha)
        errors[alpha] = lost(x / s, w_smoothed, y)
    # Seeds 0 to 7: without smoothing 0.0132 to 0.0137, at alpha 0.5 0.0071 to 0.0074.
    assert errors[0.5] < 0.65 * lost(x, w, y)
    assert errors[0.5] < errors[0.25]
    # The other way round, s multiplied into x and divided out of w, is worse than nothing.
    w_smoothed, s = smooth(w, x_amax)
    assert lost(x * s, w / s, y) > 1.5 * lost(x, w, y)


def test_half_precision_is_worked_on_in_float32() -> None:
    w = normal(8, 32).half() * 1000
    x_amax = normal(32, seed=1).abs().bfloat16() * 1000
    w_smoothed, s = smooth(w, x_amax, 1)
    assert w_smoothed.dtype == s.dtype == torch.float32
    assert float(w_smoothed.abs().max()) > torch.finfo(torch.float16).max
    assert torch.equal(s, smooth(w.float(), x_amax.float(), 1)[1])
    assert smooth(w.double(), x_amax)[1].dtype == torch.float64


# The method


def test_layers_share_s_by_their_common_amax() -> None:
    x = outliers(60, 32)
    weights = {"q": normal(16, 32), "k": 5 * normal(8, 32, seed=1), "v": normal(8, 32, seed=2) / 5}
    method = SmoothQuant(INT8, 0.7)
    seen = None
    for batch in x.split(7):
        kept = batch.clone()
        seen = method.observe(seen, kept)
        kept.zero_()  # the model may use its memory again
    assert seen is not None
    together = method.quantize(weights, seen)
    stacked, s = smooth(torch.cat(list(weights.values())), x.abs().amax(0), 0.7)
    codes = torch.cat([result.quantized.codes for result in together.values()])
    assert torch.equal(codes, INT8(stacked).codes)
    for name, result in together.items():
        assert torch.equal(result.input_scale, s)
        # Half a step of its row, in w's units.
        step = result.quantized.scale * 0.5001 / s
        assert ((result.w_hat - weights[name]).abs() <= step).all()
    assert re.fullmatch(r"alpha 0\.70, inputs divided by [\d.]+ to [\d.]+", together["q"].note)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(16)])
def test_any_quantizer_will_do(granularity: Any) -> None:
    quantizer = IntQuantizer(4, symmetric=False, granularity=granularity)
    method = SmoothQuant(quantizer)
    w = normal(8, 32)
    result = method.quantize({"w": w}, method.observe(None, outliers(20, 32)))["w"]
    expected = quantizer(smooth(w, outliers(20, 32).abs().amax(0))[0])
    assert torch.equal(result.quantized.codes, expected.codes)
    assert torch.equal(result.quantized.zero_point, expected.zero_point)


# What is refused


@pytest.mark.parametrize(
    ("w", "x_amax", "error", "words"),
    [
        (
            normal(4, 32),
            torch.ones(16),
            ValueError,
            "x_amax of shape (16,) must have the shape (32,)",
        ),
        (
            normal(4, 32),
            torch.ones(1, 32),
            ValueError,
            "x_amax of shape (1, 32) must have the shape (32,)",
        ),
        (normal(32), torch.ones(32), ValueError, "w of shape (32,) must be a matrix"),
        (torch.zeros(0, 32), torch.ones(32), ValueError, "w is empty"),
        (normal(4, 32).long(), torch.ones(32), TypeError, "w has dtype torch.int64"),
        (normal(4, 32), torch.ones(32).int(), TypeError, "x_amax has dtype torch.int32"),
        (normal(4, 32), [1.0] * 32, TypeError, "x_amax is a list"),
        (normal(4, 32) / 0, torch.ones(32), ValueError, "w has 128 NaN or infinite values"),
        (
            normal(4, 32),
            torch.ones(32) * math.nan,
            ValueError,
            "x_amax has 32 NaN or infinite values",
        ),
        (normal(4, 32), -torch.ones(32), ValueError, "x_amax=-1 must be at least 0"),
        (normal(4, 32) * 1e-42, torch.ones(32) * 1e38, ValueError, "must be positive and finite"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_inputs_that_cannot_be(w: Any, x_amax: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        smooth(w, x_amax)


def test_a_smoothed_weight_that_overflows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"w s has .* NaN or infinite values"):
        smooth(normal(4, 32) * 1e20, torch.ones(32) * 1e30, 1)


@pytest.mark.parametrize("alpha", [-0.1, 1.01, math.nan, "half", None, True])
@pytest.mark.usefixtures("unchecked")
def test_alpha_is_from_0_to_1(alpha: Any) -> None:
    for attempt in (
        lambda: smooth(normal(4, 32), torch.ones(32), alpha),
        lambda: SmoothQuant(INT8, alpha),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"alpha={alpha!r} must be a number from 0 to 1")
        ):
            attempt()


@pytest.mark.parametrize("quantizer", ["int8", IntQuantizer, None])
@pytest.mark.usefixtures("unchecked")
def test_a_quantizer_is_a_value(quantizer: Any) -> None:
    with pytest.raises(TypeError, match="must be a quantizer such as"):
        SmoothQuant(quantizer)


def test_a_layer_that_is_refused_is_named() -> None:
    method = SmoothQuant(IntQuantizer(8, scale_dtype=torch.float16), 1)
    x = torch.ones(2, 32)
    with pytest.raises(ValueError, match=r"layer 'up': scale=.*cannot be held"):
        method.quantize({"gate": normal(4, 32), "up": normal(4, 32) * 1e9}, method.observe(None, x))
    with pytest.raises(ValueError, match="layer 'gate, up': w has 128 NaN"):
        method.quantize({"gate": normal(4, 32), "up": normal(4, 32) / 0}, method.observe(None, x))
    x = torch.ones(2, 32) * torch.tensor([[1.0], [math.nan]])
    for batches in (x.split(1), x.flip(0).split(1)):
        seen = method.observe(method.observe(None, batches[0]), batches[1])
        with pytest.raises(ValueError, match=r"layer 'gate, up': x_amax has 32 NaN"):
            method.quantize({"gate": normal(4, 32), "up": normal(4, 32)}, seen)
