"""What a quantization method is to ``quantize_model``: a value that looks at inputs, and then chooses codes.

The idea: methods differ in two things only. What they want to know of a layer's inputs (nothing; the second moment
X^T X; the mean magnitude), which a step ``observe(seen, x)`` gathers batch by batch, so that no activations pile up.
And how they choose codes by it, ``quantize(weights, seen)``. It is given all layers that read the same input at once (a
Llama's q, k and v; its gate and up): what was seen is theirs in common, and so must be a scale that moves to their
predecessor.

Source: the steps that GPTQ (Frantar et al., ICLR 2023) and AWQ (Lin et al., MLSys 2024) share.

How it differs from ``quantize.py``: here is what one group of layers asks for; there, the way through a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import in_layer


@runtime_checkable
class Observer(Protocol):
    """What gathers something of a layer's inputs, batch by batch."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs inputs; without, ``observe`` is not called and what is seen is None."""

    def observe(self, seen: Any, x: Tensor) -> Any:
        """What is known after x (tokens, in) as well, in the model's dtype; seen is None before the first x alone.

        It may reuse seen's memory.
        """


@runtime_checkable
class Method(Observer, Protocol):
    """What ``quantize_model`` asks of a method; nothing has to be derived from it.

    A method that wants the second moment of the inputs is, with imports aside, no more than

        @dataclass(frozen=True)
        class Gptq:
            quantizer: Quantizer
            calibrated = True

            def observe(self, seen, x):
                x = x.float()  # in bfloat16 the sum would stop growing
                return x.T @ x if seen is None else seen.addmm_(x.T, x)

            def quantize(self, weights, seen):
                return {name: gptq(w, seen, self.quantizer) for name, w in weights.items()}
    """

    @property
    def quantizer(self) -> Quantizer:
        """Encodes and decodes the weights of every layer."""

    def quantize(self, weights: Mapping[str, Tensor], seen: Any) -> Mapping[str, Any]:
        """For each layer's name, given its weight (out, in), the codes: a QuantizedTensor, or an object that has it.

        The object has it as ``.quantized`` and may have, beside it, ``.input_scale``, ``.input_order`` and ``.inputs``
        as ``QuantizedLinear`` takes them, and ``.note``, words for the report. An input_scale that is to be folded into
        the predecessor must be the same for all the layers. The weights are the model's own: not to be changed.
        """


@dataclass(frozen=True)
class RoundToNearest:
    """Each weight becomes its nearest code on the quantizer's own grid, whatever the inputs.

    >>> from qcourse import IntQuantizer
    >>> import torch
    >>> w = torch.tensor([[0.0, 0.4, 1.4]])
    >>> RoundToNearest(IntQuantizer(bits=4)).quantize({"layer": w}, None)["layer"].codes.tolist()
    [[0, 2, 7]]
    """

    quantizer: Quantizer
    calibrated: ClassVar[bool] = False

    def observe(self, seen: None, x: Tensor) -> None:
        """Nothing to know."""

    def quantize(self, weights: Mapping[str, Tensor], seen: None) -> dict[str, QuantizedTensor]:
        """The quantizer, layer by layer; ValueError, with the layer's name, for what it cannot hold."""
        result = {}
        for name, w in weights.items():
            with in_layer(name):
                result[name] = self.quantizer(w)
        return result


def as_method(method: object) -> Method:
    """A method as it is, a quantizer as round-to-nearest; TypeError for anything else.

    >>> as_method("gptq")
    Traceback (most recent call last):
    TypeError: method='gptq' must be a quantizer such as IntQuantizer(4), or a value with quantizer, calibrated, \
observe and quantize, such as RoundToNearest(IntQuantizer(4))
    """
    if not isinstance(method, type):
        if isinstance(method, Method):
            return method
        if isinstance(method, Quantizer):
            return RoundToNearest(method)
    raise TypeError(
        f"method={method!r} must be a quantizer such as IntQuantizer(4), or a value with quantizer, calibrated, observe"
        " and quantize, such as RoundToNearest(IntQuantizer(4))"
    )
