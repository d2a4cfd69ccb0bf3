"""The INT4 product on a GPU, as called: y = x w_hat^T by one of the three kernels of ``triton_int4.py``.

The idea: what does not change from call to call is done once, when a weight is packed (`int4_planes.py`); a call checks
shapes, takes a configuration and launches one kernel. With w_hat[n, k] = (code - zero_point) scale and codes in 0..15;
symmetric codes -8..7 are stored 8 higher, and 8 is then every zero point.

What is summed up is exact up to float32: fp16 and bf16 hold code - zero_point exactly, tensor cores multiply such
numbers without rounding, and the scale multiplies sums in float32. Two round w_hat to x's dtype, as a dense product
does: `naive`, and `tuned` in tiles of 64 tokens and more, where registers for a second sum are lacking.

Under TRITON_INTERPRET=1, set before triton is first imported, the kernels run on the CPU, slowly: for tests, lessons.

How it differs from its neighbours: ``triton_int4.py`` holds the kernels, and is loaded by the first product;
``triton_int4_configs.py`` says how they are cut. This file imports no triton.
"""

import functools
import importlib.util
import os
from importlib import metadata
from types import ModuleType

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from qcourse.kernels.int4_planes import BLOCK, groups_and_blocks, row_words, takes
from qcourse.kernels.triton_int4_configs import TileConfig, choose
from qcourse.kernels.triton_int4_counters import COUNTERS, counters_at_0

VERSIONS = ("naive", "planes", "tuned")
WIDE = 64  # tokens in a tile from which on weights are scaled before the product
NARROW = TileConfig(block_n=64, block_m=32, splits=1, warps=2, stages=3)  # for who cannot


@functools.cache
def unavailable_reason() -> str | None:
    """None where the kernels can run, else why they cannot, in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        fits = _release("triton") >= (3, 7) or _release("numpy") < (2, 4)
        return (
            None
            if fits
            else "the interpreter of triton before 3.7 does not run with numpy 2.4 or later"
        )
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
        )
    return None


def _release(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in metadata.version(name).split(".")[:2])


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    """y[m, n] = sum_k x[m, k] (code[n, k] - zero_point[n, k // G]) scale[n, k // G].

    Args:
        x: fp16 or bf16; for "naive" fp32 too. In the interpreter, which reckons bf16 wrongly, no bf16.
        words: the codes, from `pack_planes`.
        scale: from `prepare`.
        zero_point: from `prepare`; None where each is 8.
        group_size: G, one that `takes` takes.
        version: "naive", "planes" or "tuned".
        config: how it is cut; None takes what `choose` says.

    Returns:
        The product in x's dtype. The same input gives the same bits.

    Raises:
        TypeError: a dtype of x that the version does not take.
        ValueError: an unknown version; a group size that the kernels do not take; shapes that do not fit; tensors that
            are not on one device; words, scale or zero_point not contiguous.
    """
    _check(x, words, scale, zero_point, group_size, version)
    (M, K), N = x.shape, len(words)
    y = x.new_empty(M, N)
    if not M:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):  # triton launches on the current device
        config = config or choose(M, N, K, x.device)
        zeros = (
            scale if zero_point is None else zero_point
        )  # no zero points: a pointer that is not read
        common = (x, words, scale, zeros, y, M, N, K)
        _LAUNCH[version](_kernels(), common, group_size, config, zero_point is not None)
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
    """The rows of w_hat from start up to stop, (code - zero_point) scale in float32 rounded to dtype.

    Args:
        words, scale, zero_point, group_size: as for `int4_mm`.
        inputs: K.
        dtype: fp16 or bf16.
        start: the first row.
        stop: the row after the last; None or beyond the end is the end.

    Raises:
        TypeError, ValueError: as `int4_mm`.
    """
    _check(words.new_empty(0, inputs, dtype=dtype), words, scale, zero_point, group_size, "tuned")
    N = len(words)
    stop = min(N if stop is None else stop, N)
    w_hat = torch.empty(max(0, stop - start), inputs, dtype=dtype, device=words.device)
    groups, blocks_a_group = groups_and_blocks(group_size)
    halves, zeros = words.view(torch.int16), scale if zero_point is None else zero_point
    if len(w_hat):
        with torch.cuda.device_of(words):
            _kernels().decode[-(-len(w_hat) // 64), -(-inputs // BLOCK)](
                halves, scale, zeros, w_hat, start, stop, N, inputs, blocks_a_group, halves.stride(0), GROUPS=groups,
                HAS_ZERO=zero_point is not None, EVEN_K=inputs % BLOCK == 0, PACKED=_packed(), BLOCK_N=64, num_warps=4,
            )  # fmt: skip
    return w_hat


def _naive(
    kernels: ModuleType, common: tuple, group_size: int, config: TileConfig, has_zero: bool
) -> None:
    x, words, *_, M, N, _ = common
    block_n, block_m = 64, 16
    kernels.naive[-(-M // block_m), -(-N // block_n)](
        *common,
        group_size,
        x.stride(0),
        words.stride(0),
        HAS_ZERO=has_zero,
        BLOCK_N=block_n,
        BLOCK_M=block_m,
    )


def _planes(
    kernels: ModuleType, common: tuple, group_size: int, config: TileConfig, has_zero: bool
) -> None:
    x, words, *_, M, N, K = common
    groups, blocks_a_group = groups_and_blocks(group_size)
    config = config if config.block_m < WIDE else NARROW
    kernels.planes[-(-M // config.block_m), -(-N // config.block_n)](
        *common, blocks_a_group, x.stride(0), words.stride(0),
        GROUPS=groups, HAS_ZERO=has_zero, EVEN_K=K % BLOCK == 0,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def _tuned(
    kernels: ModuleType, common: tuple, group_size: int, config: TileConfig, has_zero: bool
) -> None:
    x, words, scale, zeros, y, M, N, K = common
    groups, blocks_a_group = groups_and_blocks(group_size)
    fits = (
        x.dtype == torch.bfloat16 or scale.dtype == x.dtype
    )  # fp16 may not hold another dtype's scales
    config = config if config.block_m < WIDE or fits else NARROW
    tiles, blocks = (-(-M // config.block_m), -(-N // config.block_n)), -(-K // BLOCK)
    blocks_a_split = -(-blocks // (config.splits if tiles[0] * tiles[1] <= COUNTERS else 1))
    splits = -(-blocks // blocks_a_split)
    sums, arrived = (
        (x.new_empty(splits, M, N, dtype=torch.float32), counters_at_0(x.device))
        if splits > 1
        else (y, words)
    )
    halves = words.view(torch.int16)
    kernels.tuned[*tiles, splits](
        x, halves, scale, zeros, y, sums, arrived, M, N, K, blocks_a_group, x.stride(0), halves.stride(0),
        blocks_a_split, GROUPS=groups, HAS_ZERO=has_zero, EVEN_K=K % BLOCK == 0, SPLIT=splits > 1,
        PACKED=_packed(), SCALE_FIRST=config.block_m >= WIDE,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


_LAUNCH = {"naive": _naive, "planes": _planes, "tuned": _tuned}


def _kernels() -> ModuleType:
    from qcourse.kernels import triton_int4

    return triton_int4


def _packed() -> bool:
    """Whether there is the packed assembly, which is NVIDIA's."""
    return not interpreted() and torch.version.hip is None


def _check(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_size: int,
    version: str,
) -> None:
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} must be one of {', '.join(VERSIONS)}")
    allowed = (
        [torch.float16]
        + [torch.bfloat16] * (not interpreted())
        + [torch.float32] * (version == "naive")
    )
    if x.dtype not in allowed:
        raise TypeError(
            f"x has dtype {x.dtype}; version={version!r} takes {', '.join(map(str, allowed))} here"
        )
    (_, K), N = x.shape, len(words)
    if not takes(group_size, K):
        raise ValueError(
            f"group_size={group_size} with K={K} must be 32, 64 or a multiple of 128 that divides K, or K"
        )
    groups, blocks_a_group = groups_and_blocks(group_size)
    blocks = -(-K // BLOCK)
    rows = groups * blocks if groups > 1 else -(-blocks // blocks_a_group)
    for name, tensor, shape in (
        ("words", words, (N, row_words(K))),
        ("scale", scale, (rows, N)),
        ("zero_point", zero_point, (rows, N)),
    ):
        if tensor is not None and (
            tensor.shape != shape or tensor.device != x.device or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device} must be of shape {shape}, contiguous and on"
                f" {x.device} for x {tuple(x.shape)} and group_size={group_size}"
            )
