"""Gradients through rounding: by autograd, by a smoothed staircase, and as torch computes them."""

from typing import Any

import pytest
import torch
from inputs import normal
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor, quantize
from qcourse.methods.qat import FakeQuantized, beyond, lsq, straight_through
from qcourse.methods.ternary import TernaryQuantizer
from qcourse.numerics.codebook import CodebookQuantizer
from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.microscaling import NVFP4Quantizer, mx
from qcourse.numerics.minifloat import E2M1, E4M3

QUANTIZERS = [
    IntQuantizer(4),
    IntQuantizer(2, granularity=PerGroup(16)),
    IntQuantizer(3, symmetric=False, granularity=PerChannel(0)),
    FloatQuantizer(E2M1, PerChannel(0)),
    FloatQuantizer(E4M3, PerTensor()),
    CodebookQuantizer(granularity=PerGroup(16)),
    mx(E2M1),
    NVFP4Quantizer(),
    TernaryQuantizer(),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: type(q).__name__)
def test_forward_is_the_quantizer_and_backward_is_as_it_comes(quantizer: Any) -> None:
    x = normal(8, 32).requires_grad_()
    grad = normal(8, 32, seed=1)
    x_hat = straight_through(x, quantizer)
    x_hat.backward(grad)
    assert torch.equal(x_hat, quantizer(x.detach()).dequantize())
    outside = beyond(x.detach(), quantizer, quantizer.fit(x.detach()))
    assert torch.equal(x.grad, grad.masked_fill(outside, 0))
    # The scale of these two is not that of the largest value.
    clips = isinstance(quantizer, TernaryQuantizer) or quantizer == mx(E2M1)
    assert bool(outside.any()) == clips


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_ends_are_torchs(bits: int, symmetric: bool) -> None:
    quantizer = IntQuantizer(bits, symmetric=symmetric)
    zero = 0 if symmetric else 2
    given = quantize(torch.ones(1), bits, symmetric=symmetric, scale=0.5, zero_point=zero)
    parameters = given.parameters
    x = (torch.arange(-1200, 1200) / 8 + 1 / 64).requires_grad_()
    ours = straight_through(x, quantizer, parameters)
    ours.sum().backward()
    mine = x.grad.clone()
    x.grad = None
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.5, zero, quantizer.qmin, quantizer.qmax)
    theirs.sum().backward()
    assert torch.equal(ours, theirs)
    assert torch.equal(mine, x.grad)
    assert {0.0, 1.0} == set(mine.tolist())


def test_the_largest_weight_has_a_gradient() -> None:
    w = torch.tensor([0.3, -0.7, 0.1], requires_grad=True)
    straight_through(w, IntQuantizer(4)).sum().backward()
    assert w.grad.tolist() == [1, 1, 1]  # a strict rule between the ends would give -0.7 none


def test_the_ends_of_a_minifloat() -> None:
    quantizer = FloatQuantizer(E2M1)
    parameters = quantizer.fit(torch.tensor([6.0]))  # levels ... 3, 4, 6
    inside = torch.tensor([5.9, 6.9, -6.9, 2.5, 0.25])
    outside = torch.tensor([7.1, 100.0, -7.1])
    assert not beyond(inside, quantizer, parameters).any()
    assert beyond(outside, quantizer, parameters).all()


def test_no_gradient_goes_through_the_scale() -> None:
    x = normal(64).requires_grad_()
    straight_through(x, IntQuantizer(8)).sum().backward()
    assert x.grad.tolist() == [1.0] * 64  # through amax the largest would have had more


def test_a_float_stays_in_its_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = normal(64).to(dtype).requires_grad_()
        x_hat = straight_through(x, IntQuantizer(4))
        x_hat.sum().backward()
        assert x_hat.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(8)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_by_the_formula(bits: int, granularity: Any) -> None:
    quantizer = IntQuantizer(bits, granularity=granularity)
    x = (3 * normal(6, 16, seed=bits)).double().requires_grad_()
    scale = quantizer.fit(x.detach()).scale.double().mul(0.6).requires_grad_()
    grad = normal(6, 16, seed=1).double()
    x_hat = lsq(x, scale, quantizer)
    x_hat.backward(grad)
    columns = scale if scale.ndim != 2 else scale.repeat_interleave(16 // scale.shape[1], 1)
    per_value = columns.detach().expand(6, 16)
    v = x.detach() / per_value
    inside = (v >= quantizer.qmin) & (v <= quantizer.qmax)
    end = torch.where(v < 0, quantizer.qmin, quantizer.qmax).double()
    torch.testing.assert_close(x_hat, torch.where(inside, v.round(), end) * per_value)
    torch.testing.assert_close(x.grad, grad * inside)
    rows = granularity.rows(grad * torch.where(inside, v.round() - v, end)).sum(1)
    size = granularity.rows(grad).shape[1]
    expected = (rows / (max(quantizer.qmax, 1) * size) ** 0.5).reshape(scale.shape)
    torch.testing.assert_close(scale.grad, expected)
    assert bool(inside.any())
    assert not bool(inside.all())


def test_lsq_is_the_slope_of_the_smoothed_staircase() -> None:
    """Averaged over one step of x, the staircase is the line clamp(x), with the STE's slopes."""
    quantizer = IntQuantizer(3)
    s = 0.5
    h = 0.02
    shifts = (torch.arange(4096).double() + 0.5) / 4096 - 0.5  # a step, evenly

    def smooth(x: Tensor, scale: float) -> Tensor:
        steps = (x[:, None] / scale + shifts).round()
        return steps.clamp(quantizer.qmin, quantizer.qmax).mean(1) * scale

    # All more than half a step from the ends.
    x = torch.tensor([-3.0, -1.13, -0.31, 0.4, 0.86, 1.2, 1.9, 3.0]).double()
    slope = (smooth(x + h, s) - smooth(x - h, s)) / (2 * h)
    by_scale = (smooth(x, s + h) - smooth(x, s - h)) / (2 * h)
    ours = x.clone().requires_grad_()
    scale = torch.tensor(s).double().requires_grad_()
    lsq(ours, scale, quantizer).sum().backward()
    torch.testing.assert_close(slope, ours.grad, atol=1e-2, rtol=0)
    # Inside, the line does not depend on s: round(v) - v is 0 on average. Beyond, it is s times the
    # end of the grid.
    inside = ours.grad == 1
    ends = torch.where(x < 0, quantizer.qmin, quantizer.qmax).double()
    torch.testing.assert_close(by_scale, torch.where(inside, 0.0, ends), atol=1e-2, rtol=0)
    v = x / s
    expected = torch.where(inside, v.round() - v, ends).sum() / (3 * len(x)) ** 0.5
    torch.testing.assert_close(scale.grad, expected)


def test_a_scale_that_is_too_large_learns_to_shrink() -> None:
    x = normal(4096)
    quantizer = IntQuantizer(2)
    log_scale = torch.tensor(2.0).requires_grad_()  # all of x rounds to 0 or +-1 of 7.4
    optimizer = torch.optim.Adam([log_scale], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        error = lsq(x, log_scale.exp(), quantizer) - x
        error.square().mean().backward()
        optimizer.step()
    learned = float((lsq(x, log_scale.detach().exp(), quantizer) - x).square().mean())
    searched = float((quantize(x, 2, scale_rule="mse").dequantize() - x).square().mean())
    assert learned < 1.02 * searched


def test_a_parametrized_layer_trains_and_gives_its_codes() -> None:
    torch.manual_seed(0)
    for learned in (False, True):
        layer = nn.Linear(32, 16)
        x = normal(64, 32)
        target = x @ normal(16, 32, seed=2).T
        quantizer = IntQuantizer(
            3, granularity=PerGroup(16), scale_rule="mse", scale_dtype=torch.float16
        )
        grid = FakeQuantized(quantizer, layer.weight, learned_scale=learned)
        parametrize.register_parametrization(layer, "weight", grid)
        optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
        losses = []
        for _ in range(100):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.35 * losses[0]
        q = grid.quantized(layer.parametrizations.weight.original)
        assert q.codes.abs().max() <= 4
        assert q.scale.dtype == torch.float16
        assert torch.equal(q.dequantize(), layer.weight.detach())


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: straight_through(torch.ones(3), "int4"),
            TypeError,
            "quantizer='int4' must be a quantizer",
        ),
        (
            lambda: lsq(torch.ones(3), torch.ones(()), mx(E2M1)),
            TypeError,
            "must be an IntQuantizer",
        ),
        (
            lambda: lsq(torch.ones(3), torch.ones(()), IntQuantizer(4, symmetric=False)),
            ValueError,
            "symmetric=False",
        ),
        (
            lambda: lsq(torch.ones(3), torch.ones(3), IntQuantizer(4)),
            ValueError,
            r"scale of shape \(3,\) must have",
        ),
        (
            lambda: FakeQuantized(mx(E2M1), torch.ones(1, 32), learned_scale=True),
            TypeError,
            "must be an IntQuantizer",
        ),
        (lambda: straight_through(torch.tensor([torch.nan]), IntQuantizer(4)), ValueError, "NaN"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
