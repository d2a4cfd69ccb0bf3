"""Values as JSON and back: what a quantizer is, in words that a file can hold.

The idea: a quantizer is a frozen dataclass of numbers, words, dtypes and other such dataclasses, so the name of its
class and its fields say all. What is read makes classes of this package alone, whatever the file says.

Source: the habit of safetensors: a file of data, which cannot make anything run.

How it differs from pickle: that would import, and run, what a stranger's file names.
"""

import importlib
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch

Value = TypeVar("Value")
PACKAGE = "qcourse."


def describe(value: object) -> Any:
    """A value as what JSON can hold.

    Raises:
        TypeError: the value, or one in it, is no number, text, None, tuple, torch.dtype, or dataclass of this package.

    >>> from qcourse import PerGroup
    >>> describe(PerGroup(32)), describe(torch.float16)
    ({'value': 'qcourse.numerics.granularity.PerGroup', 'size': 32}, {'dtype': 'float16'})
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [describe(item) for item in value]
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    kind = value if isinstance(value, type) else type(value)
    if not is_dataclass(kind) or not kind.__module__.startswith(PACKAGE):
        raise TypeError(f"{value!r} cannot be saved: it is not made of numbers, texts and dataclasses of qcourse")
    name = f"{kind.__module__}.{kind.__qualname__}"
    if value is kind:
        return {"class": name}
    return {"value": name, **{field.name: describe(getattr(value, field.name)) for field in fields(kind)}}


def rebuild(description: Any, expected: type[Value]) -> Value:
    """The value that ``describe`` described.

    Raises:
        ValueError: it is not the description of a value of this type that this package can make.

    >>> from qcourse import IntQuantizer, PerGroup
    >>> rebuild(describe(IntQuantizer(4, granularity=PerGroup(32))), IntQuantizer).granularity
    PerGroup(size=32)
    """
    try:
        value = _rebuild(description)
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        raise ValueError(f"the metadata describe no value of this version of qcourse: {error}") from error
    if not isinstance(value, expected):
        raise ValueError(f"the metadata describe {value!r}, which is no {expected.__name__}")
    return value


def _rebuild(description: Any) -> Any:
    if isinstance(description, list):
        return tuple(_rebuild(item) for item in description)
    if not isinstance(description, dict):
        return description
    if "dtype" in description:
        return getattr(torch, description["dtype"])
    if "class" in description:
        return _class(description["class"])
    rest = {name: _rebuild(value) for name, value in description.items() if name != "value"}
    return _class(description["value"])(**rest)


def _class(name: str) -> Any:
    module, _, last = name.rpartition(".")
    kind = getattr(importlib.import_module(module), last) if module.startswith(PACKAGE) else None
    if not (isinstance(kind, type) and is_dataclass(kind)):
        raise ValueError(f"the metadata name {name!r}, which is no dataclass of qcourse")
    return kind
