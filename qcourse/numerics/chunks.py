"""Work through a large tensor in pieces that stay in the cache.

The idea: dividing, rounding and clipping a whole matrix, one after another, moves it to memory and
back three times. Doing all three to one piece before the next piece moves it once.
How it differs from `granularity.py`: that lays a tensor out as rows; this walks along the rows.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 1 << 19  # values per piece: 2 MiB of float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def range_of_rows(rows: Float[Tensor, "scales size"]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value of each row; NaN passes through."""
    if len(rows) == 1:
        low, high = torch.aminmax(rows)
        return low[None], high[None]
    lows = []
    highs = []
    for piece in rows.split(_rows_per_piece(rows)):
        lows.append(piece.amin(dim=1))
        highs.append(piece.amax(dim=1))
    return torch.cat(lows), torch.cat(highs)


def sum_of_squares(x: Tensor) -> float:
    """Return ||x||^2: rows are summed in x's dtype, then added in float64.

    >>> sum_of_squares(torch.tensor([[3.0, 4.0]]))
    25.0
    """
    # A float32 norm per row is fast, and adding in float64 keeps small rows beside large ones.
    row_norms = torch.linalg.vector_norm(x, dim=-1)
    total = float(row_norms.double().square().sum())
    if 0 < total < math.inf:
        return total
    # Squares left the range of float32, or x is all zero.
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def chunks(rows: Tensor, out: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield pieces of about CHUNK values of `rows` and `out`, with their part of each column."""
    # Methods that go column by column come here thousands of times with a small tensor.
    if rows.numel() <= CHUNK:
        yield rows, out, *columns
        return
    if len(rows) == 1:
        for part, out_part in zip(rows.split(CHUNK, dim=1), out.split(CHUNK, dim=1), strict=True):
            yield part, out_part, *columns
        return
    count = _rows_per_piece(rows)
    pieces = [tensor.split(count) for tensor in (rows, out, *columns)]
    yield from zip(*pieces, strict=True)


def _rows_per_piece(rows: Tensor) -> int:
    return max(1, CHUNK // rows.shape[1])
