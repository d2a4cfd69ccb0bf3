"""The roofline: a lower bound on the time of a computation, from its bytes and its operations.

The idea: a device moves bytes and does operations at the same time, so the slower part decides:
time = max(bytes / bandwidth, operations / peak). The two are equal at the ridge, peak / bandwidth
operations per byte. Work below it is memory-bound and gains from fewer bits per weight; work above
it is compute-bound and does not.
Source: Williams, Waterman and Patterson, "Roofline" (CACM 2009).
How it differs from `memory.py`: that counts what is stored, this how long it takes to read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qcourse.cost.memory import bytes_per_parameter


@dataclass(frozen=True)
class Device:
    """What a processor can do; a peak counts multiplications and additions of one dtype.

    >>> device = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> device.ridge("float16")
    100.0
    """

    name: str
    bandwidth_bytes_per_s: float
    peak_ops_per_s: Mapping[str, float] = field(hash=False)
    memory_bytes: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        # A read-only copy, since a device is a constant.
        peaks = MappingProxyType(dict(self.peak_ops_per_s))
        object.__setattr__(self, "peak_ops_per_s", peaks)
        if not peaks:
            raise ValueError(f"peak_ops_per_s of {self.name} must name at least one dtype")
        # Check every figure, named as in the message.
        figures = {"bandwidth_bytes_per_s": self.bandwidth_bytes_per_s}
        if self.memory_bytes is not None:
            figures["memory_bytes"] = self.memory_bytes
        figures.update(peaks)
        for name, value in figures.items():
            if not value > 0:
                raise ValueError(f"{name}={value!r} of {self.name} must be above 0")

    def peak(self, dtype: str) -> float:
        """Return the operations per second on this dtype."""
        if dtype not in self.peak_ops_per_s:
            known = ", ".join(self.peak_ops_per_s)
            raise ValueError(f"dtype={dtype!r}: {self.name} has no peak for it, only for {known}")
        return self.peak_ops_per_s[dtype]

    def ridge(self, dtype: str) -> float:
        """Return peak / bandwidth: from this many operations per byte on, work is compute-bound."""
        return self.peak(dtype) / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Work:
    """Bytes to move and operations to do; work adds up.

    >>> (Work(10, 40) + Work(10, 0)).intensity
    2.0
    """

    bytes: float
    operations: float

    def __post_init__(self) -> None:
        if not self.bytes >= 0 or not self.operations >= 0:
            raise ValueError(
                f"bytes={self.bytes!r} and operations={self.operations!r} must be 0 or more"
            )

    @property
    def intensity(self) -> float:
        # Operations per byte; infinite for work that moves none.
        if not self.bytes:
            return math.inf
        return self.operations / self.bytes

    def __add__(self, other: "Work") -> "Work":
        total_bytes = self.bytes + other.bytes
        total_operations = self.operations + other.operations
        return Work(total_bytes, total_operations)


def roofline(work: Work, device: Device, dtype: str = "float16") -> float:
    """Return the least seconds for the work: max(bytes / bandwidth, operations / peak).

    >>> toy = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> roofline(Work(bytes=1e9, operations=2e9), toy), roofline(Work(1e9, 1e12), toy)
    (0.001, 0.01)
    """
    memory_s = work.bytes / device.bandwidth_bytes_per_s
    compute_s = work.operations / device.peak(dtype)
    return max(memory_s, compute_s)


def linear_work(
    outputs: int,
    inputs: int,
    batch: int,
    *,
    bits: float = 16,
    group_size: float | None = None,
    activation_bytes: int = 2,
) -> Work:
    """Return the work of x (batch, inputs) times w^T: 2 batch inputs outputs operations.

    >>> linear_work(4096, 4096, batch=1).intensity  # two operations per weight of two bytes
    0.9995119570522206
    """
    for name, value in {"outputs": outputs, "inputs": inputs, "batch": batch}.items():
        if not value >= 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if not activation_bytes >= 0:
        raise ValueError(f"activation_bytes={activation_bytes!r} must be 0 or more")
    # Weights are read once, whatever the batch; x is read and y is written.
    weights = outputs * inputs * bytes_per_parameter(bits, group_size)
    activations = batch * (inputs + outputs) * activation_bytes
    # A product of a weight and an activation is one multiplication and one addition.
    operations = 2.0 * batch * inputs * outputs
    return Work(weights + activations, operations)


def speedup(
    device: Device,
    bits: float,
    batch: int,
    *,
    group_size: float | None = 128,
    size: int = 8192,
    dtype: str = "float16",
) -> float:
    """Return an upper bound on the speedup of a square layer by `bits` instead of 16 per weight.

    >>> toy = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> [round(speedup(toy, 4, batch), 2) for batch in (1, 16, 64, 1024)]
    [3.88, 3.84, 1.59, 1.0]
    """
    # An upper bound, because the operations that decode the weights are not counted.
    plain = linear_work(size, size, batch)
    packed = linear_work(size, size, batch, bits=bits, group_size=group_size)
    return roofline(plain, device, dtype) / roofline(packed, device, dtype)
