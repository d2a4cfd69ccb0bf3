"""The INT4 product on a GPU: y = x w_hat^T by one of the three kernels of ``triton_int4.py``.

The idea: work that does not change between calls is done once, when a weight is packed. A call
checks shapes, chooses a tile and launches one kernel. w_hat[n, k] = (code - zero_point) scale, with
codes in 0..15; symmetric codes -8..7 are stored 8 higher, so their zero point is 8.

The sums are exact up to float32: fp16 and bf16 hold code - zero_point exactly, tensor cores
multiply such numbers without rounding, and the scale multiplies float32 sums. Two kernels round
w_hat to x's dtype, as a dense product does: `naive`, and `tuned` in tiles of 64 tokens and more,
which have no registers for a second sum.

How it differs from its neighbors: ``triton_int4.py`` holds the kernels and is imported by the first
product; ``triton_int4_configs.py`` chooses the tile. This file imports no triton.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from qcourse.kernels.int4_planes import BLOCK, ceil_div
from qcourse.kernels.triton_available import has_packed_assembly
from qcourse.kernels.triton_int4_configs import TileConfig, choose_config
from qcourse.kernels.triton_int4_counters import COUNTERS, zero_counters
from qcourse.kernels.triton_int4_operands import KernelWeight, check_weight, check_x

WIDE = 64  # from this many tokens per tile on, weights are scaled before the product
NARROW = TileConfig(block_n=64, block_m=32, splits=1, warps=2, stages=3)  # the widest that is not
DECODED_ROWS = 64  # per program of `decode`


@dataclass(frozen=True)
class Product:
    """One product y = x w_hat^T, and its tile."""

    x: Tensor  # (M, K)
    w: KernelWeight
    y: Tensor  # (M, N)
    config: TileConfig

    def x_and_y_arguments(self) -> dict[str, object]:
        """The arguments of every kernel besides the weight's."""
        return {
            "x_ptr": self.x,
            "y_ptr": self.y,
            "M": len(self.x),
            "stride_xm": self.x.stride(0),
        }

    def grid(self, block_m: int, block_n: int) -> tuple[int, int]:
        """The tiles along M and along N, one program each."""
        tokens, outputs = self.y.shape
        return ceil_div(tokens, block_m), ceil_div(outputs, block_n)


def int4_mm(
    x: Float[Tensor, "M K"],
    words: Int32[Tensor, "N words"],
    scale: Shaped[Tensor, "rows N"],
    zero_point: UInt8[Tensor, "rows N"] | None = None,
    *,
    group_size: int,
    version: str = "tuned",
    config: TileConfig | None = None,
) -> Float[Tensor, "M N"]:
    """Return y[m, n] = sum_k x[m, k] (code[n, k] - zero_point[n, k // G]) scale[n, k // G].

    Args:
        x: fp16 or bf16; for "naive" also fp32. Triton's interpreter does not take bf16.
        words: the codes, from ``pack_planes``.
        scale: from ``scale_and_zero_rows``.
        zero_point: from ``scale_and_zero_rows``; None where each is 8.
        group_size: G, one that ``supports_group_size`` allows.
        version: "naive", "planes" or "tuned".
        config: the tile; None takes the one that ``choose_config`` returns.

    Returns:
        The product in x's dtype. The same input gives the same bits.

    Raises:
        TypeError: a dtype of x that the version does not take.
        ValueError: an unknown version; a group size that the kernels do not take; a tensor of the
            wrong shape or device, or words, scale or zero_point that are not contiguous.
    """
    check_x(x, version)
    tokens, inputs = x.shape
    w = KernelWeight(words, scale, zero_point, group_size, inputs)
    check_weight(w, x.device)
    outputs = len(words)
    y = x.new_empty(tokens, outputs)
    if not tokens:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):  # triton launches on the current device
        config = config or choose_config(tokens, outputs, inputs, x.device)
        _LAUNCHERS[version](Product(x, w, y, config))
    return y


def decode(
    words: Int32[Tensor, "N words"],
    scale: Shaped[Tensor, "rows N"],
    zero_point: UInt8[Tensor, "rows N"] | None = None,
    *,
    group_size: int,
    inputs: int,
    dtype: torch.dtype,
    start: int = 0,
    stop: int | None = None,
) -> Float[Tensor, "outputs K"]:
    """Return rows start to stop of w_hat, (code - zero_point) scale in float32 rounded to dtype.

    Args:
        words: the codes; scale, zero_point and group_size too are as for ``int4_mm``.
        inputs: K.
        dtype: fp16 or bf16.
        start: the first row.
        stop: the row after the last; None or beyond the end is the end.

    Raises:
        TypeError, ValueError: as ``int4_mm``.
    """
    w = KernelWeight(words, scale, zero_point, group_size, inputs)
    check_x(words.new_empty(0, inputs, dtype=dtype), "tuned")
    check_weight(w, words.device)
    outputs = len(words)
    stop = outputs if stop is None else min(stop, outputs)
    rows = max(0, stop - start)
    w_hat = torch.empty(rows, inputs, dtype=dtype, device=words.device)
    if not rows:
        return w_hat
    grid = (ceil_div(rows, DECODED_ROWS), ceil_div(inputs, BLOCK))
    with torch.cuda.device_of(words):
        _kernels().decode[grid](
            w_ptr=w_hat,
            first=start,
            last=stop,
            **w.halves_arguments(),
            PACKED=has_packed_assembly(),
            BLOCK_N=DECODED_ROWS,
            num_warps=4,
        )
    return w_hat


def _launch_naive(product: Product) -> None:
    block_m = 16
    block_n = 64
    _kernels().naive[product.grid(block_m, block_n)](
        **product.x_and_y_arguments(),
        **product.w.pointers_and_sizes(),
        group_size=product.w.group_size,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
    )


def _launch_planes(product: Product) -> None:
    config = product.config if product.config.block_m < WIDE else NARROW
    _kernels().planes[product.grid(config.block_m, config.block_n)](
        **product.x_and_y_arguments(),
        **product.w.planes_arguments(),
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _launch_tuned(product: Product) -> None:
    x = product.x
    config = product.config
    # Wide tiles convert scales to x's dtype, and fp16 may not hold the scales of another dtype.
    holds_scales = x.dtype in (torch.bfloat16, product.w.scale.dtype)
    if config.block_m >= WIDE and not holds_scales:
        config = NARROW
    tiles_m, tiles_n = product.grid(config.block_m, config.block_n)

    # Split-K: `splits` programs share the blocks of one tile. Each split tile needs a counter.
    blocks = ceil_div(product.w.inputs, BLOCK)
    wanted_splits = config.splits if tiles_m * tiles_n <= COUNTERS else 1
    blocks_per_split = ceil_div(blocks, wanted_splits)
    splits = ceil_div(blocks, blocks_per_split)
    if splits > 1:
        sums = x.new_empty(splits, *product.y.shape, dtype=torch.float32)
        arrived = zero_counters(x.device)
    else:  # neither is read
        sums = product.y
        arrived = product.w.words

    _kernels().tuned[(tiles_m, tiles_n, splits)](
        **product.x_and_y_arguments(),
        **product.w.halves_arguments(),
        sums_ptr=sums,
        arrived_ptr=arrived,
        blocks_a_split=blocks_per_split,
        SPLIT=splits > 1,
        PACKED=has_packed_assembly(),
        SCALE_FIRST=config.block_m >= WIDE,
        BLOCK_N=config.block_n,
        BLOCK_M=config.block_m,
        STAGES=config.stages,
        num_warps=config.warps,
    )


_LAUNCHERS = {"naive": _launch_naive, "planes": _launch_planes, "tuned": _launch_tuned}


def _kernels() -> ModuleType:
    from qcourse.kernels import triton_int4

    return triton_int4
