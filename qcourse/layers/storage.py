"""A quantized model as a file: packed codes, scales, zero points, and what stayed in floats.

safetensors stores tensors and nothing that runs. The quantizer, which turns codes into weights, is
a value, so it is written as JSON into the metadata of the file (`saved_values.py`). A file is
written aside and then renamed, which is atomic (POSIX), so a full disk leaves the old file.

`tinylm.py` and `minilm_files.py` read published files with a known SHA-256; this writes your own.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qcourse.layers.quantized_linear import BufferLayout
from qcourse.layers.restore import (
    quantized_layers,
    restore_others,
    restored_layer,
    take_tensors,
)
from qcourse.layers.saved_values import describe, rebuild
from qcourse.machine import written_aside
from qcourse.methods.method import Inputs
from qcourse.trace.linears import linears
from qcourse.trace.model_copy import ModelCopy

FORMAT = "qcourse quantized model, 1"


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a quantized model as one safetensors file; an old file stays whole until then.

    Args:
        model: has ``QuantizedLinear`` layers; all else is written as it is, tied tensors once.
        path: of the file.

    Raises:
        ValueError: the model has no quantized layer.
        TypeError: a quantizer is no value that a file can hold.
        OSError: the file cannot be written.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(
            f"model must have a QuantizedLinear layer to be saved, and this {type(model).__name__}"
            " has none (layers of the INT4 kernels are packed for this"
            " machine: save the model before with_int4_kernels)"
        )
    # All that turns codes into weights, as JSON.
    inputs = {name: each.inputs for name, each in layers.items() if each.inputs is not None}
    tensors, tied = _untied(model.state_dict())
    about = {
        "format": FORMAT,
        "layers": {name: describe(layer.layout) for name, layer in layers.items()},
        "inputs": {name: describe(value) for name, value in inputs.items()},
        "tied": tied,
    }
    # A full disk shows as one of two errors; the old file is still there.
    path = Path(path)
    try:
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"qcourse": json.dumps(about)})
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path} ({error}); what was there before is as it was"
        ) from error


def load_quantized(path: str | Path, model: nn.Module) -> nn.Module:
    """Return a new quantized model, with the tensors that ``save_quantized`` wrote.

    Args:
        path: of the file.
        model: the architecture before quantization, with any weights, or on the device "meta"; not
            changed. The new model is in eval mode and without gradients.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut short, is of another kind, or does not belong to model; the
            message names the tensor that is missing, left over, or wrong.
    """
    path = Path(path)
    about, tensors = _read(path)
    old = linears(model)
    for name in sorted(about["layers"]):
        if name not in old:
            raise ValueError(
                f"{path} does not belong to this model, which has no linear layer {name!r}"
            )
    # The layers that the file has codes for are replaced, so their weights are not copied.
    work = ModelCopy(model, {name: old[name] for name in about["layers"]})
    try:
        # Quantized layers take their tensors; the rest belongs to other modules.
        for name, description in about["layers"].items():
            layout = rebuild(description, BufferLayout)
            layer = restored_layer(name, layout, take_tensors(name, tensors), old[name])
            if name in about["inputs"]:
                layer.inputs = rebuild(about["inputs"][name], Inputs)  # type: ignore[type-abstract]
            work.replace(name, layer)
        restore_others(work.model, tensors, about["tied"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return work.model.eval().requires_grad_(False)


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, in memory of its own; and for its other names the name that it has."""
    first: dict[tuple[Any, ...], str] = {}
    tied = {}
    once = {}
    for name, tensor in state.items():
        # Tensors of the same place, dtype and shape are one; empty ones have no place.
        identity: tuple[Any, ...] = (name,)
        if tensor.numel():
            identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first_name = first.setdefault(identity, name)
        if first_name == name:
            once[name] = tensor
        else:
            tied[name] = first_name

    # Tensors that only overlap are different, but safetensors refuses shared memory.
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in once.values())
    apart = {}
    for name, tensor in once.items():
        shared = users[tensor.untyped_storage().data_ptr()] > 1
        apart[name] = tensor.clone() if shared else tensor.contiguous()
    return apart, tied


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description in a file and its tensors, under all their names."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("qcourse", "{}")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short, or no safetensors file: {error}") from error
    # Metadata of safetensors are text, so the description is JSON.
    try:
        about = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has metadata that are no JSON: {error}") from error
    _check_description(about, path)
    # A tied tensor is stored once; give it back its other names.
    for alias, name in about["tied"].items():
        if name in tensors:
            tensors[alias] = tensors[name]
    return about, tensors


def _check_description(about: Any, path: Path) -> None:
    # A file of another program has no description, or another format.
    found = about.get("format") if isinstance(about, dict) else about
    if not isinstance(about, dict) or found != FORMAT:
        raise ValueError(f"{path} is no file of {FORMAT!r}: its metadata say {found!r}")
    for key in ("layers", "inputs", "tied"):
        if not isinstance(about.get(key), dict):
            raise ValueError(f"{path} has metadata with no table of {key!r}")
    for name in about["inputs"]:
        if name not in about["layers"]:
            raise ValueError(
                f"{path} has metadata on the inputs of {name!r},"
                " which is none of its quantized layers"
            )
