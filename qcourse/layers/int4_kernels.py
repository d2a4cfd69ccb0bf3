"""Turn quantized layers into layers that multiply packed codes: the same codes, in another order.

The idea: a method chooses codes once, on any machine. The machine that multiplies decides how they
lie in memory. So a model is saved with ``QuantizedLinear`` layers and converted after loading.

How it differs from ``quantize.py``: that chooses codes; this only moves them.
"""

from torch import nn

from qcourse.kernels.int4_weight import Int4Weight, check_int4_quantizer
from qcourse.layers.int4_linear import Int4Linear
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.numerics.validation import in_layer


def with_int4_kernels(model: nn.Module) -> nn.Module:
    """Replace each ``QuantizedLinear`` of the model in place by an ``Int4Linear``; return it.

    Raises:
        TypeError: a layer's codes are not integers.
        ValueError: no layer is quantized, or one has bits or groups that the kernels do not take,
            or rounds its inputs; then no layer has been changed.

    >>> from qcourse import IntQuantizer, PerGroup, quantize_model
    >>> int4 = IntQuantizer(4, granularity=PerGroup(32))
    >>> model, _ = quantize_model(nn.Sequential(nn.Linear(64, 32)), int4, progress=False)
    >>> with_int4_kernels(model)[0].weight.group_size
    32
    """
    # A layer may be used in two places; both names are listed.
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, QuantizedLinear)}
    if not layers:
        raise ValueError(
            f"model must have a QuantizedLinear layer, and this {type(model).__name__} has none"
        )
    # Convert all layers before the first is replaced, so that an error changes nothing.
    converted: dict[QuantizedLinear, Int4Linear] = {}
    for name, layer in layers.items():
        with in_layer(name):
            if layer not in converted:
                converted[layer] = _int4_linear(layer)
    if model in converted:  # the model is itself a layer
        return converted[model]
    for name, layer in layers.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, converted[layer])
    return model


def check_int4(quantizer: object, inputs: object, width: int) -> None:
    """Raise what ``with_int4_kernels`` raises for such a layer, before there are any codes.

    `width` is the number of its inputs, `inputs` what rounds them, or None.
    """
    if inputs is not None:
        raise ValueError(f"inputs={inputs} are rounded; the INT4 kernels take them as floats")
    check_int4_quantizer(quantizer, width)


def _int4_linear(layer: QuantizedLinear) -> Int4Linear:
    check_int4(layer.layout.quantizer, layer.inputs, layer.in_features)
    weight = Int4Weight.from_quantized(layer.quantized)
    return Int4Linear(
        weight, layer.bias, input_scale=layer.input_scale, input_order=layer.input_order
    )
