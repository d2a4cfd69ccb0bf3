"""The order of 4-bit codes that torch's INT4 product on a CPU reads, and that product.

The idea: torch multiplies by a block of outputs at once. The codes of a block lie together, input
by input, and a byte holds two outputs of one input. Which two, and whether a block is 64, 32 or 16
outputs, depends on the processor: `_lanes` finds out by packing known codes. The product takes
bfloat16, rounds scales and weights to it and sums in float32. For other dtypes it is slower than
decoding the weight first.

Source: torch's ``aten::_weight_int4pack_mm_for_cpu``: w = (code - 8) scale + zero.

How it differs from ``int4_planes.py``: that is the order of our own GPU kernel.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = (256, 128, 64, 32)  # the group sizes that torch's product takes
MULTIPLE = GROUPS[-1]  # inputs are padded to whole groups, outputs to whole blocks
BLOCK = 64
STRIP = 2**18  # codes that are packed at once
Lanes = tuple[int, slice, slice]


def unavailable_reason() -> str | None:
    """Return why torch's INT4 product cannot be used on this machine; None where it can."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has no INT4 product for CPUs"
    return None if _lanes() else "this processor's packing of INT4 codes is not known"


def pack_blocks(codes: Tensor) -> Tensor:
    """Return uint8 codes (N, K) in 0..15 in torch's order: bytes (N, K / 2), padded with code 8."""
    outputs, inputs = codes.shape
    padded_outputs = outputs + -outputs % BLOCK
    padded_inputs = inputs + -inputs % MULTIPLE
    packed = codes.new_empty(padded_outputs, padded_inputs // 2)
    # torch packs int32, eight times the size of the result: a strip of whole blocks at a time.
    rows = max(1, STRIP // padded_inputs // BLOCK) * BLOCK
    for start in range(0, padded_outputs, rows):
        strip = codes[start : start + rows].int()
        target = packed[start : start + rows]
        padding = (0, padded_inputs - inputs, 0, len(target) - len(strip))
        if any(padding):
            strip = F.pad(strip, padding, value=8)
        target.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(strip.contiguous(), 1))
    return packed


def unpack_blocks(packed: Tensor, inputs: int) -> Tensor:
    """Return the uint8 codes (N, inputs) that ``pack_blocks`` packed, N padded to whole blocks."""
    lanes = _lanes()
    if lanes is None:
        raise RuntimeError(unavailable_reason())
    return _read(packed, lanes)[:, :inputs]


def scale_and_zero(
    scale: Tensor, zero_point: Tensor | None, group_size: int, inputs: int
) -> Tensor:
    """Return scale and (8 - zero_point) scale in bfloat16, (groups, outputs, 2), for the product.

    For a group size that the product does not take, each scale is repeated for smaller groups.
    """
    exact = scale.double()
    zero = torch.zeros_like(exact)
    if zero_point is not None:
        zero = (8 - zero_point.double()) * exact
    both = torch.stack([exact, zero], dim=-1)  # (outputs, groups, 2)
    size = native_group(group_size, inputs)
    if size != group_size:  # a row is one group, which becomes several
        both = both.repeat_interleave(-(-inputs // size), dim=1)
    missing_outputs = -len(scale) % BLOCK
    both = F.pad(both, (0, 0, 0, 0, 0, missing_outputs))
    return both.transpose(0, 1).contiguous().bfloat16()  # (groups, outputs, 2)


def native_group(group_size: int, inputs: int) -> int:
    """Return the group size for torch's product: G, or the largest that divides the padded row."""
    if group_size in GROUPS and inputs % group_size == 0:
        return group_size
    padded_inputs = inputs + -inputs % MULTIPLE
    return next(size for size in GROUPS if padded_inputs % size == 0)


def multiply(x: Tensor, packed: Tensor, scales: Tensor, *, group_size: int, outputs: int) -> Tensor:
    """Return x w^T (M, N) for bfloat16 x (M, K) by torch's product, in bfloat16.

    Args:
        packed: from ``pack_blocks``; scales: from ``scale_and_zero``.
        group_size: from ``native_group``; outputs: N.
    """
    missing = 2 * packed.shape[1] - x.shape[1]
    padded = F.pad(x, (0, missing)).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, packed, group_size, scales)
    return y[:, :outputs]


@cache
def _lanes() -> Lanes | None:
    """(outputs per block, those in the low nibbles, those in the high nibbles), or None."""
    generator = torch.Generator().manual_seed(0)
    shape = (2 * BLOCK, 2 * MULTIPLE)
    codes = torch.randint(0, 16, shape, generator=generator).byte()
    try:
        packed = pack_blocks(codes)
    except (AttributeError, RuntimeError):
        return None
    # Try every known order on codes that we know.
    for block in (64, 32, 16):
        half = block // 2
        halves = (block, slice(0, half), slice(half, block))
        alternating = (block, slice(0, block, 2), slice(1, block, 2))
        for lanes in (halves, alternating):
            if torch.equal(_read(packed, lanes), codes):
                return lanes
    return None


def _read(packed: Tensor, lanes: Lanes) -> Tensor:
    block, low, high = lanes
    inputs = 2 * packed.shape[1]
    pairs = packed.reshape(-1, inputs, block // 2)  # (blocks, inputs, pairs of outputs)
    codes = pairs.new_empty(len(pairs), block, inputs)
    codes[:, low] = (pairs & 15).transpose(1, 2)
    codes[:, high] = (pairs >> 4).transpose(1, 2)
    return codes.reshape(-1, inputs)  # (outputs, inputs)
