"""Blocks of ggml as quantized tensors: Q4_0, Q4_1 and Q8_0.

A block holds 32 weights of one row: its scale first, then its codes.

    Q8_0    float16 d, 32 int8 codes            w = d q
    Q4_0    float16 d, 16 bytes of codes        w = d (q - 8)
    Q4_1    float16 d, float16 m, 16 bytes      w = d q + m

Byte i of the 16 holds weight i in its low half and weight i + 16 in its high half. Other packings,
such as `numerics.packing`, put neighbors into one byte.

Source: ggml-common.h and ggml-quants.c of the public repository of llama.cpp.
"""

from collections.abc import Callable

import torch
from jaxtyping import UInt8
from torch import Tensor

from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.minimum import Minimum, MinimumQuantizer
from qcourse.numerics.quantized import Parameters, QuantizedTensor

BLOCK = 32
_GROUPS = PerGroup(BLOCK)
Q8_0 = IntQuantizer(8, granularity=_GROUPS, scale_dtype=torch.float16)
# The scale of Q4_0 is negative in about every second block.
Q4_0 = IntQuantizer(4, granularity=_GROUPS, scale_rule="signed", scale_dtype=torch.float16)
Q4_1 = MinimumQuantizer(4, granularity=_GROUPS, scale_dtype=torch.float16)


def read_q8_0(data: UInt8[Tensor, " nbytes"], shape: tuple[int, ...]) -> QuantizedTensor:
    """Return the quantized tensor (*shape) in blocks of 34 bytes."""
    blocks = data.reshape(-1, 34)
    codes = blocks[:, 2:].view(torch.int8)  # (blocks, 32)
    return _symmetric(codes, _half(blocks, 0), shape, Q8_0)


def read_q4_0(data: UInt8[Tensor, " nbytes"], shape: tuple[int, ...]) -> QuantizedTensor:
    """Return the quantized tensor (*shape) in blocks of 18 bytes; its codes are q - 8."""
    blocks = data.reshape(-1, 18)
    codes = _nibbles(blocks[:, 2:]).view(torch.int8).sub_(8)
    return _symmetric(codes, _half(blocks, 0), shape, Q4_0)


def read_q4_1(data: UInt8[Tensor, " nbytes"], shape: tuple[int, ...]) -> QuantizedTensor:
    """Return the quantized tensor (*shape) in blocks of 20 bytes."""
    blocks = data.reshape(-1, 20)
    codes = _nibbles(blocks[:, 4:])
    of_scales = Q4_1.granularity.scale_shape(torch.Size(shape))
    scale = _half(blocks, 0).reshape(of_scales)
    minimum = _half(blocks, 2).reshape(of_scales)
    parameters = Minimum(scale, minimum)
    return QuantizedTensor(codes.reshape(shape), parameters, Q4_1)


READERS: dict[str, Callable[[Tensor, tuple[int, ...]], QuantizedTensor]] = {
    "Q8_0": read_q8_0,
    "Q4_0": read_q4_0,
    "Q4_1": read_q4_1,
}


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 at byte `start` of each block, (blocks,)."""
    two_bytes = blocks[:, start : start + 2].contiguous()
    return two_bytes.view(torch.float16).flatten()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the 32 codes, 0 to 15, of each row of 16 bytes."""
    codes = torch.empty(len(packed), BLOCK, dtype=torch.uint8)
    torch.bitwise_and(packed, 0x0F, out=codes[:, : BLOCK // 2])
    torch.bitwise_right_shift(packed, 4, out=codes[:, BLOCK // 2 :])
    return codes


def _symmetric(
    codes: Tensor, scale: Tensor, shape: tuple[int, ...], quantizer: IntQuantizer
) -> QuantizedTensor:
    """Return the tensor (*shape) of codes (blocks, 32) and scales (blocks,)."""
    # ggml writes the scale 0 for a block of zeros. Our quantizers write the scale 1 and codes 0.
    # The sign stays where the format has one, so that -0 x 0 is -0 as in ggml.
    zero = scale == 0
    if zero.any():
        one = torch.ones_like(scale)
        signed = quantizer.scale_rule == "signed"
        scale = torch.where(zero, one.copysign(scale) if signed else one, scale)
        codes = torch.where(zero[:, None], 0, codes)
    scale = scale.reshape(quantizer.granularity.scale_shape(torch.Size(shape)))
    zero_point = torch.zeros(scale.shape, dtype=codes.dtype)
    return QuantizedTensor(codes.reshape(shape), Parameters(scale, zero_point), quantizer)
