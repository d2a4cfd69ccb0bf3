"""What the sheets share: draws from a generator, and the least arithmetic that a reference needs."""

from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

T = TypeVar("T")


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Uniform float32 numbers."""
    return torch.empty(shape).uniform_(low, high, generator=generator)


def whole(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers from low to high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator)


def pick(generator: Generator, *choices: T) -> T:
    """One of the choices."""
    return choices[int(whole(generator, 0, len(choices) - 1))]


def f64(x: Any) -> np.ndarray:
    """A tensor or list in float64."""
    return np.asarray(x, dtype=np.float64)


def qmax(bits: int) -> int:
    """The largest signed code.

    >>> qmax(4)
    7
    """
    return 2 ** (bits - 1) - 1
