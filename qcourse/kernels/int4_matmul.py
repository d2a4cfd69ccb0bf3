"""x w^T where w is stored in 4 bits: one function, several backends.

The idea: a product of few tokens is memory-bound. A quarter of the bytes takes a quarter of the
time, if a kernel decodes packed codes while it waits for memory. A product of many tokens is
compute-bound, and decoding a strip of the weight once is faster. The crossover is measured, on a
CPU by ``crossover.py`` and on a GPU by ``benchmarks/tune_int4.py``.

How it differs from ``int8_matmul.py``: there both sides are codes; here x is floats.
"""

import warnings
from functools import cache

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.kernels import backend_cpu, backend_dense, backend_triton, reference
from qcourse.kernels.int4_backend import Int4Backend
from qcourse.kernels.int4_weight import Int4Weight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

BACKENDS: dict[str, Int4Backend] = {
    "triton": backend_triton.BACKEND,  # our kernel on a GPU
    "cpu": backend_cpu.BACKEND,  # torch's kernel on a CPU, for bfloat16
    "dense": backend_dense.BACKEND,  # decode a strip, multiply it in x's dtype; on any device
    "reference": reference.BACKEND,  # float64 throughout, to test the others; on any device
}


def int4_matmul(
    x: Shaped[Tensor, "..."], w: Int4Weight, backend: str | None = None
) -> Shaped[Tensor, "..."]:
    """Return x w_hat^T with w_hat = (code - zero_point) scale, decoded on the way.

    Args:
        x: (..., in), float16, bfloat16 or float32, on w's device.
        w: (out, in).
        backend: "triton", "cpu", "dense" or "reference". None takes the fastest one, and warns once
            if a GPU's kernel is unavailable.

    Returns:
        (..., out) in x's dtype, the same bits at each call. NaN or infinity stays in its own row.

    Raises:
        TypeError, ValueError: x, w or backend is not as above, or x and w do not match.
        RuntimeError: the backend cannot run here, or not on this x.

    >>> from qcourse import PerGroup, quantize
    >>> w = torch.tensor([[7.0, -7.0] + 30 * [0.0]])
    >>> w4 = Int4Weight.from_quantized(quantize(w, 4, granularity=PerGroup(32)))
    >>> int4_matmul(torch.eye(2, 32), w4).tolist()
    [[7.0], [-7.0]]
    """
    _check_operands(x, w)
    tokens = x.reshape(-1, x.shape[-1])  # (tokens, in)
    name = backend or _fastest(tokens, w)
    if name not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    reason = BACKENDS[name].why_not_these(tokens, w)
    if reason:
        raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
    y = BACKENDS[name].multiply(tokens, w)
    outputs, _ = w.shape
    return y.reshape(*x.shape[:-1], outputs)  # (..., out)


def int4_unavailable_reason(backend: str) -> str | None:
    """Say why a backend of ``int4_matmul`` cannot run on this machine; None where it can.

    Raises:
        ValueError: an unknown backend.

    >>> int4_unavailable_reason("reference") is None
    True
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    return BACKENDS[backend].why_not_here()


def _fastest(x: Tensor, w: Int4Weight) -> str:
    """The name of the device's own backend, or "dense" where that cannot run."""
    for name, backend in BACKENDS.items():
        if not backend.is_first_choice_on(x.device):
            continue
        reason = backend.why_not_these(x, w)
        if reason is None:
            return name
        # On a CPU, and for float32, decoding first is the normal way and needs no warning.
        if x.device.type != "cpu" and x.dtype != torch.float32:
            _warn_once(reason)
    return "dense"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"no INT4 kernel on this GPU ({reason}): weights are decoded before each product",
        stacklevel=4,
    )


def _check_operands(x: Tensor, w: Int4Weight) -> None:
    if not isinstance(w, Int4Weight):
        raise TypeError(f"w={type(w).__name__} must be an Int4Weight: Int4Weight.from_quantized(q)")
    if not isinstance(x, Tensor):
        raise TypeError(f"x of {type(x).__name__} must be float16, bfloat16 or float32")
    if x.dtype not in DTYPES:
        raise TypeError(f"x of {x.dtype} must be float16, bfloat16 or float32")
    if not x.ndim or x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {w.shape} must have the same inputs, their last axis"
        )
    if x.device != w.packed.device:
        raise ValueError(f"x is on {x.device}, w on {w.packed.device}: Int4Weight.to moves it")
