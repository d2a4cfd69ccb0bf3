"""Quantizing with a float minimum: by hand, against the formula, and against a zero point."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcourse import IntQuantizer, MinimumQuantizer, PerGroup, PerTensor
from qcourse.numerics.minimum import Minimum


def test_a_row_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 8.5]])
    q = MinimumQuantizer(bits=4, granularity=PerGroup(4))(x)
    assert q.scale.tolist() == [[0.5]]
    assert q.parameters.minimum.tolist() == [[1.0]]
    assert q.codes.tolist() == [[0, 2, 4, 15]]
    assert torch.equal(q.dequantize(), x)
    assert q.nbytes == 2 + 2 + 2  # four nibbles, a scale, a minimum


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31), st.sampled_from([0.0, 5.0, -5.0]))
def test_the_error_is_at_most_half_a_step(bits: int, seed: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 64, generator=generator) + shift
    q = MinimumQuantizer(bits, PerGroup(32), torch.float32)(x)
    half_step = q.scale.repeat_interleave(32, dim=1) / 2
    slack = 1e-5 * (1 + x.abs())
    assert ((q.dequantize() - x).abs() <= half_step + slack).all()
    assert int(q.codes.max()) == 2**bits - 1
    assert int(q.codes.min()) == 0


def test_a_row_far_from_zero_gets_a_finer_grid_than_with_a_zero_point() -> None:
    x = torch.linspace(10.0, 11.0, 32)[None]
    by_minimum = MinimumQuantizer(4)(x)
    by_zero_point = IntQuantizer(4, symmetric=False, granularity=PerGroup(32))(x)
    # The range of the zero point must hold 0: 11 wide instead of 1.
    ratio = float(by_zero_point.scale / by_minimum.scale.float())
    assert ratio == pytest.approx(11, rel=1e-3)


def test_zero_need_not_be_on_the_grid() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.0, 1.0]])
    by_minimum = MinimumQuantizer(2, PerGroup(4))(x).dequantize()
    by_zero_point = IntQuantizer(2, symmetric=False, granularity=PerGroup(4))(x).dequantize()
    assert by_minimum[0, 1] != 0
    assert by_zero_point[0, 1] == 0


@pytest.mark.parametrize("value", [0.0, 0.75, -3.0])
def test_equal_values_have_scale_zero_and_come_back(value: float) -> None:
    q = MinimumQuantizer(4, PerTensor())(torch.full((8,), value))
    assert float(q.scale) == 0
    assert torch.equal(q.dequantize(), torch.full((8,), value))


def test_gptq_takes_it() -> None:
    from qcourse import gptq

    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 64, generator=generator)
    x = torch.randn(256, 64, generator=generator)
    found = gptq(w, x.T @ x / 256, MinimumQuantizer(4))
    nearest = MinimumQuantizer(4)(w).dequantize()
    error = ((w - found.quantized.dequantize()) @ x.T).square().sum()
    assert error < ((w - nearest) @ x.T).square().sum()


@pytest.mark.parametrize(
    ("scale", "minimum", "reason"),
    [
        (torch.ones(3), torch.ones(3), r"scale of shape \(3,\) must have the shape \(2,\)"),
        (torch.ones(2), torch.tensor([0.0, float("nan")]), "minimum=nan must be finite"),
        (torch.tensor([1.0, float("inf")]), torch.ones(2), "scale=inf must be finite"),
    ],
)
def test_parameters_that_do_not_suit(
    scale: torch.Tensor, minimum: torch.Tensor, reason: str
) -> None:
    codes = torch.zeros(64, dtype=torch.uint8)
    with pytest.raises(ValueError, match=reason):
        MinimumQuantizer(4).decode(codes, Minimum(scale, minimum))


def test_values_beyond_the_stored_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be finite in torch\.float16"):
        MinimumQuantizer(4)(torch.linspace(0, 1e9, 32))
    with pytest.raises(ValueError, match=r"bits=9 must be"):
        MinimumQuantizer(9)
    with pytest.raises(ValueError, match="NaN"):
        MinimumQuantizer(4)(torch.full((32,), float("nan")))
