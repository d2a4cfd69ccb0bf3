"""A histogram of a stream: the distribution of the data, in memory that does not grow with it.

The idea: bins are 2^e wide, 2048 on each side of 0, and e grows when a value falls outside. Each
pair of neighbors then merges into one bin exactly, since floor(floor(x / w) / 2) = floor(x / 2w).
So the counts depend neither on the order of the data nor on its batches, and
amax / 2048 < bin width <= amax / 1024.
Source: Migacz, "8-bit inference with TensorRT" (GTC 2017), which uses 2048 bins of fixed width.
How it differs from `calibration.py` and `divergence.py`: they choose ranges, this module counts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from qcourse.numerics.chunks import CHUNK

BINS = 2048  # on each side of 0
_LOG_BINS = BINS.bit_length() - 1
# The lowest exponent of a range. No float32 is that small, and 1 / width is still finite.
_LOWEST_EXPONENT = -1000


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often values fell into each bin, for each row of values that share a scale.

    >>> x = torch.tensor([[0.1, 0.2]])
    >>> seen = Histogram.of(x, low=torch.tensor([0.1]), high=torch.tensor([0.2]))
    >>> seen.width.item() == 2**-13, seen.counts.nonzero()[:, 1].tolist()  # 0.1 / 2^-13 = 819.2
    (True, [2867, 3686])
    """

    # Bin k of a row, 0 <= k < 4096, holds the values in [(k - 2048) width, (k - 2047) width).
    counts: Int64[Tensor, "rows bins"]
    # The bins of a row are 2^exponent wide.
    exponent: Int64[Tensor, " rows"]
    # The smallest and the largest value of each row, exactly.
    low: Float64[Tensor, " rows"]
    high: Float64[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "rows size"],
        low: Float[Tensor, " rows"],
        high: Float[Tensor, " rows"],
    ) -> "Histogram":
        """Return the histogram of finite values with the extremes low and high per row."""
        low = low.double()
        high = high.double()
        exponent = _exponent(low, high)
        empty = torch.zeros(len(values), 2 * BINS, dtype=torch.int64, device=values.device)
        return cls(_add_counts(empty, values, exponent), exponent, low, high)

    def add(
        self,
        values: Float[Tensor, "rows size"],
        low: Float[Tensor, " rows"],
        high: Float[Tensor, " rows"],
    ) -> "Histogram":
        """Return a histogram that counts these values too, with wider bins if they need them."""
        low = torch.minimum(self.low, low.double())
        high = torch.maximum(self.high, high.double())
        exponent = _exponent(low, high)
        counts = _widened(self.counts, exponent - self.exponent)
        return Histogram(_add_counts(counts, values, exponent), exponent, low, high)

    def folded(self) -> "Histogram":
        """Return the histogram of |x|; negative values on an edge count in the bin below."""
        positive = self.counts[:, BINS:]
        negative = self.counts[:, :BINS]
        counts = torch.zeros_like(self.counts)
        counts[:, BINS:] = positive + negative.flip(1)

        low = torch.zeros_like(self.low)
        high = torch.maximum(-self.low, self.high)
        return Histogram(counts, self.exponent, low, high)

    @property
    def width(self) -> Float64[Tensor, " rows"]:
        """Return the width of a bin, in the units of the data."""
        return _power_of_two(self.exponent)


def _exponent(low: Tensor, high: Tensor) -> Int64[Tensor, " rows"]:
    """The exponent of the bin width of each row: 2048 bins reach just beyond the largest |x|."""
    amax = torch.maximum(-low, high)
    # frexp: 2^(reach - 1) <= amax < 2^reach.
    reach = torch.frexp(amax).exponent
    reach = torch.where(amax > 0, reach, _LOWEST_EXPONENT)
    reach = reach.clamp(min=_LOWEST_EXPONENT).long()
    return reach - _LOG_BINS


def _power_of_two(exponent: Tensor) -> Float64[Tensor, " rows"]:
    """2^exponent, exactly."""
    return torch.pow(2.0, exponent.double())


def _widened(counts: Tensor, doublings: Tensor) -> Int64[Tensor, "rows bins"]:
    """A copy of counts in which 2^doublings neighbors have become one bin."""
    old_bins = torch.arange(-BINS, BINS, device=counts.device)
    shifts = doublings.clamp(max=63)[:, None]
    new_bins = old_bins >> shifts  # (rows, bins); rounds down, also left of 0
    return torch.zeros_like(counts).scatter_add_(1, new_bins + BINS, counts)


def _add_counts(counts: Tensor, values: Tensor, exponent: Tensor) -> Int64[Tensor, "rows bins"]:
    """Count the values into counts, in pieces so that memory stays bounded."""
    bins_per_unit = _power_of_two(-exponent)[:, None]
    size = max(1, CHUNK // len(values))
    for part in values.split(size, dim=1):
        index = (part.double() * bins_per_unit).floor_().long() + BINS
        counts.scatter_add_(1, index, torch.ones_like(index))
    return counts
