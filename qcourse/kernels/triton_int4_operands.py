"""The operands of the Triton kernels, by name, and the checks that a caller's tensors pass first.

The idea: a kernel has some twenty arguments. Most are the same for every kernel, so they are named
once, here, and passed by name.

How it differs from ``triton_int4_launch.py``: that chooses a tile and starts a kernel.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcourse.kernels.int4_planes import (
    BLOCK,
    ceil_div,
    groups_and_blocks,
    row_words,
    supports_group_size,
)
from qcourse.kernels.triton_available import interpreted
from qcourse.kernels.triton_int4_configs import TileConfig

VERSIONS = ("naive", "planes", "tuned")


@dataclass(frozen=True)
class KernelWeight:
    """W (N, K) as the kernels read it."""

    words: Tensor  # (N, 16 ceil(K / 128)) int32, from pack_planes
    scale: Tensor  # (rows, N), from scale_and_zero_rows
    zero_point: Tensor | None  # (rows, N) uint8; None where each is 8
    group_size: int
    inputs: int  # K

    @property
    def parameter_rows(self) -> int:
        """The rows of scales and zero points: one per group, in whole blocks."""
        groups_per_block, blocks_per_group = groups_and_blocks(self.group_size)
        blocks = ceil_div(self.inputs, BLOCK)
        if groups_per_block > 1:
            return groups_per_block * blocks
        return ceil_div(blocks, blocks_per_group)

    def pointers_and_sizes(self) -> dict[str, Any]:
        """The arguments that every kernel has."""
        # A kernel without zero points does not read zero_ptr; any tensor will do.
        zero_point = self.scale if self.zero_point is None else self.zero_point
        return {
            "words_ptr": self.words,
            "scale_ptr": self.scale,
            "zero_ptr": zero_point,
            "N": len(self.words),
            "K": self.inputs,
            "stride_wn": self.words.stride(0),
            "HAS_ZERO": self.zero_point is not None,
        }

    def planes_arguments(self) -> dict[str, Any]:
        """The arguments of the kernels that read whole planes of int32 words."""
        groups_per_block, blocks_per_group = groups_and_blocks(self.group_size)
        return self.pointers_and_sizes() | {
            "blocks_per_group": blocks_per_group,
            "GROUPS": groups_per_block,
            "EVEN_K": self.inputs % BLOCK == 0,
        }

    def halves_arguments(self) -> dict[str, Any]:
        """The same for the kernels that read each word as two int16 numbers."""
        halves = self.words.view(torch.int16)
        return self.planes_arguments() | {"words_ptr": halves, "stride_wn": halves.stride(0)}


@dataclass(frozen=True)
class Product:
    """One product y = x w_hat^T, and its tile."""

    x: Tensor  # (M, K)
    w: KernelWeight
    y: Tensor  # (M, N)
    config: TileConfig

    def x_and_y_arguments(self) -> dict[str, object]:
        """The arguments of every kernel besides the weight's and the tile's."""
        stride = self.x.stride(0)
        return {"x_ptr": self.x, "y_ptr": self.y, "M": len(self.x), "stride_xm": stride}

    def grid(self, block_m: int, block_n: int) -> tuple[int, int]:
        """The tiles along M and along N, one program each."""
        tokens, outputs = self.y.shape
        return ceil_div(tokens, block_m), ceil_div(outputs, block_n)


def check_x(x: Tensor, version: str) -> None:
    """Raise where a version of the kernel is unknown or does not take x's dtype."""
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} must be one of {', '.join(VERSIONS)}")
    allowed = [torch.float16]
    if not interpreted():  # Triton's interpreter computes bf16 wrongly
        allowed.append(torch.bfloat16)
    if version == "naive":
        allowed.append(torch.float32)
    if x.dtype not in allowed:
        names = ", ".join(map(str, allowed))
        raise TypeError(f"x has dtype {x.dtype}; version={version!r} takes {names} here")


def check_weight(w: KernelWeight, device: torch.device) -> None:
    """Raise where a tensor of w has the wrong shape or device, or is not contiguous."""
    if not supports_group_size(w.group_size, w.inputs):
        raise ValueError(
            f"group_size={w.group_size} with K={w.inputs} must be 32, 64 or a multiple of 128 that"
            " divides K, or K"
        )
    outputs = len(w.words)
    words_shape = (outputs, row_words(w.inputs))
    parameter_shape = (w.parameter_rows, outputs)
    _check_tensor("words", w.words, words_shape, w, device)
    _check_tensor("scale", w.scale, parameter_shape, w, device)
    if w.zero_point is not None:
        _check_tensor("zero_point", w.zero_point, parameter_shape, w, device)


def _check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, int], w: KernelWeight, device: torch.device
) -> None:
    if tensor.shape == shape and tensor.device == device and tensor.is_contiguous():
        return
    given = f"{name} of shape {tuple(tensor.shape)} on {tensor.device}"
    expected = f"must be of shape {shape}, contiguous and on {device}"
    raise ValueError(f"{given} {expected} for K={w.inputs} and group_size={w.group_size}")
