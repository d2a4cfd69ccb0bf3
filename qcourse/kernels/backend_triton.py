"""INT4 products on a GPU of NVIDIA or AMD, by our Triton kernel.

The idea: as on a CPU, the kernel reads packed codes while a product is memory-bound; beyond the
crossover of ``triton_int4_configs.py`` the weight is decoded first and multiplied as floats.

How it differs from ``triton_int4_launch.py``: that launches the kernel; this decides when to.
"""

import torch
from torch import Tensor

from qcourse.kernels import backend_dense, triton_available, triton_int4_launch
from qcourse.kernels.int4_backend import Int4Backend
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.kernels.triton_int4_configs import most_kernel_tokens


def multiply(x: Tensor, w: Int4Weight) -> Tensor:
    """Return x w_hat^T in x's dtype."""
    if len(x) > most_kernel_tokens():
        return backend_dense.multiply(x, w)
    return triton_int4_launch.int4_mm(x, w.packed, *w.extras, group_size=w.group_size)


def why_not_these(x: Tensor, w: Int4Weight) -> str | None:
    """Return why x and w cannot be multiplied here, or None."""
    interpreted = triton_available.interpreted()
    if w.layout != "planes":
        return f"the weight is packed for layout={w.layout!r}: Int4Weight.repacked('planes')"
    if x.dtype == torch.float32:
        return "it takes float16 and bfloat16, not float32"
    if interpreted and x.dtype == torch.bfloat16:
        return "triton's interpreter computes bfloat16 wrongly"
    if not interpreted and not x.is_cuda:
        return f"x is on {x.device}, not on a GPU"
    return triton_available.unavailable_reason()


def is_accelerator(device: torch.device) -> bool:
    """Return whether the device is anything but a CPU."""
    return device.type != "cpu"


BACKEND = Int4Backend(multiply, why_not_these, triton_available.unavailable_reason, is_accelerator)
