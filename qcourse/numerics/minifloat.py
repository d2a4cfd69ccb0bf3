"""Floats of 3 to 8 bits, from the description of their bits alone: FP8, FP6, FP4, and the scale E8M0.

The idea: a float is a sign, an exponent e and a mantissa m of M bits, and stands for

    (-1)^sign * 2^(e - bias) * (1 + m / 2^M)        and, where e = 0, for (-1)^sign * 2^(1 - bias) * m / 2^M

So within a power of two the steps are equal, and from one to the next they double; by the second rule (subnormals) they
shrink no further below the smallest, so that 0 is on the grid. Codes of one sign are in the order of their values: the
code above that of x is the next float, whatever its exponent. That is why rounding is one formula: with the step of x's
own power of two, count steps, and add the steps of all the powers below.

What formats do with the topmost codes differs, and is all that a name such as E4M3 leaves open: see ``FloatFormat``.

Source: Micikevicius et al., "FP8 formats for deep learning" (2022), tables 1 and 2, and the OCP standards OFP8 (2023)
and Microscaling Formats MX 1.0 (2023), section 5.

How it differs from ``affine.py``: steps there are all equal; here they grow with the number, and no scale is needed to
read a code (``FloatQuantizer`` adds one).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Integer, Shaped, UInt8
from torch import Tensor

from qcourse.numerics.chunks import CHUNK, wide
from qcourse.numerics.validation import check_floating

SPECIALS = ("ieee", "nan", "none")
_FIELDS = {
    torch.float32: (torch.int32, 23, 127),
    torch.float64: (torch.int64, 52, 1023),
}  # integers, mantissa, bias


@dataclass(frozen=True)
class FloatFormat:
    """What each bit of a small float is for.

    Args:
        name: as in "E4M3".
        exponent_bits: E, at least 1.
        mantissa_bits: M.
        bias: what the exponent field counts from.
        specials: what the topmost codes are. "ieee": the topmost exponent is infinity (m = 0) and NaN. "nan": only the
            very last code, all ones, is NaN. "none": every code is a number.
        signed: whether there is a sign; without one, e = 0 is an exponent like any other, and there is no 0 (E8M0).

    Raises:
        ValueError: more than 8 bits, or fewer than 3; an exponent without bits; a bias for which float32 does not hold
            every number; "ieee" without a mantissa.

    >>> E4M3.bits, E4M3.max, E4M3.smallest, E4M3.smallest_normal
    (8, 448.0, 0.001953125, 0.015625)
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "none"
    signed: bool = True

    def __post_init__(self) -> None:
        sizes = {
            "exponent_bits": self.exponent_bits,
            "mantissa_bits": self.mantissa_bits,
            "bias": self.bias,
        }
        for name, size in sizes.items():
            if type(size) is not int:
                raise ValueError(f"{name}={size!r} must be a whole number (a Python int)")
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or not 3 <= self.bits <= 8:
            raise ValueError(
                f"{self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits make {self.bits}"
                " with the sign; need 3 to 8 bits, at least one of them for the exponent"
            )
        if self.specials not in SPECIALS:
            raise ValueError(f"specials={self.specials!r} must be 'ieee', 'nan' or 'none'")
        if self.specials == "ieee" and not self.mantissa_bits:
            raise ValueError(
                f"specials='ieee' of {self.name} needs a mantissa bit, to tell NaN from infinity"
            )
        highest = (self.max_code >> self.mantissa_bits) - self.bias
        lowest = self.signed - self.bias - self.mantissa_bits  # of the smallest step
        if highest > 127 or lowest < -149:
            raise ValueError(
                f"bias={self.bias} of {self.name} is too far from 0: float32 does not hold every number"
            )

    @property
    def bits(self) -> int:
        """Bits a code."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of the largest number; what is above it, up to the sign bit, is infinity or NaN."""
        ones = (1 << self.exponent_bits + self.mantissa_bits) - 1
        return {"none": ones, "nan": ones - 1, "ieee": ones - (1 << self.mantissa_bits)}[
            self.specials
        ]

    @property
    def max(self) -> float:
        """The largest number."""
        return float(code_values(self)[self.max_code])

    @property
    def smallest(self) -> float:
        """The smallest number above 0."""
        return float(code_values(self)[int(self.signed)])

    @property
    def smallest_normal(self) -> float:
        """The smallest number with a full mantissa, 2^(1 - bias); without a sign, 2^-bias."""
        return 2.0 ** (self.signed - self.bias)

    def __repr__(self) -> str:
        return self.name


E4M3 = FloatFormat(
    "E4M3", 4, 3, 7, "nan"
)  # FP8 for weights and activations; called E4M3FN elsewhere
E5M2 = FloatFormat("E5M2", 5, 2, 15, "ieee")  # FP8 for gradients
E3M2 = FloatFormat("E3M2", 3, 2, 3)  # FP6
E2M3 = FloatFormat("E2M3", 2, 3, 1)  # FP6
E2M1 = FloatFormat("E2M1", 2, 1, 1)  # FP4
E8M0 = FloatFormat(
    "E8M0", 8, 0, 127, "nan", signed=False
)  # a power of two: the scale of the MX formats


@lru_cache
def code_values(format: FloatFormat) -> Float[Tensor, " codes"]:
    """What each code of a format stands for, 2^bits numbers in float32, which holds all of them; not to be written to.

    >>> code_values(E2M1).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    """
    exponents, mantissas = 1 << format.exponent_bits, 1 << format.mantissa_bits
    e = torch.arange(exponents, dtype=torch.float64)[:, None]
    m = torch.arange(mantissas, dtype=torch.float64) / mantissas
    values = torch.exp2(e - format.bias) * (1 + m)  # (exponents, mantissas)
    if format.signed:
        values[0] = 2.0 ** (1 - format.bias) * m
    values = values.flatten()
    if format.specials != "none":
        values[format.max_code + 1 :] = torch.nan
    if format.specials == "ieee":
        values[format.max_code + 1] = torch.inf
    return (torch.cat([values, -values]) if format.signed else values).float()


def decode(codes: Integer[Tensor, "*shape"], format: FloatFormat) -> Float[Tensor, "*shape"]:
    """The numbers that codes stand for, in float32.

    Raises:
        ValueError: a code outside 0 to 2^bits - 1.

    >>> decode(torch.tensor([0x38, 0x7E, 0x01]), E4M3).tolist()
    [1.0, 448.0, 0.001953125]
    """
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 1 << format.bits:
        raise ValueError(
            f"codes of {format} must be from 0 to {(1 << format.bits) - 1}, got {int(codes.min())} to"
            f" {int(codes.max())}"
        )
    return code_values(format).to(codes.device)[
        codes.long() if codes.numel() < CHUNK else codes.int()
    ]


def encode(
    x: Shaped[Tensor, "*shape"],
    format: FloatFormat,
    *,
    saturate: bool = True,
    stochastic: torch.Generator | None = None,
) -> UInt8[Tensor, "*shape"]:
    """The code of the number nearest to x; of two equally near ones, that with the even code.

    Args:
        x: any floats; NaN is kept, -0 keeps its sign.
        format: what to encode to.
        saturate: True: what lies beyond the largest number, infinity too, becomes the largest. False: what rounds
            beyond it becomes infinity where the format has one, else NaN. Libraries differ in this (torch on a CPU
            saturates E4M3, but not E5M2), so it is for the caller to say.
        stochastic: draws whether to round up or down, with the chance that makes the mean x; None rounds to nearest.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x is empty; x has NaN, or with saturate=False a number too large, that the format has no code for;
            a negative number for a format without a sign.

    >>> encode(torch.tensor([1.0, -0.3, 1000.0]), E4M3).tolist()
    [56, 170, 126]
    >>> encode(torch.tensor([1000.0]), E4M3, saturate=False).tolist(), encode(torch.tensor([2.5, 3.5]), E2M1).tolist()
    ([127], [4, 6])
    """
    check_floating(x)
    flat = _wide_enough(x.detach().to(wide(x.dtype)).reshape(-1), format)
    codes = torch.empty(flat.shape, dtype=torch.uint8, device=x.device)
    for part, out in zip(flat.split(CHUNK), codes.split(CHUNK), strict=True):
        _check_codes_exist(part, format)
        size = _count(part.abs().nan_to_num_(0, posinf=torch.inf), format, stochastic)
        if not saturate and format.specials == "none" and (size > format.max_code).any():
            raise ValueError(
                f"x has {int((size > format.max_code).sum())} values beyond {format.max:g}, for which {format} has no"
                " code; use saturate=True"
            )
        size.clamp_(
            max=format.max_code + (not saturate)
        )  # the code above the largest is infinity, or else NaN
        if format.specials != "none":
            size.masked_fill_(part.isnan(), (1 << format.exponent_bits + format.mantissa_bits) - 1)
        out.copy_(_with_sign(size, part, format))
    return codes.reshape(x.shape)


def encode_finite(x: Float[Tensor, "*shape"], format: FloatFormat) -> Integer[Tensor, "*shape"]:
    """`encode` of finite float32 or float64 that saturates, without a look at x: for quantizers, which have looked."""
    x = _wide_enough(x, format)
    return _with_sign(_count(x.abs(), format, None).clamp_(max=format.max_code), x, format)


def _wide_enough(x: Tensor, format: FloatFormat) -> Tensor:
    """x in float64 where steps of the format are so small that float32 would have to count in subnormals."""
    step = 2.0 ** (format.signed - format.bias - format.mantissa_bits)
    return x.double() if step < torch.finfo(torch.float32).tiny else x


def _count(size: Tensor, format: FloatFormat, stochastic: torch.Generator | None) -> Tensor:
    """How many numbers of the format lie between 0 and size (which is written to): the code, were there no largest."""
    integers, mantissa, bias = _FIELDS[size.dtype]
    size.clamp_(
        max=2 * format.max
    )  # which is beyond it as well, and unlike infinity has an exponent
    lowest = format.signed - format.bias  # below the smallest normal number steps shrink no more
    exponent = (size.view(integers) >> mantissa).clamp_(min=lowest + bias)
    step = (exponent - format.mantissa_bits << mantissa).view(
        size.dtype
    )  # a power of two, written as its bits
    steps = size.div_(step)
    if stochastic is None:
        steps.round_()
    else:
        steps += torch.rand(
            steps.shape, dtype=steps.dtype, device=steps.device, generator=stochastic
        )
        steps.floor_()
    # 2^M steps lead from one power of two to the next: where steps were rounded up to the next, the sum is right too.
    codes = (exponent.sub_(lowest + bias) << format.mantissa_bits).add_(steps.to(integers))
    # Without a sign there is no 0 to count from: what is below the smallest becomes that.
    return codes if format.signed else codes.sub_(1).clamp_(min=0)


def _with_sign(codes: Tensor, x: Tensor, format: FloatFormat) -> Tensor:
    return codes.add_(x.signbit(), alpha=1 << format.bits - 1) if format.signed else codes


def _check_codes_exist(x: Tensor, format: FloatFormat) -> None:
    """Raise ValueError for what a format has no code for."""
    if format.specials == "none" and x.isnan().any():
        raise ValueError(f"x has {int(x.isnan().sum())} NaN, for which {format} has no code")
    if not format.signed and (x < 0).any():
        raise ValueError(f"x has {int((x < 0).sum())} negative values; {format} has no sign")
