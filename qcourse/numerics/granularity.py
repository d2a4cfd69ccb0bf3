"""Which values share a scale.

The idea: a granularity lays a tensor out as rows, one row for all values that share one scale.
Ranges, codes and searches then work on rows and never ask which granularity it was.
Source: Krishnamoorthi (2018), sections 2.5 and 3.1; groups as in GPTQ (Frantar et al., 2023).
How it differs from `affine.py`: that turns rows into codes; this only arranges them.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.numerics.whole import check_whole


@runtime_checkable
class Granularity(Protocol):
    """What a quantizer asks of `PerTensor`, `PerChannel` and `PerGroup`."""

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Return the shape of the scales; ValueError if the granularity does not suit `shape`."""

    def rows(self, x: Tensor) -> Tensor:
        """Return x as (scales, values per scale)."""

    def unrows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return the inverse of `rows`, contiguous."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    >>> PerTensor().scale_shape(torch.Size([4, 6]))
    ()
    """

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        return ()

    def rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "1 size"]:
        return x.reshape(1, -1)

    def unrows(self, rows: Shaped[Tensor, "1 size"], shape: torch.Size) -> Shaped[Tensor, "*shape"]:
        return rows.reshape(shape)


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`, which is 0 for the outputs of weights (out, in).

    >>> PerChannel(axis=0).scale_shape(torch.Size([4, 6]))
    (4, 1)
    """

    axis: int = 0

    def __post_init__(self) -> None:
        check_whole("axis", self.axis)

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        axes = len(shape)
        if not -axes <= self.axis < axes:
            raise ValueError(
                f"axis={self.axis} is out of range for shape {tuple(shape)}:"
                f" need {-axes} <= axis < {axes}"
            )
        # 1 on every other axis, so that codes * scale broadcasts.
        scale_shape = [1] * axes
        scale_shape[self.axis] = shape[self.axis]
        return tuple(scale_shape)

    def rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "channels size"]:
        # A copy, unless `axis` is the first.
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    def unrows(
        self, rows: Shaped[Tensor, "channels size"], shape: torch.Size
    ) -> Shaped[Tensor, "*shape"]:
        axis = self.axis % len(shape)
        if axis == 0:
            return rows.reshape(shape)
        # Channels come first in rows; move them back to their axis.
        others = shape[:axis] + shape[axis + 1 :]
        channels_first = rows.reshape(shape[axis], *others)
        return channels_first.movedim(0, axis).contiguous()


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` neighbors on the last axis, the inputs of weights (out, in).

    >>> PerGroup(2).scale_shape(torch.Size([4, 6]))
    (4, 3)
    """

    size: int

    def __post_init__(self) -> None:
        check_whole("group size", self.size, least=1)

    def scale_shape(self, shape: torch.Size) -> tuple[int, ...]:
        if not shape:
            raise ValueError(
                f"group size={self.size} needs at least one axis to group along;"
                " the tensor is a scalar"
            )
        length = shape[-1]
        groups, rest = divmod(length, self.size)
        if rest:
            sizes = _nearest_divisors(length, self.size)
            raise ValueError(
                f"group size={self.size} does not divide the last axis of shape {tuple(shape)}:"
                f" {length} = {groups} x {self.size} + {rest};"
                f" the nearest sizes that divide it are {sizes}"
            )
        return (*shape[:-1], groups)

    def rows(self, x: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "groups size"]:
        return x.reshape(-1, self.size)

    def unrows(
        self, rows: Shaped[Tensor, "groups size"], shape: torch.Size
    ) -> Shaped[Tensor, "*shape"]:
        return rows.reshape(shape)


def _nearest_divisors(length: int, size: int) -> str:
    """Return the divisors of `length` next to `size`, which is none of them: "25 and 50"."""
    divisors = set()
    # Divisors come in pairs: if i divides length, so does length / i.
    for i in range(1, math.isqrt(length) + 1):
        if length % i == 0:
            divisors.add(i)
            divisors.add(length // i)
    below = max(d for d in divisors if d < size)
    above = min((d for d in divisors if d > size), default=None)
    return str(below) if above is None else f"{below} and {above}"
