"""A linear layer that stores codes: y = (x / input_scale) w_hat^T + bias, w_hat decoded anew at every call.

The idea: what makes a quantized model small is what it holds: codes, packed to the bit, with the scales and zero points
to read them by. The floats exist during a product only. (What makes it fast as well is a kernel that never writes them
to memory at all; this layer is the plain form that any quantizer fits.)

Source: weight-only quantization as in GPTQ (Frantar et al., ICLR 2023), section 4; the run-time input scale as in AWQ
(Lin et al., MLSys 2024), section 3.2, where no operation precedes that could take it.

How it differs from ``inspect.map_weights``: there, a float weight that went through codes; here, the codes themselves.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qcourse.methods.activations import Inputs
from qcourse.numerics.packing import pack, unpack
from qcourse.numerics.quantized import QuantizedTensor, Quantizer


@dataclass(frozen=True)
class BufferLayout:
    """How a quantized weight is kept as tensors: the codes and a zero point packed, other parameters as they are.

    Args:
        quantizer: decodes the codes.
        shape: (out, in).
        signed: whether codes are int8; otherwise uint8.
        parameters: the dataclass of tensors that the quantizer's ``fit`` returns.
    """

    quantizer: Quantizer
    shape: tuple[int, ...]
    signed: bool
    parameters: type

    @classmethod
    def of(cls, q: QuantizedTensor) -> "BufferLayout":
        """The layout that keeps q; raises ValueError where codes are no int8 or uint8 codes of q.bits bits."""
        signed = q.codes.dtype == torch.int8
        if q.codes.ndim != 2 or not q.codes.numel():
            raise ValueError(
                f"codes of a linear layer are a matrix (out, in), got the shape {tuple(q.shape)}"
            )
        if not (signed or q.codes.dtype == torch.uint8) or (
            signed and int(q.codes.max()) >= 1 << q.bits - 1
        ):
            raise ValueError(
                f"codes must be two's complement in int8 or unsigned in uint8, of {q.bits} bits; got"
                f" {q.codes.dtype} up to {int(q.codes.max())}"
            )
        return cls(q.quantizer, tuple(q.shape), signed, type(q.parameters))

    def write(self, q: QuantizedTensor) -> dict[str, Tensor | None]:
        """Name the tensors that q is kept as; None for zero points that are all 0, which take no memory."""
        kept: dict[str, Tensor | None] = {"packed": pack(q.codes, q.bits)}
        for field in fields(self.parameters):
            value = getattr(q.parameters, field.name)
            if field.name == "zero_point":
                value = pack(value, q.bits) if value.any() else None
            kept[field.name] = value
        return kept

    def read(self, kept: Mapping[str, Tensor | None]) -> QuantizedTensor:
        """The inverse of ``write``; raises what ``unpack`` raises, and KeyError for a tensor that is missing."""
        parameters = {field.name: kept.get(field.name) for field in fields(self.parameters)}
        if "zero_point" in parameters:
            parameters["zero_point"] = self._zero_point(parameters["zero_point"], kept["scale"])
        codes = self._unpack(kept["packed"], torch.Size(self.shape))
        return QuantizedTensor(codes, self.parameters(**parameters), self.quantizer)

    def _unpack(self, packed: Any, shape: torch.Size) -> Tensor:
        return unpack(packed, self.quantizer.bits, shape.numel(), signed=self.signed).reshape(shape)

    def _zero_point(self, packed: Tensor | None, scale: Any) -> Tensor:
        if packed is None:
            return torch.zeros_like(scale, dtype=torch.int8 if self.signed else torch.uint8)
        return self._unpack(packed, scale.shape)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight, held as packed codes; for inference, so nothing in it is trained.

    Args:
        q: the weight (out, in).
        bias: (out,), or None.
        input_scale: (in,); x is divided by it first, so q stands for w * input_scale.
        input_order: (in,), a permutation; column j of q meets input ``input_order[j]``.
        inputs: a value of ``activations.py`` that rounds the inputs, once they are divided; None leaves them.

    Raises:
        ValueError: q is no matrix of int8 or uint8 codes of its bits; another argument of the wrong length.

    >>> from qcourse import IntQuantizer
    >>> layer = QuantizedLinear(IntQuantizer(bits=4)(torch.randn(32, 64)), torch.zeros(32))
    >>> layer.packed.dtype, layer.nbytes  # half a byte a weight, a scale of 4 bytes, 32 biases of 4 bytes
    (torch.uint8, 1156)
    """

    packed: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_order: Tensor | None

    def __init__(
        self,
        q: QuantizedTensor,
        bias: Shaped[Tensor, "..."] | None = None,
        *,
        input_scale: Shaped[Tensor, "..."] | None = None,
        input_order: Shaped[Tensor, "..."] | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.inputs = BufferLayout.of(q), inputs
        self.out_features, self.in_features = self.layout.shape
        extra = {"bias": bias, "input_scale": input_scale, "input_order": input_order}
        for name, value in extra.items():
            expected = (self.out_features if name == "bias" else self.in_features,)
            if value is not None and value.shape != expected:
                raise ValueError(f"{name} must have the shape {expected}, got {tuple(value.shape)}")
        for name, value in {**self.layout.write(q), **extra}.items():
            self.register_buffer(name, None if value is None else value.detach().clone())

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it was given: the same codes, scales and zero points."""
        return self.layout.read(dict(self.named_buffers()))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The float weight that the layer acts by, w_hat / input_scale in the order of the inputs; made at each use."""
        w_hat = self.quantized.dequantize()
        if self.input_scale is not None:
            w_hat = w_hat / self._columns(self.input_scale)
        return w_hat if self.input_order is None else w_hat[:, self.input_order.argsort()]

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layer holds."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Decode the weight to the input's dtype and multiply; the argument is called as nn.Linear's is."""
        x = self._entering(input)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self._columns(x), self.quantized.dequantize().to(x.dtype), bias)

    def rounded(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """What becomes of x by ``inputs``, in x's own units: the layer's output is rounded(x) weight^T + bias."""
        if self.inputs is None:
            return x
        entering = self._entering(x)
        return entering if self.input_scale is None else (entering * self.input_scale).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        inputs = "" if self.inputs is None else f", inputs={self.inputs}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.layout.quantizer}{inputs}"

    def _entering(self, x: Tensor) -> Tensor:
        """x as it enters the product: divided by input_scale, and rounded."""
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        if self.inputs is None or not x.numel():
            return x
        return (
            self.inputs(x.reshape(-1, x.shape[-1])).to(x.dtype).reshape(x.shape)
        )  # (tokens, in) and back

    def _columns(self, x: Tensor) -> Tensor:
        return x if self.input_order is None else x[..., self.input_order]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # Follow the model to another device, but never to another dtype: model.half() would round the scales anew.
        return super()._apply(lambda buffer: buffer.to(fn(buffer.new_empty(0)).device), recurse)
