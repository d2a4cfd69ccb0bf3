"""Inputs as codes too: W8A8, W4A8, W4A4, whatever chooses the codes of the weights.

The idea: a product of integers needs integers on both sides, so what enters a layer is rounded as well. That is one
function of x, kept beside the layer's codes: on x's own range, found anew at each call (dynamic), or on a range fixed
beforehand by calibration (static: nothing to search at run time, but what leaves the range is clipped). A value that
wraps any method adds it, so that methods for weights need not know.

The product itself is simulated: x_hat and w_hat are floats that codes stand for. ``kernels.int8_matmul`` multiplies the
codes; the result is the same up to rounding in the last digits.

Source: Jacob et al. (CVPR 2018), section 3.1, for fixed ranges; ZeroQuant (Yao et al., NeurIPS 2022) for one a token.

How it differs from ``method.py``: there, what chooses the codes of weights; here, what is done to their inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from qcourse.methods.method import as_method
from qcourse.numerics.chunks import wide
from qcourse.numerics.granularity import PerChannel, PerGroup, PerTensor
from qcourse.numerics.quantized import QuantizedTensor, Quantizer


@runtime_checkable
class Inputs(Protocol):
    """What a layer does to its inputs: a value with a quantizer, called as value(x) -> x_hat on x (tokens, in)."""

    @property
    def quantizer(self) -> Quantizer:
        """Makes the codes that x_hat stands for."""

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """x as it enters the product."""


@dataclass(frozen=True)
class Dynamic:
    """x_hat on the range that x has at this call.

    >>> from qcourse import IntQuantizer, PerChannel
    >>> Dynamic(IntQuantizer(4, granularity=PerChannel(0)))(torch.tensor([[0.3, 7.0], [0.1, 0.7]])).tolist()[0]
    [0.0, 7.0]
    """

    quantizer: Quantizer

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """Quantize x and decode it; raises what the quantizer raises, for NaN say."""
        return self.quantizer(x).dequantize()


@dataclass(frozen=True)
class Static:
    """x_hat on one range for good: what lies outside [low, high] is clipped.

    >>> from qcourse import IntQuantizer
    >>> Static(IntQuantizer(4), -7.0, 7.0)(torch.tensor([[0.3, 2.6, 9.0]])).tolist()
    [[0.0, 3.0, 7.0]]
    """

    quantizer: (
        Any  # a Quantizer that makes parameters of a range too, as IntQuantizer.from_range does
    )
    low: float
    high: float

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """Encode x and decode it; raises what the quantizer raises, for NaN say."""
        low, high = (
            torch.tensor(end, dtype=torch.float64, device=x.device) for end in (self.low, self.high)
        )
        parameters = self.quantizer.from_range(low, high)
        return self.quantizer.decode(self.quantizer.encode(x, parameters), parameters)


class _Seen(NamedTuple):
    """What is known of a layer's inputs: what the weights' method saw, and each channel's smallest and largest."""

    inner: Any
    ends: Tensor | None  # (2, in); None unless the range is to be fixed


class _Result(NamedTuple):
    """A method's result for one layer, and what is done to the layer's inputs."""

    quantized: QuantizedTensor
    input_scale: Tensor | None
    input_order: Tensor | None
    note: str
    inputs: Inputs


@dataclass(frozen=True)
class WithActivations:
    """A method for ``quantize_model`` that gives each layer's weight codes by `weights`, and its inputs by `inputs`.

    Where `weights` divides the inputs by a scale first (SmoothQuant, AWQ), what is quantized is the quotient.

    Args:
        weights: a quantizer, or any method.
        inputs: a quantizer of x (tokens, in) with a scale for all of it (``PerTensor()``), a token (``PerChannel(0)``)
            or a group of a token's channels (``PerGroup``); or a value as ``Inputs`` says, such as ``OutlierColumns``.
        static: True fixes each layer's range: the smallest and largest input that calibration brings. For a quantizer
            with one scale a tensor.

    Raises:
        TypeError: weights or inputs is none of these.
        ValueError: a scale that changes from channel to channel, which cannot leave the sum of a product; static with
            anything but one scale a tensor.

    >>> from qcourse import IntQuantizer, PerChannel, quantize_model
    >>> int8 = IntQuantizer(8, granularity=PerChannel(0))  # a scale an output of w, and a token of x
    >>> quantized, report = quantize_model(torch.nn.Linear(64, 32), WithActivations(int8, int8), progress=False)
    >>> report.layers[0].note
    'inputs in 8 bits, dynamic'
    """

    weights: object
    inputs: object
    static: bool = False

    def __post_init__(self) -> None:
        as_method(self.weights)
        if isinstance(self.inputs, type) or not isinstance(self.inputs, Quantizer | Inputs):
            raise TypeError(
                f"inputs={self.inputs!r} must be a quantizer such as IntQuantizer(8), or OutlierColumns(...)"
            )
        granularity = (
            self.inputs if isinstance(self.inputs, Quantizer) else self.inputs.quantizer
        ).granularity
        if granularity not in (PerTensor(), PerChannel(0)) and not isinstance(
            granularity, PerGroup
        ):
            raise ValueError(
                f"inputs have the granularity {granularity}: a scale for each channel cannot leave the sum over"
                " channels; use PerTensor(), PerChannel(0) for one a token, or PerGroup(size)"
            )
        fixable = isinstance(self.inputs, Quantizer) and hasattr(self.inputs, "from_range")
        if self.static and not (fixable and granularity == PerTensor()):
            raise ValueError(
                f"static=True needs one scale for all inputs of a layer, PerTensor(), got {self.inputs!r}"
            )

    @property
    def quantizer(self) -> Quantizer:
        """That of the weights."""
        return as_method(self.weights).quantizer

    @property
    def calibrated(self) -> bool:
        """Whether the weights' method needs inputs, or the range does."""
        return self.static or as_method(self.weights).calibrated

    def observe(self, seen: _Seen | None, x: Float[Tensor, "tokens in"]) -> _Seen:
        """What the weights' method wants to know, and where the range is to be fixed, each channel's."""
        inner, ends = seen or (None, None)
        method = as_method(self.weights)
        if self.static:
            now = torch.stack(x.aminmax(dim=0)).to(wide(x.dtype))  # (2, in)
            met = now if ends is None else torch.cat([ends, now])
            ends = torch.stack(met.aminmax(dim=0))
        return _Seen(method.observe(inner, x) if method.calibrated else None, ends)

    def quantize(self, weights: Mapping[str, Tensor], seen: _Seen | None) -> dict[str, _Result]:
        """What the weights' method chooses, and what becomes of the inputs."""
        chosen = as_method(self.weights).quantize(weights, seen and seen.inner)
        return {name: self._with_inputs(result, seen) for name, result in chosen.items()}

    def _with_inputs(self, result: Any, seen: _Seen | None) -> _Result:
        scale = getattr(result, "input_scale", None)
        inputs = self.inputs if isinstance(self.inputs, Inputs) else Dynamic(self.inputs)  # type: ignore[arg-type]
        if self.static and seen is not None and seen.ends is not None:
            ends = seen.ends if scale is None else seen.ends / scale
            inputs = Static(self.inputs, float(ends.min()), float(ends.max()))
        note = f"inputs in {inputs.quantizer.bits} bits, {'static' if self.static else 'dynamic'}"
        note = "; ".join(
            filter(None, [getattr(result, "note", ""), note, getattr(inputs, "note", "")])
        )
        quantized = getattr(result, "quantized", result)
        return _Result(quantized, scale, getattr(result, "input_order", None), note, inputs)
