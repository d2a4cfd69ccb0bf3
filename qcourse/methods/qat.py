"""Quantization-aware training: train weights through a rounding whose gradient is defined by hand.

Rounding has the slope 0: no gradient passes. The straight-through estimator (STE) uses 1 instead,
and 0 beyond the ends of the grid. LSQ also trains the scale.
Source: Bengio et al., "Estimating or propagating gradients through stochastic neurons" (2013);
Esser et al., "Learned step size quantization" (LSQ, ICLR 2020), sections 2.1 and 2.2.
`gptq.py` finds codes for given weights; here the weights change.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.chunks import wide
from qcourse.numerics.quantized import Parameters, QuantizedTensor, Quantizer
from qcourse.numerics.validation import check_quantizer, check_stored_scale


def straight_through(
    x: Float[Tensor, "*shape"], quantizer: Quantizer, parameters: Any = None
) -> Float[Tensor, "*shape"]:
    """Return decode(encode(x)) in x's dtype. The gradient passes, but is 0 `beyond` the grid.

    parameters=None fits them to x. Raises TypeError or ValueError as the quantizer's fit.

    >>> from qcourse import IntQuantizer, quantize
    >>> x = torch.tensor([-9.0, 0.4, 7.4, 7.6], requires_grad=True)
    >>> scale_of_one = quantize(torch.tensor([7.0]), 4).parameters
    >>> x_hat = straight_through(x, IntQuantizer(4), scale_of_one)  # from -8 to 7
    >>> x_hat.sum().backward()
    >>> x_hat.tolist(), x.grad.tolist()
    ([-8.0, 0.0, 7.0, 7.0], [0.0, 1.0, 1.0, 0.0])
    """
    check_quantizer(quantizer)
    if parameters is None:
        parameters = quantizer.fit(x.detach())
    return _StraightThrough.apply(x, quantizer, parameters)


def beyond(x: Tensor, quantizer: Quantizer, parameters: Any) -> Bool[Tensor, "*shape"]:
    """Return where x is beyond an end of the grid by more than half of the last step."""

    def nearest(values: Tensor) -> Tensor:
        return quantizer.nearest(values, parameters)[1]

    x_hat = nearest(x)
    far = torch.full_like(x, torch.finfo(x.dtype).max / 16)
    above = (x_hat == nearest(far)) & (x > x_hat)
    below = (x_hat == nearest(-far)) & (x < x_hat)

    # Reflect x at the end that it rounds to. If it was within half a step outside, it is now within
    # half a step inside, and rounds to the same end.
    reflected = 2 * x_hat.to(x.dtype) - x
    return (above | below) & (nearest(reflected) != x_hat)


class _StraightThrough(torch.autograd.Function):
    """The rounded x, with the gradient of the STE."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, parameters: Any) -> Tensor:
        ctx.save_for_backward(beyond(x, quantizer, parameters))
        _, x_hat = quantizer.nearest(x, parameters)
        return x_hat.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (outside,) = ctx.saved_tensors
        return grad.masked_fill(outside, 0), None, None


class _Replaced(torch.autograd.Function):
    """`value` in the forward pass; the gradient goes to x with the slope 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GradientTimes(torch.autograd.Function):
    """x in the forward pass; its gradient is multiplied by `factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def lsq(
    x: Float[Tensor, "*shape"], scale: Float[Tensor, "*scales"], quantizer: IntQuantizer
) -> Float[Tensor, "*shape"]:
    """Return s round(clamp(x / s, qmin, qmax)), with LSQ's gradients for x and s.

    Raises TypeError or ValueError unless quantizer is a symmetric IntQuantizer that fits scale.

    >>> x, s = torch.tensor([0.6, 1.4, 30.0]), torch.tensor(1.0, requires_grad=True)
    >>> lsq(x, s, IntQuantizer(4)).sum().backward()
    >>> round(float(s.grad) * (7 * 3) ** 0.5, 4)  # (1 - 0.6) + (1 - 1.4) + 7
    7.0
    """
    _check_lsq(quantizer)
    granularity = quantizer.granularity
    expected = tuple(granularity.scale_shape(x.shape))
    if tuple(scale.shape) != expected:
        raise ValueError(f"scale of shape {tuple(scale.shape)} must have the shape {expected}")
    rows = granularity.rows(x)

    # Section 2.2: dividing the gradient of s by sqrt(qmax * values per scale) brings the relative
    # steps of s and x to one size.
    factor = 1 / math.sqrt(max(quantizer.qmax, 1) * rows.shape[1])
    s = _GradientTimes.apply(scale, factor).reshape(-1, 1)

    # With v = x / s, the chain rule through clamp and a rounding of slope 1 gives LSQ's gradient:
    # d x_hat / d s = round(v) - v inside the grid, and qmin or qmax beyond its ends.
    steps = (rows / s).clamp(quantizer.qmin, quantizer.qmax)
    rounded = _Replaced.apply(steps, steps.detach().round())
    return granularity.unrows(rounded * s, x.shape)


class FakeQuantized(nn.Module):
    """Parametrization w -> w_hat for ``torch.nn.utils.parametrize.register_parametrization``.

    A learned scale starts from w and is trained by LSQ; otherwise each step fits the scale again.
    Raises TypeError or ValueError as ``lsq`` and the quantizer's fit.
    """

    def __init__(
        self, quantizer: Quantizer, w: Shaped[Tensor, "..."], *, learned_scale: bool = False
    ) -> None:
        super().__init__()
        check_quantizer(quantizer)
        self.quantizer = quantizer
        self.log_scale: nn.Parameter | None = None
        if learned_scale:
            _check_lsq(quantizer)
            scale = quantizer.fit(w.detach()).scale.to(wide(w.dtype))
            # Training the logarithm keeps the scale above 0.
            self.log_scale = nn.Parameter(scale.log())

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the weight on its grid."""
        if self.log_scale is None:
            return straight_through(w, self.quantizer)
        # Train with the scale as it will be stored; its gradient goes to the exact scale.
        exact = self.log_scale.exp()
        stored = self._stored(exact.detach()).to(exact.dtype)
        scale = _Replaced.apply(exact, stored)
        return lsq(w, scale, self.quantizer).to(w.dtype)  # type: ignore[arg-type]

    def quantized(self, w: Float[Tensor, "*shape"]) -> QuantizedTensor:
        """Return the current codes of w, with the scale in its stored dtype."""
        w = w.detach()
        if self.log_scale is None:
            return self.quantizer(w)
        scale = self._stored(self.log_scale.detach().exp())
        zero_point = torch.zeros_like(scale, dtype=torch.int8)
        parameters = Parameters(scale, zero_point)
        codes = self.quantizer.encode(w, parameters)
        return QuantizedTensor(codes, parameters, self.quantizer)

    def _stored(self, scale: Tensor) -> Tensor:
        """Return the scale in its storage dtype."""
        stored = scale.to(self.quantizer.scale_dtype)  # type: ignore[attr-defined]
        check_stored_scale(stored, scale)
        return stored


def _check_lsq(quantizer: object) -> None:
    if not isinstance(quantizer, IntQuantizer):
        raise TypeError(
            f"quantizer={quantizer!r} must be an IntQuantizer, for a scale to be learned"
        )
    if not quantizer.symmetric:
        raise ValueError("symmetric=False: a learned scale is for symmetric codes")
