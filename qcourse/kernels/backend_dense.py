"""INT4 products by decoding: decode some rows of the weight, multiply them as floats, repeat.

The idea: many tokens share the cost of decoding the weight once. A strip of rows at a time keeps
the decoded floats small: they never take more than a few megabytes (128 on a GPU).

How it differs from ``reference.py``: that decodes and multiplies in float64.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qcourse.kernels import triton_available, triton_int4_launch
from qcourse.kernels.int4_backend import Int4Backend
from qcourse.kernels.int4_weight import ROWS, Int4Weight

STRIP = 2**21  # weights decoded at once on a CPU, about what its caches hold
STRIP_GPU = 2**26
KERNEL_DTYPES = (torch.float16, torch.bfloat16)  # of the decoding kernel


def multiply(x: Float[Tensor, "M K"], w: Int4Weight) -> Float[Tensor, "M N"]:
    """Return x w_hat^T in x's dtype, one strip of outputs at a time."""
    outputs, inputs = w.shape
    weights = STRIP_GPU if x.is_cuda else STRIP
    rows = max(1, weights // inputs // ROWS) * ROWS  # whole blocks of every layout
    y = x.new_empty(len(x), outputs)
    for start in range(0, outputs, rows):
        w_hat = _decoded(w, start, start + rows, x.dtype)  # (rows, in)
        stop = start + len(w_hat)
        y[:, start:stop] = F.linear(x, w_hat)
    return y


def _decoded(w: Int4Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The rows from start to stop as floats, by our decoding kernel where it can run."""
    kernel_takes = w.packed.is_cuda and dtype in KERNEL_DTYPES
    if not kernel_takes or triton_available.unavailable_reason():
        return w.decoded(start, stop, dtype)
    _, inputs = w.shape
    return triton_int4_launch.decode(
        w.packed,
        *w.extras,
        group_size=w.group_size,
        inputs=inputs,
        dtype=dtype,
        start=start,
        stop=stop,
    )


BACKEND = Int4Backend(multiply)
