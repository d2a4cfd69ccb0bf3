"""Calibration: choose the range of a quantizer from data that is seen once, batch by batch.

The idea: the scale of activations must be known before the model meets its inputs, so a few batches
represent them. A rule of `ranges.py` says what to remember of a batch (its extremes, or a histogram
of 32 KiB per scale) and which range to choose at the end. A weight is one batch, [w].
Source: Nagel et al., "A white paper on neural network quantization" (2021), section 3.1.
How it differs from `IntQuantizer.fit`: that sees one whole tensor; this sees many, once each.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.methods.ranges import (
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    Rule,
)
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.chunks import range_of_rows
from qcourse.numerics.granularity import PerChannel, PerTensor
from qcourse.numerics.quantized import Parameters
from qcourse.numerics.validation import check_finite, check_floating

__all__ = [
    "Calibrator",
    "Entropy",
    "MeanSquaredError",
    "MinMax",
    "MovingAverage",
    "Percentile",
    "Rule",
    "calibrate",
]


class Calibrator:
    """A rule applied to a stream: `observe` each batch, then ask for the `parameters`.

    PerChannel quantizers need batches that agree on the channels: use PerChannel(-1) for
    activations (tokens, in).
    """

    def __init__(self, quantizer: IntQuantizer, rule: Rule) -> None:
        _check_quantizer(quantizer)
        if isinstance(rule, type) or not isinstance(rule, Rule):
            raise TypeError(f"rule={rule!r} must be a value such as MinMax() or Percentile(99.9)")
        self.quantizer = quantizer
        self.rule = rule

        # What the rule remembers, the number of batches, and the shape of the scales.
        self._seen: Any = None
        self._batches = 0
        self._shape: tuple[int, ...] = ()

    def observe(self, x: Shaped[Tensor, "*shape"]) -> None:
        """Add one batch; a rejected batch changes nothing.

        Raises TypeError or ValueError unless x is finite with the channels of earlier batches.
        """
        name = f"batches[{self._batches}]"
        check_floating(x, name)

        # Every batch must have the scales of the first: the same channels.
        granularity = self.quantizer.granularity
        shape = granularity.scale_shape(x.shape)
        if self._batches and shape != self._shape:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has scales of shape {shape}, "
                f"the batches before {self._shape}; {granularity!r} needs batches that agree"
            )

        # NaN and infinity reach the extremes, so looking at these finds them.
        rows = granularity.rows(x.detach())
        low, high = range_of_rows(rows)
        check_finite(x, name, ends=(low, high))

        # All checks passed: only now change anything.
        self._seen = self.rule.observe(self._seen, rows, low, high)
        self._shape = shape
        self._batches += 1

    def range(self) -> tuple[Float[Tensor, "*scales"], Float[Tensor, "*scales"]]:
        """Return the chosen low and high in the shape of the scales; needs at least one batch."""
        if not self._batches:
            raise ValueError("batches is empty; calibration needs at least one batch")
        low, high = self.rule.choose(self._seen, self.quantizer)

        # A symmetric grid has the range [-high, high].
        if self.quantizer.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low.reshape(self._shape), high.reshape(self._shape)

    def parameters(self) -> Parameters:
        """Return the scale and zero point for the chosen range."""
        low, high = self.range()
        return self.quantizer.from_range(low, high)


def calibrate(batches: Iterable[Tensor], quantizer: IntQuantizer, rule: Rule) -> Parameters:
    """Return the scale and zero point that `rule` chooses from all batches, each used once.

    Raises TypeError or ValueError if batches is empty or a single tensor, or as `Calibrator` does.

    >>> quantizer = IntQuantizer(bits=4)
    >>> batches = [torch.tensor([0.5, -1.0]), torch.tensor([3.5])]
    >>> parameters = calibrate(batches, quantizer, MinMax())
    >>> quantizer.encode(torch.tensor([1.0, 9.0]), parameters).tolist()  # 9 is clipped
    [2, 7]
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches is one tensor of shape {tuple(batches.shape)}; "
            "give a list of batches, [x] for one"
        )
    calibrator = Calibrator(quantizer, rule)
    for x in batches:
        calibrator.observe(x)
    return calibrator.parameters()


def _check_quantizer(quantizer: object) -> None:
    if not isinstance(quantizer, IntQuantizer):
        raise TypeError(
            f"quantizer={quantizer!r} must be an IntQuantizer, which turns a range into a scale"
        )
    granularity = quantizer.granularity
    if not isinstance(granularity, PerTensor | PerChannel):
        raise ValueError(
            f"granularity={granularity!r} must be PerTensor() or PerChannel(axis) to calibrate"
        )
    if quantizer.scale_rule == "mse":
        raise ValueError(
            "scale_rule='mse' would choose the range again; "
            "calibrate with MeanSquaredError() instead"
        )
