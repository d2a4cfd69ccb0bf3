"""The second moment of the inputs, however they came; the triangle of its inverse; what is refused."""

import re

import pytest
import torch
from torch import Tensor

from qcourse.methods.hessian import LEAF, Hessian, inverse_factor, invert_triangle, output_error

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


# Gathering


@pytest.mark.parametrize("sizes", [[1] * 50, [17, 3, 30], [50]])
def test_batches_give_what_all_tokens_at_once_give(sizes: list[int]) -> None:
    x = (normal(50, 7) * 9).round().float()  # sums of whole numbers are exact in any order
    hessian = Hessian()
    for batch in x.split(sizes):
        hessian.add(batch)
    assert hessian.count == 50
    assert torch.equal(hessian.matrix, moment(x))
    assert hessian.matrix.dtype == torch.float32


def test_a_long_stream_in_float32_stays_near_the_sum_in_float64() -> None:
    x = normal(20_000, 8) + 1
    hessian = Hessian()
    for batch in x.float().split(20):
        hessian.add(batch)
    torch.testing.assert_close(hessian.matrix.double(), moment(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((3, 2), 240.0, dtype=dtype)  # whose square float16 does not hold
    assert Hessian().add(x).add(x).matrix.tolist() == [[57600.0] * 2] * 2


def test_what_was_given_is_not_kept_and_what_is_asked_for_is_a_copy() -> None:
    x = normal(4, 3).requires_grad_()
    hessian = Hessian().add(x)
    before = hessian.matrix
    assert not before.requires_grad
    before.zero_()
    with torch.no_grad():
        x.zero_()
    assert float(hessian.matrix.diagonal().min()) > 0


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        (torch.ones(0, 3), ValueError, "x is empty"),
        (torch.ones(3), ValueError, r"x of shape \(3,\) must have the shape \(tokens, 3\)"),
        (torch.ones(2, 4), ValueError, r"x of shape \(2, 4\) must have the shape \(tokens, 3\)"),
        (torch.tensor([[1.0, float("nan"), 1.0]]), ValueError, "x has 1 NaN or infinite values"),
    ],
)
def test_a_batch_that_is_refused_leaves_no_trace(x: Tensor, error: type[Exception], words: str) -> None:
    hessian = Hessian().add(normal(5, 3))
    before = hessian.matrix
    with pytest.raises(error, match=words):
        hessian.add(x)
    assert torch.equal(hessian.matrix, before)
    assert hessian.count == 5


def test_no_batch() -> None:
    with pytest.raises(ValueError, match="hessian has seen no inputs"):
        inverse_factor(Hessian())


# The triangle


@pytest.mark.parametrize("size", [1, 2, LEAF, LEAF + 1, 3 * LEAF - 1])
def test_a_triangle_is_inverted(size: int) -> None:
    lower = torch.linalg.cholesky(moment(normal(2 * size + 1, size)) + torch.eye(size, dtype=DOUBLE))
    inverse = invert_triangle(lower)
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=DOUBLE))
    assert torch.equal(inverse, inverse.tril())


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_damped_inverse(act_order: bool) -> None:
    h = moment(normal(40, 9) * torch.linspace(1, 3, 9, dtype=DOUBLE)[torch.randperm(9)])
    factor = inverse_factor(h, damp=0.05, act_order=act_order)
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(9)
    assert torch.equal(factor.order, order)
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(9, dtype=DOUBLE)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    torch.testing.assert_close(factor.upper / factor.unit**0.5, expected)
    assert (factor.damp, factor.note) == (0.05, "")


def test_a_dead_input_stands_alone_and_leaves_the_others_as_they_are() -> None:
    x = normal(40, 5)
    with_dead = torch.cat([x[:, :2], torch.zeros(40, 1, dtype=DOUBLE), x[:, 2:]], dim=1)
    for unit in (1.0, 1e-4):  # not the 1 of the published code, beside which small inputs would drown in damping
        alone, factor = inverse_factor(moment(unit * x)), inverse_factor(moment(unit * with_dead), act_order=False)
        assert factor.dead.tolist() == [False, False, True, False, False, False]
        live = (~factor.dead).nonzero()[:, 0]
        torch.testing.assert_close(factor.upper[live][:, live], alone.upper)
        assert not factor.upper[2, 3:].any()
        assert not factor.upper[:2, 2].any()
        assert factor.note == "1 of 6 inputs always 0, their weights set to 0"


def test_dead_inputs_come_last_in_act_order() -> None:
    h = torch.diag(torch.tensor([0.0, 1e-6, 0.0, 2e-6]))
    assert inverse_factor(h, act_order=True).order.tolist() == [3, 1, 0, 2]


@pytest.mark.parametrize("unit", [1e-15, 1e-3, 1e3, 1e15])
def test_the_unit_of_the_inputs_does_not_matter(unit: float) -> None:
    x = normal(30, 6, dtype=torch.float32)
    one, other = inverse_factor(Hessian().add(x)), inverse_factor(Hessian().add(x * unit))
    torch.testing.assert_close(one.upper, other.upper, rtol=1e-4, atol=1e-4)
    assert other.unit == pytest.approx(one.unit * unit**2, rel=1e-4)


def test_damping_that_rounding_swallows_is_raised_and_the_note_says_so() -> None:
    x = normal(4, 300, dtype=torch.float32)
    h = Hessian().add(x).matrix
    assert inverse_factor(h).note == ""
    factor = inverse_factor(h, damp=1e-11)
    assert 1e-10 < factor.damp < 1e-3
    assert factor.note == f"damping raised from 1e-11 to {factor.damp:.3g}"
    # And what is reported is what was used: U H U^T = 1 at this damping, as far as float32 has digits left.
    damped = h.double() / factor.unit + factor.damp * torch.eye(300, dtype=DOUBLE)
    u = factor.upper.double()
    torch.testing.assert_close(u @ damped @ u.T, torch.eye(300, dtype=DOUBLE), atol=1, rtol=0)


def test_a_second_moment_that_is_not_quite_one_is_damped_until_it_is() -> None:
    h = moment(normal(3, 6))
    h -= 0.03 * h.diagonal().mean() * torch.eye(6, dtype=DOUBLE)  # as if summed in a narrow dtype
    for damp in (0.01, 0.032):  # at the first there is no Cholesky factor, at the second one that is mostly rounding
        factor = inverse_factor(h, damp=damp)
        assert factor.damp == pytest.approx(10 * damp)
        assert factor.note == f"damping raised from {damp} to {10 * damp:.3g}"
        damped = h / factor.unit + factor.damp * torch.eye(6, dtype=DOUBLE)
        torch.testing.assert_close(factor.upper @ damped @ factor.upper.T, torch.eye(6, dtype=DOUBLE))


def test_few_tokens_are_named() -> None:
    assert inverse_factor(Hessian().add(normal(6, 6))).note == ""
    factor = inverse_factor(Hessian().add(normal(5, 6) * torch.tensor([1, 1, 0, 1, 1, 1], dtype=DOUBLE)))
    assert factor.note == (
        "1 of 6 inputs always 0, their weights set to 0; 5 tokens for 6 inputs: damping decides what they leave open"
    )


SYMMETRIC = torch.tensor([[2.0, 0.5], [0.5, 1.0]])


@pytest.mark.parametrize(
    ("hessian", "words"),
    [
        (torch.ones(2, 3), "hessian of shape (2, 3) must be square"),
        (torch.ones(2), "hessian of shape (2,) must be square"),
        (torch.ones(0, 0), "hessian is empty"),
        (SYMMETRIC.triu(), "hessian must be symmetric; two entries that should be equal are 0.5 apart"),
        (SYMMETRIC * float("nan"), "hessian has 4 NaN or infinite values"),
        (SYMMETRIC.clone().fill_diagonal_(float("inf")), "hessian has 2 NaN or infinite values"),
        (torch.zeros(2, 2), "hessian is zero on its whole diagonal"),
        (torch.diag(torch.tensor([1.0, -1.0])), "hessian[1, 1]=-1 must not be negative"),
        (torch.tensor([[1.0, 3.0], [3.0, 1.0]]), "hessian is not positive semidefinite"),
    ],
)
def test_what_is_no_second_moment(hessian: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        inverse_factor(hessian)


def test_a_hessian_of_integers() -> None:
    with pytest.raises(TypeError, match=r"hessian has dtype torch.int64; .* \(use hessian.float\(\)\)"):
        inverse_factor(torch.eye(2, dtype=torch.int64))


@pytest.mark.parametrize("damp", [0, -0.01, float("nan"), float("inf")])
def test_damping_has_to_be_positive_and_finite(damp: float) -> None:
    with pytest.raises(ValueError, match=f"damp={damp} must be positive and finite"):
        inverse_factor(SYMMETRIC, damp=damp)


def test_rounding_may_leave_a_hessian_a_little_asymmetric() -> None:
    h = SYMMETRIC.clone()
    h[0, 1] += 1e-5
    inverse_factor(h)


# The error of the outputs


def test_the_output_error_is_that_of_the_outputs() -> None:
    x, w, w_hat = normal(20, 6), normal(4, 6, seed=1), normal(4, 6, seed=2)
    expected = float(torch.linalg.norm(x @ (w - w_hat).T) / torch.linalg.norm(x @ w.T))
    assert output_error(w, w_hat, Hessian().add(x)) == pytest.approx(expected)
    assert output_error(w, w_hat, 3 * moment(x)) == pytest.approx(expected)


def test_outputs_of_zero_have_no_relative_error() -> None:
    with pytest.raises(ValueError, match="w gives outputs of 0"):
        output_error(torch.zeros(1, 2), torch.ones(1, 2), SYMMETRIC)
