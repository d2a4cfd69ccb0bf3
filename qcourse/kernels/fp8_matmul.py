"""FP8 by FP8: activations and weights as small floats, multiplied as they are, scaled at the end.

The idea: one scale per token and one per output come out of the sum, y = s_x s_w sum q_x q_w.
Tensor cores multiply FP8 numbers and add the products in float32; the oracle here adds them in
float64. A product of two E4M3 numbers is a multiple of 2^-18 and at most 448^2, so float64 holds
every partial sum of 131,072 of them exactly, in any order. Only the last step, to float32, rounds.

Source: Micikevicius et al., "FP8 formats for deep learning" (2022), section 3.

How it differs from ``int8_matmul.py``: int32 sums are exact; hardware's sums of FP8 are not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.granularity import PerChannel, PerTensor
from qcourse.numerics.minifloat import E4M3, E5M2, FloatFormat, decode
from qcourse.numerics.quantized import QuantizedTensor

DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
BACKENDS = ("exact", "torch")
MULTIPLE = 16  # K and N for torch's product


def fp8_matmul(
    x: QuantizedTensor, w: QuantizedTensor, *, backend: str | None = None
) -> Float[Tensor, "M N"]:
    """Return x w^T of two FP8 matrices, s_x s_w sum q_x q_w, in float32.

    Args:
        x: (M, K) by a FloatQuantizer of E4M3 or E5M2, PerTensor or with one scale per token
            (``PerChannel(0)``).
        w: (N, K), PerTensor or with one scale per output (``PerChannel(0)``).
        backend: "exact" adds in float64; "torch" calls torch._scaled_mm, which adds in float32 or
            less. None takes "torch" on a GPU of compute capability 8.9 or above, else "exact".

    Raises:
        TypeError: x or w is not in FP8.
        ValueError: shapes that do not match, or that "torch" does not take (K and N must be
            multiples of 16); a scale that changes along K; an unknown backend.

    >>> q = FloatQuantizer(E4M3)
    >>> x = q(torch.tensor([[448.0, 1.0]]))
    >>> fp8_matmul(x, q(torch.tensor([[448.0, 2.0], [0.0, -448.0]]))).tolist()
    [[200706.0, -448.0]]
    """
    _check("x", x)
    _check("w", w)
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} must have the same K, their last axis"
        )
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}, or None")
    if backend is None:
        backend = "torch" if _multiplies_fp8(x.codes.device) else "exact"
    return _by_torch(x, w) if backend == "torch" else _exact(x, w)


def _exact(x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
    x_values = decode(x.codes, _format(x)).double()
    w_values = decode(w.codes, _format(w)).double()
    sums = x_values @ w_values.T  # (M, N)
    x_scale = x.scale.double().reshape(-1, 1)
    w_scale = w.scale.double().reshape(1, -1)
    return (sums * x_scale * w_scale).float()


def _by_torch(x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
    tokens, _ = x.shape
    outputs, inputs = w.shape
    if inputs % MULTIPLE or outputs % MULTIPLE:
        raise ValueError(
            "torch's FP8 product needs K and N to be multiples of 16,"
            f" got K={inputs}, N={outputs}; use 'exact'"
        )
    x_codes = _as_float8(x)
    w_codes = _as_float8(w)
    x_scale = x.scale.float()
    w_scale = w.scale.float()
    dtype = torch.float32
    if x.granularity != PerTensor() or w.granularity != PerTensor():
        # One scale per row of x and of w. For such scales a GPU returns bfloat16 only.
        x_scale = x_scale.reshape(-1, 1).expand(tokens, 1).contiguous()
        w_scale = w_scale.reshape(1, -1).expand(1, outputs).contiguous()
        dtype = torch.bfloat16 if x_codes.is_cuda else torch.float32
    y = torch._scaled_mm(x_codes, w_codes.T, scale_a=x_scale, scale_b=w_scale, out_dtype=dtype)
    return y.float()


def _multiplies_fp8(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _as_float8(q: QuantizedTensor) -> Tensor:
    """The bytes of the codes as torch's FP8 numbers."""
    dtype = DTYPES[_format(q)]
    return q.codes.contiguous().view(dtype)


def _format(q: QuantizedTensor) -> FloatFormat:
    return q.quantizer.format  # type: ignore[attr-defined]


def _check(name: str, q: QuantizedTensor) -> None:
    if not isinstance(q.quantizer, FloatQuantizer) or q.quantizer.format not in DTYPES:
        raise TypeError(
            f"{name} is in {q.quantizer}; FP8 is FloatQuantizer(E4M3, ...) or (E5M2, ...)"
        )
    if q.granularity not in (PerTensor(), PerChannel(0)):
        raise ValueError(
            f"{name} has the granularity {q.granularity}: a scale that changes along K does not"
            " come out of the sum; use PerTensor() or PerChannel(0)"
        )
    if q.codes.ndim != 2:
        raise ValueError(f"{name} of shape {tuple(q.shape)} must be a matrix")
