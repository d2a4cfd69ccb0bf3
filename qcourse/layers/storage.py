"""A quantized model as a file: packed codes, scales, zero points, and all that stayed in floats, with how to read them.

The idea: safetensors holds tensors and nothing that runs. What makes codes into weights, the quantizer, is a value, so
it is written as JSON into the file's metadata: the name of its class and its fields. Reading it makes classes of this
package alone. A file is written aside and then renamed: if the disk is full, the old one is still there.

Source: the safetensors format; a rename within a folder is atomic (POSIX ``rename``).

How it differs from ``tinylm.py`` and ``minilm_files.py``: there, published files with a known SHA-256; here, one's own.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qcourse.layers.quantized_linear import BufferLayout, QuantizedLinear
from qcourse.layers.saved_values import describe, rebuild
from qcourse.machine import written_aside
from qcourse.methods.activations import Inputs
from qcourse.trace.model_copy import ModelCopy

FORMAT = "qcourse quantized model, 1"
EXTRA = ("bias", "input_scale", "input_order")


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a quantized model as one safetensors file; a file that is there stays whole until the new one is.

    Args:
        model: has ``QuantizedLinear`` layers; what else it has is written as it is, tied tensors once.
        path: of the file.

    Raises:
        ValueError: the model has no quantized layer.
        TypeError: a quantizer is not a value of this package, so that no one could read it.
        OSError: the file cannot be written; the message says that the old one is as it was.
    """
    layers = {
        name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)
    }
    if not layers:
        raise ValueError(
            f"model must have a QuantizedLinear layer to be saved, and this {type(model).__name__} has none"
            " (what runs on the INT4 kernels is packed for this machine: save it before it is handed to them)"
        )
    tensors, tied = _untie(model.state_dict())
    about = {
        "format": FORMAT,
        "layers": {name: describe(layer.layout) for name, layer in layers.items()},
        "inputs": {
            name: describe(layer.inputs)
            for name, layer in layers.items()
            if layer.inputs is not None
        },
        "tied": tied,
    }
    path = Path(path)
    try:
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"qcourse": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}); what was there before is as it was"
        ) from error


def load_quantized(path: str | Path, model: nn.Module) -> nn.Module:
    """Read what ``save_quantized`` wrote, into a new model of the architecture of ``model``.

    Args:
        path: of the file.
        model: the same model before quantization, with any weights (also none, on the device "meta"); not changed.

    Returns:
        The quantized model in eval mode and without gradients, with exactly the codes and floats that were saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, is no such file, or does not belong to model: the message says which tensor
            is missing, left over, of the wrong shape, or holds what the quantizer refuses.
    """
    about, tensors = _read(Path(path))
    tensors |= {alias: tensors[name] for alias, name in about["tied"].items() if name in tensors}
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    strangers = sorted(about["layers"].keys() - linears.keys())
    if strangers:
        raise ValueError(
            f"{path} does not belong to this model, which has no linear layer {strangers[0]!r}"
        )
    work = ModelCopy(model, {name: linears[name] for name in about["layers"]})
    try:
        for name, description in about["layers"].items():
            keys = [key for key in tensors if key.rpartition(".")[0] == name]
            own = {key.rpartition(".")[2]: tensors.pop(key) for key in keys}
            layer = _layer(name, rebuild(description, BufferLayout), own, linears[name])
            if name in about["inputs"]:
                layer.inputs = rebuild(about["inputs"][name], Inputs)  # type: ignore[type-abstract]
            work.replace(name, layer)
        _fill(work.model, tensors, about["tied"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return work.model.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("qcourse", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short, or no safetensors file: {error}") from error
    try:
        about = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has metadata that are no JSON: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        said = about.get("format") if isinstance(about, dict) else about
        raise ValueError(f"{path} is no file of {FORMAT!r}: its metadata say {said!r}")
    for key in ("layers", "inputs", "tied"):
        if not isinstance(about.get(key), dict):
            raise ValueError(f"{path} has metadata with no table of {key!r}")
    for name in about["inputs"].keys() - about["layers"].keys():
        raise ValueError(
            f"{path} has metadata on the inputs of {name!r}, which is none of its quantized layers"
        )
    return about, tensors


def _untie(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and for its other names the one that it has."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    for name, tensor in state.items():
        place = (
            (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if tensor.numel()
            else (name,)
        )
        kept = first.setdefault(place, name)
        if kept != name:
            tied[name] = kept
    once = {name: tensor for name, tensor in state.items() if name not in tied}
    memory = Counter(tensor.untyped_storage().data_ptr() for tensor in once.values())
    overlaps = {
        name for name, tensor in once.items() if memory[tensor.untyped_storage().data_ptr()] > 1
    }
    return {
        name: tensor.clone() if name in overlaps else tensor.contiguous()
        for name, tensor in once.items()
    }, tied


def _layer(
    name: str, layout: BufferLayout, own: dict[str, Tensor], old: nn.Linear
) -> QuantizedLinear:
    """A quantized layer of these tensors; ValueError where one is not what the layout says."""
    if layout.shape != (old.out_features, old.in_features) or ("bias" in own) != (
        old.bias is not None
    ):
        raise ValueError(
            f"layer {name!r} is {layout.shape} {'with' if 'bias' in own else 'without'} bias in the file,"
            f" {(old.out_features, old.in_features)} {'without' if old.bias is None else 'with'} in the model"
        )
    try:
        q = layout.read(own)
        q.dequantize()  # the quantizer looks at shapes and values
        bias, scale, order = (own.get(key) for key in EXTRA)
        return QuantizedLinear(q, bias, input_scale=scale, input_order=order)
    except KeyError as error:
        raise ValueError(
            f"tensor {f'{name}.{error.args[0]}'.removeprefix('.')} is missing"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"layer {name!r} has a wrong tensor: {error}") from error


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    """Give all that is no quantized layer its tensors from the file."""
    quantized = {name for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    wanted = {
        name: each
        for name, each in model.state_dict().items()
        if name.rpartition(".")[0] not in quantized
    }
    for name in wanted.keys() ^ tensors.keys():
        raise ValueError(
            f"tensor {name} is {'missing' if name in wanted else 'not one of the model'}"
        )
    parameters: dict[str, nn.Parameter] = {}
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            expected = tuple(wanted[name].shape)
            raise ValueError(
                f"tensor {name} has the shape {tuple(tensor.shape)}, the model {expected}"
            )
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._buffers:
            module._buffers[key] = tensor
        else:
            module._parameters[key] = parameters.setdefault(
                tied.get(name, name), nn.Parameter(tensor, requires_grad=False)
            )
    for name, left in [*model.named_parameters(), *model.named_buffers()]:
        if left.is_meta:
            raise ValueError(
                f"tensor {name} is never saved, so model must have it; it is on the device 'meta'"
            )
