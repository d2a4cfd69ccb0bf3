"""Real numbers to integer codes and back: the affine quantizer.

The idea: choose a scale (the width of one step) and a zero point (the code that stands for 0), then

    codes = saturate(round(x / scale) + zero_point)        x_hat = scale * (codes - zero_point)

Rounding is half to even, the division a true one (not a product with 1/scale), and saturation clips to [qmin, qmax].

Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference"
(CVPR 2018), section 2.1.

Which values share a scale is the business of `granularity.py`; how codes become bytes, of `packing.py`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerTensor
from qcourse.numerics.packing import packed_nbytes
from qcourse.numerics.quantized import Parameters, QuantizedTensor
from qcourse.numerics.scaled import ScaledQuantizer
from qcourse.numerics.validation import check_floating, check_scale, check_stored_scale


def integer_range(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """The smallest and largest code of `bits` bits, (qmin, qmax); ValueError for less than one bit.

    >>> integer_range(4), integer_range(4, signed=False)
    ((-8, 7), (0, 15))
    """
    if bits < 1:
        raise ValueError(f"bits={bits!r} must be at least 1")
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


@dataclass(frozen=True)
class IntQuantizer(ScaledQuantizer):
    """The affine quantizer to integers of 2 to 8 bits.

    Args:
        bits: 2 to 8.
        symmetric: True: signed codes and zero_point 0. False: codes 0 .. 2^bits - 1 over [min, max], widened to hold 0.
        granularity: which values share a scale.
        scale_rule: how a range becomes a scale. "amax": amax / qmax, or (max - min) / (2^bits - 1) when not symmetric.
            "full": 2 amax / (2^bits - 1), symmetric only; every code is used and the top value clips by half a step.
            "mse": "amax" on that fraction of the range (of MSE_SHRINKS) which leaves the least squared error.
        scale_dtype: the floating-point dtype that scales are stored and counted in; codes are made with the stored
            scale.

    Raises:
        TypeError: granularity is no granularity.
        ValueError: another argument outside the above.

    >>> IntQuantizer(bits=4, symmetric=False)(torch.tensor([0.0, 0.4, 1.5])).codes.tolist()
    [0, 4, 15]
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    scale_rule: str = "amax"
    scale_dtype: torch.dtype = torch.float32
    scale_rules: ClassVar[tuple[str, ...]] = ("amax", "full", "mse")

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in range(
            2, 9
        ):  # 8.0 and np.uint8(8) would shift wrongly
            raise ValueError(
                f"bits={self.bits!r} must be a whole number (a Python int) from 2 to 8"
            )
        self._check_fields()
        if self.scale_rule == "full" and not self.symmetric:
            raise ValueError(
                "scale_rule='full' needs symmetric=True; an asymmetric range uses every code anyway"
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
    def code_dtype(self) -> torch.dtype:  # type: ignore[override]
        """What codes are held in: int8 when symmetric, uint8 when not."""
        return torch.int8 if self.symmetric else torch.uint8

    def parameter_nbytes(self, parameters: Parameters) -> int:
        """Bytes of the scales in their dtype and, when not symmetric, of the zero points packed like any code."""
        zeros = 0 if self.symmetric else packed_nbytes(parameters.zero_point.numel(), self.bits)
        return super().parameter_nbytes(parameters) + zeros

    @property
    def _zero_points(self) -> tuple[int, int]:
        return (0, 0) if self.symmetric else (self.qmin, self.qmax)

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        if self.symmetric:
            return torch.maximum(-low, high) / (self.qmax + 0.5 * (self.scale_rule == "full"))
        return (high - low) / (self.qmax - self.qmin)

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        return torch.zeros_like(low) if self.symmetric else (-low / scale.double()).round()

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
    """IntQuantizer(bits, ...)(x): saturate(round(x / scale) + zero_point), on x's own range or on the scale given.

    Args:
        x: finite floating-point values, any shape; float16 and bfloat16 are worked on in float32. Gradients stop here
            (rounding has none to give).
        scale: use this scale instead of x's own, broadcast to the shape `granularity.scale_shape` gives.
        zero_point: the code for 0 that goes with `scale`; 0 if left out.
        bits, symmetric, granularity, scale_rule, scale_dtype: as in `IntQuantizer`.

    Raises:
        TypeError, ValueError: as `IntQuantizer`, `IntQuantizer.fit`, `IntQuantizer.encode`; zero_point without scale.

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
    check_floating(x)
    shape = granularity.scale_shape(x.shape)
    exact = _given("scale", torch.as_tensor(scale, dtype=torch.float64, device=x.device), shape)
    zeros = _given(
        "zero_point",
        torch.as_tensor(0 if zero_point is None else zero_point, device=x.device),
        shape,
    )
    check_scale(exact)
    check_stored_scale(exact.to(scale_dtype), exact)
    given = Parameters(exact.to(scale_dtype), zeros)
    codes = quantizer.encode(
        x, given
    )  # which has looked whether the zero points fit the codes' dtype
    return QuantizedTensor(codes, replace(given, zero_point=zeros.to(codes.dtype)), quantizer)


def fake_quantize(
    x: Shaped[Tensor, "*shape"], bits: int = 8, **options: object
) -> Float[Tensor, "*shape"]:
    """quantize then dequantize, in x's dtype: what x has become once it has been stored in codes.

    Takes and raises what `quantize` does. What rounds beyond a narrow dtype's largest value saturates there. The result
    carries no gradient (rounding has none).

    >>> fake_quantize(torch.tensor([0.3, 2.6, 7.0]), bits=4).tolist()
    [0.0, 3.0, 7.0]
    """
    x_hat = quantize(x, bits, **options).dequantize()  # type: ignore[arg-type]
    limit = min(torch.finfo(x.dtype).max, torch.finfo(x_hat.dtype).max)
    return x_hat if x_hat.dtype == x.dtype else x_hat.clamp(-limit, limit).to(x.dtype)


def _given(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A caller's scale or zero point, one for each place of `shape`."""
    try:
        return value.detach().expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast to the shape {shape}"
        ) from None
