"""The exact oracle of INT4 products: float64 throughout, rounded once.

The idea: the result of every kernel must be that of decoding the weight and multiplying. This does
both in float64 and rounds to x's dtype at the end. Every backend is tested against it.

How it differs from ``backend_dense.py``: that computes in x's dtype, as a model would.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.kernels.int4_backend import Int4Backend
from qcourse.kernels.int4_weight import Int4Weight


def multiply(x: Float[Tensor, "M K"], w: Int4Weight) -> Float[Tensor, "M N"]:
    """Return x w_hat^T computed in float64, rounded to x's dtype."""
    outputs, _ = w.shape
    w_hat = w.decoded(0, outputs, torch.float64)
    return (x.double() @ w_hat.T).to(x.dtype)


BACKEND = Int4Backend(multiply)
