"""Double quantization: the scales of a quantized tensor are quantized, too.

The idea: small blocks have many scales, and a float32 scale per 64 weights costs 0.5 bits per
weight. Scales are numbers like any other, so they can be codes with scales of their own. They are
all positive, so their mean is subtracted first.

Source: Dettmers et al., "QLoRA" (NeurIPS 2023), section 3; its 8-bit float is E4M3 here.

How it differs from `codebook.py`: that quantizes weights, this their scales.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.minifloat import E4M3
from qcourse.numerics.quantized import QuantizedTensor
from qcourse.numerics.validation import check_finite, check_floating


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """Quantized scales: scale - mean in E4M3, with a float32 scale per group.

    >>> scales = torch.rand(1024, generator=torch.Generator().manual_seed(0)) + 1
    >>> double = double_quantize(scales)
    >>> error = (double.dequantize() - scales).abs().max()
    >>> double.nbytes, bool(error < 0.02)  # 1024 bytes of codes, 4 scales, the mean
    (1044, True)
    """

    codes: QuantizedTensor
    mean: Float[Tensor, ""]
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes in storage."""
        return self.codes.nbytes + self.mean.element_size()

    def dequantize(self) -> Float[Tensor, "..."]:
        """Return the scales in float32."""
        padded = self.codes.dequantize() + self.mean
        count = self.shape.numel()
        return padded.flatten()[:count].reshape(self.shape)


def double_quantize(scale: Shaped[Tensor, "..."], group_size: int = 256) -> DoubleQuantized:
    """Return the scales quantized; at blocks of 64 and 256, 0.127 bits per weight instead of 0.5.

    Raises:
        TypeError: scale is not a floating-point tensor.
        ValueError: scale is empty or not finite; group_size is not a whole number above 0.
    """
    check_floating(scale, "scale")
    quantizer = FloatQuantizer(E4M3, PerGroup(group_size))
    check_finite(scale, scale, scale, "scale")
    flat = scale.detach().float().flatten()
    mean = flat.mean()
    # Fill up the last group with zeros, which change no range.
    padded = torch.nn.functional.pad(flat - mean, (0, -len(flat) % group_size))
    codes = quantizer(padded[None])
    return DoubleQuantized(codes, mean, scale.shape)
