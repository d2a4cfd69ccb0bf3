"""Floats of 3 to 8 bits from the description of their bits: FP8, FP6, FP4, and the scale E8M0.

The idea: a float has a sign, an exponent e and a mantissa m of M bits, and stands for

    (-1)^sign * 2^(e - bias) * (1 + m / 2^M)        if e > 0
    (-1)^sign * 2^(1 - bias) * m / 2^M              if e = 0 (a subnormal number)

Source: Micikevicius et al. (2022), tables 1 and 2; OCP OFP8 (2023) and MX 1.0 (2023), section 5.
How it differs from `minifloat_encoding.py`: here codes become numbers; there numbers become codes.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from qcourse.numerics.chunks import CHUNK
from qcourse.numerics.whole import check_whole

SPECIALS = ("ieee", "nan", "none")


@dataclass(frozen=True)
class FloatFormat:
    """The bits of a small float of 3 to 8 bits, whose numbers float32 must hold.

    Args:
        specials: "ieee": the topmost exponent is infinity (m = 0) and NaN. "nan": the last code,
            all ones, is NaN. "none": every code is a number.
        signed: False: no sign, no subnormals and so no 0 (E8M0).

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
        for name in ("exponent_bits", "mantissa_bits", "bias"):
            check_whole(name, getattr(self, name))
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or not 3 <= self.bits <= 8:
            raise ValueError(
                f"{self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits"
                f" make {self.bits} with the sign; need 3 to 8 bits, at least one of them for the"
                " exponent"
            )
        if self.specials not in SPECIALS:
            raise ValueError(f"specials={self.specials!r} must be 'ieee', 'nan' or 'none'")
        if self.specials == "ieee" and not self.mantissa_bits:
            raise ValueError(
                f"specials='ieee' of {self.name} needs a mantissa bit, to tell NaN from infinity"
            )
        # float32 holds powers of two from 2^-149 (its smallest subnormal number) to 2^127.
        largest_exponent = (self.max_code >> self.mantissa_bits) - self.bias
        smallest_exponent = self.signed - self.bias - self.mantissa_bits
        if largest_exponent > 127 or smallest_exponent < -149:
            raise ValueError(
                f"bias={self.bias} of {self.name} is too far from 0: float32 does not hold every"
                " number"
            )

    @property
    def bits(self) -> int:
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def max_code(self) -> int:
        """The code of the largest number; infinity and NaN come after it."""
        ones = (1 << self.exponent_bits + self.mantissa_bits) - 1
        if self.specials == "nan":
            return ones - 1
        if self.specials == "ieee":
            return ones - (1 << self.mantissa_bits)
        return ones

    @property
    def max(self) -> float:
        return float(code_values(self)[self.max_code])

    @property
    def smallest(self) -> float:
        """The smallest number above 0."""
        return float(code_values(self)[int(self.signed)])

    @property
    def smallest_normal(self) -> float:
        """The smallest number with a full mantissa: 2^(1 - bias), or 2^-bias without a sign."""
        return 2.0 ** (self.signed - self.bias)

    def __repr__(self) -> str:
        return self.name


E4M3 = FloatFormat("E4M3", 4, 3, 7, "nan")  # FP8 for weights and activations; or E4M3FN
E5M2 = FloatFormat("E5M2", 5, 2, 15, "ieee")  # FP8 for gradients
E3M2 = FloatFormat("E3M2", 3, 2, 3)  # FP6
E2M3 = FloatFormat("E2M3", 2, 3, 1)  # FP6
E2M1 = FloatFormat("E2M1", 2, 1, 1)  # FP4

# A power of two: the scale of the MX formats.
E8M0 = FloatFormat("E8M0", 8, 0, 127, "nan", signed=False)


@lru_cache
def code_values(format: FloatFormat) -> Float[Tensor, " codes"]:
    """Return the number that each of the 2^bits codes stands for, in float32; do not write to it.

    >>> code_values(E2M1).tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
    """
    exponents = 1 << format.exponent_bits
    mantissas = 1 << format.mantissa_bits
    e = torch.arange(exponents, dtype=torch.float64)[:, None]
    m = torch.arange(mantissas, dtype=torch.float64) / mantissas
    values = torch.exp2(e - format.bias) * (1 + m)  # (exponents, mantissas)
    # Subnormals: the exponent of e = 1, without the leading 1.
    if format.signed:
        values[0] = 2.0 ** (1 - format.bias) * m
    values = values.flatten()
    # Infinity comes first after the largest number, then NaN.
    if format.specials != "none":
        values[format.max_code + 1 :] = torch.nan
    if format.specials == "ieee":
        values[format.max_code + 1] = torch.inf
    if format.signed:
        values = torch.cat([values, -values])
    return values.float()


def decode(codes: Integer[Tensor, "*shape"], format: FloatFormat) -> Float[Tensor, "*shape"]:
    """Return the numbers that codes from 0 to 2^bits - 1 stand for, in float32.

    >>> decode(torch.tensor([0x38, 0x7E, 0x01]), E4M3).tolist()
    [1.0, 448.0, 0.001953125]
    """
    last = (1 << format.bits) - 1
    if codes.numel():
        lowest = int(codes.min())
        highest = int(codes.max())
        if lowest < 0 or highest > last:
            raise ValueError(
                f"codes of {format} must be from 0 to {last}, got {lowest} to {highest}"
            )
    # Indexing with int64 is faster; int32 takes half the memory.
    indices = codes.long() if codes.numel() < CHUNK else codes.int()
    return code_values(format).to(codes.device)[indices]
