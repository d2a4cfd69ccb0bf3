"""Working through a large tensor in pieces that stay in the cache.

The idea: dividing, rounding and clipping a whole matrix one after another moves it to memory and back each time; doing
all three to a piece of it, then going on, does not. That is most of what makes a quantizer fast.

`granularity.py` lays a tensor out as rows that share a scale; this file walks along them.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.numerics.quantized import Parameters

CHUNK = 1 << 19  # values worked on at a time: 2 MiB of float32


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 stays, everything else becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def range_of_rows(rows: Float[Tensor, "scales size"]) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each row; NaN passes through."""
    if len(rows) == 1:
        low, high = torch.aminmax(rows)
        return low[None], high[None]
    parts = [
        (part.amin(dim=1), part.amax(dim=1)) for part in rows.split(max(1, CHUNK // rows.shape[1]))
    ]
    return torch.cat([low for low, _ in parts]), torch.cat([high for _, high in parts])


def sum_of_squares(x: Tensor) -> float:
    """||x||^2, summed along each row in x's dtype and over the rows in float64; in float64 where that leaves float32.

    >>> sum_of_squares(torch.tensor([[3.0, 4.0]]))
    25.0
    """
    size = float(torch.linalg.vector_norm(x, dim=-1).double().square().sum())
    return (
        size
        if 0 < size < math.inf
        else float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
    )


def chunks(
    rows: Tensor, parameters: Parameters, out: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """rows and out in pieces of about CHUNK values, each with the scales and zero points of its rows as a column."""
    scale, zero_point = (
        parameters.scale.detach().reshape(-1, 1),
        parameters.zero_point.reshape(-1, 1),
    )
    if rows.numel() <= CHUNK:  # methods that go column by column come here a thousand times
        yield rows, scale, zero_point, out
        return
    if len(rows) == 1:
        for part, part_out in zip(rows.split(CHUNK, dim=1), out.split(CHUNK, dim=1), strict=True):
            yield part, scale, zero_point, part_out
        return
    count = max(1, CHUNK // rows.shape[1])
    yield from zip(
        rows.split(count),
        scale.split(count),
        zero_point.split(count),
        out.split(count),
        strict=True,
    )
