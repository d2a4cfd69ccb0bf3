"""Quantized inputs: W8A8, W4A8, W4A4, with any method for the weights.

The idea: an integer product needs integers on both sides, so the inputs of a layer are rounded too.
Their range is found anew at each call (dynamic) or fixed by calibration (static), which clips
values outside the range. The product is simulated with the floats x_hat and w_hat.
Source: Jacob et al. (CVPR 2018), section 3.1, for static ranges; ZeroQuant (Yao et al., NeurIPS
2022) for one scale per token.
How it differs from `method.py`: that module is about the codes of the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.methods.method import Inputs, LayerCodes, as_method, choose_codes
from qcourse.numerics.chunks import wide
from qcourse.numerics.granularity import PerChannel, PerGroup, PerTensor
from qcourse.numerics.quantized import Quantizer


@dataclass(frozen=True)
class Dynamic:
    """x_hat on the range that x has at this call."""

    quantizer: Quantizer

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        return self.quantizer(x).dequantize()


@dataclass(frozen=True)
class Static:
    """x_hat on a fixed range: values outside [low, high] are clipped.

    >>> from qcourse import IntQuantizer
    >>> Static(IntQuantizer(4), -7.0, 7.0)(torch.tensor([[0.3, 2.6, 9.0]])).tolist()
    [[0.0, 3.0, 7.0]]
    """

    # A Quantizer that has `from_range` too, as IntQuantizer does.
    quantizer: Any
    low: float
    high: float

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        low = torch.tensor(self.low, dtype=torch.float64, device=x.device)
        high = torch.tensor(self.high, dtype=torch.float64, device=x.device)
        parameters = self.quantizer.from_range(low, high)
        codes = self.quantizer.encode(x, parameters)
        return self.quantizer.decode(codes, parameters)


class _Seen(NamedTuple):
    """What is known about a layer's inputs."""

    # What the method of the weights has seen.
    inner: Any
    # The smallest and largest value of each channel, (2, in); None unless the range is fixed.
    ends: Tensor | None


@dataclass(frozen=True)
class WithActivations:
    """A method for ``quantize_model`` that quantizes the weights and the inputs of each layer.

    If `weights` divides the inputs by a scale (SmoothQuant, AWQ), the quotient is quantized.

    >>> from qcourse import IntQuantizer, PerChannel, quantize_model
    >>> int8 = IntQuantizer(8, granularity=PerChannel(0))  # one scale per output and per token
    >>> method = WithActivations(int8, int8)
    >>> _, report = quantize_model(torch.nn.Linear(64, 32), method, progress=False)
    >>> report.layers[0].note
    'inputs in 8 bits, dynamic'
    """

    # A quantizer, or any method.
    weights: object
    # A quantizer of x (tokens, in) with PerTensor(), PerGroup, or PerChannel(0) for one scale per
    # token; or any `Inputs`, such as OutlierColumns.
    inputs: object
    # Whether calibration fixes the range of each layer; needs PerTensor().
    static: bool = False

    def __post_init__(self) -> None:
        as_method(self.weights)
        _check_inputs(self.inputs, static=self.static)

    @property
    def quantizer(self) -> Quantizer:
        return as_method(self.weights).quantizer

    @property
    def calibrated(self) -> bool:
        return self.static or as_method(self.weights).calibrated

    def observe(self, seen: _Seen | None, x: Float[Tensor, "tokens in"]) -> _Seen:
        """Return what the method of the weights has seen, and the extremes of each channel."""
        inner, ends = seen or (None, None)
        method = as_method(self.weights)
        if method.calibrated:
            inner = method.observe(inner, x)
        if self.static:
            # A batch in float16 must not round the extremes of earlier ones.
            new_ends = torch.stack(x.aminmax(dim=0)).to(wide(x.dtype))  # (2, in)
            all_ends = new_ends if ends is None else torch.cat([ends, new_ends])
            ends = torch.stack(all_ends.aminmax(dim=0))
        return _Seen(inner, ends)

    def quantize(self, weights: Mapping[str, Tensor], seen: _Seen | None) -> dict[str, LayerCodes]:
        """Return what the method of the weights chooses, and what happens to the inputs."""
        inner = None if seen is None else seen.inner
        chosen = choose_codes(as_method(self.weights), weights, inner)
        return {name: self._with_inputs(codes, seen) for name, codes in chosen.items()}

    def _with_inputs(self, codes: LayerCodes, seen: _Seen | None) -> LayerCodes:
        input_scale = codes.input_scale
        inputs = self.inputs
        if not isinstance(inputs, Inputs):
            inputs = Dynamic(inputs)  # type: ignore[arg-type]
        if self.static and seen is not None and seen.ends is not None:
            # The layer divides x by the scale before it rounds it, so the range is divided too.
            ends = seen.ends if input_scale is None else seen.ends / input_scale
            inputs = Static(self.inputs, float(ends.min()), float(ends.max()))

        kind = "static" if self.static else "dynamic"
        notes = [
            codes.note,
            f"inputs in {inputs.quantizer.bits} bits, {kind}",
            getattr(inputs, "note", ""),
        ]
        note = "; ".join(note for note in notes if note)
        return replace(codes, inputs=inputs, note=note)


def _check_inputs(inputs: object, *, static: bool) -> None:
    if isinstance(inputs, type) or not isinstance(inputs, Quantizer | Inputs):
        raise TypeError(
            f"inputs={inputs!r} must be a quantizer such as IntQuantizer(8), or OutlierColumns(...)"
        )
    quantizer = inputs if isinstance(inputs, Quantizer) else inputs.quantizer
    granularity = quantizer.granularity
    check_input_granularity(granularity)
    takes_range = isinstance(inputs, Quantizer) and hasattr(inputs, "from_range")
    if static and not (takes_range and granularity == PerTensor()):
        raise ValueError(
            f"static=True needs one scale for all inputs of a layer, PerTensor(), got {inputs!r}"
        )


def check_input_granularity(granularity: object) -> None:
    """Raise ValueError unless products of inputs (tokens, in) can use scales of this granularity.

    >>> check_input_granularity(PerChannel(0))  # one scale per token
    """
    # A scale per token or per tensor is a factor of the whole sum, one per group of a part of it.
    one_per_row = granularity in (PerTensor(), PerChannel(0))
    if not one_per_row and not isinstance(granularity, PerGroup):
        raise ValueError(
            f"inputs have the granularity {granularity}: a scale for each channel cannot leave the "
            "sum over channels; use PerTensor(), PerChannel(0) for one per token, or PerGroup(size)"
        )
