"""SmoothQuant: move a part of the difficulty of quantizing activations into the weights.

The idea: w x = (w s)(x / s) for any scale s of the inputs. A few channels of x are far larger than
the others and set the scale that all share; weights have no such channels. So divide x_j by
s_j = amax|x_j|^alpha / amax|w_j|^(1 - alpha). At alpha = 1 every channel of x reaches 1, at 0 every
column of w does, and at 1/2 x_j and w_j reach the same value.
Source: Xiao et al., "SmoothQuant" (ICML 2023), equation 4; its code floors every amax at 1e-5.
How it differs from `awq.py`: AWQ searches s for the rounding of w alone; here x is quantized too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.methods.method import LayerCodes
from qcourse.numerics.quantized import Quantizer
from qcourse.numerics.validation import (
    check_finite,
    check_floating,
    check_matrix,
    check_quantizer,
    check_scale,
    in_layer,
)

LEAST = 1e-4  # the floor of an amax, as a share of the largest channel's


def smooth(
    w: Shaped[Tensor, "..."], x_amax: Shaped[Tensor, "..."], alpha: float = 0.5
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " in"]]:
    """Return w s and s = amax|x|^alpha / amax|w|^(1 - alpha): the layer is y = (x / s) (w s)^T.

    `x_amax` (in,) is the largest |x| of each input channel on calibration data. `alpha`, from 0 to
    1, is how much of the difficulty moves into the weights.
    Raises TypeError or ValueError if an argument is invalid, or s or w s overflows its dtype.

    >>> x_amax = torch.tensor([64.0, 4.0])
    >>> w_smoothed, s = smooth(torch.tensor([[1.0, -4.0], [0.5, 1.0]]), x_amax)
    >>> s.tolist(), (x_amax / s).tolist(), w_smoothed.abs().amax(0).tolist()
    ([8.0, 1.0], [8.0, 4.0], [8.0, 4.0])
    """
    check_matrix(w, "w")
    s = _scale([w], x_amax, alpha)
    return _smoothed(w, s), s


@dataclass(frozen=True, eq=False, kw_only=True)
class SmoothQuantResult(LayerCodes):
    """The codes of w * input_scale: the layer is y = (x / input_scale) Q(w input_scale)^T."""

    # s, the same for all layers that read this input.
    input_scale: Float[Tensor, " in"]
    alpha: float

    @property
    def w_hat(self) -> Float[Tensor, "out in"]:
        """Return the weight in effect, Q(w input_scale) / input_scale."""
        return self.quantized.dequantize() / self.input_scale


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant as a method for ``quantize_model``: layers that read the same input share s.

    It chooses the codes of the weights; wrap it in ``WithActivations`` to quantize the inputs.
    """

    # The grid of the smoothed weights; PerChannel(0), one scale per output, suits the method.
    quantizer: Quantizer
    alpha: float = 0.5
    calibrated = True

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        _check_alpha(self.alpha)

    def observe(
        self, seen: Float[Tensor, " in"] | None, x: Float[Tensor, "tokens in"]
    ) -> Float[Tensor, " in"]:
        # The amax of each channel so far. NaN stays in it, and `quantize` rejects it.
        x_amax = x.detach().abs().amax(0)
        return x_amax if seen is None else torch.maximum(seen, x_amax)

    def quantize(
        self, weights: Mapping[str, Tensor], seen: Float[Tensor, " in"]
    ) -> dict[str, SmoothQuantResult]:
        """Return one s for all layers and the codes of each; a ValueError names the layer."""
        with in_layer(", ".join(weights)):
            s = _scale(list(weights.values()), seen, self.alpha)
        alpha = float(self.alpha)
        low, high = torch.aminmax(s)
        note = f"alpha {alpha:.2f}, inputs divided by {float(low):.3g} to {float(high):.3g}"

        results = {}
        for name, w in weights.items():
            with in_layer(name):
                q = self.quantizer(_smoothed(w, s))
            results[name] = SmoothQuantResult(q, input_scale=s, note=note, alpha=alpha)
        return results


def _scale(weights: Sequence[Tensor], x_amax: Tensor, alpha: float) -> Float[Tensor, " in"]:
    """s for weights that read the same input, by the largest |w| that any has in a column."""
    _check_alpha(alpha)
    _check_amax(x_amax, weights[0].shape[1:])
    for w in weights:
        check_finite(w, "w")

    # Take the powers in float64.
    columns = [w.detach().abs().amax(0).double() for w in weights]
    w_amax = torch.stack(columns).amax(0)
    s = _floored(x_amax.double()) ** alpha / _floored(w_amax) ** (1 - alpha)

    # The layers share s, so it has the widest of their dtypes.
    dtypes = {w.dtype for w in weights}
    s = s.to(torch.float64 if torch.float64 in dtypes else torch.float32)
    check_scale(s)
    return s


def _floored(amax: Tensor) -> Tensor:
    """amax, but at least LEAST of the largest; 1 if all are 0."""
    # So s is never 0 or infinite, even for a channel that was always 0 on calibration data.
    if not amax.any():
        return torch.ones_like(amax)
    return amax.clamp(min=LEAST * amax.max())


def _smoothed(w: Tensor, s: Tensor) -> Float[Tensor, "out in"]:
    ws = w.detach().to(s.dtype) * s
    check_finite(ws, "w s")
    return ws


def _check_amax(x_amax: Tensor, shape: torch.Size) -> None:
    check_floating(x_amax, "x_amax")
    if x_amax.shape != shape:
        raise ValueError(
            f"x_amax of shape {tuple(x_amax.shape)} must have the shape {tuple(shape)}, "
            "one number per input"
        )
    check_finite(x_amax, "x_amax")
    lowest = float(x_amax.min())
    if lowest < 0:
        raise ValueError(
            f"x_amax={lowest:.3g} must be at least 0; it is the largest |x| of a channel"
        )


def _check_alpha(alpha: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, Real) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be a number from 0 to 1")
