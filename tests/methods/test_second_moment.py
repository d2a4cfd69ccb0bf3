"""The second moment of inputs in any batches and of any size; what is stored; what is refused."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcourse.methods.awq import Awq
from qcourse.methods.gptq import Gptq
from qcourse.methods.second_moment import SecondMoment
from qcourse.numerics.affine import IntQuantizer

DOUBLE = torch.float64


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def gathered(*batches: Tensor) -> SecondMoment:
    hessian = SecondMoment()
    for batch in batches:
        hessian.add(batch)
    return hessian


@pytest.mark.parametrize("sizes", [[1] * 50, [17, 3, 30], [50]])
def test_batches_give_what_all_tokens_at_once_give(sizes: list[int]) -> None:
    x = (normal(50, 7) * 9).round().float()  # sums of whole numbers are exact in any order
    hessian = SecondMoment()
    for batch in x.split(sizes):
        hessian.add(batch)
    assert hessian.count == 50
    assert torch.equal(hessian.matrix, moment(x))
    assert hessian.matrix.dtype == torch.float32


def test_a_long_stream_in_float32_stays_near_the_sum_in_float64() -> None:
    x = normal(20_000, 8) + 1
    hessian = SecondMoment()
    for batch in x.float().split(20):
        hessian.add(batch)
    torch.testing.assert_close(hessian.matrix.double(), moment(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_activations_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((3, 2), 240.0, dtype=dtype)  # whose square float16 does not hold
    assert SecondMoment().add(x).add(x).matrix.tolist() == [[57600.0] * 2] * 2


@pytest.mark.parametrize("tokens", [2, 4])
def test_what_was_given_is_not_kept_and_what_is_asked_for_is_a_copy(tokens: int) -> None:
    x = normal(tokens, 3).requires_grad_()
    hessian = SecondMoment().add(x)
    expected = moment(x.detach())
    for ask in (lambda: hessian.matrix, lambda: hessian.scaled_matrix):
        before = ask()
        assert not before.requires_grad
        before.zero_()
    with torch.no_grad():
        x.zero_()
    torch.testing.assert_close(hessian.matrix, expected)


# What is kept


def test_inputs_are_kept_as_they_are_while_they_are_few() -> None:
    x = normal(7, 4, dtype=torch.float32)
    hessian = SecondMoment()
    for i, batch in enumerate(x.split([1, 2, 1, 3])):
        hessian.add(batch)
        seen = x[: hessian.count]
        few = hessian.count < 4
        assert (hessian.gram is None) == few
        assert len(hessian.batches) == (i + 1 if few else 0)
        form = hessian.as_one_group()
        assert form.is_gram == (not few)
        expected = seen.T @ seen if form.is_gram else seen
        torch.testing.assert_close(
            form.stored[0] / hessian.input_factor ** (1 + form.is_gram), expected
        )
        torch.testing.assert_close(hessian.matrix, moment(seen))
        torch.testing.assert_close(
            hessian.sum_of_abs / hessian.input_factor, seen.double().abs().sum(0), rtol=1e-6, atol=0
        )
    assert hessian.sum_of_abs.dtype == DOUBLE


def test_once_there_is_a_square_it_is_added_to_in_place() -> None:
    hessian = SecondMoment().add(normal(5, 4))
    gram = hessian.gram
    assert hessian.add(normal(5, 4, seed=1)).gram is gram is not None


# Of whatever size


@pytest.mark.parametrize("tokens", [3, 40], ids=["by x", "by x^T x"])
@pytest.mark.parametrize(
    "units", [(1e-10, 1e20), (1e20, 1e-10), (0, 1e-25), (1e-25, 0, 1e-25), (0, 3e37), (1e-38, 1e37)]
)
def test_batches_of_very_different_sizes(units: tuple[float, ...], tokens: int) -> None:
    batches = [
        unit * normal(tokens, 16, seed=seed, dtype=torch.float32) for seed, unit in enumerate(units)
    ]
    hessian = gathered(*batches)
    exact = moment(torch.cat(batches).double())
    assert hessian.scaled_matrix.abs().max() <= 1
    assert hessian.scaled_matrix.diagonal().max() > 1e-3
    assert hessian.matrix.dtype == DOUBLE  # no square of these is a float32
    torch.testing.assert_close(hessian.matrix, exact, rtol=1e-5, atol=1e-6 * float(exact.max()))
    total = torch.cat(batches).double().abs().sum(0)
    torch.testing.assert_close(hessian.sum_of_abs / hessian.input_factor, total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [3, 40], ids=["by x", "by x^T x"])
def test_batches_that_grow_count_as_what_they_are(tokens: int) -> None:
    batches = [unit * normal(tokens, 16, seed=unit, dtype=torch.float32) for unit in (1, 3, 10, 2)]
    hessian = gathered(*batches)
    assert (hessian.gram is None) == (tokens == 3)
    assert hessian.input_factor in (
        2.0**-5,
        2.0**-6,
    )  # of the third batch, whose largest are about 30
    torch.testing.assert_close(hessian.matrix, moment(torch.cat(batches)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        hessian.sum_of_abs / hessian.input_factor,
        torch.cat(batches).double().abs().sum(0),
        rtol=1e-6,
        atol=0,
    )


@pytest.mark.parametrize("power", [-149, -126, -60, 60, 127])
def test_a_power_of_two_changes_no_bit(power: int) -> None:
    x = (normal(9, 4) * 9).round().clamp(-1, 1).float()
    one = SecondMoment().add(x)
    other = SecondMoment().add(x * 2.0**power)
    assert torch.equal(
        other.scaled_matrix / other.scaled_matrix.max(), one.scaled_matrix / one.scaled_matrix.max()
    )
    assert torch.equal(other.matrix, one.matrix.double() * 2.0**power * 2.0**power)
    assert torch.equal(
        other.sum_of_abs / other.input_factor, one.sum_of_abs / one.input_factor * 2.0**power
    )


@pytest.mark.parametrize("size", [5e-324, 1e-300, 1e300, 1.7e308])
def test_the_ends_of_float64(size: float) -> None:
    h = SecondMoment().add(torch.tensor([[size, -size / 2]] * 3, dtype=DOUBLE)).scaled_matrix
    expected = (
        torch.tensor([[1.0, -0.5], [-0.5, 0.25]], dtype=DOUBLE)
        if size > 5e-324
        else torch.diag(torch.eye(2)[0])
    )
    torch.testing.assert_close(h / h[0, 0], expected.double())


def test_the_dtype_is_that_of_the_first_batch() -> None:
    x = normal(6, 4)
    assert gathered(x, x.float()).matrix.dtype == DOUBLE
    narrow = gathered(x.bfloat16(), 1e150 * x)
    assert narrow.scaled_matrix.dtype == torch.float32
    torch.testing.assert_close(narrow.matrix / 1e300, moment(x) / 2, rtol=1e-5, atol=1e-6)


# What is refused

INT4 = IntQuantizer(4)
WAYS: list[Callable[[Any, Any], SecondMoment]] = [
    lambda seen, x: (seen or SecondMoment()).add(x),
    Gptq(INT4).observe,
    Awq(INT4).observe,
]


@pytest.mark.parametrize("add", WAYS, ids=["SecondMoment", "Gptq", "Awq"])
@pytest.mark.parametrize("tokens", [2, 5])
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "x has dtype torch.int64"),
        (torch.ones(0, 3), ValueError, "x is empty"),
        (torch.ones(3), ValueError, "x of shape (3,) must have the shape (tokens, 3)"),
        (torch.ones(2, 4), ValueError, "x of shape (2, 4) must have the shape (tokens, 3)"),
        (torch.tensor([[1.0, math.nan, 1.0]]), ValueError, "x has 1 NaN or infinite values"),
        (torch.tensor([[1e30, -math.inf, 1.0]]), ValueError, "x has 1 NaN or infinite values"),
    ],
)
def test_a_batch_that_is_refused_leaves_no_trace(
    add: Any, tokens: int, x: Tensor, error: type[Exception], words: str
) -> None:
    hessian = add(None, normal(tokens, 3))
    before = hessian.matrix, hessian.sum_of_abs.clone(), hessian.input_factor
    with pytest.raises(error, match=re.escape(words)):
        add(hessian, x)
    assert torch.equal(hessian.matrix, before[0])
    assert torch.equal(hessian.sum_of_abs, before[1])
    assert (hessian.count, hessian.input_factor) == (tokens, before[2])


@pytest.mark.parametrize("add", WAYS, ids=["SecondMoment", "Gptq", "Awq"])
def test_a_first_batch_is_refused_too(add: Any) -> None:
    for x in (torch.full((2, 3), math.nan), torch.ones(3), torch.ones(2, 0)):
        with pytest.raises(
            ValueError, match=r"x has 6 NaN|x of shape \(3,\) must have .*\(tokens, in\)|x is empty"
        ):
            add(None, x)


def test_no_batch() -> None:
    hessian = SecondMoment()
    for ask in (lambda: hessian.matrix, lambda: hessian.scaled_matrix, hessian.as_one_group):
        with pytest.raises(ValueError, match="hessian has seen no inputs; add at least one batch"):
            ask()
