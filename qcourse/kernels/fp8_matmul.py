"""FP8 by FP8: activations and weights both as small floats, multiplied as they are, put right by scales at the end.

The idea: as for integers (``int8_matmul.py``), a scale for each token and one for each output come out of the sum, so

    y = s_x s_w sum q_x q_w

and the sum is one of products of FP8 numbers, which tensor cores form from bytes and add up in float32. Here it is done
in float64 first, as an oracle: a product of two E4M3 numbers is a multiple of 2^-18 and at most 448^2, so float64 holds
every partial sum of 131,072 of them exactly, in whatever order. Only the last step, to float32, rounds.

Source: Micikevicius et al., "FP8 formats for deep learning" (2022), section 3; PyTorch's ``torch._scaled_mm``.

How it differs from ``int8_matmul.py``: there sums are exact in int32 by their nature; hardware's sums of FP8 are not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.granularity import PerChannel, PerTensor
from qcourse.numerics.minifloat import E4M3, E5M2, decode
from qcourse.numerics.quantized import QuantizedTensor

DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
BACKENDS = ("exact", "torch")


def fp8_matmul(
    x: QuantizedTensor, w: QuantizedTensor, *, backend: str | None = None
) -> Float[Tensor, "M N"]:
    """x w^T of two matrices in FP8: s_x s_w sum q_x q_w.

    Args:
        x: (M, K) by a FloatQuantizer of E4M3 or E5M2, with one scale or one a token (``PerChannel(0)``).
        w: (N, K), with one scale or one an output (``PerChannel(0)``).
        backend: "exact": products added up in float64. "torch": torch._scaled_mm, as fast as the hardware multiplies
            FP8, which adds up in float32 or less. None takes "torch" on a GPU of compute capability 8.9 or above, and
            "exact" elsewhere.

    Returns:
        The product in float32.

    Raises:
        TypeError: x or w is not in FP8.
        ValueError: x or w is no matrix, or the two differ in K; a scale that changes along K; an unknown backend; for
            "torch", K or N that 16 does not divide.

    >>> from qcourse.numerics.float_quantizer import FloatQuantizer
    >>> q = FloatQuantizer(E4M3)
    >>> fp8_matmul(q(torch.tensor([[448.0, 1.0]])), q(torch.tensor([[448.0, 2.0], [0.0, -448.0]]))).tolist()
    [[200706.0, -448.0]]
    """
    _check(x, w)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend == "torch" or (backend is None and _multiplies_fp8(x.codes.device)):
        return _by_torch(x, w)
    x_values = decode(x.codes, x.quantizer.format).double()  # type: ignore[attr-defined]
    w_values = decode(w.codes, w.quantizer.format).double()  # type: ignore[attr-defined]
    sums = x_values @ w_values.T
    return (sums * x.scale.double().reshape(-1, 1) * w.scale.double().reshape(1, -1)).float()


def _by_torch(x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
    (N, K), M = w.shape, len(x.codes)
    if K % 16 or N % 16:
        raise ValueError(
            f"torch's FP8 product needs K and N to be multiples of 16, got K={K}, N={N}; use 'exact'"
        )
    a, b = (q.codes.contiguous().view(DTYPES[q.quantizer.format]) for q in (x, w))  # type: ignore[attr-defined]
    if x.granularity == w.granularity == PerTensor():
        return torch._scaled_mm(
            a, b.T, scale_a=x.scale.float(), scale_b=w.scale.float(), out_dtype=torch.float32
        )
    by_row = x.scale.float().reshape(-1, 1).expand(M, 1).contiguous()
    by_column = w.scale.float().reshape(1, -1).expand(1, N).contiguous()
    # With scales for rows a GPU writes bfloat16 alone.
    dtype = torch.bfloat16 if a.is_cuda else torch.float32
    return torch._scaled_mm(a, b.T, scale_a=by_row, scale_b=by_column, out_dtype=dtype).float()


def _multiplies_fp8(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def _check(x: QuantizedTensor, w: QuantizedTensor) -> None:
    for name, q in (("x", x), ("w", w)):
        if not isinstance(q.quantizer, FloatQuantizer) or q.quantizer.format not in DTYPES:
            raise TypeError(
                f"{name} is in {q.quantizer}; FP8 is FloatQuantizer(E4M3, ...) or (E5M2, ...)"
            )
        if q.granularity not in (PerTensor(), PerChannel(0)):
            raise ValueError(
                f"{name} has the granularity {q.granularity}: a scale that changes along K does not come out of the"
                " sum; use PerTensor() or PerChannel(0)"
            )
        if q.codes.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(q.shape)} must be a matrix")
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} must have the same K, their last axis"
        )
