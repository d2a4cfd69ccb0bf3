"""Double quantization: the scales of a quantized tensor are quantized, too.

The idea: a float32 scale per 64 weights costs 0.5 bits per weight, so scales become codes as well.
Source: Dettmers et al., "QLoRA" (NeurIPS 2023), section 3; its 8-bit float is E4M3 here.
How it differs from `codebook.py`: that quantizes weights, this quantizes their scales.
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
    """Quantized scales: scale - mean in E4M3, with a float32 scale per group."""

    codes: QuantizedTensor
    mean: Float[Tensor, ""]
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.mean.element_size()

    def dequantize(self) -> Float[Tensor, "..."]:
        """Return the scales in float32."""
        padded = self.codes.dequantize() + self.mean
        count = self.shape.numel()
        return padded.flatten()[:count].reshape(self.shape)


def double_quantize(scale: Shaped[Tensor, "..."], group_size: int = 256) -> DoubleQuantized:
    """Return E4M3 codes of scale - mean; 0.127 bits per weight instead of 0.5 at blocks of 64.

    >>> double_quantize(torch.rand(1024) + 1).nbytes  # 1024 bytes of codes, 4 scales, the mean
    1044
    """
    check_floating(scale, "scale")
    quantizer = FloatQuantizer(E4M3, PerGroup(group_size))
    check_finite(scale, "scale")
    # Scales are all positive; less their mean they use both signs of the codes.
    flat = scale.detach().float().flatten()
    mean = flat.mean()
    # Fill up the last group with zeros, which change no range.
    missing = -len(flat) % group_size
    padded = torch.nn.functional.pad(flat - mean, (0, missing))
    codes = quantizer(padded[None])
    return DoubleQuantized(codes, mean, scale.shape)
