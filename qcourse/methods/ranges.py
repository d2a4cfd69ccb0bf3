"""Five rules that choose the range of a quantizer, each in a few lines.

The idea: a wide range costs resolution, a narrow one clips. MinMax never clips; MovingAverage forgets the odd batch;
Percentile clips a share of the values; MeanSquaredError weighs both losses by their squares, and Entropy by how much
less the codes tell. The first two remember two numbers a scale, the others a histogram (`histogram.py`).

Source: Nagel et al., "A white paper on neural network quantization" (2021), section 3.1, and what each rule names.

`calibration.py` feeds them, and asks for the range at the end.
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
from qcourse.numerics.scaled import MSE_SHRINKS

Range = tuple[Float64[Tensor, " scales"], Float64[Tensor, " scales"]]


@runtime_checkable
class Rule(Protocol):
    """What to remember of the batches, and which range to choose from that; each of the five below is one."""

    def observe(self, seen: Any, rows: Tensor, low: Tensor, high: Tensor) -> Any:
        """What is remembered after a batch, rows (scales, values) and the extremes of each row; seen starts as None."""

    def choose(self, seen: Any, quantizer: IntQuantizer) -> Range:
        """The range of each scale, low and high."""


@dataclass(frozen=True)
class MinMax:
    """[min x, max x] over all batches: nothing is clipped, and one outlier sets the scale.

    >>> from qcourse.methods.calibration import calibrate
    >>> calibrate([torch.tensor([0.1, -0.7]), torch.tensor([1.4])], IntQuantizer(4), MinMax()).scale.item()  # 1.4 / 7
    0.20000000298023224
    """

    def observe(self, seen: Range | None, rows: Tensor, low: Tensor, high: Tensor) -> Range:
        """The extremes so far."""
        if seen is None:
            return low.double(), high.double()
        return torch.minimum(seen[0], low.double()), torch.maximum(seen[1], high.double())

    def choose(self, seen: Range, quantizer: IntQuantizer) -> Range:
        """The extremes."""
        return seen


@dataclass(frozen=True)
class MovingAverage:
    """low <- momentum low + (1 - momentum) min x, batch after batch, from the first batch's own; high likewise.

    The only rule that depends on the order and the size of the batches. The first of n batches weighs momentum^(n - 1),
    0.91 of 10 batches at 0.99: for a short run take a smaller momentum.

    Args:
        momentum: in [0, 1); at 0 the last batch decides alone.

    Source: Jacob et al. (CVPR 2018), section 3.1.

    >>> from qcourse.methods.calibration import calibrate
    >>> batches = [torch.tensor([0.0, 1.0]), torch.tensor([0.0, 2.0])]
    >>> parameters = calibrate(batches, IntQuantizer(8, symmetric=False), MovingAverage(0.5))
    >>> round(parameters.scale.item() * 255, 4)
    1.5
    """

    momentum: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and less than 1")

    def observe(self, seen: Range | None, rows: Tensor, low: Tensor, high: Tensor) -> Range:
        """The averages so far."""
        if seen is None:
            return low.double(), high.double()
        return torch.lerp(low.double(), seen[0], self.momentum), torch.lerp(
            high.double(), seen[1], self.momentum
        )

    def choose(self, seen: Range, quantizer: IntQuantizer) -> Range:
        """The averages."""
        return seen


class _OnHistogram:
    """What the rules below remember."""

    def observe(self, seen: Histogram | None, rows: Tensor, low: Tensor, high: Tensor) -> Histogram:
        """The histogram so far."""
        return Histogram.of(rows, low, high) if seen is None else seen.add(rows, low, high)


@dataclass(frozen=True)
class Percentile(_OnHistogram):
    """The range that keeps `percent` of the values: of |x| when symmetric; else (100 - percent) / 2 go at each end.

    At most one bin (amax / 1024) wider than numpy.percentile of all the data, never narrower; at 100 it is MinMax.

    Args:
        percent: in (0, 100].

    Source: Wu et al., "Integer quantization for deep learning inference" (2020), whose values are 99.9 to 99.9999.

    >>> from qcourse.methods.calibration import calibrate
    >>> x = torch.linspace(-1, 1, 10001)
    >>> round(calibrate([x], IntQuantizer(8), Percentile(90)).scale.item() * 127, 2)
    0.9
    """

    percent: float = 99.9

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent={self.percent} must be greater than 0 and at most 100")

    def choose(self, seen: Histogram, quantizer: IntQuantizer) -> Range:
        """The edges of the bins in which the percentiles lie."""
        if quantizer.symmetric:
            seen, kept = seen.folded(), self.percent / 100
        else:
            kept = 0.5 + self.percent / 200
        low = BINS - _quantile_edge(seen.counts.flip(1), kept)
        high = _quantile_edge(seen.counts, kept) - BINS
        return torch.maximum(low * seen.width, seen.low), torch.minimum(
            high * seen.width, seen.high
        )


@dataclass(frozen=True)
class MeanSquaredError(_OnHistogram):
    """The fraction f of [min x, max x] with the least sum (x - x_hat)^2, f in MSE_SHRINKS as for scale_rule="mse".

    Each value counts as the middle of its bin. Since |x - x_hat| is the distance to the grid, and so changes by no more
    than x does, the root mean square error of the range chosen is at most one bin above that of the best f.

    >>> from qcourse.methods.calibration import calibrate
    >>> x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    >>> parameters = calibrate([x], IntQuantizer(4), MeanSquaredError())
    >>> torch.equal(parameters.scale, IntQuantizer(4, scale_rule="mse").fit(x).scale)
    True
    """

    def choose(self, seen: Histogram, quantizer: IntQuantizer) -> Range:
        """The extremes, times the best fraction; errors are measured in bins, so that no square can underflow."""
        by_row = replace(quantizer, granularity=PerChannel(0), scale_dtype=torch.float32)
        low, high = (seen.low / seen.width)[:, None], (seen.high / seen.width)[:, None]
        x = (torch.arange(-BINS, BINS, device=low.device) + 0.5).expand(seen.counts.shape)
        counts = seen.counts.float()
        least, best = torch.full_like(seen.low, torch.inf), torch.ones_like(seen.low)
        for shrink in MSE_SHRINKS:
            parameters = by_row.from_range(shrink * low, shrink * high)
            x_hat = by_row.decode(by_row.encode(x, parameters), parameters)
            error = x_hat.sub_(x).square_().mul_(counts).sum(dim=1, dtype=torch.float64)
            best = torch.where(error < least, shrink, best)
            least = torch.minimum(least, error)
        return seen.low * best, seen.high * best


@dataclass(frozen=True)
class Entropy(_OnHistogram):
    """The range with the least KL(P || Q): P the clipped histogram, Q the same after quantization (`divergence.py`).

    Candidates end on bin edges; when not symmetric, both ends go out at one pace. Made for 8 bits, and for histograms
    with enough values to fill the bins (about 2000); it looks at probabilities, not at how far off a clipped value is.

    Source: Migacz, "8-bit inference with TensorRT" (GTC 2017).

    >>> from qcourse.methods.calibration import calibrate
    >>> x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    >>> calibrate([x], IntQuantizer(8), Entropy()).scale.item() * 127 < x.abs().max().item()
    True
    """

    def choose(self, seen: Histogram, quantizer: IntQuantizer) -> Range:
        """The best range of bins; a symmetric grid has 2^(bits - 1) levels for |x|."""
        seen = seen.folded() if quantizer.symmetric else seen
        levels = 2 ** (quantizer.bits - quantizer.symmetric)
        ends = [least_divergence(counts, BINS, levels) for counts in seen.counts]
        low, high = (torch.tensor(ends, device=seen.low.device) - BINS).double().T * seen.width
        return torch.maximum(low, seen.low), torch.minimum(high, seen.high)


def _quantile_edge(counts: Tensor, q: float) -> Float64[Tensor, " scales"]:
    """The quantile q of each row, in bins from the left end: the right edges of the bins of its two neighbours in
    sorted order, weighed as numpy.quantile weighs the neighbours themselves."""
    running = counts.cumsum(dim=1)
    rank = q * (running[:, -1:] - 1).double()  # of the values sorted, counted from 0
    neighbours = torch.cat([rank.floor(), rank.ceil()], dim=1)
    edges = torch.searchsorted(running, neighbours.long() + 1).double() + 1
    return torch.lerp(edges[:, 0], edges[:, 1], rank[:, 0] - rank[:, 0].floor())
