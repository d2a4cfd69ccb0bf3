"""Blocks of 4-, 6- or 8-bit floats under a shared scale, as hardware multiplies them: the MX formats and NVFP4.

The idea: where few neighbours share a scale, the scale itself has to be small. In the MX formats 32 values share a
power of two, one byte (E8M0): decoding adds exponents and multiplies nothing. A power of two is up to twice too large,
though. NVFP4 gives 16 values a scale with a mantissa, in E4M3, and puts one float32 for the whole tensor above all of
them, since E4M3 alone would not reach from the smallest block to the largest.

Source: OCP Microscaling Formats MX 1.0 (2023); NVIDIA's description of NVFP4 (2025). The order of the float operations
is that of torchao's ``nvfp4_quantize``, so that codes are equal to the bit.

How it differs from ``float_quantizer.py``: there any format with any scale; here the combinations that have names.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from qcourse.numerics.chunks import CHUNK, range_of_rows, wide
from qcourse.numerics.float_quantizer import POWER_RULES, FloatQuantizer
from qcourse.numerics.granularity import Granularity, PerGroup
from qcourse.numerics.minifloat import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FloatFormat,
    code_values,
    encode_finite,
)
from qcourse.numerics.quantized import QuantizedTensor
from qcourse.numerics.validation import check_finite, check_floating, check_scale


def mx(format: FloatFormat, scale_rule: str = "floor") -> FloatQuantizer:
    """An MX format: 32 neighbours share a power of two, kept in a byte (E8M0).

    Args:
        format: E4M3 or E5M2 (MXFP8), E3M2 or E2M3 (MXFP6), E2M1 (MXFP4).
        scale_rule: "floor" is the standard's; also "even", "ceil", "rceil".

    Raises:
        ValueError: another format, or another rule.

    >>> q = mx(E2M1)(torch.tensor([[1.0, 7.0, *30 * [0.1]]]))
    >>> q.bits_per_weight, q.scale.tolist(), q.dequantize()[0, :3].tolist()  # 7 is clipped to 6
    (4.25, [[1.0]], [1.0, 6.0, 0.0])
    """
    if format not in (E4M3, E5M2, E3M2, E2M3, E2M1):
        raise ValueError(
            f"format={format!r} is none of the float formats of MX: E4M3, E5M2, E3M2, E2M3, E2M1"
        )
    if scale_rule not in POWER_RULES:
        raise ValueError(
            f"scale_rule={scale_rule!r} must make a power of two: one of {', '.join(POWER_RULES)}"
        )
    return FloatQuantizer(format, PerGroup(32), scale_rule, torch.float8_e8m0fnu)


def mx_quantize(
    x: Shaped[Tensor, "*shape"], format: FloatFormat, scale_rule: str = "floor"
) -> QuantizedTensor:
    """mx(format, scale_rule)(x): x in blocks of 32 along its last axis.

    >>> mx_quantize(torch.ones(1, 32), E2M1).bits_per_weight
    4.25
    """
    return mx(format, scale_rule)(x)


@dataclass(frozen=True, eq=False)
class BlockScales:
    """The two scales of NVFP4: a value is code * scale of its block * scale of the tensor.

    Args:
        scale: in E4M3, from its smallest normal number up, one for each block of 16.
        tensor_scale: one for all.
    """

    scale: Shaped[Tensor, "*scales"]
    tensor_scale: Float[Tensor, ""]


@dataclass(frozen=True)
class NVFP4Quantizer:
    """NVFP4: E2M1 in blocks of 16 with a scale in E4M3 each, and a float32 for the tensor.

    tensor_scale = amax / (6 * 448), so that the block with the largest value has the largest scale. A method that fits
    group after group by itself (GPTQ with groups that are not static) would give each of them another tensor_scale.

    Args:
        per_tensor: whether there is a scale for the tensor; without, it is 1, and blocks whose amax is below 6/64 or
            above 6 * 448 do without a fitting scale.
        granularity: PerGroup(16) is the format's; another for what goes through a block column by column.

    >>> q = NVFP4Quantizer()(torch.tensor([[6.0, 0.5, *14 * [0.0]], [0.75, 0.25, *14 * [0.0]]]))
    >>> q.bits_per_weight, q.dequantize()[:, :2].tolist()  # 4.5 and the 32 bits of the tensor's scale
    (5.5, [[6.0, 0.5], [0.75, 0.25]])
    """

    per_tensor: bool = True
    granularity: Granularity = PerGroup(16)
    bits: ClassVar[int] = 4

    def __call__(self, x: Shaped[Tensor, "*shape"]) -> QuantizedTensor:
        """x quantized on its own range; raises what `fit` raises."""
        parameters = self.fit(x)
        return QuantizedTensor(self._encode(x, parameters), parameters, self)

    def fit(self, x: Shaped[Tensor, "*shape"]) -> BlockScales:
        """The scales for x's own range; none below E4M3's smallest normal number, as in the published code.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty, has NaN or infinity, or 16 does not divide its last axis; x so small that float32
                cannot divide by its scale.
        """
        check_floating(x)
        shape = self.granularity.scale_shape(x.shape)
        low, high = range_of_rows(self.granularity.rows(x.detach()))
        check_finite(x, low, high)
        amax = torch.maximum(-low, high).float()
        largest = amax.max()
        tensor_scale = (
            largest / (E4M3.max * E2M1.max)
            if self.per_tensor and largest > 0
            else torch.ones_like(largest)
        )
        if not torch.isfinite(1 / tensor_scale):
            raise ValueError(
                f"x reaches {float(largest):.3g} at most, too small for float32 to divide by its scale"
            )
        scale = amax / E2M1.max / tensor_scale
        scale = scale.clamp(E4M3.smallest_normal, E4M3.max).to(torch.float8_e4m3fn)
        return BlockScales(scale.reshape(shape), tensor_scale)

    def encode(
        self, x: Shaped[Tensor, "*shape"], parameters: BlockScales
    ) -> Integer[Tensor, "*shape"]:
        """E2M1 codes of x / (scale tensor_scale).

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty or has NaN or infinity; scales of the wrong shape, or not positive.
        """
        check_floating(x)
        self._check(parameters, x.shape)
        check_finite(x, *range_of_rows(x.detach().reshape(1, -1)))
        return self._encode(x, parameters)

    def decode(
        self, codes: Integer[Tensor, "*shape"], parameters: BlockScales
    ) -> Float[Tensor, "*shape"]:
        """code * (scale tensor_scale), in float32; ValueError for scales that `encode` refuses."""
        self._check(parameters, codes.shape)
        return self._decode(codes, parameters)

    def nearest(
        self, x: Shaped[Tensor, "*shape"], parameters: BlockScales
    ) -> tuple[Integer[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Codes and the floats they stand for, unchecked."""
        codes = self._encode(x, parameters)
        return codes, self._decode(codes, parameters)

    def parameter_nbytes(self, parameters: BlockScales) -> int:
        """A byte a block, and four for the tensor if it has a scale."""
        return parameters.scale.numel() + 4 * self.per_tensor

    def _check(self, parameters: BlockScales, shape: torch.Size) -> None:
        expected = self.granularity.scale_shape(shape)
        if parameters.scale.shape != expected:
            raise ValueError(
                f"scale of shape {tuple(parameters.scale.shape)} must have the shape {expected}"
            )
        check_scale(parameters.scale)
        check_scale(parameters.tensor_scale)

    def _encode(self, x: Tensor, parameters: BlockScales) -> Tensor:
        rows = self.granularity.rows(x.detach())
        codes = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
        factors = (1 / parameters.tensor_scale / parameters.scale.float()).reshape(-1, 1)
        count = max(1, CHUNK // rows.shape[1])
        for part, factor, out in zip(
            rows.split(count), factors.split(count), codes.split(count), strict=True
        ):
            out.copy_(encode_finite(part.to(wide(x.dtype)) * factor, E2M1))
        return self.granularity.unrows(codes, x.shape)

    def _decode(self, codes: Tensor, parameters: BlockScales) -> Tensor:
        rows = self.granularity.rows(codes)
        x_hat = torch.empty(rows.shape, device=codes.device)
        scales = (parameters.scale.float() * parameters.tensor_scale).reshape(-1, 1)
        levels, count = code_values(E2M1).to(codes.device), max(1, CHUNK // rows.shape[1])
        for part, scale, out in zip(
            rows.split(count), scales.split(count), x_hat.split(count), strict=True
        ):
            torch.mul(levels[part.int()], scale, out=out)
        return self.granularity.unrows(x_hat, codes.shape)


def nvfp4_quantize(x: Shaped[Tensor, "*shape"], *, per_tensor: bool = True) -> QuantizedTensor:
    """NVFP4Quantizer(per_tensor)(x): x in blocks of 16 along its last axis.

    >>> nvfp4_quantize(torch.ones(1, 16)).dequantize()[0, :2].tolist()
    [1.0, 1.0]
    """
    return NVFP4Quantizer(per_tensor)(x)
