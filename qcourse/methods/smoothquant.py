"""SmoothQuant: let the weights carry a part of what makes activations hard to quantize.

The idea: w x = (w s)(x / s) for any scale s of the inputs. Some channels of x reach far beyond the others, in every
token, and a scale that all channels share is made for them. Weights have no such channels, and may have a scale for
each output. So each input channel is divided by

    s_j = amax|x_j|^alpha / amax|w_j|^(1 - alpha)

alpha says how much moves: at 1 every channel of x reaches 1, at 0 every column of w does, and at 1/2 channel j of x and
column j of w reach the same. What one side gains the other pays for, so alpha is to be tried.

Source: Xiao et al., "SmoothQuant" (ICML 2023), section 4 and equation 4. Its published code counts every amax as at
least 1e-5; here as at least LEAST of the largest channel's, so that units do not matter.

How it differs from ``awq.py``: there s comes from mean |x| and a search, and serves the rounding of w alone while x
stays in floats; here both are to be quantized, and s evens out their ranges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.chunks import range_of_rows
from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import (
    check_finite,
    check_floating,
    check_matrix,
    check_quantizer,
    check_scale,
    in_layer,
)

LEAST = 1e-4  # an amax counts as at least this share of the largest channel's: a channel that was always 0 has one


def smooth(
    w: Shaped[Tensor, "..."], x_amax: Shaped[Tensor, "..."], alpha: float = 0.5
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " in"]]:
    """w s and s, with s_j = amax|x_j|^alpha / amax|w_j|^(1 - alpha): the layer is then y = (x / s) (w s)^T.

    Args:
        w: the weight (out, in); not changed.
        x_amax: the largest |x| of each input channel on calibration data (in,).
        alpha: how much of the difficulty moves into the weights, from 0 to 1.

    Returns:
        w s and s, in float32, or float64 where w is. A channel of x or column of w that is all 0, or below LEAST of the
        largest, counts as LEAST of the largest; x_amax or w that is 0 altogether as 1. So s is never 0 or infinite.

    Raises:
        TypeError: w or x_amax is no floating-point tensor.
        ValueError: alpha is outside 0 to 1; w is no matrix, is empty, or has NaN or infinity; x_amax is not one
            finite number of at least 0 for each input; an s or w s that the dtype cannot hold.

    >>> w, x_amax = torch.tensor([[1.0, -4.0], [0.5, 1.0]]), torch.tensor([64.0, 4.0])
    >>> w_smoothed, s = smooth(w, x_amax)
    >>> s.tolist(), (x_amax / s).tolist(), w_smoothed.abs().amax(0).tolist()
    ([8.0, 1.0], [8.0, 4.0], [8.0, 4.0])
    """
    check_matrix(w, "w")
    s = _scale([w], x_amax, alpha)
    return _smoothed(w, s), s


@dataclass(frozen=True, eq=False)
class SmoothQuantResult:
    """The codes of w * input_scale: the layer is y = (x / input_scale) Q(w input_scale)^T.

    Args:
        quantized: codes and parameters of the smoothed weight.
        input_scale: s, the same for all layers that read this input.
        alpha: the exponent.
    """

    quantized: QuantizedTensor
    input_scale: Float[Tensor, " in"]
    alpha: float

    @property
    def w_hat(self) -> Float[Tensor, "out in"]:
        """The weight that the layer acts by, Q(w input_scale) / input_scale."""
        return self.quantized.dequantize() / self.input_scale

    @property
    def note(self) -> str:
        """Words for the report."""
        low, high = (float(each) for each in torch.aminmax(self.input_scale))
        return f"alpha {self.alpha:.2f}, inputs divided by {low:.3g} to {high:.3g}"


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant as a method for ``quantize_model``: layers that read the same input share s, by their common amax.

    It chooses the codes of the weights; that the inputs are quantized as well is to be said beside it.

    Args:
        quantizer: the grid of the smoothed weights; a scale for each output (``PerChannel(0)``) is what the idea needs.
        alpha: as in ``smooth``.

    Raises:
        TypeError: quantizer is no quantizer.
        ValueError: alpha is outside 0 to 1.

    >>> from qcourse import IntQuantizer, PerChannel
    >>> method = SmoothQuant(IntQuantizer(8, granularity=PerChannel(0)))
    >>> seen = method.observe(method.observe(None, torch.tensor([[64.0, 1.0]])), torch.tensor([[-8.0, 4.0]]))
    >>> q, k = method.quantize({"q": torch.tensor([[1.0, 1.0]]), "k": torch.tensor([[0.5, -4.0]])}, seen).values()
    >>> q.input_scale.tolist(), k.quantized.codes.tolist()  # k s is [4, -4]
    ([8.0, 1.0], [[127, -127]])
    """

    quantizer: Quantizer
    alpha: float = 0.5
    calibrated = True

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        _check_alpha(self.alpha)

    def observe(
        self, seen: Float[Tensor, " in"] | None, x: Float[Tensor, "tokens in"]
    ) -> Float[Tensor, " in"]:
        """The amax of each channel, with x taken into account; NaN stays, and is refused by ``quantize``."""
        x_amax = x.detach().abs().amax(0)
        return x_amax if seen is None else torch.maximum(seen, x_amax)

    def quantize(
        self, weights: Mapping[str, Tensor], seen: Float[Tensor, " in"]
    ) -> dict[str, SmoothQuantResult]:
        """One s for all layers, the codes of each; ValueError, with its name, for what cannot be done."""
        with in_layer(", ".join(weights)):
            s = _scale(list(weights.values()), seen, self.alpha)
        result = {}
        for name, w in weights.items():
            with in_layer(name):
                result[name] = SmoothQuantResult(
                    self.quantizer(_smoothed(w, s)), s, float(self.alpha)
                )
        return result


def _scale(weights: Sequence[Tensor], x_amax: Tensor, alpha: float) -> Float[Tensor, " in"]:
    """s for weights that read the same input, by the largest |w| that any has in a column; powers in float64."""
    _check_alpha(alpha)
    check_floating(x_amax, "x_amax")
    if x_amax.shape != weights[0].shape[1:]:
        shapes = f"{tuple(x_amax.shape)} must have the shape {tuple(weights[0].shape[1:])}"
        raise ValueError(f"x_amax of shape {shapes}, one number an input")
    check_finite(x_amax, x_amax, x_amax, "x_amax")
    if (x_amax < 0).any():
        raise ValueError(
            f"x_amax={float(x_amax.min()):.3g} must be at least 0: it is the largest |x| of a channel"
        )
    for w in weights:
        check_finite(w, *range_of_rows(w.detach()), "w")
    w_amax = torch.stack([w.detach().abs().amax(0).double() for w in weights]).amax(0)
    exact = _live(x_amax.double()) ** alpha / _live(w_amax) ** (1 - alpha)
    s = exact.to(torch.float64 if torch.float64 in {w.dtype for w in weights} else torch.float32)
    check_scale(s)
    return s


def _live(amax: Tensor) -> Tensor:
    """amax, but at least LEAST of the largest; 1 where all are 0."""
    return amax.clamp(min=LEAST * amax.max()) if amax.any() else torch.ones_like(amax)


def _smoothed(w: Tensor, s: Tensor) -> Float[Tensor, "out in"]:
    ws = w.detach().to(s.dtype) * s
    check_finite(ws, *range_of_rows(ws), "w s")
    return ws


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a number from 0 to 1")
