"""What the second moment of a layer's inputs says about its weights: the factor of its inverse, which GPTQ needs.

The idea: the outputs' mean squared error is a quadratic form of the weights' error, mean ||x d^T||^2 = tr(d H d^T) with
H the second moment of the inputs. The inverse of H says where the error of one column is best made up for; GPTQ reads
it row by row from one triangular factor, H^-1 = U^T U. A ``Hessian`` knows H up to a power of two, so that the unit of
the inputs does not matter; a matrix is taken as it is.

Source: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers" (ICLR 2023),
section 4, step 3. The paper's H is 2 sum x x^T; only because damping is relative to the mean of the diagonal does the
constant change no code.

How it differs from `second_moment.py`: that gathers H, and multiplies with it; this solves with it.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from qcourse.methods.second_moment import Hessian
from qcourse.numerics.chunks import range_of_rows, wide
from qcourse.numerics.validation import check_finite, check_floating

LEAF = 256  # triangles of this size are inverted at once
ASYMMETRY = (
    1e-3  # how far two entries that should be equal may be apart, in units of their inputs' sizes
)


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """What a sweep needs of a Hessian: U, with (H + damping)^-1 = U^T U, its columns in the order of the sweep.

    Args:
        upper: sqrt(unit) U, which is the factor for H / unit; upper triangular.
        order: (in,), a permutation: column j of the sweep is input ``order[j]``.
        dead: (in,), the inputs that were never other than 0.
        unit: the mean of H's diagonal over the inputs that are not dead.
        damp: what was added to the diagonal, in units of ``unit``.
        note: what a report should say of it, or "".
    """

    upper: Float[Tensor, "in in"]
    order: Int[Tensor, " in"]
    dead: Bool[Tensor, " in"]
    unit: float
    damp: float
    note: str


def inverse_factor(
    hessian: Hessian | Shaped[Tensor, "..."],
    *,
    damp: float = 0.01,
    act_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> InverseFactor:
    """U with (H + damp mean(diag H))^-1 = U^T U, upper triangular: one Cholesky factor and the inverse of a triangle.

    A dead input (H_ii = 0) counts as one of its own with H_ii the mean of the others. Where the factor fails, or is
    lost in rounding, damp is raised tenfold as often as needed; the note says so.

    Args:
        hessian: symmetric, positive semidefinite (in, in); as a ``Hessian`` it also knows how many tokens it has seen.
        damp: a fraction of the mean of H's diagonal.
        act_order: whether the sweep takes the inputs by falling H_ii, or as they are.
        dtype: to compute in; float64 where hessian is.

    Raises:
        TypeError: hessian holds no floats.
        ValueError: hessian is not square, not symmetric, has NaN or infinity, is zero, or is no second moment (negative
            on the diagonal, or not positive definite however damped); damp is not positive and finite.

    >>> inverse_factor(torch.tensor([[5.0, 1.0], [1.0, 2.0]])).order.tolist()
    [0, 1]
    """
    check_damp(damp)
    matrix, size = (
        (hessian.scaled, hessian.factor) if isinstance(hessian, Hessian) else (hessian, 1.0)
    )
    check_hessian(matrix, symmetric=isinstance(hessian, Hessian))
    diagonal = matrix.diagonal().double()
    dead = diagonal == 0
    unit = float(diagonal[~dead].mean())
    order = torch.arange(len(dead), device=dead.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)
    back = order.flip(0)
    h = matrix[back][:, back] if act_order else matrix.flip(0, 1)
    h = h.to(torch.promote_types(dtype, wide(h.dtype))).div_(unit)
    h.diagonal().masked_fill_(dead[back], 1)
    lower, used = _damped_cholesky(h, damp)
    del matrix, h  # each as large as the triangles to come
    # In reversed order J (J = its own inverse), J H J = L L^T, so H^-1 = U^T U with U = J L^-1 J, upper triangular.
    upper = invert_triangle(lower).flip(0, 1)
    count = hessian.count if isinstance(hessian, Hessian) else None
    return InverseFactor(
        upper, order, dead, unit / size / size, used, _note(damp, used, dead, count)
    )


def invert_triangle(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """L^-1 of a lower triangle by halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].

    A third of the products that solving L X = I takes, since it knows where I and X are 0.

    >>> invert_triangle(torch.tensor([[2.0, 0.0], [1.0, 1.0]])).tolist()
    [[0.5, 0.0], [-0.5, 1.0]]
    """
    if len(lower) <= LEAF:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half = len(lower) // 2
    out = torch.zeros_like(lower)
    out[:half, :half] = invert_triangle(lower[:half, :half])
    out[half:, half:] = invert_triangle(lower[half:, half:])
    out[half:, :half] = -out[half:, half:] @ (lower[half:, :half] @ out[:half, :half])
    return out


def output_error(
    w: Float[Tensor, "out in"],
    w_hat: Float[Tensor, "out in"],
    hessian: Hessian | Float[Tensor, "in in"],
) -> float:
    """The relative error of the outputs, ||x (w - w_hat)^T|| / ||x w^T|| = sqrt(tr(d H d^T) / tr(w H w^T)).

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.eye(2))
    0.2
    """
    h = hessian.scaled if isinstance(hessian, Hessian) else hessian
    dtype = torch.promote_types(wide(w.dtype), wide(h.dtype))
    h, w = h.to(dtype), w.to(dtype)
    lost, size = (float(((d @ h) * d).sum(dtype=torch.float64)) for d in (w - w_hat.to(dtype), w))
    if size <= 0:
        raise ValueError(
            "w gives outputs of 0 on the inputs that hessian has seen; the relative error is undefined"
        )
    return math.sqrt(max(lost, 0) / size)


def check_damp(damp: float) -> None:
    """Raise ValueError unless damp is positive and finite."""
    if not 0 < damp < math.inf:
        raise ValueError(
            f"damp={damp!r} must be positive and finite; it is a fraction of the mean of H's diagonal"
        )


def check_hessian(h: Tensor, *, symmetric: bool = False) -> None:
    """Raise ValueError unless h can be a second moment; ``symmetric``: it is known to be."""
    check_floating(h, "hessian")
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(f"hessian of shape {tuple(h.shape)} must be square, (in, in)")
    check_finite(h, *range_of_rows(h.reshape(1, -1)), "hessian")
    diagonal = h.diagonal()
    if diagonal.min() < 0:
        i = int(diagonal.argmin())
        raise ValueError(
            f"hessian[{i}, {i}]={float(diagonal[i]):.3g} must not be negative: it is a mean of squares"
        )
    if not diagonal.any():
        raise ValueError(
            "hessian is zero on its whole diagonal: the layer has seen no input other than 0"
        )
    if not symmetric:
        _check_entries(h)


def _check_entries(h: Tensor) -> None:
    """Raise ValueError unless h is symmetric, and 0 beside a 0 of its diagonal: each entry in units of its inputs."""
    # No second moment has |h_ij| above sqrt(h_ii h_jj). A diagonal of 0 may have been too small to be a float.
    root = h.diagonal().clamp(min=torch.finfo(h.dtype).tiny).to(wide(h.dtype)).sqrt()
    h, dead = h.to(root.dtype), (h.diagonal() == 0).nonzero()  # (dead, 1)
    apart = ((h - h.T).abs_().div_(root).div_(root[:, None]) > ASYMMETRY).nonzero()
    beside = (h[dead[:, 0]].abs().div_(root) > root[dead]).nonzero()
    if len(apart):
        i, j = apart[0].tolist()
        raise ValueError(
            f"hessian must be symmetric, but [{i}, {j}] is {h[i, j]:.3g} and [{j}, {i}] is {h[j, i]:.3g}"
        )
    if len(beside):
        i, j = int(dead[beside[0, 0]]), int(beside[0, 1])
        raise ValueError(
            f"hessian[{i}, {j}]={h[i, j]:.3g} must be 0, as hessian[{i}, {i}] is: input {i} was always 0"
        )


def _damped_cholesky(h: Tensor, damp: float) -> tuple[Tensor, float]:
    """L with L L^T = h + damp, and damp as it had to be; overwrites h's diagonal, whose mean is 1."""
    diagonal = h.diagonal().clone()
    while True:
        h.diagonal().copy_(diagonal + damp)
        lower, failed = torch.linalg.cholesky_ex(h)
        # In exact arithmetic no pivot of h + damp is below damp. One that is, is rounding, and so is all after it.
        if not failed and float(lower.diagonal().min()) ** 2 >= damp / 2:
            return lower, damp
        if damp >= 1:
            raise ValueError(
                f"hessian is not positive semidefinite: its Cholesky factor fails even at damp={damp:.3g}"
            )
        damp *= 10


def _note(damp: float, used: float, dead: Tensor, count: int | None) -> str:
    size, gone = len(dead), int(dead.sum())
    words = []
    if used != damp:
        words.append(f"damping raised from {damp:.3g} to {used:.3g}")
    if gone:
        words.append(f"{gone} of {size} inputs always 0, their weights set to 0")
    if count is not None and count < size:
        words.append(f"{count} tokens for {size} inputs: damping decides what they leave open")
    return "; ".join(words)
