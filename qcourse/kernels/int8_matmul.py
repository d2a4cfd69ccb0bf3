"""W8A8: activations and weights both as 8-bit codes, multiplied as integers, put right by their scales at the end.

The idea: with x = s_x (q_x - z_x) for each token and w = s_w (q_w - z_w) for each output, a dot product is

    y = s_x s_w (sum q_x q_w - z_x sum q_w - z_w sum q_x + K z_x z_w)

The first sum is one of bytes in an int32, which hardware does several times as fast as one of floats. The others are
sums of a row, and nothing where zero points are 0. A scale comes out of the sum only if it does not change along it: so
one a tensor or one a row (a token of x, an output of w), never one an input channel.

An int32 holds |q_x| |q_w| K up to 2^31 - 1: with codes in [-127, 127] that is K = 133,144; beyond it a sum would wrap.

Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
(CVPR 2018), sections 2.2 and 2.3.

How it differs from ``methods``: there codes are chosen, here they are multiplied.
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
    """sum_k x[m, k] w[n, k], exactly, in int32.

    Args:
        x: codes (M, K), int8 or uint8.
        w: codes (N, K), int8 or uint8.

    Returns:
        The sums (M, N).

    Raises:
        TypeError: x or w holds no bytes.
        ValueError: x or w is no matrix, or empty, or the two differ in K; K so large that a sum of such codes could
            leave int32.

    >>> x, w = torch.tensor([[[100, -128]], [[127, 127]]], dtype=torch.int8)
    >>> int8_matmul(x, w).tolist()
    [[-3556]]
    """
    _check_codes(x, w)
    # The product of the hardware takes int8 alone: a uint8 code is 128 more than an int8 one.
    moved = [128 if codes.dtype == torch.uint8 else 0 for codes in (x, w)]
    a, b = (codes ^ 128 if shift else codes for codes, shift in zip((x, w), moved, strict=True))
    y = _product(a.view(torch.int8), b.view(torch.int8))
    return _with_zero_points(y, a.view(torch.int8), b.view(torch.int8), -moved[0], -moved[1])


def quantized_matmul(x: QuantizedTensor, w: QuantizedTensor) -> Float[Tensor, "M N"]:
    """x w^T of two quantized matrices, by one integer product: s_x s_w (sum (q_x - z_x)(q_w - z_w)).

    Args:
        x: (M, K), with one scale or one a token (``PerChannel(0)``).
        w: (N, K), with one scale or one an output (``PerChannel(0)``).

    Returns:
        The product in float32, or float64 where a scale is; up to its rounding what dequantizing first would give.

    Raises:
        TypeError, ValueError: as `int8_matmul`; a scale that changes along K.

    >>> from qcourse import PerChannel, quantize
    >>> x, w = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    >>> y = quantized_matmul(quantize(x, 8), quantize(w, 8, granularity=PerChannel(0)))
    >>> [round(value, 2) for value in y[0].tolist()]
    [-1.5, 1.01]
    """
    for name, q in (("x", x), ("w", w)):
        if q.granularity not in (PerTensor(), PerChannel(0)):
            raise ValueError(
                f"{name} has the granularity {q.granularity}: a scale that changes along K does not come out of the"
                " sum; use PerTensor() or PerChannel(0)"
            )
    sums = int8_matmul(x.codes, w.codes)
    zero_x, zero_w = (q.zero_point.long().reshape(-1, 1) for q in (x, w))
    exact = _with_zero_points(sums.long(), x.codes, w.codes, zero_x, zero_w.T)
    dtype = torch.promote_types(torch.promote_types(x.scale.dtype, w.scale.dtype), torch.float32)
    return exact.to(dtype) * x.scale.to(dtype).reshape(-1, 1) * w.scale.to(dtype).reshape(1, -1)


def _with_zero_points(
    sums: Tensor, x: Tensor, w: Tensor, zero_x: int | Tensor, zero_w: int | Tensor
) -> Tensor:
    """sum (x - zero_x)(w - zero_w), given the sums of x w; in their dtype."""
    if isinstance(zero_x, int) and zero_x == zero_w == 0:
        return sums
    of_x, of_w = x.sum(dim=1, dtype=sums.dtype)[:, None], w.sum(dim=1, dtype=sums.dtype)[None]
    return sums - zero_x * of_w - zero_w * of_x + x.shape[1] * zero_x * zero_w


def _product(x: Tensor, w: Tensor) -> Tensor:
    """int8 by int8 in int32, by torch's product of bytes where it is exact."""
    if _sums_are_exact(x.device.type):
        try:
            return torch._int_mm(x.contiguous(), w.contiguous().T)
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
        ):  # an old torch, or a shape that the device refuses
            pass
    return _product_of_floats(x, w)


@cache
def _sums_are_exact(device: str) -> bool:
    """Whether torch's product of bytes sums in int32 on this device, found out on the largest codes.

    On a processor without VNNI (AVX2, the first ones with AVX-512) oneDNN multiplies by instructions that add two
    products in int16. 2 x 127 x 127 fits, but oneDNN makes one factor unsigned first, and 2 x 255 x 127 is cut off.
    """
    codes = torch.full((32, 64), 127, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(codes, codes.T) == 64 * 127**2).all())
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _product_of_floats(x: Tensor, w: Tensor) -> Tensor:
    """The same by float32, which holds every whole number up to 2^24: as many products at a time as stay below."""
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for part_x, part_w in zip(x.split(EXACT_K, dim=1), w.split(EXACT_K, dim=1), strict=True):
        total += (part_x.float() @ part_w.float().T).int()
    return total


def _check_codes(x: Tensor, w: Tensor) -> None:
    for name, codes in (("x", x), ("w", w)):
        if codes.dtype not in (torch.int8, torch.uint8):
            raise TypeError(f"{name} has dtype {codes.dtype}; codes are int8 or uint8")
        if codes.ndim != 2 or not codes.numel():
            raise ValueError(
                f"{name} of shape {tuple(codes.shape)} must be a matrix with at least one code"
            )
    if x.shape[1] != w.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} must have the same K, their last axis"
        )
    largest = [
        max(-int(codes.min()), int(codes.max()), 128 * (codes.dtype == torch.uint8))
        for codes in (x, w)
    ]
    limit = INT32_MAX // max(1, largest[0] * largest[1])
    if x.shape[1] > limit:
        raise ValueError(
            f"K={x.shape[1]} is too long for int32: codes up to {largest[0]} and {largest[1]} allow {limit:,}; split K"
        )
