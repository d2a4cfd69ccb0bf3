"""A linear layer whose weight is multiplied in 4 bits.

The idea: the layer holds a packed weight as buffers, so the weight moves with its model and is
packed again on each device. A state dict stores the codes in the plain order of
``numerics.packing``, because the packing depends on the processor.

How it differs from ``quantized_linear.py``: that takes any quantizer and decodes the weight first.
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qcourse.kernels.int4_matmul import int4_matmul
from qcourse.kernels.int4_weight import BITS, Int4Weight
from qcourse.numerics.packing import pack, unpack


class Int4Linear(nn.Module):
    """y = (x / input_scale)[input_order] w_hat^T + bias, for inference.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        input_scale: (in,), or None; AWQ's scale where no earlier operation could absorb it.
        input_order: (in,), or None; GPTQ's order: column j multiplies input ``input_order[j]``.

    Raises:
        ValueError: bias, input_scale or input_order has the wrong length.

    >>> import torch
    >>> from qcourse import PerGroup, quantize
    >>> q = quantize(torch.randn(64, 128), 4, granularity=PerGroup(64))
    >>> Int4Linear(Int4Weight.from_quantized(q))(torch.zeros(3, 128)).shape
    torch.Size([3, 64])
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_order: Tensor | None

    def __init__(
        self,
        weight: Int4Weight,
        bias: Shaped[Tensor, "..."] | None = None,
        *,
        input_scale: Shaped[Tensor, "..."] | None = None,
        input_order: Shaped[Tensor, "..."] | None = None,
    ) -> None:
        super().__init__()
        self._extras: list[str] = []
        self.out_features, self.in_features = weight.shape
        self._hold(weight)
        self._register("bias", bias, length=self.out_features)
        self._register("input_scale", input_scale, length=self.in_features)
        self._register("input_order", input_order, length=self.in_features)

    @property
    def weight(self) -> Int4Weight:
        """The weight, built from the buffers."""
        extras = tuple(getattr(self, name) for name in self._extras)
        return Int4Weight(self.packed, self.scale, self.zero_point, extras, **self._fixed)

    @property
    def layout(self) -> str:
        """The name of the layout that the weight is packed in."""
        return self._fixed["layout"]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers of the layer."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the product in the input's dtype."""
        x = input
        if self.input_scale is not None:
            x = (x / self.input_scale).to(input.dtype)
        if self.input_order is not None:
            x = x[..., self.input_order]
        y = int4_matmul(x, self.weight)
        if self.bias is None:
            return y
        return y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Describe the layer for ``print(model)``."""
        has_bias = self.bias is not None
        quantizer = self._fixed["quantizer"]
        return f"{self.in_features}, {self.out_features}, bias={has_bias}, {quantizer}"

    def get_extra_state(self) -> Tensor:
        """Return the codes for a state dict, two per byte."""
        return pack(self.weight.codes(), BITS)

    def set_extra_state(self, state: Tensor) -> None:
        """Pack loaded codes, with the scales loaded before them, for this machine's kernel."""
        count = self.out_features * self.in_features
        flat = unpack(state, BITS, count, signed=False).to(self.scale.device)
        codes = flat.reshape(self.out_features, self.in_features)
        quantizer = self._fixed["quantizer"]
        weight = Int4Weight.from_codes(
            codes, self.scale, self.zero_point, quantizer, layout=self.layout
        )
        self._hold(weight)

    def _register(self, name: str, value: Tensor | None, *, length: int) -> None:
        if value is not None and value.shape != (length,):
            raise ValueError(f"{name} must have the shape {(length,)}, got {tuple(value.shape)}")
        own = None if value is None else value.detach().clone()
        self.register_buffer(name, own)

    def _hold(self, weight: Int4Weight) -> None:
        """Replace the buffers of the weight by those of another one."""
        for name in self._extras:
            delattr(self, name)
        self._extras = [f"extra_{i}" for i in range(len(weight.extras))]
        self._fixed: dict[str, Any] = {
            "quantizer": weight.quantizer,
            "shape": weight.shape,
            "layout": weight.layout,
        }
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        # A state dict stores the codes in plain order instead: see get_extra_state.
        self.register_buffer("packed", weight.packed, persistent=False)
        for name, extra in zip(self._extras, weight.extras, strict=True):
            self.register_buffer(name, extra, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        # Follow the model to another device, packed again for it, but never to another dtype:
        # model.bfloat16() changes neither codes nor scales.
        device = fn(self.scale.new_empty(0)).device
        self._hold(self.weight.to(device))

        def moved(buffer: Tensor) -> Tensor:
            return buffer.to(fn(buffer.new_empty(0)).device)

        return super()._apply(moved, recurse)
