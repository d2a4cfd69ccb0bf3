"""Quantizers with one scale per row: fit a range, divide by its scale, take the nearest point.

The idea: codes = to_codes(x / scale), x_hat = scale * from_codes(codes). Number formats differ in
their grid (integers, small floats, a list of levels) and share the way from a range to its scale.
How it differs from `row_quantizer.py`: that says nothing about scales; this has one per row.
"""

from abc import abstractmethod

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from qcourse.numerics.chunks import chunks, wide
from qcourse.numerics.granularity import Granularity
from qcourse.numerics.quantized import Parameters
from qcourse.numerics.row_quantizer import RowQuantizer
from qcourse.numerics.shrinks import MSE_SHRINKS, best_shrink
from qcourse.numerics.validation import check_parameters, check_stored_scale


class ScaledQuantizer(RowQuantizer):
    """Base class of the quantizers with one scale per row; a subclass defines its grid."""

    @property
    @abstractmethod
    def scale_rule(self) -> str:
        """How a range becomes a scale; one of `scale_rules`."""

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """The floating-point dtype that scales are stored in."""

    @property
    @abstractmethod
    def scale_rules(self) -> tuple[str, ...]:
        """The names of the scale rules. "mse" is done here, the others in `_exact_scale`."""

    @abstractmethod
    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the scale for [low, high], float64 with low <= 0 <= high; 0 if both are 0."""

    @abstractmethod
    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        """Return the codes of steps = x / scale (rows, size); may overwrite `steps`."""

    @abstractmethod
    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the grid points of codes (rows, size), in units of the scale."""

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """Return the code of 0, a whole number in any dtype; only an asymmetric grid moves it."""
        return torch.zeros_like(low)

    @property
    def _zero_point_range(self) -> tuple[int, int]:
        """The smallest and the largest zero point allowed."""
        return 0, 0

    def _check_fields(self) -> None:
        """Raise TypeError or ValueError unless the three fields are valid; for `__post_init__`."""
        if isinstance(self.granularity, type) or not isinstance(self.granularity, Granularity):
            raise TypeError(
                f"granularity={self.granularity!r} must be a value such as PerTensor() or"
                " PerGroup(128)"
            )
        if self.scale_rule not in self.scale_rules:
            known = ", ".join(self.scale_rules)
            raise ValueError(f"scale_rule={self.scale_rule!r} must be one of {known}")
        dtype = self.scale_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"scale_dtype={dtype!r} must be a floating-point dtype such as torch.float16"
            )

    def fit(self, x: Shaped[Tensor, "*shape"]) -> Parameters:
        """Return the scale and zero point for x's own range, by `scale_rule`.

        Raises TypeError or ValueError if x is not finite floats, its shape does not suit the
        granularity, or scale_dtype cannot hold a scale.
        """
        rows, low, high = self._checked_rows(x)
        if self.scale_rule == "mse":
            shrink = self._least_squares_shrink(rows, low, high)
            low = low * shrink
            high = high * shrink
        shape = self.granularity.scale_shape(x.shape)
        return self.from_range(low.reshape(shape), high.reshape(shape))

    def from_range(
        self, low: Float[Tensor, "*scales"], high: Float[Tensor, "*scales"]
    ) -> Parameters:
        """Return the scale and zero point for the range [low, high], widened to hold 0."""
        return self._parameters(low, high, self.scale_dtype)

    def parameter_nbytes(self, parameters: Parameters) -> int:
        return parameters.scale.numel() * parameters.scale.element_size()

    def _parameters(self, low: Tensor, high: Tensor, scale_dtype: torch.dtype) -> Parameters:
        # The range must hold 0, so that 0 stays exact.
        low = low.double().clamp(max=0)
        high = high.double().clamp(min=0)
        exact = self._exact_scale(low, high)
        # A row of zeros has codes 0 with any scale; 1 can be divided by.
        exact = torch.where(exact == 0, 1.0, exact)
        scale = exact.to(scale_dtype)
        check_stored_scale(scale, exact)
        zero_point = self._zero_point(low, scale).clamp(*self._zero_point_range)
        return Parameters(scale, zero_point.to(self.code_dtype))

    def _check_parameters(self, parameters: Parameters, shape: tuple[int, ...]) -> None:
        check_parameters(parameters, shape, *self._zero_point_range)

    def _encode_rows(self, rows: Tensor, parameters: Parameters) -> Tensor:
        codes = torch.empty(rows.shape, dtype=self.code_dtype, device=rows.device)
        # Divide in float64 if x or the scale is float64, else in float32.
        scale_dtype = wide(parameters.scale.dtype)
        dtype = torch.promote_types(wide(rows.dtype), scale_dtype)
        columns = _columns(parameters)
        for part, codes_part, scale, zero_point in chunks(rows, codes, *columns):
            # Nested, so that the quotient is freed before that of the next piece is made.
            codes_part.copy_(self._to_codes(part.to(dtype) / scale.to(dtype), zero_point))
        return codes

    def _decode_rows(self, codes: Tensor, parameters: Parameters) -> Tensor:
        dtype = wide(parameters.scale.dtype)
        x_hat = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        columns = _columns(parameters)
        for part, x_hat_part, scale, zero_point in chunks(codes, x_hat, *columns):
            torch.mul(self._from_codes(part, zero_point, dtype), scale.to(dtype), out=x_hat_part)
        return x_hat

    def _least_squares_shrink(
        self, rows: Tensor, low: Tensor, high: Tensor
    ) -> Float64[Tensor, " scales"]:
        """Return, per row, the fraction of its range that leaves the least squared error."""
        dtype = wide(rows.dtype)
        low = low.double()[:, None]
        high = high.double()[:, None]
        # Errors are in units of the range, since 1e-25 squared is 0 in float32.
        # A row of zeros has the error NaN.
        unit = torch.maximum(-low, high).to(dtype)

        def squared_error(shrink: float) -> Tensor:
            parameters = self._parameters(shrink * low, shrink * high, dtype)
            codes = self._encode_rows(rows, parameters)
            x_hat = self._decode_rows(codes, parameters)
            return (x_hat - rows).div_(unit).square_().sum(dim=1)

        return best_shrink(MSE_SHRINKS, squared_error)


def _columns(parameters: Parameters) -> tuple[Tensor, Tensor]:
    scale = parameters.scale.detach().reshape(-1, 1)  # (scales, 1)
    return scale, parameters.zero_point.reshape(-1, 1)
