"""AWQ: before rounding, enlarge the columns of the weight that meet large activations, and divide these instead.

The idea: w x = (w s)(x / s) for any scale s of the inputs. Rounding moves a weight by up to half a step whatever its
size, so a column multiplied by s_j has its error divided by s_j, and that costs the others nothing as long as the
largest value of its group, and so the step, does not grow. Columns that meet large activations deserve it:
s = mean|x|^alpha, alpha the one of a grid at which the outputs lose least, ||x (w - w_hat)^T||^2 with
w_hat = Q(w s) / s. At alpha = 0 nothing is scaled, so the result is never worse than rounding to nearest. Then each
scale of the quantizer is clipped where that pays (`clip.py`). Both searches judge by the inputs' second moment
(`second_moment.py`), for which the activations are visited once. From as many tokens as inputs on that is x^T x, and the time
grows no more; below, x itself serves, and is faster: a weight of 4096 x 4096 took 3.7 s with 512 tokens, and 21 s by
x^T x (benchmarks/results/awq_cpu.json: two cores; that of a weight of 1024 x 1024, 0.24 s and 0.35 s).

Source: Lin et al., "AWQ" (MLSys 2024), section 3.2; alpha in twentieths as in its published code. That divides s by
sqrt(max s * min s), which overflows in float16, and gives channels that were always 0 a scale near 0: here s is within
[0.01, 100]. It also leaves q and k unclipped; here the loss is that of the layer's own outputs, and they are clipped.

How it differs from ``gptq.py``: every weight goes to its nearest code, on a better grid; there, on the grid there is,
each rounding makes up for those before it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from qcourse.methods.clip import Rounding, shrunk
from qcourse.methods.second_moment import BySecondMoment, SecondMoment
from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import check_floating, check_matrix, check_quantizer, in_layer

LEAST = 1e-4  # mean |x| counts as at least this share of the largest: bounds s, and does not give up dead channels


@dataclass(frozen=True, eq=False)
class AWQResult:
    """The codes of w * input_scale, and what they lose: the layer is y = (x / input_scale) Q(w input_scale)^T.

    Args:
        quantized: codes and parameters, of the same size in storage as without AWQ.
        input_scale: by which x is to be divided, in the layer or before it; None in a model where alpha is 0.
        error: of the outputs, ||x w^T - x w_hat^T|| / ||x w^T||.
        alpha: the exponent that was chosen, in common for all layers that read the input.
        curve: the error at each alpha of the grid, before clipping, of all these layers together.
        shrink: the share of its range that each scale was made for, of the scales' shape; 1 is unclipped.
    """

    quantized: QuantizedTensor
    input_scale: Float[Tensor, " in"] | None
    error: float
    alpha: float
    curve: Float64[Tensor, " alphas"]
    shrink: Float[Tensor, "*scales"]

    @property
    def w_hat(self) -> Float[Tensor, "out in"]:
        """The weight that the layer acts by, Q(w input_scale) / input_scale."""
        w_hat = self.quantized.dequantize()
        return w_hat if self.input_scale is None else w_hat / self.input_scale

    @property
    def note(self) -> str:
        """Words for the report."""
        return f"alpha {self.alpha:.2f}, {float((self.shrink < 1).double().mean()):.0%} of scales clipped"


@dataclass(frozen=True)
class Awq(BySecondMoment):
    """AWQ as a method for ``quantize_model``: layers that read the same input share the scale, each has its own clips.

    While it observes, a layer's inputs take the memory of x, or of in x in numbers once x would be larger.

    Args:
        quantizer: the grid of every layer, with any granularity.
        clip: whether the range of each scale is searched too.
        grid: steps of alpha from 0 to 1; 0 is always tried.

    Raises:
        TypeError: quantizer is no quantizer.
        ValueError: grid is below 1.
    """

    quantizer: Quantizer
    clip: bool = True
    grid: int = 20

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        if type(self.grid) is not int or self.grid < 1:
            raise ValueError(
                f"grid={self.grid!r} must be a whole number (a Python int) of at least 1"
            )

    def quantize(self, weights: Mapping[str, Tensor], seen: SecondMoment) -> dict[str, AWQResult]:
        """One scale for all layers, the codes of each; ValueError, with its name, for a weight that cannot be."""
        for name, w in weights.items():
            with in_layer(name):
                check_matrix(w, "w")
                self.quantizer.fit(w)
        results = _search(weights, seen, self)
        return {
            name: result if result.alpha else replace(result, input_scale=None)
            for name, result in results.items()
        }


def awq(
    w: Shaped[Tensor, "..."],
    x: Shaped[Tensor, "..."],
    quantizer: Quantizer,
    *,
    clip: bool = True,
    grid: int = 20,
) -> AWQResult:
    """Codes of w s, with the alpha of s = mean|x|^alpha and the clips that make ||x (w - w_hat)^T|| least.

    Args:
        w: the weight (out, in).
        x: what enters the layer on calibration data (tokens, in).
        quantizer, clip, grid: as in ``Awq``.

    Returns:
        The codes, s, and the error on x: never above that of quantizer(w), nor with clip above that without.

    Raises:
        TypeError: w or x is no floating-point tensor; quantizer is no quantizer.
        ValueError: w or x is no matrix, is empty, or has NaN or infinity; the two differ in inputs; grid is below 1; w
            does not suit the quantizer.

    >>> from qcourse import IntQuantizer, PerGroup
    >>> generator = torch.Generator().manual_seed(0)
    >>> w, x = torch.randn(64, 128, generator=generator), torch.randn(256, 128, generator=generator)
    >>> x[:, ::50] *= 20  # three channels are outliers
    >>> quantizer = IntQuantizer(4, granularity=PerGroup(64))
    >>> to_nearest = x @ (quantizer(w).dequantize() - w).T
    >>> float(to_nearest.norm() / (x @ w.T).norm()) > 1.8 * awq(w, x, quantizer).error
    True
    """
    method = Awq(quantizer, clip, grid)
    check_matrix(w, "w")
    check_floating(x)
    seen = method.observe(None, x.to(torch.promote_types(w.dtype, x.dtype)))
    if w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w {tuple(w.shape)} and x {tuple(x.shape)} must have the same inputs, their last axis"
        )
    quantizer.fit(w)  # what it refuses, it says in its own words
    return _search({"": w}, seen, method)[""]


def _search(weights: Mapping[str, Tensor], seen: SecondMoment, method: Awq) -> dict[str, AWQResult]:
    """The alpha that is best for all weights together, then the clips of each."""
    moment = seen.as_one_group()
    weights = {name: w.detach().to(moment.stored.dtype) for name, w in weights.items()}
    unit = max(float(w.abs().max()) for w in weights.values()) or 1.0
    sizes = {name: float(moment.losses(w / unit).sum()) for name, w in weights.items()}
    scales, trials = _scales(seen.magnitude, method.grid, moment.stored.dtype), []
    for s in scales:
        rounding = Rounding(method.quantizer, moment.divided_by(s), s, unit)
        trials.append({name: rounding.losses(w) for name, w in weights.items()})
    totals = [sum(float(lost.sum()) for lost in trial.values()) for trial in trials]
    best = totals.index(min(totals))  # the first of equals: 0 where nothing is gained
    curve = torch.tensor(
        [_relative(total, sum(sizes.values())) for total in totals], dtype=torch.float64
    )
    rounding = Rounding(method.quantizer, moment.divided_by(scales[best]), scales[best], unit)
    results = {}
    for name, w in weights.items():
        q, shrink, lost = _quantized(w, rounding, trials[best][name], clip=method.clip)
        error = _relative(lost, sizes[name])
        results[name] = AWQResult(q, scales[best], error, best / method.grid, curve, shrink)
    return results


def _quantized(
    w: Tensor, rounding: Rounding, lost: Tensor, *, clip: bool
) -> tuple[QuantizedTensor, Tensor, float]:
    """The codes of w s, the share of its range that each scale is made for, and the loss, which was `lost` by row."""
    shape = rounding.quantizer.granularity.scale_shape(w.shape)
    shrink = torch.ones(shape or (1, 1), dtype=w.dtype, device=w.device)
    if clip:
        shrink, lost = rounding.clipped(w, lost)
    ws = w * rounding.s
    parameters = rounding.quantizer.fit(shrunk(ws, shrink))
    codes = rounding.quantizer.encode(ws, parameters)
    return (
        QuantizedTensor(codes, parameters, rounding.quantizer),
        shrink.reshape(shape),
        float(lost.sum()),
    )


def _scales(magnitude: Tensor, grid: int, dtype: torch.dtype) -> list[Float[Tensor, " in"]]:
    """s = mean|x|^alpha for alpha = 0, 1/grid, ..., 1, each divided by sqrt(max s * min s)."""
    largest = magnitude.max().clamp(min=torch.finfo(magnitude.dtype).tiny)
    share = (magnitude / largest).clamp(min=LEAST)
    powers = [share ** (i / grid) for i in range(grid + 1)]
    return [(s / (s.max() * s.min()).sqrt()).to(dtype) for s in powers]


def _relative(lost: float, size: float) -> float:
    """The root of lost / size; 0 where nothing is lost, which rounding in H may make a little less than nothing."""
    lost = max(lost, 0)
    return math.sqrt(lost / size) if size > 0 else math.inf if lost else 0.0
