"""What all quantizers with one scale for a row of values have in common; what their grids are, they say themselves.

The idea: fit a range, make a scale of it, divide by the scale, take the nearest point of a fixed grid; and back. Grids
differ (whole numbers, small floats, a list of levels), the rest does not: which values share a scale, how scales are
stored, what is refused, and that a large tensor is worked through in pieces.

    codes = to_codes(x / scale)        x_hat = scale * from_codes(codes)

Source: as for the grids; nothing here is about any one of them.

How it differs from ``quantized.py``: that is what a quantizer must offer, whatever it is; this is how three of them do.
"""

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from qcourse.numerics.chunks import chunks, range_of_rows, wide
from qcourse.numerics.granularity import Granularity, PerChannel
from qcourse.numerics.quantized import Parameters, QuantizedTensor
from qcourse.numerics.validation import (
    check_finite,
    check_floating,
    check_parameters,
    check_stored_scale,
)

MSE_SHRINKS = tuple(
    0.97**i for i in range(100)
)  # the fractions of the full range that "mse" tries: 1 down to 0.05


class ScaledQuantizer(ABC):
    """To derive a frozen dataclass from, with these three among its fields, and the methods below."""

    granularity: Granularity
    scale_rule: str  # "mse" is done here, the others by _exact_scale
    scale_dtype: torch.dtype
    code_dtype: torch.dtype
    scale_rules: ClassVar[tuple[str, ...]]  # that there are

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits a code."""

    @abstractmethod
    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """The scale for [low, high], both float64, low <= 0 <= high; 0 where both are."""

    @abstractmethod
    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        """The codes of steps = x / scale (rows, size), which may be written to."""

    @abstractmethod
    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        """What codes (rows, size) stand for, in scales."""

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """The code of 0, a whole number in any dtype; 0 unless the grid can move."""
        return torch.zeros_like(low)

    @property
    def _zero_points(self) -> tuple[int, int]:
        """The smallest and largest zero point allowed."""
        return 0, 0

    def _check_fields(self) -> None:
        """For ``__post_init__``: raise TypeError or ValueError unless the three fields are what they should be."""
        if isinstance(self.granularity, type) or not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"granularity={self.granularity!r} must be a value such as PerTensor() or PerGroup(128)"
            )
        if self.scale_rule not in self.scale_rules:
            raise ValueError(
                f"scale_rule={self.scale_rule!r} must be one of {', '.join(self.scale_rules)}"
            )
        if not isinstance(self.scale_dtype, torch.dtype) or not self.scale_dtype.is_floating_point:
            raise ValueError(
                f"scale_dtype={self.scale_dtype!r} must be a floating-point dtype such as torch.float16"
            )

    def __call__(self, x: Shaped[Tensor, "*shape"]) -> QuantizedTensor:
        """x quantized on its own range; raises what `fit` raises."""
        parameters = self.fit(x)
        return QuantizedTensor(
            self._encode(x, parameters), parameters, self
        )  # fit has looked for NaN already

    def fit(self, x: Shaped[Tensor, "*shape"]) -> Parameters:
        """The scale and zero point for x's own range, by `scale_rule`.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty, has NaN or infinity, or does not suit the granularity; a scale that scale_dtype
                cannot hold.
        """
        check_floating(x)
        shape = self.granularity.scale_shape(x.shape)
        rows = self.granularity.rows(x.detach())
        low, high = range_of_rows(rows)
        check_finite(x, low, high)
        if self.scale_rule == "mse":
            shrink = self._least_squares_shrink(rows, low, high)
            low, high = low * shrink, high * shrink
        return self.from_range(low.reshape(shape), high.reshape(shape))

    def from_range(
        self, low: Float[Tensor, "*scales"], high: Float[Tensor, "*scales"]
    ) -> Parameters:
        """The scale and zero point for the range [low, high] widened to hold 0; where calibrations plug in.

        An all-zero range gets scale 1. A scale that scale_dtype cannot hold raises ValueError.
        """
        low, high = low.double().clamp(max=0), high.double().clamp(min=0)
        exact = self._exact_scale(low, high)
        exact = torch.where(exact == 0, 1.0, exact)
        scale = exact.to(self.scale_dtype)
        check_stored_scale(scale, exact)
        zero_point = self._zero_point(low, scale).clamp(*self._zero_points)
        return Parameters(scale, zero_point.to(self.code_dtype))

    def encode(
        self, x: Shaped[Tensor, "*shape"], parameters: Parameters
    ) -> Integer[Tensor, "*shape"]:
        """The codes of the points nearest to x / scale; what lies beyond the grid gets its end.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty or has NaN or infinity; parameters of the wrong shape, a scale that is not positive
                and finite, a zero point that is not a code.
        """
        check_floating(x)
        check_parameters(parameters, self.granularity.scale_shape(x.shape), *self._zero_points)
        check_finite(x, *range_of_rows(x.detach().reshape(1, -1)))
        return self._encode(x, parameters)

    def decode(
        self, codes: Integer[Tensor, "*shape"], parameters: Parameters
    ) -> Float[Tensor, "*shape"]:
        """What codes stand for times their scale, in float32, or float64 where the scale is.

        Raises:
            ValueError: parameters that `encode` refuses.
        """
        check_parameters(parameters, self.granularity.scale_shape(codes.shape), *self._zero_points)
        return self._decode(codes, parameters)

    def nearest(
        self, x: Shaped[Tensor, "*shape"], parameters: Parameters
    ) -> tuple[Integer[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """x's codes and the floats they stand for, without a look at the arguments: for loops over columns."""
        codes = self._encode(x, parameters)
        return codes, self._decode(codes, parameters)

    def parameter_nbytes(self, parameters: Parameters) -> int:
        """Bytes of the scales in their dtype."""
        return parameters.scale.numel() * parameters.scale.element_size()

    def _encode(self, x: Tensor, parameters: Parameters) -> Tensor:
        """`encode` without its checks; computes in float64 where x or the scale is, else in float32."""
        rows = self.granularity.rows(x.detach())
        codes = torch.empty(rows.shape, dtype=self.code_dtype, device=x.device)
        dtype = torch.promote_types(wide(x.dtype), wide(parameters.scale.dtype))
        for part, scale, zero_point, out in chunks(rows, parameters, codes):
            out.copy_(self._to_codes(torch.div(part.to(dtype), scale.to(dtype)), zero_point))
        return self.granularity.unrows(codes, x.shape)

    def _decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        """`decode` without its checks."""
        rows = self.granularity.rows(codes)
        out = torch.empty(rows.shape, dtype=wide(parameters.scale.dtype), device=codes.device)
        for part, scale, zero_point, part_out in chunks(rows, parameters, out):
            torch.mul(
                self._from_codes(part, zero_point, out.dtype), scale.to(out.dtype), out=part_out
            )
        return self.granularity.unrows(out, codes.shape)

    def _least_squares_shrink(
        self, rows: Tensor, low: Tensor, high: Tensor
    ) -> Float[Tensor, " scales"]:
        """For each row, the fraction of its range that leaves the least squared error."""
        assert {"granularity", "scale_rule", "scale_dtype"} <= {
            field.name
            for field in fields(self)  # type: ignore[arg-type]
        }
        by_row = replace(  # type: ignore[type-var]
            self, granularity=PerChannel(0), scale_rule="amax", scale_dtype=wide(rows.dtype)
        )
        low, high = low.double()[:, None], high.double()[:, None]
        # Errors in units of the range, since 1e-25 squared is 0 in float32; of an all-zero row NaN, never the least.
        unit = torch.maximum(-low, high).to(by_row.scale_dtype)
        least, best = torch.full_like(low[:, 0], torch.inf), torch.ones_like(low[:, 0])
        for shrink in MSE_SHRINKS:
            parameters = by_row.from_range(shrink * low, shrink * high)
            _, x_hat = by_row.nearest(rows, parameters)
            error = (x_hat - rows).div_(unit).square_().sum(dim=1)
            best = torch.where(error < least, shrink, best)
            least = torch.minimum(least, error)
        return best
