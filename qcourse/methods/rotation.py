"""Rotations: mix all channels of x so that none stands out, and let the weights undo it.

x w^T = (x Q)(w Q)^T for any Q with Q Q^T = I. Q spreads an outlier channel over all channels, so a
shared scale fits. A random Q needs no data, unlike `smoothquant.py`; ``cayley_descent`` learns Q.
Source: Ashkboos et al., "QuaRot" (NeurIPS 2024); Liu et al., "SpinQuant" (ICLR 2025); the step of
Li et al., "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform"
(ICLR 2020), here solved exactly and with a given length.
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
    """Return n random values +1 or -1."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(2, (n,), generator=generator)
    return 2.0 * bits - 1


def random_hadamard(n: int, *, seed: int) -> Float[Tensor, "n n"]:
    """Return the orthogonal matrix diag(signs) H / sqrt(n); raises as `hadamard`."""
    signs = random_signs(n, seed=seed)
    return signs[:, None] * hadamard(n) / math.sqrt(n)


class Rotation(nn.Module):
    """Layer x -> x diag(signs) H / sqrt(n) along the last axis; seed=None makes all signs +1."""

    signs: Tensor

    def __init__(self, n: int, *, seed: int | None = None) -> None:
        super().__init__()
        # Refuse an impossible size now, not at the first call.
        check_size(n)
        signs = torch.ones(n) if seed is None else random_signs(n, seed=seed)
        self.register_buffer("signs", signs)

    def forward(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        """Rotate x."""
        return hadamard_transform(x * self.signs.to(x))

    def inverse(self, x: Float[Tensor, "*any n"]) -> Float[Tensor, "*any n"]:
        """Rotate x back."""
        return hadamard_transform(x, inverse=True) * self.signs.to(x)

    def extra_repr(self) -> str:
        return str(len(self.signs))


def cayley_descent(
    loss: Callable[[Tensor], Tensor],
    r: Shaped[Tensor, "..."],
    *,
    steps: int,
    lr: float,
    momentum: float = 0.0,
) -> tuple[Float[Tensor, "n n"], list[float]]:
    """Lower loss(r) over orthogonal r; return the last r, and the loss before each step.

    Args:
        loss: maps (n, n) to a scalar that autograd can differentiate.
        lr: Frobenius norm of the first step; it falls linearly to lr / steps.
        momentum: share of the previous direction that is kept, 0 <= momentum < 1.

    Raises TypeError or ValueError for an r that is not orthogonal, an argument out of range, and a
    loss or gradient that is not finite.

    >>> target = random_hadamard(4, seed=1)
    >>> distance = lambda r: (r - target).square().sum()
    >>> r, losses = cayley_descent(distance, torch.eye(4), steps=60, lr=0.3)
    >>> losses[0] > 7, bool((r - target).norm() < 0.1)
    (True, True)
    """
    _check_descent(r, steps, lr, momentum)
    dtype = r.dtype
    r = r.detach().double()
    eye = torch.eye(len(r), dtype=r.dtype, device=r.device)
    direction = torch.zeros_like(r)
    losses = []
    for step in range(steps):
        value, gradient = _gradient(loss, r.to(dtype))
        losses.append(value)

        # Steepest ascent among rotations of r: the skew matrix G r^T - r G^T.
        skew = gradient @ r.T - r @ gradient.T
        direction = momentum * direction + skew
        size = float(direction.norm())
        if size == 0:  # a stationary point
            continue

        # The Cayley step r <- (I + A/2)^-1 (I - A/2) r is orthogonal for any skew A.
        length = lr * (1 - step / steps)
        half = length / 2 * (direction / size)
        r = torch.linalg.solve(eye + half, (eye - half) @ r)
    return r.to(dtype), losses


def _gradient(loss: Callable[[Tensor], Tensor], r: Tensor) -> tuple[float, Tensor]:
    """Return loss(r) and its gradient in float64; raise ValueError unless both are finite."""
    with torch.enable_grad():
        r = r.clone().requires_grad_()
        value = loss(r)
        (gradient,) = torch.autograd.grad(value, r)
    size = float(value.detach())
    if not (math.isfinite(size) and torch.isfinite(gradient).all()):
        raise ValueError(f"loss={size:.3g} or its gradient is not finite")
    return size, gradient.double()


def check_orthogonal(r: Tensor, name: str) -> None:
    """Raise TypeError unless r holds floats, ValueError unless r r^T = I to 1e-4."""
    check_floating(r, name)
    if r.ndim != 2 or r.shape[0] != r.shape[1]:
        raise ValueError(f"{name} of shape {tuple(r.shape)} must be square")
    exact = r.detach().double()
    eye = torch.eye(len(r), dtype=exact.dtype, device=r.device)
    off = float((exact @ exact.T - eye).abs().max())
    # `not <=` also refuses NaN.
    if not off <= 1e-4:
        raise ValueError(
            f"{name} must be orthogonal, {name} {name}^T = I to 1e-4, and is off by {off:.3g}"
        )


def _check_descent(r: Tensor, steps: int, lr: float, momentum: float) -> None:
    check_orthogonal(r, "r")
    if steps < 1 or not 0 < lr < math.inf or not 0 <= momentum < 1:
        raise ValueError(
            f"steps={steps}, lr={lr}, momentum={momentum}: steps must be at least 1, lr positive,"
            " momentum in [0, 1)"
        )
