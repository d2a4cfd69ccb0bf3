"""What a quantized tensor is: codes, the parameters to read them with, and their quantizer.

The idea: a quantizer has three pure functions, fit(x) -> parameters, encode(x, parameters) -> codes
and decode(codes, parameters) -> floats. Methods such as GPTQ take any quantizer.
How it differs from `row_quantizer.py`: this is the interface, that implements it.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity
from qcourse.numerics.packing import packed_nbytes


# eq=False: compared by identity, since tensors have no single ==.
@dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of an affine map, of the shape that `granularity.scale_shape` gives."""

    # The width of one step in units of x, in the dtype it is stored in.
    scale: Shaped[Tensor, "*scales"]
    # The code that stands for 0.
    zero_point: Integer[Tensor, "*scales"]


@runtime_checkable
class Quantizer(Protocol):
    """What a method may ask of any quantizer.

    It is a frozen dataclass with a field `granularity`. For a matrix, each tensor of its parameters
    is a scalar or has 1 row or one per row of the matrix, and 1 column or one per group: the
    parameters of a group are a slice.
    """

    @property
    def bits(self) -> int:
        """Bits per code."""

    @property
    def granularity(self) -> Granularity:
        """Which values share a scale."""

    def __call__(self, x: Tensor) -> "QuantizedTensor":
        """Quantize x on its own range: fit, then encode."""

    def fit(self, x: Tensor) -> Any:
        """Return the parameters for x."""

    def encode(self, x: Tensor, parameters: Any) -> Tensor:
        """Return codes of x's shape."""

    def decode(self, codes: Tensor, parameters: Any) -> Tensor:
        """Return floats of the codes' shape."""

    def nearest(self, x: Tensor, parameters: Any) -> tuple[Tensor, Tensor]:
        """Return codes and their floats, unchecked: for methods that go column by column."""

    def parameter_nbytes(self, parameters: Any) -> int:
        """Return the bytes that the parameters take in storage."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """What `quantize` returns.

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
        return self.parameters.scale

    @property
    def zero_point(self) -> Tensor:
        """The zero points: all 0 for a symmetric quantizer, which stores none."""
        return self.parameters.zero_point

    @property
    def bits(self) -> int:
        return self.quantizer.bits

    @property
    def granularity(self) -> Granularity:
        return self.quantizer.granularity

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes in storage: packed codes, scales, and zero points unless symmetric."""
        code_nbytes = packed_nbytes(self.codes.numel(), self.bits)
        return code_nbytes + self.quantizer.parameter_nbytes(self.parameters)

    @property
    def bits_per_weight(self) -> float:
        """Bits in storage per value: 8 nbytes / count, scales and zero points included."""
        return 8 * self.nbytes / self.codes.numel()

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """Return the floats that the codes stand for: float32, or float64 if the scales are."""
        return self.quantizer.decode(self.codes, self.parameters)
