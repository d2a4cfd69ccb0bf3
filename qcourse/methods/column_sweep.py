"""The sweep of GPTQ: round the columns of a weight one after another; later columns answer the errors of earlier ones.

The idea: let H^-1 = U^T U, U upper triangular. Rounding column j, as it has become, leaves an error e_j, which is
(w_j - w_hat_j) / U_jj, and the best answer to it is w_k -= e_j U_jk in every later column k. No column needs it before
its turn, or that of its group. So it is done late, and for many columns at once: a block answers all columns before it
in one product, then a part of the block those before it in the block, then a column those before it in the part. The
first product does nearly all the work.

Source: Frantar et al., "GPTQ" (ICLR 2023), section 4, steps 1 and 2, and Algorithm 1. Its blocks push their updates
forward to all later columns; here they are fetched: the same sum, and each column is written a few times only.

How it differs from `gptq.py`: here are columns, a triangle and a grid; there, weights, inputs and what becomes of them.
"""

from dataclasses import fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerChannel
from qcourse.numerics.quantized import Quantizer

PART = 32  # columns of a block that are brought up to date together: they stay in the cache


@runtime_checkable
class Grid(Protocol):
    """What a column is rounded to.

    Its ``span`` columns are brought up to date together: their parameters depend on all of them.
    """

    span: int

    def at(self, j: int, columns: Tensor) -> Any:
        """The parameters of column j, given the columns as they are when its turn comes."""

    def nearest(self, column: Tensor, parameters: Any) -> tuple[Tensor, Tensor]:
        """The codes of a column (out, 1), and what they stand for."""


class FittedBefore:
    """Parameters that are fitted before the sweep: on w as it was, with groups in the order of the inputs.

    Args:
        order: column j of the sweep is input ``order[j]``.
    """

    def __init__(
        self, quantizer: Quantizer, w: Float[Tensor, "out in"], order: Int[Tensor, " in"]
    ) -> None:
        self.span, self.parameters = len(order), quantizer.fit(w)
        self.nearest = _of_a_column(quantizer, w.shape).nearest
        size = group_size(quantizer.granularity, w.shape)
        self._groups = (order // size).tolist()
        self._fits = [
            _group(self.parameters, k, len(order) // size) for k in range(len(order) // size)
        ]

    def at(self, j: int, columns: Tensor) -> Any:
        """The parameters that column j of the sweep is rounded with."""
        return self._fits[self._groups[j]]


class FittedOnTheWay:
    """Parameters that are fitted group by group: each at its turn, on the weights as updated by then.

    Groups are runs of columns in the order of the sweep.

    Args:
        w: (out, in); only its shape and dtype are looked at.
    """

    def __init__(self, quantizer: Quantizer, w: Float[Tensor, "out in"]) -> None:
        self.quantizer, self.span = quantizer, group_size(quantizer.granularity, w.shape)
        self.nearest = _of_a_column(quantizer, w.shape).nearest
        zeros = torch.zeros_like(w[:1])  # any values will do, to learn the shapes of the parameters
        self._example, self._fits = quantizer.fit(zeros), list[Any]()

    def at(self, j: int, columns: Tensor) -> Any:
        """The parameters that column j of the sweep is rounded with; at the first of a group they are fitted."""
        if j % self.span == 0:
            self._fits.append(self.quantizer.fit(columns[j : j + self.span].T))
        return self._fits[-1]

    @property
    def parameters(self) -> Any:
        """Those of all groups side by side; ValueError where groups disagree on what they have in common."""
        joined = {}
        for name, value in _tensors(self._example).items():
            parts = [getattr(fit, name) for fit in self._fits]
            if _by_group(value, len(parts)):
                joined[name] = torch.cat(parts, dim=1)
            elif all(torch.equal(part, parts[0]) for part in parts):
                joined[name] = parts[0]
            else:
                raise ValueError(
                    f"quantizer={self.quantizer!r} fits one {name} for all groups, so groups cannot be fitted one by"
                    " one; use static_groups=True"
                )
        return replace(self._example, **joined)


def round_columns(
    columns: Float[Tensor, "in out"],
    upper: Float[Tensor, "in in"],
    grid: Grid,
    block_size: int = 128,
) -> Shaped[Tensor, "in out"]:
    """The codes of w^T; columns, which holds w^T as the sweep begins, becomes the errors e.

    >>> from qcourse import IntQuantizer
    >>> columns, upper = torch.tensor([[0.4], [0.4], [7.0]]), torch.eye(3)
    >>> upper[0, 1] = -0.9  # inputs 0 and 1 are alike: what 0 has lost, 1 makes up for
    >>> round_columns(columns, upper, FittedBefore(IntQuantizer(4), columns.T, torch.arange(3))).tolist()
    [[0], [1], [7]]
    """
    nearest, diagonal, codes = grid.nearest, upper.diagonal().tolist(), []

    def round_run(start: int, stop: int, widths: list[int]) -> None:
        """Round columns start to stop, which have answered the errors of all columns before start."""
        for first in range(start, stop, widths[0]):
            last = min(first + widths[0], stop)
            columns[first:last].addmm_(
                upper[start:first, first:last].T, columns[start:first], alpha=-1
            )
            if len(widths) > 1:
                round_run(first, last, widths[1:])
            else:
                column_codes, w_hat = nearest(columns[first][:, None], grid.at(first, columns))
                codes.append(column_codes[:, 0])
                columns[first].sub_(w_hat[:, 0]).div_(diagonal[first])

    round_run(0, len(columns), _widths(grid.span, block_size))
    return torch.stack(codes)


def _widths(span: int, block_size: int) -> list[int]:
    """The widths of runs of columns that are brought up to date together, each a part of the one before; the last is 1.

    Above span, multiples of it: a group has to be up to date as a whole when it is fitted.

    >>> _widths(32, 100), _widths(128, 100)
    ([96, 32, 1], [128, 100, 32, 1])
    """
    parts = (block_size, min(block_size, PART))
    return sorted({1, span, *(n if n < span else n // span * span for n in parts)}, reverse=True)


def group_size(granularity: Granularity, shape: torch.Size) -> int:
    """How many neighbouring inputs share a row's parameters: all of them, unless there are groups.

    Raises:
        ValueError: the granularity does not suit a weight of this shape (out, in).

    >>> from qcourse import PerGroup
    >>> [group_size(each, torch.Size([8, 128])) for each in (PerGroup(32), PerChannel(0), PerChannel(1))]
    [32, 128, 1]
    """
    scales = granularity.scale_shape(shape)
    return shape[1] // scales[1] if scales else shape[1]


def _of_a_column(quantizer: Quantizer, shape: torch.Size) -> Quantizer:
    """The same quantizer for one column of w (out, in), and its slice of the parameters."""
    scales = quantizer.granularity.scale_shape(shape)
    one_for_all_rows = not scales or scales[0] < shape[0]
    return quantizer if one_for_all_rows else replace(quantizer, granularity=PerChannel(0))  # type: ignore[type-var]


def _group(parameters: Any, k: int, count: int) -> Any:
    """The parameters of group k of count."""
    tensors = _tensors(parameters).items()
    return replace(
        parameters, **{name: t[:, k : k + 1] for name, t in tensors if _by_group(t, count)}
    )


def _tensors(parameters: Any) -> dict[str, Tensor]:
    return {field.name: getattr(parameters, field.name) for field in fields(parameters)}


def _by_group(t: Tensor, count: int) -> bool:
    return t.ndim == 2 and t.shape[1] == count > 1
