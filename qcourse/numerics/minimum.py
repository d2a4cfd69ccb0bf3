"""Quantize with a float minimum: the grid of llama.cpp's "type 1" blocks, such as Q4_1.

The idea: code 0 stands for the smallest value of a row, so

    codes = saturate(round((x - minimum) / scale))        x_hat = scale * codes + minimum

How it differs from the zero point of `affine.py`: a zero point is a code, so it takes `bits` bits
and makes 0 exact, and the range must hold 0. A minimum is a float of its own: it takes 16 bits, 0
may lie between two grid points, and a row without zeros gets a finer grid.

Source: ggml's block_q4_1 (ggml-common.h), in the public repository of llama.cpp.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.numerics.chunks import chunks, wide
from qcourse.numerics.granularity import Granularity, PerGroup
from qcourse.numerics.row_quantizer import RowQuantizer
from qcourse.numerics.whole import check_whole


# eq=False: compared by identity, since tensors have no single ==.
@dataclass(frozen=True, eq=False)
class Minimum:
    """Scale and minimum, each of the shape that `granularity.scale_shape` gives."""

    scale: Shaped[Tensor, "*scales"]  # the width of one step
    minimum: Shaped[Tensor, "*scales"]  # the value of code 0


@dataclass(frozen=True)
class MinimumQuantizer(RowQuantizer):
    """Quantize to codes 0 to 2^bits - 1 between the smallest and the largest value of each row.

    Args:
        scale_dtype: the floating-point dtype that scales and minima are stored in.

    >>> q = MinimumQuantizer(granularity=PerGroup(4))(torch.tensor([10.0, 11.0, 12.0, 25.0]))
    >>> q.codes.tolist(), q.dequantize().tolist()
    ([0, 1, 2, 15], [10.0, 11.0, 12.0, 25.0])
    """

    bits: int = 4
    granularity: Granularity = PerGroup(32)
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        check_whole("bits", self.bits, 2, 8)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    def fit(self, x: Shaped[Tensor, "*shape"]) -> Minimum:
        """Return the scale and the minimum of x's own range; ValueError beyond scale_dtype's."""
        _, low, high = self._checked_rows(x)
        steps = (high.double() - low.double()) / self.qmax

        # The float32 or float64 range may be too wide for the stored dtype.
        shape = self.granularity.scale_shape(x.shape)
        stored = Minimum(
            steps.to(self.scale_dtype).reshape(shape), low.to(self.scale_dtype).reshape(shape)
        )
        self._check_parameters(stored, shape)
        return stored

    def parameter_nbytes(self, parameters: Minimum) -> int:
        return 2 * parameters.scale.numel() * parameters.scale.element_size()

    def _check_parameters(self, parameters: Minimum, shape: tuple[int, ...]) -> None:
        for name in ("scale", "minimum"):
            values = getattr(parameters, name)
            if values.shape != shape:
                raise ValueError(
                    f"{name} of shape {tuple(values.shape)} must have the shape {shape} that the"
                    " granularity gives"
                )
            wrong = ~torch.isfinite(values)
            if wrong.any():
                raise ValueError(
                    f"{name}={float(values[wrong][0])} must be finite in {values.dtype}"
                    f" ({int(wrong.sum())} of {wrong.numel()} are not)"
                )

    def _encode_rows(self, rows: Tensor, parameters: Minimum) -> Tensor:
        codes = torch.empty(rows.shape, dtype=self.code_dtype, device=rows.device)
        dtype = torch.promote_types(wide(rows.dtype), wide(parameters.scale.dtype))
        for part, codes_part, scale, minimum in chunks(rows, codes, *_columns(parameters, dtype)):
            # A row of equal values has scale 0: its steps are 0 / 1.
            safe = torch.where(scale == 0, 1.0, scale)
            steps = (part.to(dtype) - minimum).div_(safe)
            codes_part.copy_(steps.round_().clamp_(0, self.qmax))
        return codes

    def _decode_rows(self, codes: Tensor, parameters: Minimum) -> Tensor:
        dtype = wide(parameters.scale.dtype)
        x_hat = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        for part, x_hat_part, scale, minimum in chunks(codes, x_hat, *_columns(parameters, dtype)):
            torch.mul(part.to(dtype), scale, out=x_hat_part)
            x_hat_part.add_(minimum)
        return x_hat


def _columns(parameters: Minimum, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = parameters.scale.detach().reshape(-1, 1)  # (scales, 1)
    minimum = parameters.minimum.detach().reshape(-1, 1)
    return scale.to(dtype), minimum.to(dtype)
