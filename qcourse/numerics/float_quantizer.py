"""Small floats times a scale: FP8 per tensor or per row, FP4 per group.

The idea: a scale moves the data into the range of the format. A small float has about the same
relative precision over its range, so a power of two will do, stored as an exponent.
Source: Micikevicius et al. (2022), section 3.1; OCP MX 1.0 (2023), section 6.3; torchao's rules.
How it differs from `minifloat.py`: that describes the formats; this adds ranges and scales.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerTensor
from qcourse.numerics.minifloat import E4M3, E5M2, E8M0, FloatFormat, decode
from qcourse.numerics.minifloat_encoding import encode_finite
from qcourse.numerics.scaled import ScaledQuantizer

POWER_RULES = ("floor", "even", "ceil", "rceil")

# The formats that torch can cast to. Beyond the largest number its versions differ.
_TORCH_DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


@dataclass(frozen=True)
class FloatQuantizer(ScaledQuantizer):
    """Quantize to a small float format times a scale: codes = encode(x / scale).

    Args:
        scale_rule: "amax": amax / format.max. "mse": "amax" of the fraction of the range that
            leaves the least squared error. "unit": 1. The others are powers of two, with E the
            exponent of format.max. "floor": 2^(floor(log2 amax) - E), which may clip. "even":
            "floor" of amax rounded to the format's mantissa. "ceil": 2^(ceil(log2 amax) - E).
            "rceil": the smallest that does not clip.
        scale_dtype: torch.float8_e8m0fnu holds a power of two in one byte.

    >>> from qcourse.numerics.minifloat import E2M1
    >>> q = FloatQuantizer(E2M1)(torch.tensor([0.125, -0.5, 1.5, 0.03]))
    >>> q.scale.item(), q.codes.tolist(), q.dequantize().tolist()
    (0.25, [1, 12, 7, 0], [0.125, -0.5, 1.5, 0.0])
    """

    format: FloatFormat = E4M3
    granularity: Granularity = PerTensor()
    scale_rule: str = "amax"
    scale_dtype: torch.dtype = torch.float32
    code_dtype: ClassVar[torch.dtype] = torch.uint8
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
        return self.format.bits

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        amax = torch.maximum(-low, high)
        if self.scale_rule == "unit":
            return torch.ones_like(amax)
        if self.scale_rule in POWER_RULES:
            return _power_of_two(amax, self.format, self.scale_rule)
        return amax / self.format.max

    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        if self.format in _TORCH_DTYPES and steps.dtype == torch.float32:
            # torch's cast gives the same codes several times as fast, once steps are in range.
            limit = self.format.max
            in_range = steps.clamp_(-limit, limit)
            return in_range.to(_TORCH_DTYPES[self.format]).view(torch.uint8)
        return encode_finite(steps, self.format)

    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        if self.format in _TORCH_DTYPES:
            return codes.view(_TORCH_DTYPES[self.format]).to(dtype)
        return decode(codes, self.format).to(dtype)


def _power_of_two(amax: Tensor, format: FloatFormat, rule: str) -> Tensor:
    exponent = _scale_exponent(amax, format, rule)
    scale = torch.exp2(exponent.double()).clamp(min=E8M0.smallest)
    # A block of zeros gets the smallest scale that E8M0 holds.
    return scale.where(amax > 0, E8M0.smallest)


def _scale_exponent(amax: Tensor, format: FloatFormat, rule: str) -> Tensor:
    # frexp splits a number into mantissa * 2^exponent with mantissa in [1/2, 1).
    if rule == "rceil":
        mantissa, exponent = torch.frexp(amax / format.max)
        is_power_of_two = mantissa == 0.5
        return exponent - is_power_of_two.int()
    mantissa, exponent = torch.frexp(amax)
    if rule == "ceil":
        exponent = exponent + (mantissa > 0.5).int()
    if rule == "even":
        # From half a step below 1 upwards, the format's mantissa rounds to the next power of two.
        half_step = 2.0 ** -(format.mantissa_bits + 2)
        exponent = exponent + (mantissa >= 1 - half_step).int()
    # floor(log2 amax) is exponent - 1, and so is the exponent of the format's largest number.
    top = torch.frexp(torch.tensor(format.max)).exponent - 1
    return exponent - 1 - top
