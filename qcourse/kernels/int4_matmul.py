"""x w^T where w is held in 4 bits: one function, and who computes it.

The idea: a product of few tokens waits for the weights to arrive, so a quarter of the bytes is a quarter of the time,
if decoding hides behind the reading: that takes a kernel that reads packed codes. A product of many waits for the
multipliers, and then it is faster to decode a strip of the weight once and multiply it as floats. `crossover.py` tells
where the two cross on a CPU, the kernel's table of configurations on a GPU.

The backends:

    triton      our kernel on a GPU of NVIDIA or AMD; past the crossover dense
    cpu         torch's INT4 product where x is bfloat16; past the crossover, and for other dtypes, dense
    dense       decode a strip, multiply it in x's dtype; anywhere
    reference   float64 throughout, to hold the others against; anywhere

Source: the crossover is one of the published figures of INT4 kernels too (gemlite's plots, for batches up to 256).

How it differs from ``int8_matmul.py``: there both sides are codes and the sum is one of integers; here x is floats.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.kernels import int4_cpu, triton_int4_configs, triton_int4_launch
from qcourse.kernels.crossover import crossover
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.kernels.reference import dense, exact

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def int4_matmul(
    x: Shaped[Tensor, "..."], w: Int4Weight, backend: str | None = None
) -> Shaped[Tensor, "..."]:
    """x w_hat^T, with w_hat = (code - zero_point) scale decoded on the way.

    Args:
        x: (..., in), float16, bfloat16 or float32, on w's device; no tokens at all give no outputs.
        w: (out, in).
        backend: "triton", "cpu", "dense", "reference"; None takes the fastest that the device, x's dtype and the number
            of tokens allow, and warns, once, where a GPU's kernel is missing.

    Returns:
        (..., out) in x's dtype, the same bits at each call. NaN or infinity in a token of x stays in its own row.

    Raises:
        TypeError: x is not of these dtypes; w is no Int4Weight.
        ValueError: x and w differ in inputs or device; an unknown backend.
        RuntimeError: the backend asked for cannot run here, or not on this x: the message says why.

    >>> from qcourse import PerGroup, quantize
    >>> w = torch.tensor([[7.0, -7.0] + 30 * [0.0]])
    >>> w4 = Int4Weight.from_quantized(quantize(w, 4, granularity=PerGroup(32)))
    >>> int4_matmul(torch.ones(2, 32) * torch.tensor([[1.0], [2.0]]) + torch.eye(2, 32), w4).tolist()
    [[7.0], [-7.0]]
    """
    _check(x, w)
    tokens = x.reshape(-1, x.shape[-1])  # (tokens, in)
    name = backend or _fastest(tokens, w)
    if name not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    run, reason = BACKENDS[name]
    if why_not := reason(tokens, w):
        raise RuntimeError(f"backend={name!r} cannot run here: {why_not}")
    return run(tokens, w).reshape(*x.shape[:-1], w.shape[0])  # (..., out)


def int4_unavailable_reason(backend: str) -> str | None:
    """Say why a backend of ``int4_matmul`` cannot run on this machine; None where it can.

    Raises:
        ValueError: an unknown backend.

    >>> int4_unavailable_reason("reference") is None
    True
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    modules = {"triton": triton_int4_launch, "cpu": int4_cpu}
    return modules[backend].unavailable_reason() if backend in modules else None


def _triton(x: Tensor, w: Int4Weight) -> Tensor:
    if len(x) > triton_int4_configs.crossover():
        return dense(x, w)
    scale, *zero = w.extras
    return triton_int4_launch.int4_mm(x, w.packed, scale, *zero, group_size=w.group_size)


def _no_triton(x: Tensor, w: Int4Weight) -> str | None:
    if w.layout != "planes":
        return f"the weight is packed for layout={w.layout!r}: Int4Weight.repacked('planes')"
    if x.dtype == torch.float32:
        return "it takes float16 and bfloat16, not float32"
    if triton_int4_launch.interpreted() and x.dtype == torch.bfloat16:
        return "triton's interpreter computes bfloat16 wrongly"
    if not x.is_cuda and not triton_int4_launch.interpreted():
        return f"x is on {x.device}, not on a GPU"
    return triton_int4_launch.unavailable_reason()


def _cpu(x: Tensor, w: Int4Weight) -> Tensor:
    if x.dtype != torch.bfloat16 or not len(x) or len(x) > crossover():
        return dense(x, w)
    size = int4_cpu.native_group(w.group_size, w.shape[1])
    return int4_cpu.multiply(x, w.packed, *w.extras, group_size=size, outputs=w.shape[0])


def _no_cpu(x: Tensor, w: Int4Weight) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if w.layout != "cpu":
        return (
            int4_cpu.unavailable_reason()
            or f"the weight is packed for layout={w.layout!r}: Int4Weight.repacked('cpu')"
        )
    return None


def _always(x: Tensor, w: Int4Weight) -> None:
    return None


BACKENDS: dict[
    str, tuple[Callable[[Tensor, Int4Weight], Tensor], Callable[[Tensor, Int4Weight], str | None]]
] = {
    "triton": (_triton, _no_triton),
    "cpu": (_cpu, _no_cpu),
    "dense": (dense, _always),
    "reference": (exact, _always),
}


def _fastest(x: Tensor, w: Int4Weight) -> str:
    if x.device.type == "cpu":
        return "dense" if _no_cpu(x, w) else "cpu"
    reason = _no_triton(x, w)
    if reason and x.dtype != torch.float32:
        _warn_once(reason)
    return "dense" if reason else "triton"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"no INT4 kernel on this GPU ({reason}): weights are decoded before each product",
        stacklevel=4,
    )


def _check(x: Tensor, w: Int4Weight) -> None:
    if not isinstance(w, Int4Weight):
        raise TypeError(f"w={type(w).__name__} must be an Int4Weight: Int4Weight.from_quantized(q)")
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x of {got} must be float16, bfloat16 or float32")
    if not x.ndim or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {w.shape} must have the same inputs, their last axis"
        )
    if x.device != w.packed.device:
        raise ValueError(f"x is on {x.device}, w on {w.packed.device}: Int4Weight.to moves it")
