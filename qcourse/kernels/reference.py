"""The exact oracle of INT4 products, and the plain way: decode the weight, then multiply.

The idea: whatever a kernel does with nibbles and registers, its answer is that of decoding the weight and multiplying.
`exact` does that in float64 and rounds once, at the end; every backend is held against it. `dense` does it in x's own
dtype, some outputs at a time, so that no more than a strip of the weight ever exists as floats: beyond some tens of
tokens, where decoding is shared by many products, it is the faster way too.

How it differs from the kernels: it knows nothing of how codes are packed.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qcourse.kernels import triton_int4_launch
from qcourse.kernels.int4_weight import Int4Weight

STRIP = 2**21  # weights decoded at once on a CPU, about what its caches hold; a GPU takes more
STRIP_GPU = 2**26


def exact(x: Float[Tensor, "M K"], w: Int4Weight) -> Float[Tensor, "M N"]:
    """x w_hat^T with float64 throughout, rounded to x's dtype at the end."""
    w_hat = torch.cat([strip for _, strip in _strips(w, torch.float64, STRIP)])
    return (x.double() @ w_hat.T).to(x.dtype)


def dense(x: Float[Tensor, "M K"], w: Int4Weight) -> Float[Tensor, "M N"]:
    """x w_hat^T in x's dtype, a strip of outputs at a time."""
    y = x.new_empty(len(x), w.shape[0])
    for start, strip in _strips(w, x.dtype, STRIP_GPU if x.is_cuda else STRIP):
        y[:, start : start + len(strip)] = F.linear(x, strip)
    return y


def _strips(w: Int4Weight, dtype: torch.dtype, weights: int) -> Iterator[tuple[int, Tensor]]:
    outputs, inputs = w.shape
    size = max(1, weights // inputs // 64) * 64  # whole blocks of every layout
    decoded = (
        _decoded_by_kernel
        if w.packed.is_cuda and not triton_int4_launch.unavailable_reason()
        else Int4Weight.decoded
    )
    return ((start, decoded(w, start, start + size, dtype)) for start in range(0, outputs, size))


def _decoded_by_kernel(w: Int4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    if dtype not in (torch.float16, torch.bfloat16):
        return w.decoded(start, stop, dtype)
    options = {
        "group_size": w.group_size,
        "inputs": w.shape[1],
        "dtype": dtype,
        "start": start,
        "stop": stop,
    }
    return triton_int4_launch.decode(w.packed, *w.extras, **options)  # type: ignore[arg-type]
