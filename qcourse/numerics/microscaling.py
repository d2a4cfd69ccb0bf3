"""Blocks of 4-, 6- or 8-bit floats with a shared scale, which hardware multiplies: MX and NVFP4.

The idea: few values share a scale, so it has to be small. MX: 32 values, a power of two in one byte
(E8M0). NVFP4: 16 values and a scale with a mantissa, in E4M3, which does not reach from the
smallest block to the largest; so there is one float32 scale for the tensor, too.
Source: OCP MX 1.0 (2023); NVIDIA on NVFP4 (2025), in the arithmetic of torchao's `nvfp4_quantize`.
How it differs from `float_quantizer.py`: that takes any format and scale; these are standards.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.chunks import chunks, wide
from qcourse.numerics.float_quantizer import POWER_RULES, FloatQuantizer
from qcourse.numerics.granularity import Granularity, PerGroup
from qcourse.numerics.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, FloatFormat, code_values
from qcourse.numerics.minifloat_encoding import encode_finite
from qcourse.numerics.row_quantizer import RowQuantizer
from qcourse.numerics.validation import check_scale


def mx(format: FloatFormat, scale_rule: str = "floor") -> FloatQuantizer:
    """Return the quantizer of an MX format: 32 neighbors share a power of two in one byte (E8M0).

    Args:
        format: E4M3 or E5M2 (MXFP8), E3M2 or E2M3 (MXFP6), E2M1 (MXFP4).
        scale_rule: "floor" (the standard's), "even", "ceil" or "rceil".

    >>> q = mx(E2M1)(torch.tensor([[1.0, 7.0, *30 * [0.1]]]))
    >>> q.bits_per_weight, q.scale.tolist(), q.dequantize()[0, :3].tolist()  # 7 is clipped to 6
    (4.25, [[1.0]], [1.0, 6.0, 0.0])
    """
    if format not in (E4M3, E5M2, E3M2, E2M3, E2M1):
        raise ValueError(
            f"format={format!r} must be a float format of MX: E4M3, E5M2, E3M2, E2M3 or E2M1"
        )
    if scale_rule not in POWER_RULES:
        known = ", ".join(POWER_RULES)
        raise ValueError(f"scale_rule={scale_rule!r} must make a power of two: one of {known}")
    return FloatQuantizer(format, PerGroup(32), scale_rule, torch.float8_e8m0fnu)


@dataclass(frozen=True, eq=False)
class BlockScales:
    """The two scales of NVFP4, one per block in E4M3 and one per tensor in float32."""

    scale: Shaped[Tensor, "*scales"]
    tensor_scale: Float[Tensor, ""]


@dataclass(frozen=True)
class NVFP4Quantizer(RowQuantizer):
    """Quantize to NVFP4: E2M1 in blocks of 16 with an E4M3 scale each, and a float32 scale for all.

    >>> q = NVFP4Quantizer()(torch.tensor([[6.0, 0.5, *14 * [0.0]], [0.75, 0.25, *14 * [0.0]]]))
    >>> q.bits_per_weight, q.dequantize()[:, :2].tolist()  # 4.5, and the 32 bits of tensor_scale
    (5.5, [[6.0, 0.5], [0.75, 0.25]])
    """

    # False: no float32 scale; no E4M3 scale then fits a block with amax below 6/64 or over 6 * 448.
    per_tensor: bool = True
    granularity: Granularity = PerGroup(16)  # replaced by methods that go column by column
    bits: ClassVar[int] = 4
    code_dtype: ClassVar[torch.dtype] = torch.uint8

    def fit(self, x: Shaped[Tensor, "*shape"]) -> BlockScales:
        """Return the scales for x's own range; raises what `ScaledQuantizer.fit` raises."""
        _, low, high = self._checked_rows(x)
        # The largest value becomes the largest code at the largest block scale.
        amax = torch.maximum(-low, high).float()
        tensor_scale = self._tensor_scale(amax.max())
        # As in the published code, no block scale is below the normal numbers of E4M3.
        exact = amax / E2M1.max / tensor_scale
        scale = exact.clamp(E4M3.smallest_normal, E4M3.max).to(torch.float8_e4m3fn)
        shape = self.granularity.scale_shape(x.shape)
        return BlockScales(scale.reshape(shape), tensor_scale)

    def parameter_nbytes(self, parameters: BlockScales) -> int:
        # One byte per block, and a float32 for the tensor if it has a scale.
        return parameters.scale.numel() + 4 * self.per_tensor

    def _tensor_scale(self, largest: Tensor) -> Tensor:
        scale = torch.ones_like(largest)
        if self.per_tensor and largest > 0:
            scale = largest / (E4M3.max * E2M1.max)
        if not torch.isfinite(1 / scale):
            raise ValueError(
                f"x reaches {float(largest):.3g} at most, too small for float32 to divide by its"
                " scale"
            )
        return scale

    def _check_parameters(self, parameters: BlockScales, shape: tuple[int, ...]) -> None:
        if parameters.scale.shape != shape:
            raise ValueError(
                f"scale of shape {tuple(parameters.scale.shape)} must have the shape {shape}"
            )
        check_scale(parameters.scale)
        check_scale(parameters.tensor_scale)

    def _encode_rows(self, rows: Tensor, parameters: BlockScales) -> Tensor:
        codes = torch.empty(rows.shape, dtype=self.code_dtype, device=rows.device)
        dtype = wide(rows.dtype)
        # torchao multiplies by 1 / tensor_scale / scale instead of dividing by their product.
        factors = 1 / parameters.tensor_scale / parameters.scale.float()
        for part, codes_part, factor in chunks(rows, codes, factors.reshape(-1, 1)):
            codes_part.copy_(encode_finite(part.to(dtype) * factor, E2M1))
        return codes

    def _decode_rows(self, codes: Tensor, parameters: BlockScales) -> Tensor:
        x_hat = torch.empty(codes.shape, device=codes.device)
        scales = parameters.scale.float() * parameters.tensor_scale
        levels = code_values(E2M1).to(codes.device)
        for part, x_hat_part, scale in chunks(codes, x_hat, scales.reshape(-1, 1)):
            torch.mul(levels[part.int()], scale, out=x_hat_part)
        return x_hat
