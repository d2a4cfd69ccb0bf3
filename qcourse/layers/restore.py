"""Put the tensors of a file back into a model: quantized layers anew, all else in its place.

Every tensor is checked before it is used, because a file may be damaged or belong to another model.
A message names the tensor. `storage.py` reads and writes the files.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from qcourse.layers.quantized_linear import BufferLayout, QuantizedLinear


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized layers of a model, by name."""
    modules = model.named_modules()
    return {name: each for name, each in modules if isinstance(each, QuantizedLinear)}


def take_tensors(layer: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the tensors of a layer from tensors; return them by their names within the layer."""
    taken = {}
    for name in list(tensors):
        path, _, key = name.rpartition(".")
        if path == layer:
            taken[key] = tensors.pop(name)
    return taken


def restored_layer(
    name: str, layout: BufferLayout, tensors: dict[str, Tensor], old: nn.Linear
) -> QuantizedLinear:
    """Return the layer of these tensors; ValueError if they fit neither layout nor old layer."""
    shape = (old.out_features, old.in_features)
    has_bias = "bias" in tensors
    if layout.shape != shape or has_bias != (old.bias is not None):
        raise ValueError(
            f"layer {name!r} is {layout.shape} {'with' if has_bias else 'without'} bias in the"
            f" file, {shape} {'without' if old.bias is None else 'with'} in the model"
        )
    try:
        # A damaged file shows when the quantizer decodes it.
        q = layout.read(tensors)
        q.dequantize()  # the quantizer checks shapes and values
        return QuantizedLinear(
            q,
            tensors.get("bias"),
            input_scale=tensors.get("input_scale"),
            input_order=tensors.get("input_order"),
        )
    except KeyError as error:
        missing = f"{name}.{error.args[0]}".removeprefix(".")
        raise ValueError(f"tensor {missing} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"layer {name!r} has a wrong tensor: {error}") from error


def restore_others(
    model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]
) -> None:
    """Give all modules but the quantized layers their tensors from the file.

    `tied` has, for other names of a tensor, the name under which it was saved. Raises ValueError
    for a tensor that is missing, left over, of the wrong shape, or on the device "meta".
    """
    quantized = quantized_layers(model)
    # Quantized layers already have their tensors.
    wanted = {}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in quantized:
            wanted[name] = tensor
    _check_names(wanted, tensors)
    parameters: dict[str, nn.Parameter] = {}
    for name, tensor in tensors.items():
        expected = tuple(wanted[name].shape)
        if tensor.shape != expected:
            raise ValueError(
                f"tensor {name} has the shape {tuple(tensor.shape)}, the model {expected}"
            )
        # Assigned directly, because a module on "meta" has nothing to copy into.
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._buffers:
            module._buffers[key] = tensor
        else:
            # Tied names get one parameter.
            first = tied.get(name, name)
            parameter = nn.Parameter(tensor, requires_grad=False)
            module._parameters[key] = parameters.setdefault(first, parameter)
    _check_nothing_left_on_meta(model)


def _check_names(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name in wanted.keys() ^ tensors.keys():
        what = "missing" if name in wanted else "not one of the model"
        raise ValueError(f"tensor {name} is {what}")


def _check_nothing_left_on_meta(model: nn.Module) -> None:
    """Refuse a model with a tensor that is neither in the file nor given."""
    for name, left in [*model.named_parameters(), *model.named_buffers()]:
        if left.is_meta:
            raise ValueError(
                f"tensor {name} is never saved, so model must have it; it is on the device 'meta'"
            )
