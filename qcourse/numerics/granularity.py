"""Which values share a scale.

The idea: a granularity lays a tensor out as rows, one row for all the values that share one scale. Everything else in
the course (ranges, codes, searches) then works on rows and never asks again which granularity it was.

Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), sections 2.5 and 3.1
(tensor, channel); groups as in GPTQ (Frantar et al., ICLR 2023), section 4.

`affine.py` turns rows into codes; this file only arranges them.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor


@runtime_checkable
class Granularity(Protocol):
    """What a quantizer asks of a granularity; `PerTensor`, `PerChannel` and `PerGroup` answer."""

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The shape of the scales of a tensor of this shape; raises ValueError where the two do not fit."""

    def rows(self, x: Tensor) -> Tensor:
        """x as (scales, values a scale)."""

    def unrows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `rows`, contiguous."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    >>> PerTensor().scale_shape(torch.Size([4, 6]))
    ()
    """

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """No axes: the scale is a single number."""
        return ()

    def rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "1 size"]:
        """All values in one row."""
        return x.reshape(1, -1)

    def unrows(self, rows: Shaped[Tensor, "1 size"], shape: torch.Size) -> Shaped[Tensor, "*shape"]:
        """The row, in the tensor's shape again."""
        return rows.reshape(shape)


@dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axis`, the axis that keeps its own scale; weights are (out, in), so 0 is the output.

    >>> PerChannel(axis=0).scale_shape(torch.Size([4, 6]))
    (4, 1)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        if type(self.axis) is not int:
            raise ValueError(f"axis={self.axis!r} must be a whole number (a Python int)")

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """1 everywhere but on `axis`, so that codes * scale broadcasts."""
        if not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"axis={self.axis} is out of range for shape {tuple(shape)}: need {-len(shape)} <= axis < {len(shape)}"
            )
        kept = self.axis % len(shape)
        return tuple(size if i == kept else 1 for i, size in enumerate(shape))

    def rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "channels size"]:
        """One row a channel (a copy unless `axis` is the first)."""
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def unrows(
        self, rows: Shaped[Tensor, "channels size"], shape: torch.Size
    ) -> Shaped[Tensor, "*shape"]:
        """The rows moved back onto `axis`."""
        axis = self.axis % len(shape)
        if axis == 0:
            return rows.reshape(shape)
        others = shape[:axis] + shape[axis + 1 :]
        return rows.reshape(shape[axis], *others).movedim(0, axis).contiguous()


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of `size` neighbours along the last axis, for weights (out, in) the input axis.

    >>> PerGroup(2).scale_shape(torch.Size([4, 6]))
    (4, 3)
    """

    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(
                f"group size={self.size!r} must be a whole number (a Python int) of at least 1"
            )

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """The tensor's shape with the last axis counted in groups."""
        if not shape:
            raise ValueError(
                f"group size={self.size} needs at least one axis to group along; the tensor is a scalar"
            )
        if shape[-1] % self.size:
            raise ValueError(
                f"group size={self.size} does not divide the last axis of shape {tuple(shape)}: "
                f"{shape[-1]} = {shape[-1] // self.size} x {self.size} + {shape[-1] % self.size}; "
                f"the nearest sizes that divide it are {_nearest_divisors(shape[-1], self.size)}"
            )
        return (*shape[:-1], shape[-1] // self.size)

    def rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "groups size"]:
        """One row a group, in reading order."""
        return x.reshape(-1, self.size)

    def unrows(
        self, rows: Shaped[Tensor, "groups size"], shape: torch.Size
    ) -> Shaped[Tensor, "*shape"]:
        """The groups side by side again."""
        return rows.reshape(shape)


def _nearest_divisors(length: int, size: int) -> str:
    """The divisors of length just below and just above size, as words.

    >>> _nearest_divisors(100, 48)
    '25 and 50'
    """
    divisors = {
        d for i in range(1, math.isqrt(length) + 1) if length % i == 0 for d in (i, length // i)
    }
    below = max(d for d in divisors if d < size)
    above = min((d for d in divisors if d > size), default=None)
    return str(below) if above is None else f"{below} and {above}"
