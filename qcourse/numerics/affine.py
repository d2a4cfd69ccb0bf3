"""The affine quantizer: real numbers to integer codes and back.

The idea: choose a scale (the width of one step) and a zero point (the code that stands for 0), then

    codes = saturate(round(x / scale) + zero_point)        x_hat = scale * (codes - zero_point)

Rounding is half to even, and the division is a true one (not a product with 1 / scale).
Source: Jacob et al., "Quantization and training of neural networks" (CVPR 2018), section 2.1.
How it differs from `float_quantizer.py`: all steps of this grid are equal.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerTensor
from qcourse.numerics.packing import packed_nbytes
from qcourse.numerics.quantized import Parameters, QuantizedTensor
from qcourse.numerics.scaled import ScaledQuantizer
from qcourse.numerics.validation import check_floating, check_scale, check_stored_scale
from qcourse.numerics.whole import check_whole


def integer_range(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """Return (qmin, qmax), the smallest and the largest code of `bits` bits.

    >>> integer_range(4), integer_range(4, signed=False)
    ((-8, 7), (0, 15))
    """
    if bits < 1:
        raise ValueError(f"bits={bits!r} must be at least 1")
    if not signed:
        return 0, (1 << bits) - 1
    half = 1 << bits - 1
    return -half, half - 1


@dataclass(frozen=True)
class IntQuantizer(ScaledQuantizer):
    """Quantize to integers of 2 to 8 bits: signed codes if symmetric, else 0 to 2^bits - 1.

    Args:
        scale_rule: "amax": amax / qmax, or (max - min) / (2^bits - 1) if not symmetric. "full",
            symmetric only: 2 amax / (2^bits - 1), which clips the largest value by half a step.
            "signed", symmetric only: the value of largest magnitude / qmin, so that it gets the
            code qmin, of which there is one more than qmax; the scale is negative if that value is
            positive, as in llama.cpp's Q4_0.
            "mse": "amax" of the fraction of the range that leaves the least squared error.
        scale_dtype: the floating-point dtype that scales are stored in; codes use that scale.

    >>> IntQuantizer(bits=4, symmetric=False)(torch.tensor([0.0, 0.4, 1.5])).codes.tolist()
    [0, 4, 15]
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    scale_rule: str = "amax"
    scale_dtype: torch.dtype = torch.float32
    scale_rules: ClassVar[tuple[str, ...]] = ("amax", "full", "signed", "mse")

    def __post_init__(self) -> None:
        check_whole("bits", self.bits, 2, 8)
        self._check_fields()
        if self.scale_rule in ("full", "signed") and not self.symmetric:
            raise ValueError(
                f"scale_rule={self.scale_rule!r} needs symmetric=True; an asymmetric range uses"
                " every code anyway"
            )

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return integer_range(self.bits, signed=self.symmetric)[0]

    @property
    def qmax(self) -> int:
        """The largest code."""
        return integer_range(self.bits, signed=self.symmetric)[1]

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.symmetric else torch.uint8

    def parameter_nbytes(self, parameters: Parameters) -> int:
        scale_nbytes = super().parameter_nbytes(parameters)
        if self.symmetric:
            return scale_nbytes
        # A zero point is a code, and packed like one.
        return scale_nbytes + packed_nbytes(parameters.zero_point.numel(), self.bits)

    @property
    def _zero_point_range(self) -> tuple[int, int]:
        return (0, 0) if self.symmetric else (self.qmin, self.qmax)

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        # An asymmetric range [low, high] is spread over all steps from qmin to qmax.
        if not self.symmetric:
            return (high - low) / (self.qmax - self.qmin)
        amax = torch.maximum(-low, high)
        if self.scale_rule == "signed":
            return torch.where(high > -low, high, low) / self.qmin
        # "full" lets amax lie half a step beyond qmax, so that [-amax, amax] is 2^bits - 1 steps.
        steps = self.qmax + 0.5 if self.scale_rule == "full" else self.qmax
        return amax / steps

    def _check_parameters(self, parameters: Parameters, shape: tuple[int, ...]) -> None:
        if self.scale_rule == "signed":
            parameters = Parameters(parameters.scale.abs(), parameters.zero_point)
        super()._check_parameters(parameters, shape)

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        if self.symmetric:
            return torch.zeros_like(low)
        # The zero point z makes low the code 0: low = scale * (0 - z).
        return (-low / scale.double()).round()

    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        return steps.round_().add_(zero_point).clamp_(self.qmin, self.qmax)

    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype).sub_(zero_point)


def quantize(
    x: Shaped[Tensor, "*shape"],
    bits: int = 8,
    *,
    symmetric: bool = True,
    granularity: Granularity = PerTensor(),
    scale_rule: str = "amax",
    scale_dtype: torch.dtype = torch.float32,
    scale: float | Tensor | None = None,
    zero_point: int | Tensor | None = None,
) -> QuantizedTensor:
    """Return saturate(round(x / scale) + zero_point), with the scale of x's range or a given one.

    Options are those of `IntQuantizer`; a given scale and zero point broadcast to one per row.
    float16 and bfloat16 are computed in float32. The result has no gradient.

    >>> q = quantize(torch.tensor([-0.51, 0.02, 0.33, -0.18, 0.6]), bits=8)
    >>> q.codes.tolist(), round(q.scale.item(), 6)
    ([-108, 4, 70, -38, 127], 0.004724)
    """
    quantizer = IntQuantizer(bits, symmetric, granularity, scale_rule, scale_dtype)
    if scale is None:
        if zero_point is not None:
            raise ValueError(
                f"zero_point={zero_point} was given without scale; give both, or neither"
            )
        return quantizer(x)
    if scale_rule != "amax":
        raise ValueError(
            f"scale_rule={scale_rule!r} chooses a scale, but scale was given; give one of the two"
        )
    check_floating(x)
    parameters = _given_parameters(x, quantizer, scale, zero_point)
    # Saturation clips what is beyond the range of the given scale.
    codes = quantizer.encode(x, parameters)
    # `encode` has checked that the zero points fit the dtype of the codes.
    stored = Parameters(parameters.scale, parameters.zero_point.to(codes.dtype))
    return QuantizedTensor(codes, stored, quantizer)


def fake_quantize(
    x: Shaped[Tensor, "*shape"], bits: int = 8, **options: object
) -> Float[Tensor, "*shape"]:
    """Return x after `quantize` (whose options it takes) and `dequantize`, in x's dtype.

    >>> fake_quantize(torch.tensor([0.3, 2.6, 7.0]), bits=4).tolist()
    [0.0, 3.0, 7.0]
    """
    x_hat = quantize(x, bits, **options).dequantize()  # type: ignore[arg-type]
    if x_hat.dtype == x.dtype:
        return x_hat
    # A value that rounds beyond the largest one of a narrow dtype saturates.
    x_limit = torch.finfo(x.dtype).max
    x_hat_limit = torch.finfo(x_hat.dtype).max
    limit = min(x_limit, x_hat_limit)
    return x_hat.clamp(-limit, limit).to(x.dtype)


def _given_parameters(
    x: Tensor,
    quantizer: IntQuantizer,
    scale: float | Tensor,
    zero_point: int | Tensor | None,
) -> Parameters:
    # Expand both to one value per scale.
    shape = quantizer.granularity.scale_shape(x.shape)
    exact = torch.as_tensor(scale, dtype=torch.float64, device=x.device)
    exact = _expanded("scale", exact, shape)
    zeros = torch.as_tensor(0 if zero_point is None else zero_point, device=x.device)
    zeros = _expanded("zero_point", zeros, shape)
    # Codes are made with the stored scale, so check that it is close to the exact one.
    check_scale(exact)
    stored = exact.to(quantizer.scale_dtype)
    check_stored_scale(stored, exact)
    return Parameters(stored, zeros)


def _expanded(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return value.detach().expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast to the shape {shape}"
        ) from None
