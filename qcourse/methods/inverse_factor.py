"""The triangular factor U of the inverse second moment, H^-1 = U^T U, for GPTQ and SparseGPT.

The idea: H^-1 says how the later columns of a weight best compensate the rounding error of an
earlier one. Row j of U holds that compensation for column j, so one Cholesky factor serves all.
Source: Frantar et al., "GPTQ" (ICLR 2023), section 4, step 3. The paper's H is 2 sum x x^T; the
constant does not matter, because damping is relative to the mean of H's diagonal.
How it differs from `second_moment.py`: that module gathers H, this one inverts it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from qcourse.methods.hessian_checks import check_damp, check_hessian
from qcourse.methods.second_moment import SecondMoment
from qcourse.numerics.chunks import wide

LEAF = 256  # triangles up to this size are inverted in one call


@dataclass(frozen=True, eq=False)
class InverseFactor:
    """U with (H + damping)^-1 = U^T U, and what a sweep over the columns needs beside it."""

    # sqrt(unit) U, upper triangular: the factor for H / unit.
    upper: Float[Tensor, "in in"]
    # A permutation: column j of the sweep is input order[j].
    order: Int[Tensor, " in"]
    # True for inputs that were always 0.
    dead: Bool[Tensor, " in"]
    # The mean of H's diagonal over the inputs that are not dead.
    unit: float
    # What was added to the diagonal, as a fraction of unit.
    damp: float
    # Words for a report: damping raised, dead inputs, few tokens.
    note: str


def inverse_factor(
    hessian: SecondMoment | Shaped[Tensor, "..."],
    *,
    damp: float = 0.01,
    act_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> InverseFactor:
    """Return the upper triangular U with (H + damp mean(diag H))^-1 = U^T U.

    The diagonal entry of a dead input (H_ii = 0) is replaced by the mean of the others. If the
    Cholesky factor fails or is lost in rounding, damp is raised tenfold until it succeeds.

    Args:
        hessian: H or any multiple of it, (in, in), symmetric and positive semidefinite.
        act_order: whether the sweep takes the inputs by decreasing H_ii.
        dtype: the dtype of the computation; float64 if hessian is float64.

    Raises TypeError or ValueError if hessian cannot be a second moment, or damp is not positive.
    """
    check_damp(damp)
    matrix, input_factor, tokens = _opened(hessian)
    diagonal = matrix.diagonal().double()
    dead = diagonal == 0
    mean = float(diagonal[~dead].mean())
    order = torch.arange(len(dead), device=dead.device)
    if act_order:
        order = diagonal.argsort(descending=True, stable=True)

    # Damp and factor H / unit. Then free both copies: each is as large as a triangle below.
    h = _normalized(matrix, order, dead, mean, dtype)
    lower, used_damp = _damped_cholesky(h, damp)
    del matrix, h

    # With J the reversal of the order, J H J = L L^T. So H^-1 = U^T U with U = J L^-1 J, upper.
    upper = invert_triangle(lower).flip(0, 1)
    # Divide twice, because the square of the factor may overflow.
    unit = mean / input_factor / input_factor
    return InverseFactor(upper, order, dead, unit, used_damp, _note(damp, used_damp, dead, tokens))


def _opened(hessian: SecondMoment | Tensor) -> tuple[Tensor, float, int | None]:
    """input_factor^2 H, input_factor, and the tokens if known; ValueError if H is none."""
    if isinstance(hessian, SecondMoment):
        matrix = hessian.scaled_matrix
        # x^T x is symmetric as it was computed.
        check_hessian(matrix, check_entries=False)
        return matrix, hessian.input_factor, hessian.count
    check_hessian(hessian)
    return hessian, 1.0, None


def _normalized(
    matrix: Tensor, order: Tensor, dead: Tensor, mean: float, dtype: torch.dtype
) -> Tensor:
    """A copy of matrix / mean in the reverse of `order`, with 1 on the diagonal of dead inputs."""
    reverse = order.flip(0)
    keeps_order = bool((order.diff() > 0).all())
    h = matrix.flip(0, 1) if keeps_order else matrix[reverse][:, reverse]
    h = h.to(torch.promote_types(dtype, wide(h.dtype))).div_(mean)

    # H has nothing about an input that was always 0. It counts as an average input of its own.
    h.diagonal().masked_fill_(dead[reverse], 1)
    return h


def _damped_cholesky(h: Tensor, damp: float) -> tuple[Tensor, float]:
    """L with L L^T = h + damp, and the damp it took; overwrites h's diagonal, whose mean is 1."""
    diagonal = h.diagonal().clone()
    while True:
        h.diagonal().copy_(diagonal + damp)
        lower, failed = torch.linalg.cholesky_ex(h)

        # In exact arithmetic every pivot of h + damp is at least damp. A smaller pivot is rounding
        # error, and so is everything after it.
        if not failed and float(lower.diagonal().min()) ** 2 >= damp / 2:
            return lower, damp
        if damp >= 1:
            raise ValueError(
                "hessian is not positive semidefinite: "
                f"its Cholesky factor fails even at damp={damp:.3g}"
            )
        damp *= 10


def invert_triangle(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return L^-1 by halves: [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].

    This takes a third of the products of solving L X = I, because it skips the zeros of I and X.

    >>> invert_triangle(torch.tensor([[2.0, 0.0], [1.0, 1.0]])).tolist()
    [[0.5, 0.0], [-0.5, 1.0]]
    """
    if len(lower) <= LEAF:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)

    # A and C, the triangles on the diagonal, first: B's block needs both of their inverses.
    half = len(lower) // 2
    out = torch.zeros_like(lower)
    out[:half, :half] = invert_triangle(lower[:half, :half])
    out[half:, half:] = invert_triangle(lower[half:, half:])

    a_inverse = out[:half, :half]
    c_inverse = out[half:, half:]
    out[half:, :half] = -c_inverse @ (lower[half:, :half] @ a_inverse)
    return out


def _note(damp: float, used_damp: float, dead: Tensor, tokens: int | None) -> str:
    inputs = len(dead)
    dead_count = int(dead.sum())
    words = []
    if used_damp != damp:
        words.append(f"damping raised from {damp:.3g} to {used_damp:.3g}")
    if dead_count:
        words.append(f"{dead_count} of {inputs} inputs always 0, their weights set to 0")
    if tokens is not None and tokens < inputs:
        words.append(f"{tokens} tokens for {inputs} inputs: H is singular without damping")
    return "; ".join(words)
