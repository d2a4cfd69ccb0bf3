"""Calibration: choosing the range of a quantizer from data that is seen once, batch by batch.

The idea: the scale of activations has to be fixed before the model meets its inputs, so a few batches stand for them.
A rule says what to remember of a batch (its extremes, or a histogram) and which range to choose at the end:

    parameters = calibrate(batches, IntQuantizer(bits=8), Percentile(99.9))
    codes = quantizer.encode(x, parameters)

Memory is bounded: two numbers a scale, or a histogram of 32 KiB a scale, whose bins are at most amax / 1024 wide.
The rules are in `ranges.py`, and importable from here. A weight is one batch: [w].

Supported: symmetric and asymmetric quantizers; PerTensor (batches of any shapes) and PerChannel (batches that agree on
the channels; for activations (tokens, in) that is PerChannel(-1)). Groups of weights fit themselves: `quantizer(w)`.

Source: Nagel et al., "A white paper on neural network quantization" (2021), section 3.1; Krishnamoorthi, "Quantizing
deep convolutional networks for efficient inference" (2018), section 3.1.

How it differs from `IntQuantizer.fit`: that sees one tensor, whole; this sees many, once each.
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
    """A rule at work on a stream: `observe` each batch, then ask for the `parameters`.

    >>> calibrator = Calibrator(IntQuantizer(8), MinMax())
    >>> for x in (torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 12.7]])):
    ...     calibrator.observe(x)
    >>> round(calibrator.parameters().scale.item(), 6)
    0.1
    """

    def __init__(self, quantizer: IntQuantizer, rule: Rule) -> None:
        if not isinstance(quantizer, IntQuantizer):
            raise TypeError(
                f"quantizer={quantizer!r} must be an IntQuantizer, which turns a range into a scale"
            )
        if isinstance(rule, type) or not isinstance(rule, Rule):
            raise TypeError(f"rule={rule!r} must be a value such as MinMax() or Percentile(99.9)")
        if not isinstance(quantizer.granularity, PerTensor | PerChannel):
            raise ValueError(
                f"granularity={quantizer.granularity!r} must be PerTensor() or PerChannel(axis) to calibrate"
            )
        if quantizer.scale_rule == "mse":
            raise ValueError(
                "scale_rule='mse' would choose the range again; calibrate with MeanSquaredError() instead"
            )
        self.quantizer, self.rule = quantizer, rule
        self._seen: Any = None
        self._batches = 0
        self._shape: tuple[int, ...] = ()

    def observe(self, x: Shaped[Tensor, "*shape"]) -> None:
        """Take one batch into account; one that is refused leaves no trace.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty, has NaN or infinity, or has other channels than the batches before.
        """
        name = f"batches[{self._batches}]"
        check_floating(x, name)
        shape = self.quantizer.granularity.scale_shape(x.shape)
        if self._batches and shape != self._shape:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} has scales of shape {shape}, the batches before {self._shape}; "
                f"{self.quantizer.granularity!r} needs batches that agree"
            )
        rows = self.quantizer.granularity.rows(x.detach())
        low, high = range_of_rows(rows)
        check_finite(x, low, high, name)
        self._seen, self._shape = self.rule.observe(self._seen, rows, low, high), shape
        self._batches += 1

    def range(self) -> tuple[Float[Tensor, "*scales"], Float[Tensor, "*scales"]]:
        """The range chosen, low and high, of the shape of the scales: [-high, high] when symmetric.

        Raises:
            ValueError: no batch was observed.
        """
        if not self._batches:
            raise ValueError("batches is empty; calibration needs at least one batch")
        low, high = self.rule.choose(self._seen, self.quantizer)
        if self.quantizer.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return low.reshape(self._shape), high.reshape(self._shape)

    def parameters(self) -> Parameters:
        """The scale and zero point for the range chosen; raises what `range` and `IntQuantizer.from_range` raise."""
        return self.quantizer.from_range(*self.range())


def calibrate(batches: Iterable[Tensor], quantizer: IntQuantizer, rule: Rule) -> Parameters:
    """The scale and zero point that `rule` chooses from all batches, each looked at once and then let go.

    Args:
        batches: floating-point tensors: activations, or [w] for a weight.
        quantizer: whose range is chosen; PerTensor or PerChannel.
        rule: MinMax(), MovingAverage(), Percentile(), MeanSquaredError() or Entropy().

    Returns:
        What `quantizer.encode` and `quantizer.decode` take. All-zero data gets scale 1.

    Raises:
        TypeError, ValueError: as `Calibrator` and its methods; batches is a single tensor, or holds none.

    >>> quantizer = IntQuantizer(bits=4)
    >>> parameters = calibrate([torch.tensor([0.5, -1.0]), torch.tensor([3.5])], quantizer, MinMax())
    >>> quantizer.encode(torch.tensor([1.0, 9.0]), parameters).tolist()  # 9 was not in the data, and clips
    [2, 7]
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches is one tensor of shape {tuple(batches.shape)}; give a list of batches, [x] for one"
        )
    calibrator = Calibrator(quantizer, rule)
    for x in batches:
        calibrator.observe(x)
    return calibrator.parameters()
