"""Five rules that choose the range of a quantizer, each in a few lines.

The idea: a wide range costs resolution, a narrow one clips. The first two rules remember two
numbers per scale, the others a histogram (`histogram.py`).
Source: Nagel et al., "A white paper on neural network quantization" (2021), section 3.1.
How it differs from `calibration.py`: that module feeds the rules and asks for the range at the end.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from qcourse.methods.divergence import least_divergence
from qcourse.methods.histogram import BINS, Histogram
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.granularity import PerChannel
from qcourse.numerics.shrinks import MSE_SHRINKS, best_shrink

# The low and the high end of the range of each scale.
Range = tuple[Float64[Tensor, " scales"], Float64[Tensor, " scales"]]


@runtime_checkable
class Rule(Protocol):
    """What to remember of the batches, and which range to choose from it."""

    def observe(self, seen: Any, rows: Tensor, low: Tensor, high: Tensor) -> Any:
        """Return what to remember after a batch, rows (scales, values); seen starts as None."""

    def choose(self, seen: Any, quantizer: IntQuantizer) -> Range:
        """Return the low and the high end of the range of each scale."""


@dataclass(frozen=True)
class MinMax:
    """[min x, max x] over all batches: nothing is clipped, and a single outlier sets the scale."""

    def observe(self, seen: Range | None, rows: Tensor, low: Tensor, high: Tensor) -> Range:
        low = low.double()
        high = high.double()
        if seen is None:
            return low, high
        seen_low, seen_high = seen
        return torch.minimum(seen_low, low), torch.maximum(seen_high, high)

    def choose(self, seen: Range, quantizer: IntQuantizer) -> Range:
        return seen


@dataclass(frozen=True)
class MovingAverage:
    """low <- momentum low + (1 - momentum) min x per batch, and the same for high with max x.

    Only this rule depends on the order and the size of the batches.
    Source: Jacob et al. (CVPR 2018), section 3.1.
    """

    # In [0, 1); at 0 the last batch decides alone. The first of n batches keeps the weight
    # momentum^(n - 1): 0.91 at 0.99 and 10 batches.
    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and less than 1")

    def observe(self, seen: Range | None, rows: Tensor, low: Tensor, high: Tensor) -> Range:
        low = low.double()
        high = high.double()
        if seen is None:
            return low, high
        seen_low, seen_high = seen
        low = torch.lerp(low, seen_low, self.momentum)
        high = torch.lerp(high, seen_high, self.momentum)
        return low, high

    def choose(self, seen: Range, quantizer: IntQuantizer) -> Range:
        return seen


class _OnHistogram:
    """What the rules below remember."""

    def observe(self, seen: Histogram | None, rows: Tensor, low: Tensor, high: Tensor) -> Histogram:
        if seen is None:
            return Histogram.of(rows, low, high)
        return seen.add(rows, low, high)


@dataclass(frozen=True)
class Percentile(_OnHistogram):
    """The range that keeps `percent` of |x| if symmetric, else clips half of the rest at each end.

    It is at most one bin (amax / 1024) wider than numpy.percentile of all data, never narrower.
    Source: Wu et al., "Integer quantization for deep learning inference" (2020): 99.9 to 99.9999.

    >>> from qcourse import calibrate
    >>> x = torch.linspace(-1, 1, 10001)
    >>> round(calibrate([x], IntQuantizer(8), Percentile(90)).scale.item() * 127, 2)
    0.9
    """

    percent: float = 99.9  # in (0, 100]

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent={self.percent} must be greater than 0 and at most 100")

    def choose(self, seen: Histogram, quantizer: IntQuantizer) -> Range:
        quantile = 0.5 + self.percent / 200
        if quantizer.symmetric:
            seen = seen.folded()
            quantile = self.percent / 100

        # Take the outer edges of the bins that hold the percentiles, within the extremes. The low
        # end is the high end of the mirrored histogram.
        low = BINS - _quantile_edge(seen.counts.flip(1), quantile)
        high = _quantile_edge(seen.counts, quantile) - BINS
        low = torch.maximum(low * seen.width, seen.low)
        high = torch.minimum(high * seen.width, seen.high)
        return low, high


@dataclass(frozen=True)
class MeanSquaredError(_OnHistogram):
    """The fraction f of [min x, max x] with the least sum (x - x_hat)^2, f in MSE_SHRINKS."""

    def choose(self, seen: Histogram, quantizer: IntQuantizer) -> Range:
        # Measure in bins, so that no square underflows, with one scale per row of the histogram.
        by_row = replace(quantizer, granularity=PerChannel(0), scale_dtype=torch.float32)
        low = (seen.low / seen.width)[:, None]
        high = (seen.high / seen.width)[:, None]

        # Each value counts as the middle of its bin. |x - x_hat| moves by no more than x itself, so
        # the root mean square error is at most one bin above that of the best fraction.
        middles = torch.arange(-BINS, BINS, device=low.device) + 0.5
        x = middles.expand(seen.counts.shape)
        counts = seen.counts.float()

        def squared_error(shrink: float) -> Tensor:
            parameters = by_row.from_range(shrink * low, shrink * high)
            x_hat = by_row.decode(by_row.encode(x, parameters), parameters)
            squares = x_hat.sub_(x).square_().mul_(counts)
            return squares.sum(dim=1, dtype=torch.float64)

        best = best_shrink(MSE_SHRINKS, squared_error)
        return seen.low * best, seen.high * best


@dataclass(frozen=True)
class Entropy(_OnHistogram):
    """The range with the least KL(P || Q), P the clipped histogram, Q the quantized one.

    Source: Migacz, "8-bit inference with TensorRT" (GTC 2017); see `divergence.py`.
    """

    # The rule suits 8 bits and at least about 2000 values, which fill the bins. It compares
    # probabilities, not how far a clipped value moves.

    def choose(self, seen: Histogram, quantizer: IntQuantizer) -> Range:
        levels = 2**quantizer.bits
        if quantizer.symmetric:
            # Half of the codes are left for |x|.
            seen = seen.folded()
            levels //= 2
        edges = [least_divergence(counts, BINS, levels) for counts in seen.counts]  # (rows, 2)
        from_zero = (torch.tensor(edges, device=seen.low.device) - BINS).double()

        low, high = from_zero.T * seen.width
        low = torch.maximum(low, seen.low)
        high = torch.minimum(high, seen.high)
        return low, high


def _quantile_edge(counts: Tensor, q: float) -> Float64[Tensor, " scales"]:
    """The quantile q of each row, in bins from the left end."""
    # As numpy.quantile does, interpolate between the two neighbors in sorted order. Each of them
    # counts as the right edge of its bin.
    running = counts.cumsum(dim=1)
    rank = q * (running[:, -1:] - 1).double()  # the place in sorted order, from 0
    floor = rank.floor()
    neighbors = torch.cat([floor, rank.ceil()], dim=1)
    edges = torch.searchsorted(running, neighbors.long() + 1).double() + 1
    return torch.lerp(edges[:, 0], edges[:, 1], (rank - floor)[:, 0])
