"""The roofline: how fast a product or a step of writing can be, from its bytes and its operations alone.

The idea: a device moves so many bytes a second and does so many operations a second, and can do both at once. Work
that needs few operations for each byte waits for memory, work that needs many waits for the multipliers:

    time = max(bytes / bandwidth, operations / peak)

Operations for each byte are the intensity of the work; where the two times are equal, at peak / bandwidth, is the
ridge. One token's product with a weight reads every weight once and uses it once: left of the ridge by far, so its time
is that of its bytes, and fewer bits a weight are less time. In a large batch each weight is used for every token: right
of the ridge bits of storage no longer matter, and what codes have to be decoded to decides.

Source: Williams, Waterman and Patterson, "Roofline" (CACM 2009). Peaks and bandwidths of devices are those of the
vendors' data sheets, without sparsity.

How it differs from ``memory.py``: there what is stored, here how long it takes to read.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from qcourse.cost.memory import bytes_per_parameter


@dataclass(frozen=True)
class Device:
    """What a processor can do, in bytes and operations a second.

    Args:
        name: of the device.
        bandwidth_bytes_per_s: of its memory.
        peak_ops_per_s: multiplications and additions a second, by the dtype that is multiplied: "float16", "int8", ...
        memory_bytes: how much it holds; None if that is not asked.
        source: where the figures come from.

    Raises:
        ValueError: a figure that is not above 0, or no dtype at all.

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
        object.__setattr__(self, "peak_ops_per_s", MappingProxyType(dict(self.peak_ops_per_s)))
        if not self.peak_ops_per_s:
            raise ValueError(f"peak_ops_per_s of {self.name} must name at least one dtype")
        memory = {} if self.memory_bytes is None else {"memory_bytes": self.memory_bytes}
        figures = {
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
            **memory,
            **self.peak_ops_per_s,
        }
        for name, value in figures.items():
            if not value > 0:
                raise ValueError(f"{name}={value!r} of {self.name} must be above 0")

    def peak(self, dtype: str) -> float:
        """Operations a second on this dtype; ValueError, with those it has, where it has none."""
        if dtype not in self.peak_ops_per_s:
            known = ", ".join(self.peak_ops_per_s)
            raise ValueError(f"dtype={dtype!r}: {self.name} has no peak for it, only for {known}")
        return self.peak_ops_per_s[dtype]

    def ridge(self, dtype: str) -> float:
        """peak / bandwidth: the operations a byte from which on the multipliers, not memory, take the longer."""
        return self.peak(dtype) / self.bandwidth_bytes_per_s


@dataclass(frozen=True)
class Work:
    """Bytes to move and operations to do; adds up.

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
        """Operations for each byte; infinite where there is none."""
        return self.operations / self.bytes if self.bytes else math.inf

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def roofline(work: Work, device: Device, dtype: str = "float16") -> float:
    """Seconds at least: max(bytes / bandwidth, operations / peak).

    >>> toy = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> roofline(Work(bytes=1e9, operations=2e9), toy), roofline(Work(1e9, 1e12), toy)
    (0.001, 0.01)
    """
    return max(work.bytes / device.bandwidth_bytes_per_s, work.operations / device.peak(dtype))


def linear_work(
    outputs: int,
    inputs: int,
    batch: int,
    *,
    bits: float = 16,
    group_size: float | None = None,
    activation_bytes: int = 2,
) -> Work:
    """The product x (batch, inputs) w^T: 2 batch inputs outputs operations; weights, x and y moved once.

    Args:
        bits, group_size: of the weight, as in ``bytes_per_parameter``.
        activation_bytes: a number of x and of y.

    Raises:
        ValueError: a size below 1; what ``bytes_per_parameter`` refuses.

    >>> linear_work(4096, 4096, batch=1).intensity  # two operations for each weight of two bytes
    0.9995119570522206
    """
    for name, value in {"outputs": outputs, "inputs": inputs, "batch": batch}.items():
        if not value >= 1:
            raise ValueError(f"{name}={value!r} must be at least 1")
    if not activation_bytes >= 0:
        raise ValueError(f"activation_bytes={activation_bytes!r} must be 0 or more")
    weights = outputs * inputs * bytes_per_parameter(bits, group_size)
    return Work(
        weights + batch * (inputs + outputs) * activation_bytes, 2.0 * batch * inputs * outputs
    )


def speedup(
    device: Device,
    bits: float,
    batch: int,
    *,
    group_size: float | None = 128,
    size: int = 8192,
    dtype: str = "float16",
) -> float:
    """How many times as fast a square layer of `bits`-bit weights is as one of 16 bits, both at the roofline.

    It is an upper bound: decoding costs operations that are not counted here.

    >>> toy = Device("a toy", bandwidth_bytes_per_s=1e12, peak_ops_per_s={"float16": 100e12})
    >>> [round(speedup(toy, 4, batch), 2) for batch in (1, 16, 64, 1024)]
    [3.88, 3.84, 1.59, 1.0]
    """
    plain = linear_work(size, size, batch)
    packed = linear_work(size, size, batch, bits=bits, group_size=group_size)
    return roofline(plain, device, dtype) / roofline(packed, device, dtype)
