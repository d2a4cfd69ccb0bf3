"""Models with fake-quantized weights: prepare one for training, and convert it to codes.

A parametrization of the weight of each linear layer rounds it, so neither the layer nor the
optimizer has to know about rounding (Jacob et al., CVPR 2018, section 3). `heal.py` trains such a
model; `quantize.py` makes codes without training.
"""

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.activations import Dynamic, check_input_granularity
from qcourse.methods.qat import FakeQuantized, straight_through
from qcourse.numerics.quantized import Quantizer
from qcourse.numerics.validation import check_quantizer
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

    `quantizer` is for the weights, `inputs` for the activations (tokens, in): PerChannel(0) gives
    one scale per token (BitNet has 8 bits), PerTensor() one per batch, PerGroup one per group of a
    token. With learned_scale the scales of the weights are trained too (LSQ). `layers` are those of
    `quantize_model`. Raises TypeError if inputs is no quantizer, ValueError if it has a scale per
    channel, and both as ``FakeQuantized`` and ``selection.choose``.

    >>> from qcourse import IntQuantizer
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> student = prepare_qat(model, IntQuantizer(2))
    >>> int(student[0].weight.unique().numel()) <= 4, int(model[0].weight.unique().numel())
    (True, 8)
    """
    if inputs is not None:
        check_quantizer(inputs, "inputs")
        check_input_granularity(inputs.granularity)
    chosen, _ = choose(model, layers, quantizer.granularity, "refuse")
    student = copy.deepcopy(model).requires_grad_(True).train()
    for name in chosen:
        layer: Any = student.get_submodule(name)
        # The layer keeps w as the trained parameter and multiplies by the rounded w.
        grid = FakeQuantized(quantizer, layer.weight, learned_scale=learned_scale)
        parametrize.register_parametrization(layer, "weight", grid)
        if inputs is not None:
            layer.register_forward_pre_hook(_RoundedInput(inputs))
    return student


def convert_qat(student: nn.Module) -> nn.Module:
    """Return the trained model with ``QuantizedLinear`` layers; the student stays as it is.

    Raises ValueError if the student was not prepared.
    """
    model = copy.deepcopy(student)
    # The codes are those that the trained weights round to.
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
    if parametrize.is_parametrized(layer, "weight"):
        parametrizations: Any = layer.parametrizations
        for each in parametrizations.weight:
            if isinstance(each, FakeQuantized):
                return each
    return None


def _converted(layer: Any, grid: FakeQuantized) -> QuantizedLinear:
    q = grid.quantized(layer.parametrizations.weight.original.detach())
    # The inputs are rounded at inference too, on the range that they have at each call.
    inputs = None
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, _RoundedInput):
            inputs = Dynamic(hook.quantizer)
    return QuantizedLinear(q, layer.bias, inputs=inputs)


class _RoundedInput:
    """A hook that rounds the input of a layer as (tokens, in); gradients pass straight through."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        (x,) = args
        rows = x.reshape(-1, x.shape[-1])  # (tokens, in)
        return straight_through(rows, self.quantizer).reshape(x.shape)
