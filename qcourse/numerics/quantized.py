"""What a quantized tensor is: codes, the parameters to read them with, and the quantizer that made them.

The idea: a quantizer is a value with three pure functions, fit(x) -> parameters, encode(x, parameters) -> codes and
decode(codes, parameters) -> floats. Integers (`affine.py`), minifloats and codebooks all have these three, so a method
such as GPTQ takes any of them and a new number format needs no edit there.

This file says what they share; it chooses no codes itself.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity
from qcourse.numerics.packing import packed_nbytes


@dataclass(frozen=True, eq=False)  # compared by identity: tensors have no single ==
class Parameters:
    """The scale (the width of one step, in x's units) and zero point (the code that stands for 0) of an affine map.

    Args:
        scale: in the dtype it is stored in, of the shape `granularity.scale_shape` gives.
        zero_point: whole codes, of scale's shape.
    """

    scale: Shaped[Tensor, "*scales"]  # floats, of 8 bits too
    zero_point: Integer[Tensor, "*scales"]


@runtime_checkable
class Quantizer(Protocol):
    """What everything that takes a quantizer may ask of it.

    A quantizer is a frozen dataclass with ``granularity`` among its fields, so that ``dataclasses.replace`` gives one
    for another granularity. Each tensor of its parameters has no axis or, for a matrix, one row or a row for each of
    the matrix, and one column or a column for each group: so the parameters of one group are a slice of the whole's.
    """

    @property
    def bits(self) -> int:
        """Bits a code."""

    @property
    def granularity(self) -> Granularity:
        """Which values share a scale."""

    def __call__(self, x: Tensor) -> "QuantizedTensor":
        """x quantized on its own range: fit, then encode."""

    def fit(self, x: Tensor) -> Any:
        """The parameters for x."""

    def encode(self, x: Tensor, parameters: Any) -> Tensor:
        """Codes of x's shape."""

    def decode(self, codes: Tensor, parameters: Any) -> Tensor:
        """Floats of the codes' shape."""

    def nearest(self, x: Tensor, parameters: Any) -> tuple[Tensor, Tensor]:
        """Codes and the floats they stand for in one, unchecked: for methods that encode column by column."""

    def parameter_nbytes(self, parameters: Any) -> int:
        """Bytes that the parameters take in storage."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes with all it takes to read them; what `quantize` returns.

    >>> from qcourse import quantize
    >>> q = quantize(torch.tensor([-0.33, -0.10, 0.02, 0.41]), bits=4)
    >>> q.codes.tolist(), q.nbytes  # two bytes of codes, four of scale
    ([-6, -2, 0, 7], 6)
    """

    codes: Shaped[Tensor, "*shape"]
    parameters: Any
    quantizer: Quantizer

    @property
    def scale(self) -> Tensor:
        """The scales, as stored."""
        return self.parameters.scale

    @property
    def zero_point(self) -> Tensor:
        """The zero points, as stored (all 0 for a symmetric quantizer, which then stores none)."""
        return self.parameters.zero_point

    @property
    def bits(self) -> int:
        """Bits a code."""
        return self.quantizer.bits

    @property
    def granularity(self) -> Granularity:
        """Which values share a scale."""
        return self.quantizer.granularity

    @property
    def shape(self) -> torch.Size:
        """The shape of the tensor that was quantized."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes in storage: the codes as packed, the scales and zero points as stored."""
        return packed_nbytes(self.codes.numel(), self.bits) + self.quantizer.parameter_nbytes(
            self.parameters
        )

    @property
    def bits_per_weight(self) -> float:
        """Bits in storage for each value, 8 nbytes / count, scales and zero points included."""
        return 8 * self.nbytes / self.codes.numel()

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """The floats that the codes stand for: float32, or float64 where the scales are."""
        return self.quantizer.decode(self.codes, self.parameters)
