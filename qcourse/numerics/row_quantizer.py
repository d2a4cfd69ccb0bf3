"""The base class of the quantizers: encode and decode a tensor row by row.

The idea: a granularity lays a tensor out as rows that share a scale. A number format only says how
rows become codes and back; the checks, and the way from the tensor to rows and back, are here.
How it differs from `quantized.py`: that says what GPTQ may ask of a quantizer; this implements it.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from qcourse.numerics.chunks import range_of_rows
from qcourse.numerics.granularity import Granularity
from qcourse.numerics.quantized import QuantizedTensor
from qcourse.numerics.validation import check_finite, check_floating


class RowQuantizer(ABC):
    """Base class of the quantizers: a frozen dataclass that defines all that is abstract here."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits per code."""

    @property
    @abstractmethod
    def granularity(self) -> Granularity:
        """Which values share a scale; a field, so that `dataclasses.replace` can change it."""

    @property
    @abstractmethod
    def code_dtype(self) -> torch.dtype:
        """The dtype that holds codes."""

    @abstractmethod
    def fit(self, x: Shaped[Tensor, "*shape"]) -> Any:
        """Return the parameters for x's own range; they have an attribute `scale`."""

    @abstractmethod
    def parameter_nbytes(self, parameters: Any) -> int:
        """Return the bytes that the parameters take in storage."""

    @abstractmethod
    def _check_parameters(self, parameters: Any, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless the parameters are usable and their scales have this shape."""

    @abstractmethod
    def _encode_rows(self, rows: Tensor, parameters: Any) -> Tensor:
        """Return the codes of finite rows (scales, size)."""

    @abstractmethod
    def _decode_rows(self, codes: Tensor, parameters: Any) -> Tensor:
        """Return the floats that rows of codes (scales, size) stand for."""

    def __call__(self, x: Shaped[Tensor, "*shape"]) -> QuantizedTensor:
        """Quantize x on its own range. Raises what `fit` raises."""
        parameters = self.fit(x)
        codes = self._encode(x, parameters)  # `fit` has checked x
        return QuantizedTensor(codes, parameters, self)

    def encode(self, x: Shaped[Tensor, "*shape"], parameters: Any) -> Integer[Tensor, "*shape"]:
        """Return the codes of the grid points nearest to finite x; values beyond get the ends."""
        check_floating(x)
        self._check_parameters(parameters, self.granularity.scale_shape(x.shape))
        check_finite(x)
        return self._encode(x, parameters)

    def decode(self, codes: Integer[Tensor, "*shape"], parameters: Any) -> Float[Tensor, "*shape"]:
        """Return each code's grid point times its scale, in float32, or float64 if the scale is."""
        self._check_parameters(parameters, self.granularity.scale_shape(codes.shape))
        return self._decode(codes, parameters)

    def nearest(
        self, x: Shaped[Tensor, "*shape"], parameters: Any
    ) -> tuple[Integer[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return x's codes and their floats without any check: for loops over columns."""
        codes = self._encode(x, parameters)
        return codes, self._decode(codes, parameters)

    def _encode(self, x: Tensor, parameters: Any) -> Tensor:
        rows = self.granularity.rows(x.detach())
        codes = self._encode_rows(rows, parameters)
        return self.granularity.unrows(codes, x.shape)

    def _decode(self, codes: Tensor, parameters: Any) -> Tensor:
        rows = self.granularity.rows(codes)
        x_hat = self._decode_rows(rows, parameters)
        return self.granularity.unrows(x_hat, codes.shape)

    def _checked_rows(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x's rows and the smallest and largest value of each, after the checks of x."""
        check_floating(x)
        self.granularity.scale_shape(x.shape)  # raises ValueError if the shape does not suit
        rows = self.granularity.rows(x.detach())
        low, high = range_of_rows(rows)
        check_finite(x, ends=(low, high))
        return rows, low, high
