"""The orders in which 4-bit codes lie in memory, by name, one order per kernel.

The idea: each INT4 kernel reads codes in its own order and takes its scales in its own form. A
layout packs codes and scales for one kernel and unpacks the same codes again, bit for bit.

How it differs from ``int4_weight.py``: that holds one weight in one of these layouts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcourse.kernels import int4_cpu
from qcourse.kernels.int4_cpu import pack_blocks, unpack_blocks
from qcourse.kernels.int4_planes import pack_planes, scale_and_zero_rows, unpack_planes


@dataclass(frozen=True)
class Int4Layout:
    """How one kernel wants a 4-bit weight in memory."""

    # Codes (N, K), uint8 in 0..15, to the packed tensor.
    pack: Callable[[Tensor], Tensor]
    # Whole blocks of 64 packed rows, and K, to codes; padded rows come out at the end.
    unpack: Callable[[Tensor, int], Tensor]
    # Scale (N, K / G), zero_point (N, K / G) or None, G and K to the kernel's other tensors.
    extras: Callable[[Tensor, Tensor | None, int, int], tuple[Tensor, ...]]
    # Why a weight on this device cannot have the layout, or None.
    unavailable_reason: Callable[[torch.device], str | None]


def default_layout(device: torch.device) -> str:
    """Return the first layout of the table that a weight on this device can have."""
    # The table ends with a layout that every device can have.
    return next(name for name in LAYOUTS if not LAYOUTS[name].unavailable_reason(device))


def _cpu_extras(
    scale: Tensor, zero_point: Tensor | None, group_size: int, inputs: int
) -> tuple[Tensor, ...]:
    return (int4_cpu.scale_and_zero(scale, zero_point, group_size, inputs),)


def _planes_extras(
    scale: Tensor, zero_point: Tensor | None, group_size: int, inputs: int
) -> tuple[Tensor, ...]:
    scale_rows, zero_rows = scale_and_zero_rows(scale, zero_point, group_size=group_size)
    return (scale_rows,) if zero_rows is None else (scale_rows, zero_rows)


def _cpu_reason(device: torch.device) -> str | None:
    reason = int4_cpu.unavailable_reason()
    if reason is None and device.type != "cpu":
        return f"the weight is on {device}; move it first, with Int4Weight.to('cpu')"
    return reason


def _no_reason(device: torch.device) -> None:
    return None


# A weight gets the first layout that its device allows, unless the caller names another one.
LAYOUTS = {
    "cpu": Int4Layout(pack_blocks, unpack_blocks, _cpu_extras, _cpu_reason),
    "planes": Int4Layout(pack_planes, unpack_planes, _planes_extras, _no_reason),
}
