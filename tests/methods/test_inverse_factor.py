"""The factor of a second moment's inverse, what is refused, and the error of the outputs."""

import re

import pytest
import torch
from torch import Tensor

from qcourse.methods.inverse_factor import LEAF, inverse_factor, invert_triangle
from qcourse.methods.second_moment import SecondMoment, output_error

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


# The triangle


@pytest.mark.parametrize("size", [1, 2, LEAF, LEAF + 1, 3 * LEAF - 1])
def test_a_triangle_is_inverted(size: int) -> None:
    lower = torch.linalg.cholesky(
        moment(normal(2 * size + 1, size)) + torch.eye(size, dtype=DOUBLE)
    )
    inverse = invert_triangle(lower)
    torch.testing.assert_close(inverse @ lower, torch.eye(size, dtype=DOUBLE))
    assert torch.equal(inverse, inverse.tril())


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_damped_inverse(act_order: bool) -> None:
    h = moment(normal(40, 9) * torch.tensor([4, 9, 1, 7, 3, 8, 2, 6, 5], dtype=DOUBLE))
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
    # The published code gives a dead input a 1; damping relative to that swamps small inputs.
    for unit in (1.0, 1e-4):
        alone = inverse_factor(moment(unit * x))
        factor = inverse_factor(moment(unit * with_dead), act_order=False)
        assert factor.dead.tolist() == [False, False, True, False, False, False]
        live = (~factor.dead).nonzero()[:, 0]
        torch.testing.assert_close(factor.upper[live][:, live], alone.upper)
        assert not factor.upper[2, 3:].any()
        assert not factor.upper[:2, 2].any()
        assert factor.note == "1 of 6 inputs always 0, their weights set to 0"


def test_dead_inputs_come_last_in_act_order() -> None:
    h = torch.diag(torch.tensor([0.0, 1e-6, 0.0, 2e-6]))
    assert inverse_factor(h, act_order=True).order.tolist() == [3, 1, 0, 2]


# At both ends the squares leave float32.
@pytest.mark.parametrize("unit", [1e-30, 1e-15, 1e-3, 1e3, 1e15, 1e30])
def test_the_unit_of_the_inputs_does_not_matter(unit: float) -> None:
    x = normal(30, 6, dtype=torch.float32)
    one = inverse_factor(SecondMoment().add(x))
    other = inverse_factor(SecondMoment().add(x * unit))
    torch.testing.assert_close(one.upper, other.upper, rtol=1e-4, atol=1e-4)
    assert other.unit == pytest.approx(one.unit * unit**2, rel=1e-4)


def test_a_hessian_in_float64_is_worked_on_in_float64() -> None:
    h = moment(normal(30, 6))
    for hessian in (h, SecondMoment().add(normal(30, 6))):
        factor = inverse_factor(hessian, dtype=torch.float32)
        assert factor.upper.dtype == DOUBLE
        torch.testing.assert_close(factor.upper, inverse_factor(h, dtype=DOUBLE).upper)
    assert inverse_factor(h.float(), dtype=DOUBLE).upper.dtype == DOUBLE


def test_damping_that_rounding_swallows_is_raised_and_the_note_says_so() -> None:
    x = normal(4, 300, dtype=torch.float32)
    h = SecondMoment().add(x).matrix
    assert inverse_factor(h).note == ""
    factor = inverse_factor(h, damp=1e-11)
    assert 1e-10 < factor.damp < 1e-3
    assert factor.note == f"damping raised from 1e-11 to {factor.damp:.3g}"
    # The reported damping was used: U H U^T = 1 at this damping, within what float32 resolves.
    damped = h.double() / factor.unit + factor.damp * torch.eye(300, dtype=DOUBLE)
    u = factor.upper.double()
    torch.testing.assert_close(u @ damped @ u.T, torch.eye(300, dtype=DOUBLE), atol=1, rtol=0)


def test_a_second_moment_that_is_not_quite_one_is_damped_until_it_is() -> None:
    h = moment(normal(3, 6))
    h -= 0.03 * h.diagonal().mean() * torch.eye(6, dtype=DOUBLE)  # as if summed in a narrow dtype
    # At 0.01 there is no Cholesky factor, at 0.032 there is one that is mostly rounding error.
    for damp in (0.01, 0.032):
        factor = inverse_factor(h, damp=damp)
        assert factor.damp == pytest.approx(10 * damp)
        assert factor.note == f"damping raised from {damp} to {10 * damp:.3g}"
        damped = h / factor.unit + factor.damp * torch.eye(6, dtype=DOUBLE)
        torch.testing.assert_close(
            factor.upper @ damped @ factor.upper.T, torch.eye(6, dtype=DOUBLE)
        )


def test_few_tokens_are_named() -> None:
    assert inverse_factor(SecondMoment().add(normal(6, 6))).note == ""
    factor = inverse_factor(
        SecondMoment().add(normal(5, 6) * torch.tensor([1, 1, 0, 1, 1, 1], dtype=DOUBLE))
    )
    assert factor.note == (
        "1 of 6 inputs always 0, their weights set to 0; "
        "5 tokens for 6 inputs: H is singular without damping"
    )


SYMMETRIC = torch.tensor([[2.0, 0.5], [0.5, 1.0]])


def beside_a_large_input(upper: float, lower: float) -> Tensor:
    """Two small inputs with these entries of H, and one a thousand times as large."""
    return torch.tensor([[1e6, 0.0, 0.0], [0.0, 1.0, upper], [0.0, lower, 1.0]])


@pytest.mark.parametrize(
    ("hessian", "words"),
    [
        (torch.ones(2, 3), "hessian of shape (2, 3) must be square"),
        (torch.ones(2), "hessian of shape (2,) must be square"),
        (torch.ones(0, 0), "hessian is empty"),
        (SYMMETRIC.triu(), "hessian must be symmetric, but [0, 1] is 0.5 and [1, 0] is 0"),
        (SYMMETRIC + torch.tensor([[0, 0], [0.05, 0]]), "but [0, 1] is 0.5 and [1, 0] is 0.55"),
        (beside_a_large_input(0.9, 0.0), "but [1, 2] is 0.9 and [2, 1] is 0"),
        (beside_a_large_input(0.9, 0.897), "but [1, 2] is 0.9 and [2, 1] is 0.897"),
        (
            torch.tensor([[0.0, 0.5], [0.5, 1.0]]),
            "hessian[0, 1]=0.5 must be 0, as hessian[0, 0] is",
        ),
        (
            torch.tensor([[1e6, 0.0, 1e-9], [0.0, 1.0, 0.0], [1e-9, 0.0, 0.0]]),
            "hessian[2, 0]=1e-09 must be 0",
        ),
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
    with pytest.raises(
        TypeError, match=r"hessian has dtype torch.int64; .* \(use hessian.float\(\)\)"
    ):
        inverse_factor(torch.eye(2, dtype=torch.int64))


@pytest.mark.parametrize("damp", [0, -0.01, float("nan"), float("inf")])
def test_damping_has_to_be_positive_and_finite(damp: float) -> None:
    with pytest.raises(ValueError, match=f"damp={damp} must be positive and finite"):
        inverse_factor(SYMMETRIC, damp=damp)


@pytest.mark.parametrize("h", [SYMMETRIC, beside_a_large_input(0.9, 0.9), SYMMETRIC.half()])
def test_rounding_may_leave_a_hessian_a_little_asymmetric(h: Tensor) -> None:
    h = h.clone()
    h[-2, -1] += 6e-4
    assert len(inverse_factor(h).order) == len(h)


@pytest.mark.parametrize(
    ("dtype", "small"), [(torch.float32, 1e-25), (torch.float16, 1e-4), (DOUBLE, 1e-200)]
)
def test_an_input_whose_square_is_too_small_to_be_a_float_is_as_good_as_dead(
    dtype: torch.dtype, small: float
) -> None:
    h = moment(torch.tensor([[1.0, small]], dtype=dtype))
    assert h[0, 1] > h[1, 1] == 0
    assert inverse_factor(h).dead.tolist() == [False, True]


# The error of the outputs


def test_the_output_error_is_that_of_the_outputs() -> None:
    x = normal(20, 6)
    w = normal(4, 6, seed=1)
    w_hat = normal(4, 6, seed=2)
    expected = float(torch.linalg.norm(x @ (w - w_hat).T) / torch.linalg.norm(x @ w.T))
    assert output_error(w, w_hat, SecondMoment().add(x)) == pytest.approx(expected)
    assert output_error(w, w_hat, 3 * moment(x)) == pytest.approx(expected)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_the_unit_of_the_inputs_changes_no_output_error(unit: float) -> None:
    x = normal(20, 6).float()
    w = normal(4, 6, seed=1)
    w_hat = normal(4, 6, seed=2)
    expected = output_error(w, w_hat, moment(x))
    assert output_error(w, w_hat, SecondMoment().add(unit * x)) == pytest.approx(expected, rel=1e-5)


def test_outputs_of_zero_have_no_relative_error() -> None:
    with pytest.raises(ValueError, match="w gives outputs of 0"):
        output_error(torch.zeros(1, 2), torch.ones(1, 2), SYMMETRIC)
