"""Encode numbers as small floats: round to nearest, or at random so that the mean is right.

The idea: codes of one sign are in the order of their values, so a code counts the numbers below its
own: the steps within its power of two, and all steps of the smaller powers of two.
How it differs from `affine.py`: all steps there are equal; here they grow with the number.
"""

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor

from qcourse.numerics.chunks import CHUNK, wide
from qcourse.numerics.minifloat import FloatFormat
from qcourse.numerics.validation import check_floating

# For each float dtype: the integers of its size, its mantissa bits, its bias.
_FIELDS = {
    torch.float32: (torch.int32, 23, 127),
    torch.float64: (torch.int64, 52, 1023),
}


def encode(
    x: Shaped[Tensor, "*shape"],
    format: FloatFormat,
    *,
    saturate: bool = True,
    stochastic: torch.Generator | None = None,
) -> UInt8[Tensor, "*shape"]:
    """Return the code of the number nearest to x; a tie goes to the even code.

    Args:
        saturate: False: values beyond the largest number become infinity if the format has it, or
            else NaN. Libraries differ in this.
        stochastic: rounds up or down at random so that the mean is x.

    >>> from qcourse.numerics.minifloat import E4M3
    >>> encode(torch.tensor([1.0, -0.3, 1000.0]), E4M3).tolist()
    [56, 170, 126]
    >>> encode(torch.tensor([1000.0]), E4M3, saturate=False).tolist()  # NaN
    [127]
    """
    check_floating(x)
    flat = x.detach().reshape(-1)
    flat = _wide_enough(flat.to(wide(x.dtype)), format)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    for part, codes_part in zip(flat.split(CHUNK), codes.split(CHUNK), strict=True):
        _check_codes_exist(part, format)
        codes_part.copy_(_encode_part(part, format, saturate, stochastic))
    return codes.reshape(x.shape)


def encode_finite(x: Float[Tensor, "*shape"], format: FloatFormat) -> Integer[Tensor, "*shape"]:
    """Return what `encode` does for finite float32 or float64, without its checks."""
    x = _wide_enough(x, format)
    codes = _count(x.abs(), format, None)
    codes.clamp_(max=format.max_code)
    return _with_sign(codes, x, format)


def _encode_part(
    x: Tensor, format: FloatFormat, saturate: bool, stochastic: torch.Generator | None
) -> Tensor:
    codes = _count(x.abs().nan_to_num_(0, posinf=torch.inf), format, stochastic)
    if not saturate and format.specials == "none":
        _check_within(codes, format)
    # The code after the largest number is infinity, or else NaN.
    codes.clamp_(max=format.max_code + (not saturate))
    if format.specials != "none":
        all_ones = (1 << format.exponent_bits + format.mantissa_bits) - 1
        codes.masked_fill_(x.isnan(), all_ones)
    return _with_sign(codes, x, format)


def _wide_enough(x: Tensor, format: FloatFormat) -> Tensor:
    # float32 would have to count steps below its own normal numbers.
    smallest_step = 2.0 ** (format.signed - format.bias - format.mantissa_bits)
    if smallest_step < torch.finfo(torch.float32).tiny:
        return x.double()
    return x


def _count(size: Tensor, format: FloatFormat, stochastic: torch.Generator | None) -> Tensor:
    """Return the codes of `size` as if there were no largest code; overwrites `size`."""
    integers, mantissa_bits, bias = _FIELDS[size.dtype]
    # Twice the largest number is beyond it as well, and unlike infinity it has an exponent.
    size.clamp_(max=2 * format.max)

    # The step is a power of two, so its bits are an exponent with an empty mantissa.
    # Below the smallest normal number steps no longer shrink.
    lowest = format.signed - format.bias + bias
    exponent = size.view(integers) >> mantissa_bits
    exponent.clamp_(min=lowest)
    step = (exponent - format.mantissa_bits) << mantissa_bits
    steps = size.div_(step.view(size.dtype))
    if stochastic is None:
        steps.round_()
    else:
        chance = torch.rand(
            steps.shape, dtype=steps.dtype, device=steps.device, generator=stochastic
        )
        steps.add_(chance).floor_()

    # 2^M steps lead from one power of two to the next. Steps that were rounded up to the next
    # power of two give the right sum, too.
    codes = exponent.sub_(lowest) << format.mantissa_bits
    codes.add_(steps.to(integers))
    # Without a sign there is no 0 to count from; smaller values become the smallest number.
    return codes if format.signed else codes.sub_(1).clamp_(min=0)


def _with_sign(codes: Tensor, x: Tensor, format: FloatFormat) -> Tensor:
    if not format.signed:
        return codes
    return codes.add_(x.signbit(), alpha=1 << format.bits - 1)


def _check_codes_exist(x: Tensor, format: FloatFormat) -> None:
    if format.specials == "none" and x.isnan().any():
        raise ValueError(f"x has {int(x.isnan().sum())} NaN, for which {format} has no code")
    if not format.signed and (x < 0).any():
        raise ValueError(f"x has {int((x < 0).sum())} negative values; {format} has no sign")


def _check_within(codes: Tensor, format: FloatFormat) -> None:
    beyond = codes > format.max_code
    if beyond.any():
        raise ValueError(
            f"x has {int(beyond.sum())} values beyond {format.max:g},"
            f" for which {format} has no code; use saturate=True"
        )
