"""Models with fake-quantized weights: prepare one for training, and convert it to codes.

The idea: ``prepare_qat`` puts a parametrization on the weight of each linear layer, so neither the
layer nor the optimizer has to know about rounding. ``convert_qat`` takes the codes of the trained
weights; the result is a model as of ``quantize_model``, with other codes.

Source: Jacob et al., "Quantization and training of neural networks for efficient
integer-arithmetic-only inference" (CVPR 2018), section 3.

How it differs from ``quantize.py``: that changes a weight only by rounding it.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.activations import Dynamic
from qcourse.methods.qat import FakeQuantized, straight_through
from qcourse.numerics.quantized import Quantizer
from qcourse.recipes.selection import Layers, choose


def prepare_qat(
    model: nn.Module,
    quantizer: Quantizer,
    *,
    inputs: Quantizer | None = None,
    learned_scale: bool = False,
    layers: Layers = None,
) -> nn.Module:
    """Return a copy to train, whose linear layers multiply by fake_quantize(w).

    Args:
        model: any module with nn.Linear layers; not changed.
        quantizer: of the weights.
        inputs: of the activations, per token (8 bits in BitNet); None leaves them.
        learned_scale: whether the scales are trained too (LSQ), from the quantizer's scales on.
        layers: as in ``quantize_model``; by default all but the head.

    Raises:
        TypeError, ValueError: as ``FakeQuantized`` and ``selection.choose``.

    >>> from qcourse import IntQuantizer
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> student = prepare_qat(model, IntQuantizer(2))
    >>> int(student[0].weight.unique().numel()) <= 4, int(model[0].weight.unique().numel())
    (True, 8)
    """
    chosen, _ = choose(model, layers, quantizer.granularity, "refuse")
    student = copy.deepcopy(model).requires_grad_(True).train()
    for name in chosen:
        layer: Any = student.get_submodule(name)
        grid = FakeQuantized(quantizer, layer.weight, learned_scale=learned_scale)
        parametrize.register_parametrization(layer, "weight", grid)
        if inputs is not None:
            layer.register_forward_pre_hook(_RoundedInput(inputs))
    return student


def convert_qat(student: nn.Module) -> nn.Module:
    """Return the trained model with ``QuantizedLinear`` layers; the student stays as it is.

    Raises:
        ValueError: it was not prepared.
    """
    model = copy.deepcopy(student)
    converted = {}
    for name, layer in model.named_modules():
        grid = _grid_of(layer)
        if grid is not None:
            converted[name] = _converted(layer, grid)
    if not converted:
        raise ValueError(
            f"student must come from prepare_qat: this {type(student).__name__} has no"
            " fake-quantized layer"
        )
    if "" in converted:  # the model itself is a linear layer
        return converted[""].eval()
    for name, layer in converted.items():
        model.set_submodule(name, layer)
    return model.eval().requires_grad_(False)


def _grid_of(layer: nn.Module) -> FakeQuantized | None:
    """The fake quantization of a layer's weight, if there is one."""
    if parametrize.is_parametrized(layer, "weight"):
        parametrizations: Any = layer.parametrizations
        for each in parametrizations.weight:
            if isinstance(each, FakeQuantized):
                return each
    return None


def _converted(layer: Any, grid: FakeQuantized) -> QuantizedLinear:
    """The layer of codes for a trained layer, which rounds its inputs as that did."""
    q = grid.quantized(layer.parametrizations.weight.original.detach())
    inputs = None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _RoundedInput):
            inputs = Dynamic(hook.quantizer)
    return QuantizedLinear(q, layer.bias, inputs=inputs)


class _RoundedInput:
    """A hook that rounds the input of a layer, token by token; gradients pass straight through."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        (x,) = args
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        return straight_through(rows, self.quantizer).reshape(x.shape)
