"""A linear layer whose weight is multiplied in 4 bits.

The idea: what ``nn.Linear`` is to F.linear, this is to ``int4_matmul``: it holds the packed weight as buffers, so that
it moves with its model, packed anew for each device. How codes are packed depends on the processor, so a state dict has
them in the plain order of ``numerics.packing``, and loading packs them. Its dtype is x's: model.bfloat16() leaves codes
and scales as they are.

How it differs from ``layers/quantized_linear.py``: that layer takes any quantizer and decodes before it multiplies.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qcourse.kernels.int4_matmul import int4_matmul
from qcourse.kernels.int4_weight import CODES, Int4Weight
from qcourse.numerics.packing import pack, unpack


class Int4Linear(nn.Module):
    """y = (x / input_scale)[input_order] w_hat^T + bias, for inference.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        input_scale: (in,), or None; AWQ's scale where nothing before the layer could take it.
        input_order: (in,), or None; GPTQ's order of columns, column j of the weight meets input ``input_order[j]``.

    Raises:
        ValueError: one of them of the wrong length.

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
        for name, value in {
            "bias": bias,
            "input_scale": input_scale,
            "input_order": input_order,
        }.items():
            expected = (self.out_features if name == "bias" else self.in_features,)
            if value is not None and value.shape != expected:
                raise ValueError(f"{name} must have the shape {expected}, got {tuple(value.shape)}")
            self.register_buffer(name, None if value is None else value.detach().clone())

    @property
    def weight(self) -> Int4Weight:
        """The weight, made of the buffers."""
        extras = tuple(getattr(self, name) for name in self._extras)
        return Int4Weight(self.packed, self.scale, self.zero_point, extras, **self._rest)

    @property
    def nbytes(self) -> int:
        """Bytes of all that the layer holds."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The product, in the input's dtype."""
        x = input if self.input_scale is None else (input / self.input_scale).to(input.dtype)
        x = x if self.input_order is None else x[..., self.input_order]
        y = int4_matmul(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the layer."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self._rest['quantizer']}"

    def _hold(self, weight: Int4Weight) -> None:
        """Make buffers of the weight's tensors."""
        for name in self._extras:
            delattr(self, name)
        self._extras = [f"extra_{i}" for i in range(len(weight.extras))]
        self._rest: dict[str, Any] = {
            name: getattr(weight, name) for name in ("quantizer", "shape", "layout")
        }
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        for name, value in zip(
            ["packed", *self._extras], [weight.packed, *weight.extras], strict=True
        ):
            self.register_buffer(
                name, value, persistent=False
            )  # in the state dict is get_extra_state

    def get_extra_state(self) -> Tensor:
        """The codes, two in a byte."""
        return pack(self.weight.codes(), 4)

    def set_extra_state(self, state: Tensor) -> None:
        """Pack codes, and the scales that have been loaded before them, as this machine's kernel reads them."""
        codes = unpack(state, 4, self.out_features * self.in_features, signed=False).reshape(
            self.out_features, -1
        )
        self._hold(
            replace(
                self.weight, packed=codes.to(self.scale.device), extras=(), layout=CODES
            ).repacked(self.layout)
        )

    @property
    def layout(self) -> str:
        """How the weight is packed."""
        return self._rest["layout"]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int4Linear":
        # Follow the model to another device, packed anew for it, but never to another dtype.
        self._hold(self.weight.to(fn(self.scale.new_empty(0)).device))
        return super()._apply(lambda buffer: buffer.to(fn(buffer.new_empty(0)).device), recurse)
