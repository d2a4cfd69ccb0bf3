"""Small floats times a scale: FP8 by tensor or by row, FP4 by group, with scales that are floats or powers of two.

The idea: a small float has a range of its own, but hardly ever the range of the data: E4M3 ends at 448, and a weight of
deviation 0.02 would lie among its subnormals. So a scale moves the data to where the format is dense,

    codes = encode(x / scale)        x_hat = scale * decode(codes)

as for integers, only that here the grid is finest around 0, and a scale that is off by a factor of two costs little. So
a power of two will do as a scale, of which only the exponent need be kept.

Source: Micikevicius et al. (2022), section 3.1; OCP Microscaling Formats MX 1.0 (2023), section 6.3, whose rule for the
shared exponent is "floor"; the other rules are those of torchao's ``ScaleCalculationMode``.

How it differs from ``minifloat.py``: there a format; here a quantizer, with ranges and scales.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerTensor
from qcourse.numerics.minifloat import E4M3, E5M2, E8M0, FloatFormat, decode, encode_finite
from qcourse.numerics.scaled import ScaledQuantizer

POWER_RULES = ("floor", "even", "ceil", "rceil")
_CAST = {
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
}  # what torch casts to, once x is within the range


@dataclass(frozen=True)
class FloatQuantizer(ScaledQuantizer):
    """Quantizer to a small float format times a scale.

    Args:
        format: what the codes are; at most 8 bits.
        granularity: which values share a scale.
        scale_rule: "amax": amax / format.max, so that the largest value becomes the largest code. "mse": "amax" on that
            fraction of the range which leaves the least squared error. "unit": 1, whatever the data; what lies beyond
            the format saturates. The others make powers of two, with E for the exponent of format.max: "floor":
            2^(floor(log2 amax) - E), the MX standard's, which may clip the largest values; "even": amax is rounded to
            the format's mantissa first; "ceil": 2^(ceil(log2 amax) - E); "rceil": the smallest that does not clip.
        scale_dtype: the floating-point dtype that scales are stored and counted in; torch.float8_e8m0fnu holds powers
            of two in a byte.

    Raises:
        TypeError: format or granularity is none.
        ValueError: another argument outside the above.

    >>> from qcourse.numerics.minifloat import E2M1
    >>> q = FloatQuantizer(E2M1)(torch.tensor([0.125, -0.5, 1.5, 0.03]))
    >>> q.scale.item(), q.codes.tolist(), q.dequantize().tolist()
    (0.25, [1, 12, 7, 0], [0.125, -0.5, 1.5, 0.0])
    """

    format: FloatFormat = E4M3
    granularity: Granularity = PerTensor()
    scale_rule: str = "amax"
    scale_dtype: torch.dtype = torch.float32
    code_dtype: ClassVar[torch.dtype] = torch.uint8  # type: ignore[misc]
    scale_rules: ClassVar[tuple[str, ...]] = ("amax", "mse", "unit", *POWER_RULES)

    def __post_init__(self) -> None:
        if not isinstance(self.format, FloatFormat):
            raise TypeError(f"format={self.format!r} must be a FloatFormat such as E4M3")
        if not self.format.signed:
            raise ValueError(
                f"format={self.format!r} has no sign; it can hold scales, but no weights"
            )
        self._check_fields()

    @property
    def bits(self) -> int:
        """Bits a code."""
        return self.format.bits

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        amax = torch.maximum(-low, high)
        if self.scale_rule == "unit":
            return torch.ones_like(amax)
        if self.scale_rule not in POWER_RULES:
            return amax / self.format.max
        return _power_of_two(amax, self.format, self.scale_rule)

    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        if (
            self.format in _CAST and steps.dtype == torch.float32
        ):  # the same codes, several times as fast
            return (
                steps.clamp_(-self.format.max, self.format.max)
                .to(_CAST[self.format])
                .view(torch.uint8)
            )
        return encode_finite(steps, self.format)

    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        if self.format in _CAST:
            return codes.view(_CAST[self.format]).to(dtype)
        return decode(codes, self.format).to(dtype)


def _power_of_two(amax: Tensor, format: FloatFormat, rule: str) -> Tensor:
    """The shared scale of a block, exactly, for amax in float64; the smallest that E8M0 holds for a block of zeros."""
    top = (
        torch.frexp(torch.tensor(format.max)).exponent - 1
    )  # of the largest number; frexp's mantissas begin at 1/2
    if rule == "rceil":
        mantissa, exponent = torch.frexp(amax / format.max)
        exponent = exponent - (mantissa == 0.5).int()
    else:
        mantissa, exponent = torch.frexp(amax)
        if rule == "ceil":
            exponent = exponent + (mantissa > 0.5).int()
        elif (
            rule == "even"
        ):  # where half a step of the format would carry the mantissa to the next power of two
            exponent = exponent + (mantissa >= 1 - 2.0 ** -(format.mantissa_bits + 2)).int()
        exponent = exponent - 1 - top
    return torch.exp2(exponent.double()).clamp(min=E8M0.smallest).where(amax > 0, E8M0.smallest)
