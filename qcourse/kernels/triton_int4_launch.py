"""The INT4 product on a GPU: y = x w_hat^T by one of the three kernels of ``triton_int4.py``.

The idea: a call checks shapes, chooses a tile and launches one kernel. Work that does not change
between calls is done when a weight is packed. w_hat[n, k] = (code - zero_point) scale, with codes
in 0..15; symmetric codes -8..7 are stored 8 higher, so their zero point is 8.

The sums are exact up to float32: fp16 and bf16 hold code - zero_point exactly, tensor cores
multiply such numbers without rounding, and the scale multiplies float32 sums. Two kernels round
w_hat to x's dtype, as a dense product does: `naive`, and `tuned` in tiles of 64 tokens and more,
which have no registers for a second sum.

How it differs from ``triton_int4.py``: that holds the kernels and is imported by the first product;
this file imports no triton.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from qcourse.kernels.int4_planes import BLOCK, ceil_div
from qcourse.kernels.triton_available import has_packed_assembly
from qcourse.kernels.triton_int4_configs import TileConfig, choose_config
from qcourse.kernels.triton_int4_counters import COUNTERS, zero_counters
from qcourse.kernels.triton_int4_operands import KernelWeight, Product, check_weight, check_x

WIDE = 64  # from this many tokens per tile on, weights are scaled before the product
NARROW = TileConfig(block_n=64, block_m=32, splits=1, warps=2, stages=3)  # the widest that is not
DECODED_ROWS = 64  # per program of `decode`


@dataclass(frozen=True)
class SplitK:
    """How programs share the blocks of 128 along K of one tile."""

    splits: int
    blocks_per_split: int
    sums: Tensor  # (splits, M, N) float32, the sums of each program
    arrived: Tensor  # a counter per tile

    def arguments(self) -> dict[str, object]:
        """The arguments of `tuned` for split-K."""
        return {
            "sums_ptr": self.sums,
            "arrived_ptr": self.arrived,
            "blocks_per_split": self.blocks_per_split,
            "SPLIT": self.splits > 1,
        }


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
        scale: from ``scale_and_zero_rows``, as is zero_point (None where each is 8).
        group_size: G, one that ``supports_group_size`` allows.
        version: "naive", "planes" or "tuned".
        config: the tile; None takes the one that ``choose_config`` returns.

    Returns:
        The product in x's dtype. The same input gives the same bits.

    Raises:
        TypeError: a dtype of x that the version does not take.
        ValueError: an unknown version, a wrong group size, or a tensor of the wrong shape, device
            or stride.
    """
    check_x(x, version)
    tokens, inputs = x.shape
    w = KernelWeight(words, scale, zero_point, group_size, inputs)
    check_weight(w, x.device)
    y = x.new_empty(tokens, len(words))
    if not tokens:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    with torch.cuda.device_of(x):  # triton launches on the current device
        config = config or choose_config(tokens, len(words), inputs, x.device)
        launch = _LAUNCHERS[version]
        launch(Product(x, w, y, config))
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
    if rows:
        with torch.cuda.device_of(words):
            _launch_decode(w, w_hat, start)
    return w_hat


def _launch_decode(w: KernelWeight, w_hat: Tensor, start: int) -> None:
    from qcourse.kernels.triton_int4_decoding import decode as kernel

    rows, inputs = w_hat.shape
    grid = (ceil_div(rows, DECODED_ROWS), ceil_div(inputs, BLOCK))
    arguments = w.halves_arguments()
    arguments |= {"w_ptr": w_hat, "first": start, "last": start + rows}
    packed = has_packed_assembly()
    kernel[grid](**arguments, PACKED=packed, BLOCK_N=DECODED_ROWS, num_warps=4)


def _launch_naive(product: Product) -> None:
    from qcourse.kernels.triton_int4 import naive

    block_m = 16
    block_n = 64
    grid = product.grid(block_m, block_n)
    arguments = product.x_and_y_arguments() | product.w.pointers_and_sizes()
    arguments["group_size"] = product.w.group_size
    naive[grid](**arguments, BLOCK_N=block_n, BLOCK_M=block_m)


def _launch_planes(product: Product) -> None:
    from qcourse.kernels.triton_int4 import planes

    config = product.config if product.config.block_m < WIDE else NARROW
    grid = product.grid(config.block_m, config.block_n)
    arguments = product.x_and_y_arguments() | product.w.planes_arguments()
    planes[grid](**arguments, **_tile_arguments(config))


def _launch_tuned(product: Product) -> None:
    from qcourse.kernels.triton_int4 import tuned

    # Wide tiles convert scales to x's dtype, and fp16 may not hold the scales of another dtype.
    config = product.config
    holds_scales = product.x.dtype in (torch.bfloat16, product.w.scale.dtype)
    if config.block_m >= WIDE and not holds_scales:
        config = NARROW
    tiles_m, tiles_n = product.grid(config.block_m, config.block_n)
    split_k = _split_k(product, config.splits, tiles_m * tiles_n)
    grid = (tiles_m, tiles_n, split_k.splits)
    arguments = product.x_and_y_arguments() | product.w.halves_arguments()
    tuned[grid](
        **arguments,
        **_tile_arguments(config),
        **split_k.arguments(),
        PACKED=has_packed_assembly(),
        SCALE_FIRST=config.block_m >= WIDE,
    )


def _split_k(product: Product, splits: int, tiles: int) -> SplitK:
    """The shares of at most `splits` programs, none of them empty."""
    blocks = ceil_div(product.w.inputs, BLOCK)
    if tiles > COUNTERS:  # every tile that is split needs a counter
        splits = 1
    blocks_per_split = ceil_div(blocks, splits)
    splits = ceil_div(blocks, blocks_per_split)
    if splits == 1:  # the kernel reads neither sums nor counters
        return SplitK(splits, blocks_per_split, sums=product.y, arrived=product.w.words)
    tokens, outputs = product.y.shape
    sums = product.y.new_empty(splits, tokens, outputs, dtype=torch.float32)
    return SplitK(splits, blocks_per_split, sums, zero_counters(product.y.device))


def _tile_arguments(config: TileConfig) -> dict[str, int]:
    return {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


_LAUNCHERS = {"naive": _launch_naive, "planes": _launch_planes, "tuned": _launch_tuned}
