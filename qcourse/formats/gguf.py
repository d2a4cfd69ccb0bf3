"""Read GGUF, the file format of llama.cpp: metadata and tensors, memory-mapped.

`read_gguf` parses the header alone. A tensor's bytes are read when it is asked for, and only they.

Source: docs/gguf.md in the public repository of ggml.
`gguf_header.py` parses and checks; `ggml_blocks.py` decodes blocks.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qcourse.formats.ggml_blocks import READERS
from qcourse.formats.gguf_header import TensorPlace, read_header
from qcourse.numerics.quantized import QuantizedTensor

_PLAIN = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in the file."""

    place: TensorPlace
    data: UInt8[Tensor, " nbytes"]  # its bytes, mapped and not yet read

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in torch's order: weights are (out, in)."""
        return self.place.shape

    @property
    def type(self) -> str:
        """The name of its number format, such as "Q4_1"."""
        return self.place.type.name

    def load(self) -> Shaped[Tensor, "*shape"] | QuantizedTensor:
        """Return a tensor that shares the file's memory, or a `QuantizedTensor` of its codes.

        Raises ValueError if the type is none of those that qcourse decodes.
        """
        if self.type in _PLAIN:
            dtype = _PLAIN[self.type]
            if not self.data.numel():
                return torch.empty(self.shape, dtype=dtype)
            return self.data.view(dtype).reshape(self.shape)
        if self.type not in READERS:
            known = ", ".join([*_PLAIN, *READERS])
            raise ValueError(f"tensor {self.name!r} has the type {self.type}; this reads {known}")
        return READERS[self.type](self.data, self.shape)

    def dequantize(self) -> Float[Tensor, "*shape"]:
        """Return the values in float32 (float64 stays). Raises what `load` raises."""
        loaded = self.load()
        if isinstance(loaded, QuantizedTensor):
            try:
                return loaded.dequantize()
            except ValueError as error:
                raise ValueError(f"tensor {self.name!r} is damaged: {error}") from error
        return loaded if loaded.dtype == torch.float64 else loaded.float()


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """A GGUF file: its metadata and its tensors by name, in the file's order."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]


def read_gguf(path: str | Path) -> GGUFFile:
    """Return what the file holds; its tensors stay on the disk until they are asked for.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no GGUF file of version 2 or 3, or it is damaged.

    >>> file = read_gguf("README.md")
    Traceback (most recent call last):
    ValueError: README.md is not readable as GGUF: it begins with b'...', a GGUF file with b'GGUF'
    """
    path = Path(path)
    with path.open("rb") as file:
        # A mapping of an empty file is refused by the system.
        if not path.stat().st_size:
            raise ValueError(f"{path} is not readable as GGUF: it is empty")
        # Copy-on-write, since torch takes writable memory only; the file itself never changes.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        header = read_header(memoryview(mapped))
    except ValueError as error:
        raise ValueError(f"{path} is not readable as GGUF: {error}") from error

    content = torch.frombuffer(mapped, dtype=torch.uint8)
    tensors = {}
    for name, place in header.tensors.items():
        data = content[place.start : place.start + place.nbytes]
        tensors[name] = GGUFTensor(place, data)
    return GGUFFile(
        path, header.version, MappingProxyType(header.metadata), MappingProxyType(tensors)
    )
