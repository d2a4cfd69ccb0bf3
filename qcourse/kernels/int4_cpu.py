"""The packing that torch's own INT4 product on a CPU reads, and that product.

The idea: a kernel wants what it reads next to lie next. torch's multiplies a block of 64 outputs at once (32 or 16 on
processors with shorter registers), so the codes of a block lie together, input after input, and a byte holds two
outputs of one input. Which two, and how many outputs a block has, depends on the processor: `_lanes` finds it out by
packing known codes, so that codes can be read back exactly, on any processor whose blocks are of either kind.

The product itself is for bfloat16: torch's loops for the other dtypes are plain ones, slower than decoding the weight
first. It rounds scales to bfloat16 and each weight as well, and sums in float32.

Source: torch's ``aten::_weight_int4pack_mm_for_cpu``: w = (code - 8) scale + zero.

How it differs from ``int4_planes.py``: the packing that our own GPU kernel reads.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = (256, 128, 64, 32)  # the sizes of group that torch's product knows
MULTIPLE = GROUPS[-1]  # inputs are padded to whole groups, outputs to whole blocks
BLOCK = 64
Lanes = tuple[int, slice, slice]


def unavailable_reason() -> str | None:
    """None where this torch has the product and its packing is understood; else why not."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return f"torch {torch.__version__} has no INT4 product for CPUs"
    return None if _lanes() else "this processor's packing of INT4 codes is not known"


def pack_blocks(codes: Tensor) -> Tensor:
    """uint8 codes (N, K) in 0..15 as torch's product reads them: bytes (N, K / 2), both padded with code 8."""
    padding = (0, -codes.shape[1] % MULTIPLE, 0, -codes.shape[0] % BLOCK)
    padded = F.pad(codes, padding, value=8)
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.int().contiguous(), 1)


def unpack_blocks(packed: Tensor, inputs: int) -> Tensor:
    """The inverse, but for the padding of the outputs: uint8 codes (rows of packed, inputs)."""
    lanes = _lanes()
    if lanes is None:
        raise RuntimeError(unavailable_reason())
    return _read(packed, lanes)[:, :inputs]


def scale_and_zero(
    scale: Tensor, zero_point: Tensor | None, group_size: int, inputs: int
) -> Tensor:
    """What torch's product takes beside the codes: (groups, outputs, 2), the scale and (8 - zero_point) scale, in bf16.

    Where a group is none of the sizes that it knows (a whole row), each scale is repeated for smaller groups.
    """
    exact = scale.double()
    zero = torch.zeros_like(exact) if zero_point is None else (8 - zero_point.double()) * exact
    both = torch.stack([exact, zero], dim=-1)
    size = native_group(group_size, inputs)
    if size != group_size:
        both = both.repeat_interleave(
            -(-inputs // size), dim=1
        )  # one group a row: (outputs, groups, 2)
    both = F.pad(both, (0, 0, 0, 0, 0, -len(scale) % BLOCK))
    return both.transpose(0, 1).contiguous().bfloat16()


def native_group(group_size: int, inputs: int) -> int:
    """The size of group that torch's product is told: the group's own, or the largest that makes up the padded row."""
    if group_size in GROUPS and inputs % group_size == 0:
        return group_size
    return next(size for size in GROUPS if (inputs + -inputs % MULTIPLE) % size == 0)


def multiply(x: Tensor, packed: Tensor, scales: Tensor, *, group_size: int, outputs: int) -> Tensor:
    """x (M, K) w^T (M, N) in bfloat16 by torch's product.

    Args:
        x: bfloat16.
        packed, scales: what ``pack_blocks`` and ``scale_and_zero`` made.
        group_size: what ``native_group`` says.
        outputs: N.
    """
    x = F.pad(x, (0, 2 * packed.shape[1] - x.shape[1])).contiguous()
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scales)[:, :outputs]


@cache
def _lanes() -> Lanes | None:
    """How many outputs a block has, and which of them are the low and the high halves of its bytes."""
    codes = torch.randint(
        0, 16, (2 * BLOCK, 2 * MULTIPLE), generator=torch.Generator().manual_seed(0)
    )
    try:
        packed = pack_blocks(codes.byte())
    except (AttributeError, RuntimeError):
        return None
    for block in (64, 32, 16):
        half = block // 2
        for low, high in (
            (slice(0, half), slice(half, block)),
            (slice(0, block, 2), slice(1, block, 2)),
        ):
            if torch.equal(_read(packed, (block, low, high)), codes.byte()):
                return block, low, high
    return None


def _read(packed: Tensor, lanes: Lanes) -> Tensor:
    block, low, high = lanes
    pairs = packed.reshape(
        -1, packed.shape[1] * 2, block // 2
    )  # (blocks, inputs, pairs of outputs)
    codes = pairs.new_empty(len(pairs), block, pairs.shape[1])
    codes[:, low] = (pairs & 15).transpose(1, 2)
    codes[:, high] = (pairs >> 4).transpose(1, 2)
    return codes.reshape(-1, pairs.shape[1])  # (outputs, inputs)
