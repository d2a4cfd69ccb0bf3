"""The INT4 product on a GPU, as called: y = x w_hat^T by one of the three kernels of ``triton_int4.py``.

The idea: what does not change from call to call is done once, when a weight is packed (`int4_planes.pack_planes` for the
codes, `prepare` for scales and zero points); a call checks shapes, takes a configuration and launches one kernel. With
w_hat[n, k] = (code - zero_point) scale and codes in 0..15; symmetric codes -8..7 are stored 8 higher, and 8 is then
every zero point.

What is summed up is exact up to float32: fp16 and bf16 hold code - zero_point exactly, tensor cores multiply such
numbers without rounding, and the scale multiplies sums in float32. `naive` alone rounds w_hat to x's dtype.

Under TRITON_INTERPRET=1, set before triton is first imported, the kernels run on the CPU, slowly: for tests and lessons.

How it differs from its neighbours: ``triton_int4.py`` holds the kernels, and is loaded by the first product;
``triton_int4_configs.py`` says how they are cut. This file imports no triton.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from jaxtyping import Float, Int32, Shaped, UInt8
from torch import Tensor

from qcourse.kernels.int4_planes import BLOCK, row_words
from qcourse.kernels.triton_int4_configs import Config, choose

VERSIONS = ("naive", "planes", "tuned")
SLOTS, COUNTERS = 32, 4096  # streams with counters of their own, and tiles of a product that may be split

_counters: dict[torch.device, Tensor] = {}
_slots: dict[tuple[torch.device, int], int] = {}


@functools.cache
def available() -> str | None:
    """None where the kernels can run, else why they cannot, in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0"
    return None


def interpreted() -> bool:
    """Whether triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def takes(group_size: int, inputs: int) -> bool:
    """Whether the kernels take such groups: 32, 64, multiples of 128 that divide K, or the whole row.

    >>> takes(128, 4096), takes(48, 96), takes(77, 77), takes(64, 96)
    (True, False, True, False)
    """
    return group_size == inputs or ((group_size in (32, 64) or group_size % BLOCK == 0) and inputs % group_size == 0)


def prepare(
    scale: Shaped[Tensor, "N groups"], zero_point: Shaped[Tensor, "N groups"] | None = None, *, group_size: int
) -> tuple[Shaped[Tensor, "rows N"], UInt8[Tensor, "rows N"] | None]:
    """Scales and zero points as the kernels read them: a row a group, filled up with 0 to whole blocks of 128.

    Args:
        scale: (N, K / G), in fp16, bf16 or fp32, whose dtype is kept.
        zero_point: (N, K / G) whole codes in 0..15; None where each is 8.
        group_size: G.

    >>> scale, zero_point = prepare(torch.ones(5, 3), torch.full((5, 3), 8), group_size=64)
    >>> scale.shape, zero_point.dtype
    (torch.Size([4, 5]), torch.uint8)
    """
    fill = (0, 0, 0, -scale.shape[1] % _groups(group_size)[0])
    rows = torch.nn.functional.pad(scale.T, fill).contiguous()
    if zero_point is None:
        return rows, None
    return rows, torch.nn.functional.pad(zero_point.T.to(torch.uint8), fill).contiguous()


def int4_mm(
    x: Float[Tensor, "M K"],
    words: Int32[Tensor, "N words"],
    scale: Shaped[Tensor, "rows N"],
    zero_point: UInt8[Tensor, "rows N"] | None = None,
    *,
    group_size: int,
    version: str = "tuned",
    config: Config | None = None,
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
        zeros = scale if zero_point is None else zero_point  # no zero points: a pointer that is not read
        common = (x, words, scale, zeros, y, M, N, K)
        _LAUNCH[version](_kernels(), common, group_size, config, zero_point is not None)
    return y


def _naive(kernels: ModuleType, common: tuple, group_size: int, config: Config, has_zero: bool) -> None:
    x, words, *_, M, N, _ = common
    block_n, block_m = 64, 16
    kernels.naive[-(-M // block_m), -(-N // block_n)](
        *common, group_size, x.stride(0), words.stride(0), HAS_ZERO=has_zero, BLOCK_N=block_n, BLOCK_M=block_m
    )


def _planes(kernels: ModuleType, common: tuple, group_size: int, config: Config, has_zero: bool) -> None:
    x, words, *_, M, N, K = common
    groups, blocks_a_group = _groups(group_size)
    kernels.planes[-(-M // config.block_m), -(-N // config.block_n)](
        *common, blocks_a_group, x.stride(0), words.stride(0),
        GROUPS=groups, HAS_ZERO=has_zero, EVEN_K=K % BLOCK == 0,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def _tuned(kernels: ModuleType, common: tuple, group_size: int, config: Config, has_zero: bool) -> None:
    x, words, scale, zeros, y, M, N, K = common
    groups, blocks_a_group = _groups(group_size)
    tiles, blocks = (-(-M // config.block_m), -(-N // config.block_n)), -(-K // BLOCK)
    blocks_a_split = -(-blocks // (config.splits if tiles[0] * tiles[1] <= COUNTERS else 1))
    splits = -(-blocks // blocks_a_split)
    sums, arrived = (x.new_empty(splits, M, N, dtype=torch.float32), _zeros(x)) if splits > 1 else (y, words)
    halves = words.view(torch.int16)
    kernels.tuned[*tiles, splits](
        x, halves, scale, zeros, y, sums, arrived, M, N, K, blocks_a_group, x.stride(0), halves.stride(0),
        blocks_a_split, GROUPS=groups, HAS_ZERO=has_zero, EVEN_K=K % BLOCK == 0, SPLIT=splits > 1,
        PACKED=not interpreted() and torch.version.hip is None,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


_LAUNCH = {"naive": _naive, "planes": _planes, "tuned": _tuned}


def _kernels() -> ModuleType:
    from qcourse.kernels import triton_int4

    return triton_int4


def _groups(group_size: int) -> tuple[int, int]:
    """Groups in a block of 128, or 1 and the blocks in a group."""
    return (BLOCK // group_size, 1) if group_size in (32, 64) else (1, -(-group_size // BLOCK))


def _zeros(x: Tensor) -> Tensor:
    """Counters at 0, which every kernel leaves at 0: kept, since setting them each time is a launch of its own.

    Each stream has its own, so that products at one time do not meet. While a graph is captured no memory may be kept,
    so that a product before it (as a warm-up is) has to have made them; else the graph sets them at each replay. Two
    graphs captured on one stream share counters: they are not to be replayed at one time.
    """
    if x.device.type != "cuda":
        return torch.zeros(COUNTERS, dtype=torch.int32)
    if x.device not in _counters and not torch.cuda.is_current_stream_capturing():
        _counters[x.device] = torch.zeros(SLOTS, COUNTERS, dtype=torch.int32, device=x.device)
        torch.cuda.synchronize(x.device)  # other streams may be the next to use them
    stream = x.device, torch.cuda.current_stream(x.device).cuda_stream
    slot = _slots.setdefault(stream, sum(device == x.device for device, _ in _slots))
    if x.device not in _counters or slot >= SLOTS:
        return torch.zeros(COUNTERS, dtype=torch.int32, device=x.device)
    return _counters[x.device][slot]


def _check(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int, version: str
) -> None:
    if version not in VERSIONS:
        raise ValueError(f"version={version!r} must be one of {', '.join(VERSIONS)}")
    allowed = [torch.float16] + [torch.bfloat16] * (not interpreted()) + [torch.float32] * (version == "naive")
    if x.dtype not in allowed:
        raise TypeError(f"x has dtype {x.dtype}; version={version!r} takes {', '.join(map(str, allowed))} here")
    (_, K), N = x.shape, len(words)
    if not takes(group_size, K):
        raise ValueError(f"group_size={group_size} with K={K} must be 32, 64 or a multiple of 128 that divides K, or K")
    groups, blocks_a_group = _groups(group_size)
    blocks = -(-K // BLOCK)
    rows = groups * blocks if groups > 1 else -(-blocks // blocks_a_group)
    for name, tensor, shape in (
        ("words", words, (N, row_words(K))),
        ("scale", scale, (rows, N)),
        ("zero_point", zero_point, (rows, N)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.device != x.device or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} on {tensor.device} must be of shape {shape}, contiguous and on"
                f" {x.device} for x {tuple(x.shape)} and group_size={group_size}"
            )
