"""A quantized model with its weights decoded once: the errors of the codes at the speed of floats.

The idea: a ``QuantizedLinear`` layer decodes its weight at each call, so a chat would decode every
weight for every token. A lesson that wants the answer, not the size, decodes each weight once.

How it differs from ``kernels/int4_matmul.py``: that multiplies packed codes and saves the bytes.
"""

from torch import nn

from qcourse.layers.quantized_linear import QuantizedLinear


def decode_weights(model: nn.Module) -> nn.Module:
    """Replace each ``QuantizedLinear`` of a model in place by a float layer; return the model.

    The float layer has the weight and bias that the quantized layer multiplies in effect.

    Raises:
        ValueError: no layer of the model is quantized, or one rounds its inputs, too.

    >>> import torch
    >>> from qcourse import IntQuantizer, quantize_model
    >>> model, _ = quantize_model(nn.Sequential(nn.Linear(64, 32)), IntQuantizer(4), progress=False)
    >>> x = torch.ones(1, 64)
    >>> before = model(x)
    >>> torch.equal(decode_weights(model)(x), before), type(model[0]).__name__
    (True, 'Linear')
    """
    # A layer may be used in two places; both names are listed.
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, QuantizedLinear)}
    if not layers:
        raise ValueError(
            f"model must have a QuantizedLinear layer, and this {type(model).__name__} has none"
        )
    for name, layer in layers.items():
        if layer.inputs is not None:
            raise ValueError(f"layer {name!r} rounds its inputs, which no float layer does")

    decoded: dict[QuantizedLinear, nn.Linear] = {}
    for name, layer in layers.items():
        if layer not in decoded:
            decoded[layer] = _float_layer(layer)
        if layer is model:
            return decoded[layer]
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, decoded[layer])
    return model


def _float_layer(layer: QuantizedLinear) -> nn.Linear:
    # On the meta device the new layer draws no random weights.
    has_bias = layer.bias is not None
    new = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    new.weight = nn.Parameter(layer.weight, requires_grad=False)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias, requires_grad=False)
    return new.eval()
