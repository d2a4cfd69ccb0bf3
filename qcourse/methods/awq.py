"""AWQ: enlarge the weight columns that meet large activations, and divide the activations.

The idea: w x = (w s)(x / s) for any scale s of the inputs. Multiplying column j by s_j divides its
rounding error by s_j, at no cost while the largest value of its group does not grow. Columns that
meet large activations gain most, so s = mean|x|^alpha, with the alpha that has the least
||x (w - w_hat)^T||^2, w_hat = Q(w s) / s. At alpha = 0 this is RTN, so AWQ is never worse.
Then each scale is clipped where that pays (`clip.py`).
Source: Lin et al., "AWQ" (MLSys 2024), section 3.2. Unlike in its code, s stays in [0.01, 100]:
float16 holds it, and dead channels keep their weights. And q and k are clipped too.
How it differs from `gptq.py`: AWQ rounds each weight to its nearest code on a better grid; GPTQ
keeps the grid and compensates each rounding error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from qcourse.methods.clip import ClipSearch, shrunk
from qcourse.methods.method import LayerCodes
from qcourse.methods.second_moment import BySecondMoment, SecondMoment
from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import check_floating, check_matrix, check_quantizer, in_layer
from qcourse.numerics.whole import check_whole

LEAST = 1e-4  # the floor of mean |x|, as a share of the largest: bounds s and keeps dead channels


@dataclass(frozen=True, eq=False, kw_only=True)
class AWQResult(LayerCodes):
    """The codes of w * input_scale: the layer is y = (x / input_scale) Q(w input_scale)^T."""

    # In a model, input_scale is None if alpha is 0.

    # Relative, not squared: ||x w^T - x w_hat^T|| / ||x w^T||.
    error: float
    # The chosen exponent, the same for all layers that read this input.
    alpha: float
    # The relative error at each alpha of the grid, before clipping, over all these layers.
    curve: Float64[Tensor, " alphas"]
    # The share of its range that each scale was made for; 1 is unclipped.
    shrink: Float[Tensor, "*scales"]

    @property
    def w_hat(self) -> Float[Tensor, "out in"]:
        """Return the weight in effect, Q(w input_scale) / input_scale."""
        w_hat = self.quantized.dequantize()
        return w_hat if self.input_scale is None else w_hat / self.input_scale


@dataclass(frozen=True)
class Awq(BySecondMoment):
    """AWQ as a method for ``quantize_model``; layers that read the same input share the scale."""

    quantizer: Quantizer
    clip: bool = True  # whether the range of each scale is searched too
    grid: int = 20  # the number of steps of alpha from 0 to 1

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        check_whole("grid", self.grid, least=1)

    def quantize(self, weights: Mapping[str, Tensor], seen: SecondMoment) -> dict[str, AWQResult]:
        """Return one scale for all layers and the codes of each; a ValueError names the layer."""
        for name, w in weights.items():
            with in_layer(name):
                check_matrix(w, "w")
                self.quantizer.fit(w)

        results = {}
        for name, result in _search(weights, seen, self).items():
            results[name] = result if result.alpha else replace(result, input_scale=None)
        return results


def awq(
    w: Shaped[Tensor, "..."],
    x: Shaped[Tensor, "..."],
    quantizer: Quantizer,
    *,
    clip: bool = True,
    grid: int = 20,
) -> AWQResult:
    """Return the codes of w s, with the alpha and clips that minimize ||x (w - w_hat)^T||.

    `x` (tokens, in) are inputs of the layer on calibration data; the options are those of ``Awq``.
    Raises TypeError or ValueError if an argument is invalid, or w and x differ in their inputs.

    >>> from qcourse import IntQuantizer, PerGroup
    >>> generator = torch.Generator().manual_seed(0)
    >>> w = torch.randn(64, 128, generator=generator)
    >>> x = torch.randn(256, 128, generator=generator)
    >>> x[:, ::50] *= 20  # three outlier channels
    >>> round(awq(w, x, IntQuantizer(4, granularity=PerGroup(64))).error, 2)  # RTN: 0.11
    0.05
    """
    method = Awq(quantizer, clip, grid)
    check_matrix(w, "w")
    check_floating(x)
    seen = method.observe(None, x.to(torch.promote_types(w.dtype, x.dtype)))
    if w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w {tuple(w.shape)} and x {tuple(x.shape)} must have the same inputs, their last axis"
        )
    quantizer.fit(w)  # raises the quantizer's own error for a weight it cannot take
    return _search({"": w}, seen, method)[""]


def _search(weights: Mapping[str, Tensor], seen: SecondMoment, method: Awq) -> dict[str, AWQResult]:
    """The best alpha for all weights together, then the clips of each weight."""
    moments = seen.as_one_group()
    weights = {name: w.detach().to(moments.stored.dtype) for name, w in weights.items()}
    unit = max(float(w.abs().max()) for w in weights.values()) or 1.0

    def search_with(s: Tensor) -> ClipSearch:
        return ClipSearch(method.quantizer, moments.divided_by(s), s, unit)

    # Try each alpha on all weights.
    scales = _scales(seen.sum_of_abs, method.grid, moments.stored.dtype)
    trials = [_unclipped_losses(weights, search_with(s)) for s in scales]
    totals = [sum(float(lost.sum()) for lost in losses.values()) for losses in trials]
    best = totals.index(min(totals))  # the first of equals: alpha is 0 if nothing is gained

    # Errors are relative to ||x w^T||^2, in units of unit^2.
    sizes = {name: float(moments.losses(w / unit).sum()) for name, w in weights.items()}
    curve = _curve(totals, sum(sizes.values()))

    # The moments of the best trial are made anew: those of all trials need too much memory.
    search = search_with(scales[best])
    alpha = best / method.grid
    results = {}
    for name, w in weights.items():
        q, shrink, lost = _quantized(w, search, trials[best][name], clip=method.clip)
        note = _note(alpha, shrink)
        error = _relative(lost, sizes[name])
        results[name] = AWQResult(
            q, search.s, note=note, error=error, alpha=alpha, curve=curve, shrink=shrink
        )
    return results


def _unclipped_losses(weights: Mapping[str, Tensor], search: ClipSearch) -> dict[str, Tensor]:
    return {name: search.unclipped_losses(w) for name, w in weights.items()}


def _quantized(
    w: Tensor, search: ClipSearch, losses: Tensor, *, clip: bool
) -> tuple[QuantizedTensor, Tensor, float]:
    """The codes of w s, the share of its range per scale, and the loss; `losses` is unclipped."""
    quantizer = search.quantizer
    shrink = w.new_ones(search.scale_shape(w))
    if clip:
        shrink, losses = search.best_shrinks(w, losses)

    # Fit the grid on the shrunk weights, but encode the weights themselves: that clips them.
    ws = w * search.s
    parameters = quantizer.fit(shrunk(ws, shrink))
    codes = quantizer.encode(ws, parameters)
    quantized = QuantizedTensor(codes, parameters, quantizer)
    shape = quantizer.granularity.scale_shape(w.shape)
    return quantized, shrink.reshape(shape), float(losses.sum())


def _scales(sum_of_abs: Tensor, grid: int, dtype: torch.dtype) -> list[Float[Tensor, " in"]]:
    """s = mean|x|^alpha / sqrt(max s * min s) for alpha = 0, 1/grid, ..., 1."""
    # A factor of the sum cancels in s, so the sum of |x| serves as the mean.
    largest = sum_of_abs.max().clamp(min=torch.finfo(sum_of_abs.dtype).tiny)
    share = (sum_of_abs / largest).clamp(min=LEAST)
    scales = []
    for i in range(grid + 1):
        s = share ** (i / grid)
        middle = (s.max() * s.min()).sqrt()
        scales.append((s / middle).to(dtype))
    return scales


def _curve(totals: list[float], size: float) -> Float64[Tensor, " alphas"]:
    return torch.tensor([_relative(lost, size) for lost in totals], dtype=torch.float64)


def _note(alpha: float, shrink: Tensor) -> str:
    clipped = float((shrink < 1).double().mean())
    return f"alpha {alpha:.2f}, {clipped:.0%} of scales clipped"


def _relative(lost: float, size: float) -> float:
    """sqrt(lost / size); rounding in H may make a loss of 0 slightly negative."""
    lost = max(lost, 0)
    if size > 0:
        return math.sqrt(lost / size)
    return math.inf if lost else 0.0
