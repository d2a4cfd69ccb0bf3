"""Values as JSON and back: a quantizer in words that a file can hold.

The idea: a quantizer is a frozen dataclass of numbers, words, dtypes and other such dataclasses.
So a short name for its class, and its fields, say everything. A file holds that name, never a
module path: a class can move to another module and old files still load.

Source: the habit of safetensors: a file of data, which cannot make anything run.
How it differs from pickle: pickle imports, and runs, what a file names. Here a file can only name
classes that were registered.
"""

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch

from qcourse.layers.quantized_linear import BufferLayout
from qcourse.methods.activations import Dynamic, Static
from qcourse.methods.llm_int8 import OutlierColumns
from qcourse.methods.ternary import TernaryQuantizer
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.codebook import CodebookQuantizer
from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.granularity import PerChannel, PerGroup, PerTensor
from qcourse.numerics.microscaling import BlockScales, NVFP4Quantizer
from qcourse.numerics.minifloat import FloatFormat
from qcourse.numerics.quantized import Parameters

Value = TypeVar("Value")

# Files hold these names: a name never changes its meaning, whatever its class is called by then.
_CLASSES: dict[str, type] = {
    "block_scales": BlockScales,
    "buffer_layout": BufferLayout,
    "codebook": CodebookQuantizer,
    "dynamic_inputs": Dynamic,
    "float": FloatQuantizer,
    "float_format": FloatFormat,
    "int": IntQuantizer,
    "nvfp4": NVFP4Quantizer,
    "outlier_columns": OutlierColumns,
    "parameters": Parameters,
    "per_channel": PerChannel,
    "per_group": PerGroup,
    "per_tensor": PerTensor,
    "static_inputs": Static,
    "ternary": TernaryQuantizer,
}

# Files of version 0.1 named classes by their module.
_ALIASES = {
    "qcourse.methods.llm_int8.OutlierColumns": "outlier_columns",
    "qcourse.methods.ternary.TernaryQuantizer": "ternary",
    "qcourse.models.activations.Dynamic": "dynamic_inputs",
    "qcourse.models.activations.Static": "static_inputs",
    "qcourse.models.quantized_linear.Layout": "buffer_layout",
    "qcourse.numerics.affine.IntQuantizer": "int",
    "qcourse.numerics.codebook.CodebookQuantizer": "codebook",
    "qcourse.numerics.float_quantizer.FloatQuantizer": "float",
    "qcourse.numerics.granularity.PerChannel": "per_channel",
    "qcourse.numerics.granularity.PerGroup": "per_group",
    "qcourse.numerics.granularity.PerTensor": "per_tensor",
    "qcourse.numerics.microscaling.BlockScales": "block_scales",
    "qcourse.numerics.microscaling.NVFP4Quantizer": "nvfp4",
    "qcourse.numerics.minifloat.FloatFormat": "float_format",
    "qcourse.numerics.quantized.Parameters": "parameters",
}


def register(name: str, kind: type) -> None:
    """Let files hold values of a dataclass of your own, under a name that you never change.

    Raises:
        TypeError: kind is no dataclass.
        ValueError: the name is taken by another class.
    """
    if not is_dataclass(kind):
        raise TypeError(f"kind={kind!r} must be a dataclass")
    if _CLASSES.setdefault(name, kind) is not kind:
        raise ValueError(f"name={name!r} is taken by {_CLASSES[name].__name__}; choose another")


def describe(value: object) -> Any:
    """Turn a value into what JSON can hold.

    Raises:
        TypeError: the value, or one in it, is no number, text, None, tuple, torch.dtype, or
            registered dataclass.

    >>> describe(PerGroup(32)), describe(torch.float16)
    ({'value': 'per_group', 'size': 32}, {'dtype': 'float16'})
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [describe(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, type):
        return {"class": _name_of(value)}
    # A dataclass is its name and its fields.
    described = {"value": _name_of(type(value))}
    for field in fields(value):  # type: ignore[arg-type]  # registered, so a dataclass
        described[field.name] = describe(getattr(value, field.name))
    return described


def rebuild(description: Any, expected: type[Value]) -> Value:
    """Make the value that ``describe`` described.

    Raises:
        ValueError: it does not describe a value of the expected type.

    >>> rebuild(describe(IntQuantizer(4, granularity=PerGroup(32))), IntQuantizer).granularity
    PerGroup(size=32)
    """
    # A field that this version does not know ends as an error here.
    try:
        value = _rebuild(description)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the metadata describe no value of this version of qcourse: {error}"
        ) from error
    if not isinstance(value, expected):
        raise ValueError(f"the metadata describe {value!r}, which is no {expected.__name__}")
    return value


def _rebuild(description: Any) -> Any:
    if isinstance(description, list):
        return tuple(_rebuild(item) for item in description)
    if not isinstance(description, dict):
        return description
    if "dtype" in description:
        return _dtype_of(description["dtype"])
    if "class" in description:
        return _class_of(description["class"])
    # The constructor checks the fields again.
    kind = _class_of(description["value"])
    arguments = {}
    for name, each in description.items():
        if name != "value":
            arguments[name] = _rebuild(each)
    return kind(**arguments)


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the metadata name the dtype {name!r}, which is none of torch's")
    return dtype


def _name_of(kind: type) -> str:
    # A class without a name could not be read back, so it cannot be saved.
    for name, registered in _CLASSES.items():
        if registered is kind:
            return name
    raise TypeError(
        f"a {kind.__name__} cannot be saved: files hold numbers, texts and registered dataclasses"
        " (qcourse.layers.saved_values.register adds one)"
    )


def _class_of(name: str) -> Any:
    # Only registered classes are made, whatever the file names.
    name = _ALIASES.get(name, name)
    if name not in _CLASSES:
        raise ValueError(f"the metadata name {name!r}, which is no registered class of qcourse")
    return _CLASSES[name]
