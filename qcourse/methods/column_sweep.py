"""The sweep of GPTQ: round the columns of a weight in turn; later columns compensate the errors.

The idea: let H^-1 = U^T U, U upper triangular. Rounding column j leaves the error
e_j = (w_j - w_hat_j) / U_jj; the best compensation is w_k -= e_j U_jk for every later column k. A
column needs these updates only at its turn. So one product brings a whole block up to date, smaller
ones its parts, and then its columns; the first does nearly all the work.
Source: Frantar et al., "GPTQ" (ICLR 2023), Algorithm 1, whose blocks push updates forward.
How it differs from `gptq.py`: this module knows columns, a triangle and a grid, no inputs.
"""

from dataclasses import fields, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerChannel
from qcourse.numerics.quantized import Quantizer

PART = 32  # columns of a block that are updated together, so that they stay in the cache


@runtime_checkable
class Grid(Protocol):
    """What the columns are rounded to, with parameters that `span` columns determine together."""

    span: int

    def fit(self, start: int, run: Tensor) -> None:
        """Fit the next `span` columns to their values (span, out); called in order, once each."""

    def at(self, j: int) -> Any:
        """Return the parameters of column j, whose run has been fitted."""

    def nearest(self, column: Tensor, parameters: Any) -> tuple[Tensor, Tensor]:
        """Return the codes of a column (out, 1), and the values they stand for."""


class FittedBefore:
    """Parameters fitted before the sweep, on w; column j of the sweep is input ``order[j]``."""

    def __init__(
        self, quantizer: Quantizer, w: Float[Tensor, "out in"], order: Int[Tensor, " in"]
    ) -> None:
        self.span = len(order)
        self.parameters = quantizer.fit(w)
        self.nearest = _for_one_column(quantizer, w.shape).nearest

        # Slice the parameters once: the sweep asks for them once per column.
        size = group_size(quantizer.granularity, w.shape)
        count = len(order) // size
        self._groups = (order // size).tolist()
        self._fits = [_group(self.parameters, k, count) for k in range(count)]

    def fit(self, start: int, run: Tensor) -> None:
        """Fit nothing: all parameters are known."""

    def at(self, j: int) -> Any:
        return self._fits[self._groups[j]]


class FittedOnTheWay:
    """Parameters fitted in the sweep: each run of columns at its turn, on the updated weights."""

    def __init__(self, quantizer: Quantizer, w: Float[Tensor, "out in"]) -> None:
        self.quantizer = quantizer
        self.span = group_size(quantizer.granularity, w.shape)
        self.nearest = _for_one_column(quantizer, w.shape).nearest
        self._fits = list[Any]()

        # Fit a row of zeros: the shapes of the parameters tell which of them all groups share.
        self._example = quantizer.fit(torch.zeros_like(w[:1]))

    def fit(self, start: int, run: Tensor) -> None:
        self._fits.append(self.quantizer.fit(run.T))

    def at(self, j: int) -> Any:
        return self._fits[j // self.span]

    @property
    def parameters(self) -> Any:
        """Join the parameters of all groups; ValueError if the groups disagree on a shared one."""
        joined = {}
        for name, value in _tensors(self._example).items():
            parts = [getattr(fit, name) for fit in self._fits]
            if _has_groups(value, len(parts)):
                joined[name] = torch.cat(parts, dim=1)
            elif all(torch.equal(part, parts[0]) for part in parts):
                joined[name] = parts[0]
            else:
                raise ValueError(
                    f"quantizer={self.quantizer!r} fits one {name} for all groups, "
                    "so groups cannot be fitted one by one; use static_groups=True"
                )
        return replace(self._example, **joined)


class Swept(NamedTuple):
    """The result of a sweep, in its order of the columns."""

    codes: Shaped[Tensor, "in out"]
    # e_j = (w_j - w_hat_j) / U_jj, w_j as updated at its turn.
    errors: Float[Tensor, "in out"]


def round_columns(
    columns: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    grid: Grid,
    block_size: int = 128,
) -> Swept:
    """Return the codes of w^T, given as `columns`, and the errors, in the memory of `columns`.

    >>> from qcourse import IntQuantizer
    >>> columns = torch.tensor([[0.4], [0.4], [7.0]])
    >>> upper = torch.eye(3)
    >>> upper[0, 1] = -0.9  # inputs 0 and 1 correlate: column 1 compensates the error of column 0
    >>> grid = FittedBefore(IntQuantizer(4), columns.T, torch.arange(3))
    >>> round_columns(columns, upper, grid).codes.tolist()
    [[0], [1], [7]]
    """
    sweep = _Sweep(columns, upper, grid)
    sweep.round_run(0, len(columns), _widths(grid.span, block_size))
    return Swept(codes=torch.stack(sweep.codes), errors=columns)


class _Sweep:
    """The columns, of which those already rounded hold their errors, and the codes so far."""

    def __init__(self, columns: Tensor, upper: Tensor, grid: Grid) -> None:
        self.columns = columns
        self.upper = upper
        self.diagonal = upper.diagonal().tolist()
        self.grid = grid
        self.codes: list[Tensor] = []

    def round_run(self, start: int, stop: int, widths: list[int]) -> None:
        """Round columns start to stop, which are up to date with all errors before start."""
        columns = self.columns
        width, *narrower = widths
        for first in range(start, stop, width):
            # Subtract sum_j e_j U_jk over the columns j from start on, for this run's columns k.
            last = min(first + width, stop)
            u = self.upper[start:first, first:last]
            columns[first:last].addmm_(u.T, columns[start:first], alpha=-1)

            if narrower:
                self.round_run(first, last, narrower)
            else:
                self._round_column(first)

    def _round_column(self, j: int) -> None:
        """Round a column that is up to date, and leave its error e in its place."""
        grid = self.grid
        if j % grid.span == 0:
            grid.fit(j, self.columns[j : j + grid.span])
        column = self.columns[j]
        codes, w_hat = grid.nearest(column[:, None], grid.at(j))
        self.codes.append(codes[:, 0])
        column.sub_(w_hat[:, 0]).div_(self.diagonal[j])


def _widths(span: int, block_size: int) -> list[int]:
    """The widths of blocks, parts and columns, in decreasing order."""
    # In blocks of 100, groups of 32 give 96, 32, 1 and groups of 128 give 128, 100, 32, 1.
    widths = {1, span}
    for width in (block_size, min(block_size, PART)):
        # A group must be up to date as a whole when it is fitted: wider runs hold whole groups.
        groups = max(width // span, 1)
        widths.add(min(width, groups * span))
    return sorted(widths, reverse=True)


def group_size(granularity: Granularity, shape: torch.Size) -> int:
    """Return how many neighboring inputs share a row's parameters; all of them without groups.

    >>> from qcourse import PerGroup
    >>> shape = torch.Size([8, 128])
    >>> group_size(PerGroup(32), shape), group_size(PerChannel(0), shape)
    (32, 128)
    """
    inputs = shape[1]
    scales = granularity.scale_shape(shape)
    return inputs // scales[1] if scales else inputs


def _for_one_column(quantizer: Quantizer, shape: torch.Size) -> Quantizer:
    """The same quantizer for one column of w (out, in) with its slice of the parameters."""
    scales = quantizer.granularity.scale_shape(shape)
    rows_share = not scales or scales[0] < shape[0]
    if rows_share:
        return quantizer
    # A column of a PerGroup or PerChannel(0) weight has one scale per row.
    return replace(quantizer, granularity=PerChannel(0))  # type: ignore[type-var]


def _group(parameters: Any, k: int, count: int) -> Any:
    """The parameters of group k of count."""
    own = {}
    for name, value in _tensors(parameters).items():
        if _has_groups(value, count):
            own[name] = value[:, k : k + 1]
    return replace(parameters, **own)


def _tensors(parameters: Any) -> dict[str, Tensor]:
    names = [field.name for field in fields(parameters)]
    return {name: getattr(parameters, name) for name in names}


def _has_groups(value: Tensor, count: int) -> bool:
    return value.ndim == 2 and value.shape[1] == count > 1
