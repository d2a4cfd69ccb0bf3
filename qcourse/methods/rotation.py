"""Rotations: mix all channels of x, so that no channel stands out, and let the weights undo it.

The idea: x w^T = (x Q)(w Q)^T for any Q with Q Q^T = I. An outlier of one channel becomes a small part of every
channel, and a scale that all channels share then fits all of them. Half a rotation is worse than none: x and w go
together.

The Q that costs least is a Hadamard matrix over sqrt(n) (``hadamard.py``), with signs drawn at random before it, so
that no input is special to it. Where Q is to be better than chance, it is learned: ``cayley_descent`` walks downhill
among orthogonal matrices, and never leaves them.

Source: Ashkboos et al., "QuaRot" (NeurIPS 2024); Liu et al., "SpinQuant" (ICLR 2025), with the step of Li et al.,
"Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform" (ICLR 2020). They solve for the
step by iteration, here it is solved exactly; and its length is given, not that of the gradient.

How it differs from ``smoothquant.py``: there each channel is scaled for itself, by calibration; here channels are
mixed, and no data is needed unless the rotation is learned.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qcourse.methods.hadamard import check_size, hadamard, hadamard_transform
from qcourse.numerics.validation import check_floating

__all__ = [
    "Rotation",
    "cayley_descent",
    "hadamard",
    "hadamard_transform",
    "random_hadamard",
    "random_signs",
]


def random_signs(n: int, *, seed: int) -> Float[Tensor, " n"]:
    """+1 or -1 for each channel, drawn with a generator of its own.

    >>> random_signs(6, seed=0).tolist()
    [-1.0, 1.0, 1.0, -1.0, 1.0, 1.0]
    """
    return 2.0 * torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)) - 1


def random_hadamard(n: int, *, seed: int) -> Float[Tensor, "n n"]:
    """The orthogonal matrix diag(signs) H / sqrt(n); raises as `hadamard`.

    >>> q = random_hadamard(20, seed=0)
    >>> torch.allclose(q @ q.T, torch.eye(20), atol=1e-6)
    True
    """
    return random_signs(n, seed=seed)[:, None] * hadamard(n) / math.sqrt(n)


class Rotation(nn.Module):
    """x (signs H / sqrt(n)) along the last axis, as a layer that holds n signs and nothing else.

    Args:
        n: channels.
        seed: of the signs; None for all +1.

    Raises:
        TypeError, ValueError: as `hadamard`.

    >>> rotation, x = Rotation(8, seed=0), torch.arange(8.0)
    >>> torch.allclose(rotation.inverse(rotation(x)), x, atol=1e-5)
    True
    """

    signs: Tensor

    def __init__(self, n: int, *, seed: int | None = None) -> None:
        super().__init__()
        check_size(n)  # refuses what it cannot do now, not at the first call
        self.register_buffer("signs", torch.ones(n) if seed is None else random_signs(n, seed=seed))

    def forward(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        """Rotate x."""
        return hadamard_transform(x * self.signs.to(x))

    def inverse(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        """Rotate x back."""
        return hadamard_transform(x, inverse=True) * self.signs.to(x)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return str(len(self.signs))


def cayley_descent(
    loss: Callable[[Tensor], Tensor],
    r: Shaped[Tensor, "..."],
    *,
    steps: int,
    lr: float,
    momentum: float = 0.0,
) -> tuple[Float[Tensor, "n n"], list[float]]:
    """Lower loss(r) among orthogonal r: r <- (I + A/2)^-1 (I - A/2) r with a skew A along the gradient.

    With G the gradient at r, A = G r^T - r G^T is the turn that raises the loss most, brought to the Frobenius norm lr,
    which falls linearly to lr / steps at the last step; where A is 0, r stays. A small turn by theta radians in a
    single plane has the norm sqrt(2) theta. The Cayley transform of a skew matrix is orthogonal, so no step leaves the
    rotations; r is kept in float64 on the way.

    Args:
        loss: from an (n, n) tensor to a single number that autograd can differentiate.
        r: to start from, orthogonal to 1e-4; not changed.
        steps: at least 1.
        lr: the Frobenius norm of the first step's A, whatever the size of the gradient.
        momentum: how much of the last turn's direction stays, from 0 to less than 1.

    Returns:
        r after all the steps, and the loss before each of them.

    Raises:
        TypeError: r is no floating-point tensor.
        ValueError: r is not square or not orthogonal; another argument out of its range; the loss or its gradient is
            not finite.

    >>> target = random_hadamard(4, seed=1)
    >>> start = torch.eye(4)  # both are rotations proper: the descent never meets a mirror image
    >>> r, losses = cayley_descent(lambda r: (r - target).square().sum(), start, steps=60, lr=0.3)
    >>> losses[0] > 7, bool((r - target).norm() < 0.1)
    (True, True)
    """
    _check_descent(r, steps, lr, momentum)
    dtype, r = r.dtype, r.detach().double()
    turn, losses = torch.zeros_like(r), []
    for step in range(steps):
        value, gradient = _gradient(loss, r.to(dtype))
        losses.append(value)
        turn = momentum * turn + (gradient @ r.T - r @ gradient.T)
        size = float(turn.norm())
        if size == 0:  # no direction to turn in
            continue
        half = lr * (1 - step / steps) / 2 * (turn / size)
        eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
        r = torch.linalg.solve(eye + half, (eye - half) @ r)
    return r.to(dtype), losses


def _gradient(loss: Callable[[Tensor], Tensor], r: Tensor) -> tuple[float, Tensor]:
    with torch.enable_grad():
        r = r.clone().requires_grad_()
        value = loss(r)
        (gradient,) = torch.autograd.grad(value, r)
    if not (torch.isfinite(value) and torch.isfinite(gradient).all()):
        raise ValueError(f"loss={float(value.detach()):.3g} or its gradient is not finite")
    return float(value.detach()), gradient.double()


def check_orthogonal(r: Tensor, name: str) -> None:
    """Raise TypeError unless r is a tensor of floats, ValueError unless it is square and r r^T = I to 1e-4.

    >>> check_orthogonal(hadamard(4), "r")
    Traceback (most recent call last):
    ValueError: r must be orthogonal, r r^T = I to 1e-4, and is off by 3
    """
    check_floating(r, name)
    if r.ndim != 2 or r.shape[0] != r.shape[1]:
        raise ValueError(f"{name} of shape {tuple(r.shape)} must be square")
    exact = r.detach().double()
    off = float(
        (exact @ exact.T - torch.eye(len(r), dtype=exact.dtype, device=r.device)).abs().max()
    )
    if not off <= 1e-4:
        raise ValueError(
            f"{name} must be orthogonal, {name} {name}^T = I to 1e-4, and is off by {off:.3g}"
        )


def _check_descent(r: Tensor, steps: int, lr: float, momentum: float) -> None:
    check_orthogonal(r, "r")
    if steps < 1 or not 0 < lr < math.inf or not 0 <= momentum < 1:
        raise ValueError(
            f"steps={steps}, lr={lr}, momentum={momentum}: steps must be at least 1, lr positive, momentum in [0, 1)"
        )
