"""Hadamard matrices of every promised size, the fast transform, signs, and Cayley descent."""

import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qcourse import IntQuantizer, PerChannel
from qcourse.methods.rotation import (
    Rotation,
    cayley_descent,
    hadamard,
    hadamard_transform,
    random_hadamard,
    random_signs,
)

# 28 = 27 + 1 and 344 = 343 + 1 need the fields of 3^3 and 7^3 elements, 52 = 2 (25 + 1) and
# 100 = 2 (49 + 1) those of 5^2 and 7^2.
SIZES = [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 52, 100, 140, 144, 344, 384, 768, 1536]
MISSING = [92, 116, 156, 172, 184, 188]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


@pytest.mark.parametrize("n", SIZES)
def test_rows_are_exactly_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert h.dtype == torch.float32
    assert set(h.flatten().tolist()) <= {1.0, -1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n))


def test_powers_of_two_are_sylvesters() -> None:
    for n in (1, 2, 4, 64, 128, 512):
        assert torch.equal(hadamard(n), torch.from_numpy(scipy.linalg.hadamard(n)).float())


def test_every_multiple_of_4_below_200_but_six() -> None:
    for n in range(4, 200, 4):
        if n in MISSING:
            with pytest.raises(ValueError, match=f"n={n} has no Hadamard matrix here"):
                hadamard(n)
        else:
            assert torch.equal(hadamard(n) @ hadamard(n).T, n * torch.eye(n)), n


@pytest.mark.parametrize(
    "n", [2048, 3072, 3584, 4096, 5120, 6912, 8960, 11008, 13824, 14336, 18944, 28672, 29568]
)
def test_widths_of_common_models(n: int) -> None:
    x = normal(2, n, dtype=torch.float64)
    y = hadamard_transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)
    torch.testing.assert_close(hadamard_transform(y, inverse=True), x)
    one = torch.zeros(n, dtype=torch.float64)
    one[n // 3] = 1
    equal_parts = torch.full((n,), n**-0.5, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(one).abs(), equal_parts)


@pytest.mark.parametrize("n", SIZES)
def test_the_fast_transform_is_the_product(n: int) -> None:
    x = normal(2, 3, n, dtype=torch.float64)
    h = hadamard(n).double() / math.sqrt(n)
    kept = x.clone()
    torch.testing.assert_close(hadamard_transform(x), x @ h)
    torch.testing.assert_close(hadamard_transform(x, inverse=True), x @ h.T)
    assert torch.equal(x, kept)


def test_paleys_are_not_symmetric_so_the_inverse_is_another_product() -> None:
    x = normal(3, 12)
    assert not torch.allclose(hadamard_transform(hadamard_transform(x)), x, atol=0.1)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), inverse=True), x)


@given(st.sampled_from([1, 2, 8, 12, 48, 80]), st.integers(0, 2**31))
def test_lengths_and_angles_stay(n: int, seed: int) -> None:
    x = normal(4, n, seed=seed, dtype=torch.float64)
    y = hadamard_transform(x)
    torch.testing.assert_close(y @ y.T, x @ x.T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_come_back_as_they_are(dtype: torch.dtype) -> None:
    x = normal(5, 96, dtype=torch.float64).to(dtype)
    y = hadamard_transform(x)
    assert y.dtype == dtype
    exact = x.double() @ hadamard(96).double() / math.sqrt(96)
    assert torch.equal(y, exact.to(dtype)) or dtype == torch.float64
    atol = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=atol)


def test_float16_does_not_overflow_on_the_way() -> None:
    x = torch.full((1, 256), 4000.0, dtype=torch.float16)  # the sum of 256 would be 1,024,000
    assert hadamard_transform(x)[0, 0] == 64000


def test_gradients_pass() -> None:
    x = normal(2, 24, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(hadamard_transform, (x,))


def test_nan_stays_in_its_row() -> None:
    x = normal(3, 8)
    x[1, 5] = math.nan
    assert hadamard_transform(x).isnan().any(dim=1).tolist() == [False, True, False]


# What it is for


@pytest.mark.parametrize("seed", range(4))
def test_one_outlier_becomes_a_small_part_of_all(seed: int) -> None:
    x = normal(64, 256, seed=seed)
    w = normal(32, 256, seed=seed + 100)
    x[:, 7] *= 60
    int4 = IntQuantizer(4, granularity=PerChannel(0))
    rotation = Rotation(256, seed=seed)

    def lost(x: Tensor, w: Tensor) -> float:
        exact = x.double() @ w.double().T
        rounded = int4(x).dequantize() @ int4(w).dequantize().T
        return float((rounded - exact).norm() / exact.norm())

    plain = lost(x, w)
    turned = lost(rotation(x), rotation(w))
    # Values are near 1000.
    torch.testing.assert_close(rotation(x) @ rotation(w).T, x @ w.T, rtol=0, atol=1e-2)
    # Seeds 0 to 7: 0.25 to 0.30 without, 0.16 to 0.18 with it.
    assert turned < 0.75 * plain
    # Rotating one side only gives a wrong product.
    assert lost(rotation(x), w) < 0.3
    assert float((rotation(x) @ w.T - x @ w.T).norm() / (x @ w.T).norm()) > 1


def test_signs_are_drawn_from_the_seed_alone() -> None:
    state = torch.get_rng_state()
    signs = random_signs(1000, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(signs, random_signs(1000, seed=3))
    assert not torch.equal(signs, random_signs(1000, seed=4))
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(float(signs.mean())) < 0.15


@pytest.mark.parametrize("n", [12, 64])
def test_a_rotation_is_its_matrix(n: int) -> None:
    x = normal(5, n)
    q = random_hadamard(n, seed=2)
    rotation = Rotation(n, seed=2)
    torch.testing.assert_close(rotation(x), x @ q)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x)
    torch.testing.assert_close(q @ q.T, torch.eye(n))
    torch.testing.assert_close(Rotation(n)(x), hadamard_transform(x))
    torch.testing.assert_close(random_signs(n, seed=2)[:, None] * hadamard(n), q * math.sqrt(n))


def test_a_rotation_is_a_layer() -> None:
    rotation = Rotation(16, seed=1)
    assert list(rotation.state_dict()) == ["signs"]
    assert not list(rotation.parameters())
    other = Rotation(16)
    other.load_state_dict(rotation.state_dict())
    assert torch.equal(other(torch.eye(16)), rotation(torch.eye(16)))
    assert "Rotation(16)" in str(nn.Sequential(rotation))
    assert rotation.half()(torch.eye(16).half()).dtype == torch.float16


# Descent


def test_descent_stays_orthogonal_and_finds_a_rotation() -> None:
    start = torch.linalg.qr(normal(16, 16, seed=0)).Q
    target = torch.linalg.qr(normal(16, 16, seed=1)).Q
    if float(torch.det(start) * torch.det(target)) < 0:
        target[0] *= -1  # no rotation reaches a mirror image
    r, losses = cayley_descent(lambda r: (r - target).square().sum(), start, steps=200, lr=0.5)
    assert len(losses) == 200
    assert losses[0] == pytest.approx(float((start - target).square().sum()))
    assert float((r - target).norm()) < 0.1 < 1 < losses[0]
    assert float((r @ r.T - torch.eye(16)).abs().max()) < 1e-5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_thousand_long_steps_leave_nothing(momentum: float) -> None:
    a = normal(24, 24)
    start = random_hadamard(24, seed=0)
    r, _ = cayley_descent(
        lambda r: (r @ a).pow(3).sum(), start, steps=1000, lr=1.0, momentum=momentum
    )
    assert float((r.double() @ r.double().T - torch.eye(24)).abs().max()) < 1e-6
    assert r.dtype == torch.float32
    assert torch.equal(start, random_hadamard(24, seed=0))


def test_a_step_is_as_long_as_lr_says() -> None:
    a = normal(8, 8)
    start = torch.eye(8, dtype=torch.float64)
    for lr in (1e-3, 1e-2):
        for size in (1e-6, 1.0, 1e6):  # the loss's units do not matter
            r, _ = cayley_descent(lambda r, size=size: size * (r * a).sum(), start, steps=1, lr=lr)
            assert float((r - start).norm()) == pytest.approx(lr, rel=1e-3)


def test_two_steps_by_hand() -> None:
    """With a constant gradient a: the second step has half the length and 0.6 of the momentum."""
    a = normal(5, 5, dtype=torch.float64).numpy()
    r = np.eye(5)
    turn = np.zeros((5, 5))
    for length in (0.8, 0.4):
        turn = 0.6 * turn + a @ r.T - r @ a.T
        half = length / 2 * turn / np.linalg.norm(turn)
        r = scipy.linalg.solve(np.eye(5) + half, np.eye(5) - half) @ r
    start = torch.eye(5, dtype=torch.float64)
    gradient = torch.from_numpy(a)
    found, _ = cayley_descent(lambda r: (r * gradient).sum(), start, steps=2, lr=0.8, momentum=0.6)
    torch.testing.assert_close(found, torch.from_numpy(r))


def test_the_first_step_goes_down() -> None:
    a = normal(8, 8)
    start = random_hadamard(8, seed=3)
    for seed in range(4):
        a = normal(8, 8, seed=seed)
        _, (before, after) = cayley_descent(
            lambda r, a=a: (r @ a).pow(4).sum(), start, steps=2, lr=1e-3
        )
        assert after < before


def test_at_the_bottom_it_stays() -> None:
    start = random_hadamard(8, seed=3)
    for lr in (0.1, 100.0):  # over the smallest norm there is, the second would overflow
        r, losses = cayley_descent(lambda r: (r * 0).sum(), start, steps=5, lr=lr)
        torch.testing.assert_close(r, start)
        assert losses == [0.0] * 5


def test_the_length_of_a_small_turn_is_its_angle_times_the_root_of_2() -> None:
    gradient = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    start = torch.eye(2, dtype=torch.float64)
    r, _ = cayley_descent(lambda r: (r * gradient).sum(), start, steps=1, lr=0.01 * math.sqrt(2))
    assert math.atan2(float(r[1, 0]), float(r[0, 0])) == pytest.approx(0.01, rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("n", "near"),
    [
        (0, "1 and 1"),
        (-4, "1 and 1"),
        (3, "2 and 4"),
        (14, "12 and 16"),
        (92, "88 and 96"),
        (30522, "30520 and"),
    ],
)
def test_sizes_without_a_construction(n: int, near: str) -> None:
    words = f"n={n} has no Hadamard matrix here.*the nearest are {near}"
    with pytest.raises(ValueError, match=words):
        hadamard(n)
    with pytest.raises(ValueError, match=words):
        random_hadamard(n, seed=0) if n > 0 else hadamard(n)
    with pytest.raises(ValueError, match=words):
        Rotation(n)


def test_a_transform_of_such_a_size() -> None:
    with pytest.raises(ValueError, match="n=92 has no Hadamard matrix here"):
        hadamard_transform(normal(2, 92))


@pytest.mark.parametrize("n", [4.0, "4", None, True, torch.tensor(4)])
@pytest.mark.usefixtures("unchecked")
def test_a_size_is_a_whole_number(n: Any) -> None:
    with pytest.raises(TypeError, match="must be a whole number"):
        hadamard(n)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.arange(8), TypeError, "x has dtype torch.int64"),
        ([1.0, 2.0], TypeError, "x is a list"),
        (torch.zeros(0, 8), ValueError, "x is empty"),
        (torch.tensor(1.0), ValueError, "x is a single number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_a_transform_refuses(x: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        hadamard_transform(x)


@pytest.mark.parametrize(
    ("r", "changes", "words"),
    [
        (torch.ones(4, 4), {}, "r must be orthogonal, r r^T = I to 1e-4, and is off by 4"),
        (torch.full((4, 4), math.nan), {}, "r must be orthogonal"),
        (torch.ones(4, 3), {}, "r of shape (4, 3) must be square"),
        (hadamard(4), {}, "is off by 3"),  # not divided by sqrt(n)
        (1.0001 * torch.eye(4), {}, "is off by 0.0002"),  # a near miss
        (torch.eye(4), {"steps": 0}, "steps=0"),
        (torch.eye(4), {"lr": 0.0}, "lr=0.0"),
        (torch.eye(4), {"lr": math.inf}, "lr=inf"),
        (torch.eye(4), {"lr": math.nan}, "lr=nan"),
        (torch.eye(4), {"momentum": 1.0}, "momentum=1.0"),
        (torch.eye(4), {"momentum": -0.1}, "momentum=-0.1"),
    ],
)
def test_what_descent_refuses(r: Tensor, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        cayley_descent(lambda r: r.sum(), r, **({"steps": 3, "lr": 0.1} | changes))


def test_what_is_orthogonal_enough() -> None:
    cayley_descent(lambda r: r.sum(), 1.00004 * torch.eye(4), steps=1, lr=0.1)  # off by 8e-5


@pytest.mark.parametrize(
    "loss", [lambda r: r.sum() * math.nan, lambda r: (r - r).abs().sqrt().sum()]
)
def test_a_loss_that_is_not_finite(loss: Any) -> None:
    with pytest.raises(ValueError, match="or its gradient is not finite"):
        cayley_descent(loss, torch.eye(4), steps=2, lr=0.1)
