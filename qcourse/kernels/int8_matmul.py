"""W8A8: activations and weights as 8-bit codes, multiplied as integers, scaled at the end.

The idea: with x = s_x (q_x - z_x) per token and w = s_w (q_w - z_w) per output, a dot product is

    y = s_x s_w (sum q_x q_w - z_x sum q_w - z_w sum q_x + K z_x z_w)

The first sum is one of bytes in int32, which hardware computes several times as fast as floats. The
others vanish where zero points are 0. A scale comes out of the sum only if it does not change along
it: one per tensor or per row, but not one per input channel. An int32 holds |q_x| |q_w| K up to
2^31 - 1: for codes in [-127, 127] that is K = 133,144.

Source: Jacob et al., "Quantization and training of neural networks..." (CVPR 2018), section 2.

How it differs from ``methods``: those choose codes; this multiplies them.
"""

from functools import cache

import torch
from jaxtyping import Float, Int32, Shaped
from torch import Tensor

from qcourse.numerics.granularity import PerChannel, PerTensor
from qcourse.numerics.quantized import QuantizedTensor

INT32_MAX = 2**31 - 1
EXACT_K = 2**24 // 128**2  # products of int8 codes whose sum float32 holds exactly


def int8_matmul(x: Shaped[Tensor, "..."], w: Shaped[Tensor, "..."]) -> Int32[Tensor, "M N"]:
    """Return sum_k x[m, k] w[n, k], exactly, in int32.

    Args:
        x: codes (M, K), int8 or uint8.
        w: codes (N, K), int8 or uint8.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not match, or K so large that a sum could exceed int32.

    >>> x, w = torch.tensor([[[100, -128]], [[127, 127]]], dtype=torch.int8)
    >>> int8_matmul(x, w).tolist()
    [[-3556]]
    """
    _check_codes("x", x)
    _check_codes("w", w)
    _check_inputs(x, w)
    # The hardware's product takes int8 only: (x - 128) fits, and 128 becomes a zero point.
    x_int8, x_zero = _as_int8(x)
    w_int8, w_zero = _as_int8(w)
    sums = _product(x_int8, w_int8)
    if x_zero == w_zero == 0:
        return sums
    return _with_zero_points(sums, x_int8, w_int8, x_zero, w_zero)


def quantized_matmul(x: QuantizedTensor, w: QuantizedTensor) -> Float[Tensor, "M N"]:
    """Return x w^T by one integer product, s_x s_w (sum (q_x - z_x)(q_w - z_w)).

    Args:
        x: (M, K), PerTensor or with one scale per token (``PerChannel(0)``).
        w: (N, K), PerTensor or with one scale per output (``PerChannel(0)``).

    Returns:
        The product in float32, or float64 where a scale is.

    Raises:
        TypeError, ValueError: as `int8_matmul`; a scale that changes along K.

    >>> from qcourse import quantize
    >>> x = quantize(torch.tensor([[0.5, 2.0]]), 8)
    >>> w = quantize(torch.tensor([[1.0, -1.0], [2.0, 0.0]]), 8, granularity=PerChannel(0))
    >>> [round(value, 2) for value in quantized_matmul(x, w)[0].tolist()]
    [-1.5, 1.01]
    """
    _check_granularity("x", x)
    _check_granularity("w", w)
    sums = int8_matmul(x.codes, w.codes).long()
    # Corrected sums can exceed int32, so they are int64.
    x_zero = x.zero_point.long().reshape(-1, 1)
    w_zero = w.zero_point.long().reshape(1, -1)
    exact = _with_zero_points(sums, x.codes, w.codes, x_zero, w_zero)
    scale_dtype = torch.promote_types(x.scale.dtype, w.scale.dtype)
    dtype = torch.promote_types(scale_dtype, torch.float32)
    x_scale = x.scale.to(dtype).reshape(-1, 1)
    w_scale = w.scale.to(dtype).reshape(1, -1)
    return exact.to(dtype) * x_scale * w_scale


def _as_int8(codes: Tensor) -> tuple[Tensor, int]:
    """int8 codes, and the code among them that stands for 0."""
    if codes.dtype == torch.int8:
        return codes, 0
    # Flipping the top bit of a byte subtracts 128 and makes it signed.
    return (codes ^ 128).view(torch.int8), -128


def _with_zero_points(
    sums: Tensor, x: Tensor, w: Tensor, x_zero: int | Tensor, w_zero: int | Tensor
) -> Tensor:
    """sum (x - x_zero)(w - w_zero), given the sums of x w; in their dtype."""
    x_sums = x.sum(dim=1, dtype=sums.dtype)[:, None]  # (M, 1)
    w_sums = w.sum(dim=1, dtype=sums.dtype)[None]  # (1, N)
    inputs = x.shape[1]
    corrected = sums - x_zero * w_sums - w_zero * x_sums
    return corrected + inputs * x_zero * w_zero


def _product(x: Tensor, w: Tensor) -> Tensor:
    """int8 by int8 in int32, by torch's product of bytes where it is exact."""
    if _sums_are_exact(x.device.type):
        try:
            return torch._int_mm(x.contiguous(), w.contiguous().T)
        except (AttributeError, NotImplementedError, RuntimeError):
            pass  # an old torch, or a shape that the device refuses
    return _product_of_floats(x, w)


@cache
def _sums_are_exact(device: str) -> bool:
    """Whether torch's product of bytes sums in int32 on this device, tested on large codes."""
    # On a processor without VNNI (AVX2, the first with AVX-512) oneDNN adds two products in int16.
    # 2 x 127 x 127 fits, but oneDNN first makes one factor unsigned, and 2 x 255 x 127 saturates.
    codes = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    try:
        sums = torch._int_mm(codes, codes.T)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return bool((sums == 64 * 127**2).all())


def _product_of_floats(x: Tensor, w: Tensor) -> Tensor:
    """int8 by int8 in int32, by products of floats."""
    # float32 holds every integer up to 2^24, so add up as many inputs at a time as stay below.
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    x_parts = x.split(EXACT_K, dim=1)
    w_parts = w.split(EXACT_K, dim=1)
    for x_part, w_part in zip(x_parts, w_parts, strict=True):
        total += (x_part.float() @ w_part.float().T).int()
    return total


def _check_granularity(name: str, q: QuantizedTensor) -> None:
    if q.granularity not in (PerTensor(), PerChannel(0)):
        raise ValueError(
            f"{name} has the granularity {q.granularity}: a scale that changes along K does not"
            " come out of the sum; use PerTensor() or PerChannel(0)"
        )


def _check_codes(name: str, codes: Tensor) -> None:
    if codes.dtype not in (torch.int8, torch.uint8):
        raise TypeError(f"{name} has dtype {codes.dtype}; codes are int8 or uint8")
    if codes.ndim != 2 or not codes.numel():
        raise ValueError(
            f"{name} of shape {tuple(codes.shape)} must be a matrix with at least one code"
        )


def _check_inputs(x: Tensor, w: Tensor) -> None:
    inputs = x.shape[1]
    if inputs != w.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} must have the same K, their last axis"
        )
    x_largest = _largest(x)
    w_largest = _largest(w)
    limit = INT32_MAX // max(1, x_largest * w_largest)
    if inputs > limit:
        raise ValueError(
            f"K={inputs} is too long for int32: codes up to {x_largest} and {w_largest} allow"
            f" {limit:,}; split K"
        )


def _largest(codes: Tensor) -> int:
    """The largest magnitude in the product; 128 at least for uint8, which is computed as int8."""
    at_least = 128 if codes.dtype == torch.uint8 else 0
    return max(-int(codes.min()), int(codes.max()), at_least)
