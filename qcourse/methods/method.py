"""The interface of a quantization method for ``quantize_model``: observe inputs, then choose codes.

The idea: ``observe(seen, x)`` gathers what a method needs to know about a layer's inputs, batch by
batch, so no activations are stored. ``quantize(weights, seen)`` then chooses the codes of all the
layers that read the same input, such as q, k and v, because a scale that moves into the predecessor
must be the same for all.
Source: the steps that GPTQ (Frantar et al., ICLR 2023) and AWQ (Lin et al., MLSys 2024) share.
How it differs from `recipes/quantize.py`: that module walks through a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import in_layer


@runtime_checkable
class Inputs(Protocol):
    """What a layer does to its inputs: value(x) -> x_hat on x (tokens, in)."""

    @property
    def quantizer(self) -> Quantizer:
        """Makes the codes that x_hat stands for."""

    def __call__(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """Return x as it enters the product."""


@dataclass(frozen=True, eq=False)
class LayerCodes:
    """What a method chooses for one layer: y = inputs(x / input_scale)[input_order] w_hat^T."""

    # w_hat: the codes (out, in) and their parameters.
    quantized: QuantizedTensor
    # What x is divided by; None is 1. A scale can move into the module before only if all layers
    # that read the same input have it.
    input_scale: Float[Tensor, " in"] | None = None
    # A permutation: column j of the codes meets input `input_order[j]`; None leaves the order.
    input_order: Int[Tensor, " in"] | None = None
    # How the divided inputs are rounded; None leaves them in floats.
    inputs: Inputs | None = None
    # Words for the report.
    note: str = ""


@runtime_checkable
class Observer(Protocol):
    """Anything that gathers information about a layer's inputs, batch by batch."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs inputs; if not, ``observe`` is never called and ``seen`` is None."""

    def observe(self, seen: Any, x: Tensor) -> Any:
        """Return what is known after x (tokens, in) too; may reuse seen, which starts as None."""


@runtime_checkable
class Method(Observer, Protocol):
    """What ``quantize_model`` asks of a method, without a base class."""

    # A complete method, for example:
    #
    #     @dataclass(frozen=True)
    #     class Gptq:
    #         quantizer: Quantizer
    #         calibrated = True
    #
    #         def observe(self, seen, x):
    #             x = x.float()  # in bfloat16 the sum would stop growing
    #             return x.T @ x if seen is None else seen.addmm_(x.T, x)
    #
    #         def quantize(self, weights, seen):
    #             return {name: gptq(w, seen, self.quantizer) for name, w in weights.items()}

    @property
    def quantizer(self) -> Quantizer:
        """Encodes and decodes the weights of every layer."""

    def quantize(
        self, weights: Mapping[str, Tensor], seen: Any
    ) -> Mapping[str, QuantizedTensor | LayerCodes]:
        """Return the result for each layer's name, given its weight (out, in), left unchanged."""


@dataclass(frozen=True)
class RoundToNearest:
    """RTN: each weight becomes its nearest code on the quantizer's grid, without calibration.

    >>> from qcourse import IntQuantizer
    >>> import torch
    >>> method = RoundToNearest(IntQuantizer(bits=4))
    >>> method.quantize({"layer": torch.tensor([[0.0, 0.4, 1.4]])}, None)["layer"].codes.tolist()
    [[0, 2, 7]]
    """

    quantizer: Quantizer
    calibrated: ClassVar[bool] = False

    def observe(self, seen: None, x: Tensor) -> None:
        """Return None: nothing needs to be known."""

    def quantize(self, weights: Mapping[str, Tensor], seen: None) -> dict[str, QuantizedTensor]:
        """Return the quantized weight of each layer; a ValueError names the layer."""
        results = {}
        for name, w in weights.items():
            with in_layer(name):
                results[name] = self.quantizer(w)
        return results


def choose_codes(method: Method, weights: Mapping[str, Tensor], seen: Any) -> dict[str, LayerCodes]:
    """Return ``method.quantize(weights, seen)`` with each bare QuantizedTensor in a LayerCodes.

    Raises TypeError if the method returns anything else.
    """
    results = {}
    for name, result in method.quantize(weights, seen).items():
        if isinstance(result, QuantizedTensor):
            result = LayerCodes(result)
        if not isinstance(result, LayerCodes):
            raise TypeError(
                f"{method!r} returned a {type(result).__name__} for layer {name!r}; quantize"
                " returns a QuantizedTensor or a LayerCodes (qcourse.methods.method) per layer"
            )
        results[name] = result
    return results


def as_method(method: object) -> Method:
    """Return a method as it is and a quantizer as RTN; TypeError for anything else.

    >>> as_method("gptq")
    Traceback (most recent call last):
    TypeError: method='gptq' must be a quantizer such as IntQuantizer(4), or a value with \
quantizer, calibrated, observe and quantize, such as RoundToNearest(IntQuantizer(4))
    """
    # A class has the attributes too, but is not a value.
    if not isinstance(method, type):
        if isinstance(method, Method):
            return method
        if isinstance(method, Quantizer):
            return RoundToNearest(method)
    raise TypeError(
        f"method={method!r} must be a quantizer such as IntQuantizer(4), or a value with "
        "quantizer, calibrated, observe and quantize, such as RoundToNearest(IntQuantizer(4))"
    )
