"""A histogram of a stream: what data looked like, in memory that does not grow with it.

The idea: cut the line into bins 2^e wide, 2048 on each side of 0, and let e rise when a value falls outside. Then each
pair of neighbours becomes one bin exactly, since floor(floor(x / w) / 2) = floor(x / 2w), and e follows from the
largest |x| alone. So the counts depend neither on the order of the data nor on how it was cut into batches, and

    amax / 2048 < bin width <= amax / 1024.

Source: Migacz, "8-bit inference with TensorRT" (GTC 2017) chooses ranges from a histogram of 2048 bins; the widths are
powers of two here so that growing loses nothing.

`calibration.py` chooses ranges from these counts, and `divergence.py` does so by entropy; this file only counts.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from qcourse.numerics.chunks import CHUNK

BINS = 2048  # on each side of 0
_LOG_BINS = BINS.bit_length() - 1
_LEAST_EXPONENT = (
    -1000
)  # of the range: no float of 32 bits is so small, and 2^1011, the inverse width, is still finite


@dataclass(frozen=True, eq=False)
class Histogram:
    """How often values fell in each bin, for each row (the values that share a scale).

    Args:
        counts: bin k of a row, 0 <= k < 4096, holds the values in [(k - 2048) width, (k - 2047) width).
        exponent: the bins of a row are 2^exponent wide.
        low, high: the smallest and the largest value of each row, exactly.

    >>> seen = Histogram.of(torch.tensor([[0.1, 0.2]]), low=torch.tensor([0.1]), high=torch.tensor([0.2]))
    >>> seen.width.item() == 2**-13, seen.counts.nonzero()[:, 1].tolist()  # 0.1 / 2^-13 = 819.2
    (True, [2867, 3686])
    """

    counts: Int64[Tensor, "rows bins"]
    exponent: Int64[Tensor, " rows"]
    low: Float64[Tensor, " rows"]
    high: Float64[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "rows size"],
        low: Float[Tensor, " rows"],
        high: Float[Tensor, " rows"],
    ) -> "Histogram":
        """The histogram of finite values, whose least and largest of each row are low and high."""
        low, high = low.double(), high.double()
        empty = torch.zeros(len(values), 2 * BINS, dtype=torch.int64, device=values.device)
        return cls(_count(empty, values, exponent := _exponent(low, high)), exponent, low, high)

    def add(
        self,
        values: Float[Tensor, "rows size"],
        low: Float[Tensor, " rows"],
        high: Float[Tensor, " rows"],
    ) -> "Histogram":
        """This histogram with more values counted, its bins widened where they have to be."""
        low, high = torch.minimum(self.low, low.double()), torch.maximum(self.high, high.double())
        exponent = _exponent(low, high)
        return Histogram(
            _count(_widen(self.counts, exponent - self.exponent), values, exponent),
            exponent,
            low,
            high,
        )

    def folded(self) -> "Histogram":
        """The histogram of |x|; a value on an edge, if it was negative, counts in the bin below."""
        counts = torch.zeros_like(self.counts)
        counts[:, BINS:] = self.counts[:, BINS:] + self.counts[:, :BINS].flip(1)
        return replace(
            self,
            counts=counts,
            low=torch.zeros_like(self.low),
            high=torch.maximum(-self.low, self.high),
        )

    @property
    def width(self) -> Float64[Tensor, " rows"]:
        """The width of a bin, in the units of the data."""
        return _power_of_two(self.exponent)


def _exponent(low: Tensor, high: Tensor) -> Int64[Tensor, " rows"]:
    """The exponent of the bins of each row: 2048 of them reach just beyond the largest |x|."""
    amax = torch.maximum(-low, high)
    reach = torch.where(
        amax > 0, torch.frexp(amax).exponent, _LEAST_EXPONENT
    )  # amax < 2^reach <= 2 amax
    return reach.clamp(min=_LEAST_EXPONENT).long() - _LOG_BINS


def _power_of_two(exponent: Tensor) -> Float64[Tensor, " rows"]:
    """2^exponent, exactly."""
    return torch.pow(2.0, exponent.double())


def _widen(counts: Tensor, doublings: Tensor) -> Int64[Tensor, "rows bins"]:
    """A copy of counts in which 2^doublings neighbours have become one bin."""
    old = torch.arange(-BINS, BINS, device=counts.device)
    new = (
        old >> doublings.clamp(max=63)[:, None]
    ) + BINS  # the shift rounds down, on the left of 0 too
    return torch.zeros_like(counts).scatter_add_(1, new, counts)


def _count(counts: Tensor, values: Tensor, exponent: Tensor) -> Int64[Tensor, "rows bins"]:
    """counts, into which values have been counted, in pieces so that memory stays bounded."""
    bins_per_unit = _power_of_two(-exponent)[:, None]
    for part in values.split(max(1, CHUNK // len(values)), dim=1):
        index = (part.double() * bins_per_unit).floor_().long() + BINS
        counts.scatter_add_(1, index, torch.ones_like(index))
    return counts
