"""INT4 products on a CPU by torch's own kernel, which decodes codes as it multiplies.

The idea: a product of few tokens is memory-bound, so reading a quarter of the bytes takes a quarter
of the time. Beyond the measured crossover, and for x that is not bfloat16, decoding the weight
first is faster.

How it differs from ``int4_cpu.py``: that calls torch's product; this decides when to use it.
"""

import torch
from torch import Tensor

from qcourse.kernels import backend_dense, int4_cpu
from qcourse.kernels.crossover import crossover
from qcourse.kernels.int4_backend import Int4Backend
from qcourse.kernels.int4_weight import Int4Weight


def multiply(x: Tensor, w: Int4Weight) -> Tensor:
    """Return x w_hat^T in x's dtype."""
    if x.dtype != torch.bfloat16 or not len(x) or len(x) > crossover():
        return backend_dense.multiply(x, w)
    outputs, inputs = w.shape
    group_size = int4_cpu.native_group(w.group_size, inputs)
    return int4_cpu.multiply(x, w.packed, *w.extras, group_size=group_size, outputs=outputs)


def why_not_these(x: Tensor, w: Int4Weight) -> str | None:
    """Return why x and w cannot be multiplied here, or None."""
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if w.layout == "cpu":
        return None
    wrong_layout = f"the weight is packed for layout={w.layout!r}: Int4Weight.repacked('cpu')"
    return int4_cpu.unavailable_reason() or wrong_layout


def is_cpu(device: torch.device) -> bool:
    """Return whether the device is a CPU."""
    return device.type == "cpu"


BACKEND = Int4Backend(multiply, why_not_these, int4_cpu.unavailable_reason, is_cpu)
