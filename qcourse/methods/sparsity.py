"""N:M pruning: keep N of every M neighbors along the input axis.

Hardware skips zeros only if it knows how many there are: 2:4 on NVIDIA's sparse tensor cores. Three
scores choose the weights that stay: |w|; Wanda's |w| ||x||; SparseGPT's w^2 / [H^-1]_jj.
Source: Mishra et al., "Accelerating sparse deep neural networks" (2021); Sun et al., "Wanda" (ICLR
2024); Frantar and Alistarh, "SparseGPT" (ICML 2023).
`sparse_storage.py` stores the weights that stay.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from qcourse.methods.column_sweep import round_columns
from qcourse.methods.inverse_factor import InverseFactor, inverse_factor
from qcourse.methods.second_moment import SecondMoment, output_error
from qcourse.numerics.chunks import wide
from qcourse.numerics.validation import check_matrix


@dataclass(frozen=True)
class NM:
    """Pattern: `keep` of every `m` neighbors along the last axis stay, 1 <= keep <= m.

    >>> NM(2, 4).mask(torch.tensor([[0.0, -1.25, 0.0, 0.5]]).abs()).tolist()
    [[False, True, False, True]]
    """

    keep: int
    m: int

    def __post_init__(self) -> None:
        whole = type(self.keep) is int and type(self.m) is int
        if not whole or not 1 <= self.keep <= self.m:
            raise ValueError(
                f"keep={self.keep!r} of m={self.m!r} must be whole numbers with 1 <= keep <= m"
            )

    def mask(self, score: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Return True at the `keep` highest scores of each run of m; the first of equal scores."""
        if not score.ndim or not score.shape[-1] or score.shape[-1] % self.m:
            raise ValueError(
                f"m={self.m} of {self.keep}:{self.m} does not divide the last axis"
                f" of {tuple(score.shape)}"
            )
        runs = score.reshape(-1, self.m)
        ranked = runs.argsort(dim=1, descending=True, stable=True)
        kept = ranked[:, : self.keep]
        mask = torch.zeros_like(runs, dtype=torch.bool)
        return mask.scatter_(1, kept, True).reshape(score.shape)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned weight (out, in): 0 where mask is False."""

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]  # True where a weight is kept, even if that weight is 0
    # Relative, not squared: ||x (w - weight)^T|| / ||x w^T||; for `magnitude`, of the weight.
    error: float


def magnitude(w: Shaped[Tensor, "..."], pattern: NM) -> Pruned:
    """Keep the largest |w|. Raises unless w is a finite matrix whose inputs m divides.

    >>> magnitude(torch.tensor([[0.1, -1.25, 0.2, 0.5]]), NM(2, 4)).weight.tolist()
    [[0.0, -1.25, 0.0, 0.5]]
    """
    check_matrix(w, "w")
    mask = pattern.mask(w.detach().abs())
    weight = w.detach() * mask
    # An all-zero weight has the error 0, not 0 / 0.
    tiny = torch.finfo(w.dtype).tiny
    size = w.norm().clamp(min=tiny)
    error = (w - weight).norm() / size
    return Pruned(weight, mask, float(error))


def wanda(
    w: Shaped[Tensor, "..."], hessian: SecondMoment | Shaped[Tensor, "..."], pattern: NM
) -> Pruned:
    """Keep the largest |w_ij| ||x_j||; hessian is any multiple of the second moment (in, in).

    >>> h = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
    >>> wanda(torch.tensor([[0.1, -1.25, 0.2, 0.5]]), h, NM(2, 4)).mask.tolist()
    [[True, True, False, False]]
    """
    check_matrix(w, "w")
    matrix = hessian.scaled_matrix if isinstance(hessian, SecondMoment) else hessian
    _check_fits(w, matrix)
    # H_jj is proportional to ||x_j||^2; a common factor does not change the order.
    norms = matrix.diagonal().sqrt()
    mask = pattern.mask(w.detach().abs() * norms)
    weight = w.detach() * mask
    return Pruned(weight, mask, output_error(w.detach(), weight, hessian))


def sparsegpt(
    w: Shaped[Tensor, "..."],
    hessian: SecondMoment | Shaped[Tensor, "..."],
    pattern: NM,
    *,
    damp: float = 0.01,
    block_size: int = 128,
) -> Pruned:
    """Drop the smallest w_j^2 / [H^-1]_jj of each run of m; later weights compensate, as in `gptq`.

    >>> h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> pruned = sparsegpt(torch.tensor([[1.0, 2.0]]), h, NM(1, 2))
    >>> pruned.mask.tolist(), round(float(pruned.weight[0, 1]), 2)  # nearly 2 + 0.9 x 1
    ([[False, True]], 2.89)
    """
    check_matrix(w, "w")
    factor = inverse_factor(hessian, damp=damp, dtype=wide(w.dtype))
    _check_fits(w, factor.upper)

    # GPTQ's sweep with another rounding: to 0, or not at all. It overwrites its copy of w^T.
    grid = _PruningGrid(pattern, factor)
    columns = w.detach().to(factor.upper.dtype).T
    columns = columns.clone(memory_format=torch.contiguous_format)
    swept = round_columns(columns, factor.upper, grid, block_size)
    weight = swept.codes.T.contiguous()  # (out, in)
    mask = torch.stack(grid.kept).T.contiguous()  # (out, in)

    # Inputs that are always 0 need no weight.
    weight = weight.masked_fill(factor.dead, 0).to(w.dtype)
    return Pruned(weight, mask, output_error(w.detach(), weight, hessian))


class _PruningGrid:
    """Grid of the sweep: a column's weights, or 0, decided for runs of m columns."""

    def __init__(self, pattern: NM, factor: InverseFactor) -> None:
        self.pattern = pattern
        self.diagonal = factor.upper.diagonal()
        self.span = pattern.m
        # Which outputs keep each column, (in, out).
        self.kept: list[Tensor] = []
        # Raises ValueError now if m does not divide the inputs.
        pattern.mask(self.diagonal[None])

    def fit(self, start: int, run: Tensor) -> None:
        """Decide which outputs keep the columns of a run."""
        # U_jj^2 is [H^-1]_jj of the inputs not yet swept, so this is w_j^2 / [H^-1]_jj.
        scaled = run / self.diagonal[start : start + self.span, None]
        score = scaled.square().T  # (out, m)
        self.kept += self.pattern.mask(score).T.unbind()

    def at(self, j: int) -> Tensor:
        """Return which outputs keep column j."""
        return self.kept[j]

    def nearest(self, column: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pruned column twice: it is its own code."""
        weight = column * kept[:, None]
        return weight, weight


def _check_fits(w: Tensor, matrix: Tensor) -> None:
    shape = tuple(w.shape)
    found = tuple(matrix.shape)
    if found != (shape[1], shape[1]):
        raise ValueError(f"hessian of shape {found} does not fit w of shape {shape}, (out, in)")
