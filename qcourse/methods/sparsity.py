"""Pruning to N of M: of every M neighbours along the input axis, which N weights stay, and what the others' loss costs.

The idea: hardware can skip zeros only where it knows how many there are, so of every M weights exactly N are kept (2 of
4 on NVIDIA's sparse tensor cores). Three ways to choose them:

    magnitude   the largest |w|
    Wanda       the largest |w| ||x||, x the inputs that the weight meets: a small weight on a loud input matters
    SparseGPT   the smallest w^2 / [H^-1]_jj goes, and the weights still to come make up for it

The last is GPTQ's sweep with another rounding: to 0, or not at all. All of its machinery is shared.

Source: Mishra et al., "Accelerating sparse deep neural networks" (2021), 2:4; Sun et al., "A simple and effective
pruning approach for large language models" (Wanda, ICLR 2024); Frantar and Alistarh, "SparseGPT" (ICML 2023).

How it differs from ``sparse_storage.py``: here which weights are left; there how these are kept.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from qcourse.methods.column_sweep import round_columns
from qcourse.methods.inverse_factor import InverseFactor, inverse_factor, output_error
from qcourse.methods.second_moment import Hessian
from qcourse.numerics.chunks import wide
from qcourse.numerics.validation import check_matrix


@dataclass(frozen=True)
class NM:
    """A pattern: of every `m` neighbours along the last axis, `keep` stay.

    Raises:
        ValueError: not 1 <= keep <= m, in whole numbers.

    >>> NM(2, 4).mask(torch.tensor([[0.0, -1.25, 0.0, 0.5]]).abs()).tolist()
    [[False, True, False, True]]
    """

    keep: int
    m: int

    def __post_init__(self) -> None:
        if type(self.keep) is not int or type(self.m) is not int or not 1 <= self.keep <= self.m:
            raise ValueError(
                f"keep={self.keep!r} of m={self.m!r} must be whole numbers with 1 <= keep <= m"
            )

    def mask(self, score: Shaped[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Where the `keep` highest of each run of m are; of equals the first.

        Raises:
            ValueError: m does not divide the last axis.
        """
        if not score.ndim or not score.shape[-1] or score.shape[-1] % self.m:
            raise ValueError(
                f"m={self.m} of {self.keep}:{self.m} does not divide the last axis of {tuple(score.shape)}"
            )
        runs = score.reshape(-1, self.m)
        kept = runs.argsort(dim=1, descending=True, stable=True)[:, : self.keep]
        return torch.zeros_like(runs, dtype=torch.bool).scatter_(1, kept, True).reshape(score.shape)


@dataclass(frozen=True, eq=False)
class Pruned:
    """A pruned weight.

    Args:
        weight: (out, in), 0 where it was pruned.
        mask: True where a weight is kept, also one that is 0 by itself.
        error: of the outputs, ||x (w - weight)^T|| / ||x w^T||, where inputs were given; else of the weight.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    error: float


def magnitude(w: Shaped[Tensor, "..."], pattern: NM) -> Pruned:
    """Keep the largest |w|.

    Raises:
        TypeError, ValueError: w is no matrix of finite floats; m does not divide its inputs.

    >>> magnitude(torch.tensor([[0.1, -1.25, 0.2, 0.5]]), NM(2, 4)).weight.tolist()
    [[0.0, -1.25, 0.0, 0.5]]
    """
    check_matrix(w, "w")
    mask = pattern.mask(w.detach().abs())
    weight = w.detach() * mask
    return Pruned(
        weight, mask, float((w - weight).norm() / w.norm().clamp(min=torch.finfo(w.dtype).tiny))
    )


def wanda(
    w: Shaped[Tensor, "..."], hessian: Hessian | Shaped[Tensor, "..."], pattern: NM
) -> Pruned:
    """Keep the largest |w_ij| ||x_j||; ||x_j|| is the root of the second moment's diagonal, up to a constant.

    Args:
        hessian: the second moment of the inputs, or any multiple of it, (in, in).

    Raises:
        TypeError, ValueError: as `magnitude`; hessian does not fit w.

    >>> h = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
    >>> wanda(torch.tensor([[0.1, -1.25, 0.2, 0.5]]), h, NM(2, 4)).mask.tolist()  # |w| ||x|| = 1, 1.25, 0.2, 0.5
    [[True, True, False, False]]
    """
    check_matrix(w, "w")
    matrix = hessian.scaled if isinstance(hessian, Hessian) else hessian
    _check_fits(w, matrix)
    mask = pattern.mask(w.detach().abs() * matrix.diagonal().sqrt())
    weight = w.detach() * mask
    return Pruned(weight, mask, output_error(w.detach(), weight, hessian))


def sparsegpt(
    w: Shaped[Tensor, "..."],
    hessian: Hessian | Shaped[Tensor, "..."],
    pattern: NM,
    *,
    damp: float = 0.01,
    block_size: int = 128,
) -> Pruned:
    """In each run of m drop the smallest w_j^2 / [H^-1]_jj, and let the weights still to come answer for it.

    The weights that stay change too: they are those of the sweep, column by column, as in ``gptq``.

    Args:
        hessian, damp, block_size: as in ``gptq``.

    Raises:
        TypeError, ValueError: as `wanda` and ``inverse_factor``.

    >>> h = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> pruned = sparsegpt(torch.tensor([[1.0, 2.0]]), h, NM(1, 2))
    >>> pruned.mask.tolist(), round(float(pruned.weight[0, 1]), 2)  # 2 + 0.9 x 1, nearly
    ([[False, True]], 2.89)
    """
    check_matrix(w, "w")
    factor = inverse_factor(hessian, damp=damp, dtype=wide(w.dtype))
    _check_fits(w, factor.upper)
    grid = _Dropping(pattern, factor)
    columns = (
        w.detach().to(factor.upper.dtype).T.clone(memory_format=torch.contiguous_format)
    )  # the sweep's to use up
    weight = round_columns(columns, factor.upper, grid, block_size).T.contiguous()  # (out, in)
    mask = torch.stack(grid.kept).T.contiguous()  # (out, in)
    weight = weight.masked_fill(factor.dead, 0).to(w.dtype)
    return Pruned(weight, mask, output_error(w.detach(), weight, hessian))


class _Dropping:
    """The grid of the sweep: a column's weights, or 0; which, is settled for m columns at a time, at the first."""

    def __init__(self, pattern: NM, factor: InverseFactor) -> None:
        self.pattern, self.diagonal, self.span, self.kept = (
            pattern,
            factor.upper.diagonal(),
            pattern.m,
            list[Tensor](),
        )
        pattern.mask(self.diagonal[None])  # says so where m does not divide

    def at(self, j: int, columns: Tensor) -> Tensor:
        """The outputs that keep column j."""
        if j % self.span == 0:
            run = slice(j, j + self.span)
            score = (
                (columns[run] / self.diagonal[run, None]).square().T
            )  # (out, m); U_jj^2 is [H^-1]_jj of those left
            self.kept += self.pattern.mask(score).T.unbind()
        return self.kept[j]

    def nearest(self, column: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The column as it stays, twice: it is its own code."""
        weight = column * kept[:, None]
        return weight, weight


def _check_fits(w: Tensor, matrix: Any) -> None:
    if matrix.shape != (w.shape[1],) * 2:
        raise ValueError(
            f"hessian of shape {tuple(matrix.shape)} does not fit w of shape {tuple(w.shape)}, (out, in)"
        )
