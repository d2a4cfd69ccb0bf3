"""Quantized layers handed to the INT4 kernels: the same codes, packed for the product that decodes as it goes.

The idea: a method chooses codes, and that is done once, on any machine; how codes lie in memory is the matter of the
machine that multiplies. So a model is saved with ``QuantizedLinear`` layers and turned into this after it is loaded.

How it differs from ``quantize.py``: no code changes here, only where it lies.
"""

from torch import nn

from qcourse.kernels.int4_weight import Int4Weight
from qcourse.layers.int4_linear import Int4Linear
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.numerics.validation import in_layer


def with_int4_kernels(model: nn.Module) -> nn.Module:
    """Turn each ``QuantizedLinear`` of a model, in place, into an ``Int4Linear``; returns the model.

    Raises:
        TypeError: a layer's codes are not integers.
        ValueError: there is no quantized layer; one has other bits or groups than the kernels take, or rounds its
            inputs: then no layer has been changed.

    >>> from qcourse import IntQuantizer, PerGroup, quantize_model
    >>> int4 = IntQuantizer(4, granularity=PerGroup(32))
    >>> model, _ = quantize_model(nn.Sequential(nn.Linear(64, 32)), int4, progress=False)
    >>> with_int4_kernels(model)[0].weight.group_size
    32
    """
    modules = model.named_modules(remove_duplicate=False)  # a layer may stand in two places
    layers = {name: each for name, each in modules if isinstance(each, QuantizedLinear)}
    if not layers:
        raise ValueError(
            f"model must have a QuantizedLinear layer, and this {type(model).__name__} has none"
        )
    made: dict[QuantizedLinear, Int4Linear] = {}
    for name, layer in layers.items():
        with in_layer(name):
            made[layer] = made.get(layer) or _int4(layer)
    if model in made:
        return made[model]
    for name, layer in layers.items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, made[layer])
    return model


def _int4(layer: QuantizedLinear) -> Int4Linear:
    if layer.inputs is not None:
        raise ValueError(f"inputs={layer.inputs} are rounded; the INT4 kernels take them as floats")
    weight = Int4Weight.from_quantized(layer.quantized)
    return Int4Linear(
        weight, layer.bias, input_scale=layer.input_scale, input_order=layer.input_order
    )
