"""Checks of the arguments of `inverse_factor`: a positive damping and a valid second moment.

The idea: a second moment is symmetric with |h_ij| <= sqrt(h_ii h_jj). GPTQ would turn a matrix that
violates this into plausible codes, so the mistake is reported here. Whether H is positive definite
shows only in the Cholesky factor of `inverse_factor.py`.
"""

import math

import torch
from torch import Tensor

from qcourse.numerics.chunks import wide
from qcourse.numerics.validation import check_finite, check_floating

ASYMMETRY = 1e-3  # the largest allowed |h_ij - h_ji| / sqrt(h_ii h_jj)


def check_damp(damp: float) -> None:
    """Raise ValueError unless damp is positive and finite."""
    if not 0 < damp < math.inf:
        raise ValueError(
            f"damp={damp!r} must be positive and finite; "
            "it is a fraction of the mean of H's diagonal"
        )


def check_hessian(h: Tensor, *, check_entries: bool = True) -> None:
    """Raise ValueError unless h can be a second moment: by its diagonal, and by all entries."""
    check_floating(h, "hessian")
    if h.ndim != 2 or h.shape[0] != h.shape[1]:
        raise ValueError(f"hessian of shape {tuple(h.shape)} must be square, (in, in)")
    check_finite(h, "hessian")

    diagonal = h.diagonal()
    if diagonal.min() < 0:
        i = int(diagonal.argmin())
        raise ValueError(
            f"hessian[{i}, {i}]={float(diagonal[i]):.3g} must not be negative; "
            "it is a mean of squares"
        )
    if not diagonal.any():
        raise ValueError("hessian is zero on its whole diagonal: every input of the layer was 0")
    if check_entries:
        _check_entries(h)


def _check_entries(h: Tensor) -> None:
    """Raise ValueError unless h is symmetric, with zeros in the row of each zero diagonal entry."""
    # A second moment has |h_ij| <= sqrt(h_ii h_jj), so that product is the unit of each entry.
    # A diagonal entry may have underflowed to 0: its root counts as that of the smallest float.
    smallest = torch.finfo(h.dtype).tiny
    root = h.diagonal().clamp(min=smallest).to(wide(h.dtype)).sqrt()
    dead = (h.diagonal() == 0).nonzero()  # (dead, 1)
    h = h.to(root.dtype)

    # Symmetry, entry by entry.
    asymmetry = (h - h.T).abs_().div_(root).div_(root[:, None])
    asymmetric = (asymmetry > ASYMMETRY).nonzero()
    if len(asymmetric):
        i, j = asymmetric[0].tolist()
        entries = f"[{i}, {j}] is {h[i, j]:.3g} and [{j}, {i}] is {h[j, i]:.3g}"
        raise ValueError(f"hessian must be symmetric, but {entries}")

    # An input that was always 0 has products of 0 with all others.
    in_dead_rows = h[dead[:, 0]].abs().div_(root)
    too_large = (in_dead_rows > root[dead]).nonzero()
    if len(too_large):
        i = int(dead[too_large[0, 0]])
        j = int(too_large[0, 1])
        reason = f"hessian[{i}, {i}] is: input {i} was always 0"
        raise ValueError(f"hessian[{i}, {j}]={h[i, j]:.3g} must be 0, as {reason}")
