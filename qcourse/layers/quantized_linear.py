"""A linear layer that stores codes: y = (x / input_scale) w_hat^T + bias, w_hat decoded per call.

A quantized model is small because it stores packed codes, scales and zero points. The floats exist
only during a product. (It is also fast with a kernel that never writes them to memory; this layer
is the plain form, for any quantizer.)

Source: weight-only quantization as in GPTQ (Frantar et al., ICLR 2023), section 4; the run-time
input scale as in AWQ (Lin et al., MLSys 2024), section 3.2.
`linears.map_weights` stores a rounded float weight; this stores codes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qcourse.methods.method import Inputs
from qcourse.numerics.packing import pack, unpack
from qcourse.numerics.quantized import QuantizedTensor, Quantizer


@dataclass(frozen=True)
class BufferLayout:
    """How a quantized weight (out, in) is stored: codes and zero points packed, the rest as it is.

    Codes are int8 if `signed`, else uint8; `parameters` is the dataclass that the quantizer's
    ``fit`` returns.
    """

    quantizer: Quantizer
    shape: tuple[int, ...]
    signed: bool
    parameters: type

    @classmethod
    def of(cls, q: QuantizedTensor) -> "BufferLayout":
        """Return the layout that stores q; ValueError unless q is a matrix of q.bits-bit codes."""
        # Packing keeps the lowest bits of each code, so signed codes become two's complement.
        signed = q.codes.dtype == torch.int8
        if q.codes.ndim != 2 or not q.codes.numel():
            raise ValueError(
                f"codes of a linear layer are a matrix (out, in), got the shape {tuple(q.shape)}"
            )
        # int8 codes of 4 bits reach from -8 to 7.
        largest = int(q.codes.max())
        too_large = signed and largest >= 1 << q.bits - 1
        if too_large or q.codes.dtype not in (torch.int8, torch.uint8):
            raise ValueError(
                f"codes must be two's complement in int8 or unsigned in uint8, of {q.bits} bits;"
                f" got {q.codes.dtype} up to {largest}"
            )
        return cls(q.quantizer, tuple(q.shape), signed, type(q.parameters))

    def write(self, q: QuantizedTensor) -> dict[str, Tensor | None]:
        """Return the tensors that store q, by name; None for zero points that are all 0."""
        tensors: dict[str, Tensor | None] = {"packed": pack(q.codes, q.bits)}
        for field in fields(self.parameters):
            value = getattr(q.parameters, field.name)
            if field.name == "zero_point":
                # Symmetric grids have only zeros here, which need no memory.
                value = pack(value, q.bits) if value.any() else None
            tensors[field.name] = value
        return tensors

    def read(self, tensors: Mapping[str, Tensor | None]) -> QuantizedTensor:
        """Invert ``write``; errors as of ``unpack``, and KeyError for a missing tensor."""
        # Parameters that were not stored are None, and zero points all 0.
        parameters = {field.name: tensors.get(field.name) for field in fields(self.parameters)}
        if "zero_point" in parameters:
            scale: Any = tensors["scale"]
            parameters["zero_point"] = self._zero_point(parameters["zero_point"], scale)
        codes = self._unpack(tensors["packed"], torch.Size(self.shape))
        return QuantizedTensor(codes, self.parameters(**parameters), self.quantizer)

    def _zero_point(self, packed: Tensor | None, scale: Tensor) -> Tensor:
        if packed is not None:
            return self._unpack(packed, scale.shape)
        # Zero points are codes, so they have the dtype of the codes.
        return torch.zeros_like(scale, dtype=torch.int8 if self.signed else torch.uint8)

    def _unpack(self, packed: Any, shape: torch.Size) -> Tensor:
        codes = unpack(packed, self.quantizer.bits, shape.numel(), signed=self.signed)
        return codes.reshape(shape)


class QuantizedLinear(nn.Module):
    """A linear layer with a quantized weight, stored as packed codes; for inference only.

    Args:
        q: the weight (out, in).
        bias: (out,), or None.
        input_scale: (in,); x is divided by it first, so q stands for w * input_scale.
        input_order: (in,), a permutation; column j of q meets input ``input_order[j]``.
        inputs: a value of ``activations.py`` that rounds the divided inputs; None leaves them.

    Raises:
        ValueError: q is no matrix of int8 or uint8 codes; another argument has a wrong length.

    >>> from qcourse import IntQuantizer
    >>> layer = QuantizedLinear(IntQuantizer(bits=4)(torch.randn(32, 64)), torch.zeros(32))
    >>> layer.packed.dtype, layer.nbytes  # half a byte per weight, one scale, 32 biases
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
        self.layout = BufferLayout.of(q)
        self.inputs = inputs
        self.out_features, self.in_features = self.layout.shape
        _check_shape("bias", bias, self.out_features)
        _check_shape("input_scale", input_scale, self.in_features)
        _check_shape("input_order", input_order, self.in_features)

        # Buffers, not parameters: they follow the model to a device and get no gradient.
        tensors = self.layout.write(q)
        tensors |= {"bias": bias, "input_scale": input_scale, "input_order": input_order}
        for name, value in tensors.items():
            self.register_buffer(name, None if value is None else value.detach().clone())

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it was given: the same codes, scales and zero points."""
        return self.layout.read(dict(self.named_buffers()))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The float weight that x is multiplied by in effect; decoded at each use."""
        w_hat = self.quantized.dequantize()
        # (x / s) w_hat^T = x (w_hat / s)^T
        if self.input_scale is not None:
            w_hat = w_hat / self._reordered(self.input_scale)
        if self.input_order is not None:
            w_hat = w_hat[:, self.input_order.argsort()]  # back to the order of the inputs
        return w_hat

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the layer."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the product with the weight, decoded to the input's dtype, plus the bias."""
        # Decode once per call; the kernel of a fast layer would not store w_hat.
        x = self._rounded_quotient(input)
        w_hat = self.quantized.dequantize().to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(self._reordered(x), w_hat, bias)

    def rounded(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """Return x as ``inputs`` rounds it: the output is rounded(x) weight^T + bias."""
        if self.inputs is None:
            return x
        # Back from units of x / input_scale to units of x.
        quotient = self._rounded_quotient(x)
        if self.input_scale is None:
            return quotient
        return (quotient * self.input_scale).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what ``print(model)`` shows of the layer."""
        parts = [f"{self.in_features}, {self.out_features}", f"bias={self.bias is not None}"]
        parts.append(str(self.layout.quantizer))
        if self.inputs is not None:
            parts.append(f"inputs={self.inputs}")
        return ", ".join(parts)

    def _rounded_quotient(self, x: Tensor) -> Tensor:
        """x / input_scale, rounded by ``inputs``."""
        if self.input_scale is not None:
            x = (x / self.input_scale).to(x.dtype)
        if self.inputs is None or not x.numel():
            return x
        # Rounding is per token, whatever the axes before are.
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        return self.inputs(rows).to(x.dtype).reshape(x.shape)

    def _reordered(self, x: Tensor) -> Tensor:
        return x if self.input_order is None else x[..., self.input_order]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        # Follow the model to another device, never to another dtype: model.half() would round the
        # scales once more.
        def moved(buffer: Tensor) -> Tensor:
            device = fn(buffer.new_empty(0)).device
            return buffer.to(device)

        return super()._apply(moved, recurse)


def _check_shape(name: str, value: Tensor | None, length: int) -> None:
    if value is not None and value.shape != (length,):
        raise ValueError(f"{name} must have the shape {(length,)}, got {tuple(value.shape)}")
