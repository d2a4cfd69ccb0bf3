"""Quantization-aware training: weights that learn to be rounded, through a gradient that rounding does not have.

The idea: rounding is a staircase. Its slope is 0 on the steps and nothing at their edges, so no gradient comes through
it. Over many steps, though, a staircase goes up as the straight line through it does, and the line's slope is 1: that
is the straight-through estimator. Forward, the rounded weight; backward, as if it had not been rounded; but beyond the
ends of the grid, where the staircase is flat for good, 0.

The scale can be learned as well (LSQ). With v = x / s and the ends of the grid qmin and qmax in steps,

    d x_hat / d s = round(v) - v  inside,   qmin or qmax  beyond,

which `lsq` gets from the chain rule and a rounding whose slope is 1. A scale must stay above 0, so what is learned is
its logarithm.

Source: Bengio et al., "Estimating or propagating gradients through stochastic neurons" (2013), straight-through; Esser
et al., "Learned step size quantization" (ICLR 2020), sections 2.1 and 2.2.

How it differs from ``gptq.py``: there codes for given weights; here weights change until their codes serve.
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
    """Forward decode(encode(x)); backward the gradient as it comes, and 0 where x lies beyond the grid's ends.

    Beyond is by more than half of the last step: what rounds to the end is inside (torch's fake quantization has the
    same rule). A grid fitted to x's own largest value has nothing beyond it.

    Args:
        x: floats to be trained.
        quantizer: any: integers, minifloats, a codebook.
        parameters: of the quantizer; None fits them to x as it is now. No gradient goes through them.

    Returns:
        x_hat, in x's dtype.

    Raises:
        TypeError: quantizer is none.
        ValueError: what the quantizer's fit refuses.

    >>> from qcourse import IntQuantizer, quantize
    >>> x = torch.tensor([-9.0, 0.4, 7.4, 7.6], requires_grad=True)
    >>> x_hat = straight_through(x, IntQuantizer(4), quantize(torch.tensor([7.0]), 4).parameters)
    >>> x_hat.sum().backward()
    >>> x_hat.tolist(), x.grad.tolist()  # -8 and 7 are the ends
    ([-8.0, 0.0, 7.0, 7.0], [0.0, 1.0, 1.0, 0.0])
    """
    check_quantizer(quantizer)
    return _StraightThrough.apply(
        x, quantizer, quantizer.fit(x.detach()) if parameters is None else parameters
    )


def beyond(x: Tensor, quantizer: Quantizer, parameters: Any) -> Bool[Tensor, "*shape"]:
    """Whether x is beyond an end of the grid by more than half of the last step.

    Where x rounds to an end, reflect it there: what was within half a step outside is now within half a step inside,
    and rounds to the end again.
    """
    nearest = lambda values: quantizer.nearest(values, parameters)[1]  # noqa: E731
    x_hat = nearest(x)
    far = torch.full_like(x, torch.finfo(x.dtype).max / 16)
    outside = ((x_hat == nearest(far)) & (x > x_hat)) | ((x_hat == nearest(-far)) & (x < x_hat))
    return outside & (nearest(2 * x_hat.to(x.dtype) - x) != x_hat)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Quantizer, parameters: Any) -> Tensor:
        ctx.save_for_backward(beyond(x, quantizer, parameters))
        return quantizer.nearest(x, parameters)[1].to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (outside,) = ctx.saved_tensors
        return grad.masked_fill(outside, 0), None, None


class _As(torch.autograd.Function):
    """A value that depends on x with the slope 1, whatever the value is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GradientTimes(torch.autograd.Function):
    """x, with its gradient multiplied."""

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
    """s round(clamp(x / s, qmin, qmax)), with LSQ's gradients for x and s.

    Args:
        x: to be quantized.
        scale: s, above 0, as ``quantizer.granularity.scale_shape`` shapes it. Its gradient is divided by
            sqrt(qmax * values that share it), which brings steps of s and of x to one size.
        quantizer: symmetric integers.

    Raises:
        TypeError: quantizer is no IntQuantizer.
        ValueError: it is not symmetric; scale has another shape.

    >>> x, s = torch.tensor([0.6, 1.4, 30.0]), torch.tensor(1.0, requires_grad=True)
    >>> lsq(x, s, IntQuantizer(4)).sum().backward()
    >>> round(float(s.grad) * (7 * 3) ** 0.5, 4)  # (1 - 0.6) + (1 - 1.4) + 7
    7.0
    """
    _check_lsq(quantizer)
    expected = quantizer.granularity.scale_shape(x.shape)
    if tuple(scale.shape) != tuple(expected):
        raise ValueError(
            f"scale of shape {tuple(scale.shape)} must have the shape {tuple(expected)}"
        )
    rows = quantizer.granularity.rows(x)
    s = _GradientTimes.apply(scale, 1 / math.sqrt(max(quantizer.qmax, 1) * rows.shape[1])).reshape(
        -1, 1
    )
    steps = (rows / s).clamp(quantizer.qmin, quantizer.qmax)
    return quantizer.granularity.unrows(_As.apply(steps, steps.detach().round()) * s, x.shape)


class FakeQuantized(nn.Module):
    """A parametrization for a weight: what is trained stays a float, what is multiplied lies on the grid.

    ``torch.nn.utils.parametrize.register_parametrization(linear, "weight", FakeQuantized(quantizer, linear.weight))``

    Args:
        quantizer: the grid.
        w: the weight as it is; says where a learned scale begins.
        learned_scale: whether the scale is trained too, by LSQ; otherwise it is fitted anew at each step (where fitting
            is a search, "mse", that takes far longer than the step).

    Raises:
        TypeError, ValueError: as ``lsq`` and the quantizer's fit.
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
            scale = quantizer.fit(w.detach()).scale
            self.log_scale = nn.Parameter(scale.to(wide(w.dtype)).log())

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight on its grid."""
        if self.log_scale is None:
            return straight_through(w, self.quantizer)
        exact = self.log_scale.exp()
        scale = _As.apply(exact, self._stored(exact.detach()).to(exact.dtype))
        return lsq(w, scale, self.quantizer).to(w.dtype)  # type: ignore[arg-type]

    def quantized(self, w: Float[Tensor, "*shape"]) -> QuantizedTensor:
        """The codes that the weight has now, the scale in the dtype that it is stored in."""
        if self.log_scale is None:
            return self.quantizer(w.detach())
        scale = self._stored(self.log_scale.detach().exp())
        parameters = Parameters(scale, torch.zeros_like(scale, dtype=torch.int8))
        return QuantizedTensor(
            self.quantizer.encode(w.detach(), parameters), parameters, self.quantizer
        )

    def _stored(self, scale: Tensor) -> Tensor:
        """The scale in the dtype that it will be stored in: what is trained is what will be used."""
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
