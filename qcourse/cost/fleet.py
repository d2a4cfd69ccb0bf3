"""What a smaller model saves a fleet: GPUs for a replica, for all replicas, and what they cost.

The idea: a replica has to fit. Of each GPU's memory a part is reserved, for the cache, for activations, for what the
runtime needs; the weights have the rest. So the number of GPUs for a replica is that of its bytes over the usable bytes
of one GPU, rounded up; and where only whole nodes can be had, rounded up to those. It is the rounding that decides:
weights of a quarter of the size seldom take a quarter of the GPUs. And what does not shrink, the cache of each text,
keeps its place in the sum.

Source: the arithmetic of founding documents A and B, done both ways.

How it differs from ``memory.py``: there bytes, here what can be bought to hold them.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Fleet:
    """How many GPUs a service takes.

    Args:
        gpus_per_replica: that hold one copy of the model.
        nodes_per_replica: the same in whole nodes; None where single GPUs can be had.
        replicas: copies.
        usable_bytes: of the GPUs of a replica, once the reserve is taken off.
        needed_bytes: weights and cache of a replica.
    """

    gpus_per_replica: int
    nodes_per_replica: int | None
    replicas: int
    usable_bytes: float
    needed_bytes: float

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.gpus_per_replica * self.replicas

    @property
    def filled(self) -> float:
        """The share of a replica's usable memory that is used."""
        return self.needed_bytes / self.usable_bytes

    def cost(self, per_gpu_hour: float, hours: float = 1.0) -> float:
        """gpus * hours * per_gpu_hour, in the unit of per_gpu_hour; ValueError for a negative argument."""
        if per_gpu_hour < 0 or hours < 0:
            raise ValueError(f"per_gpu_hour={per_gpu_hour!r} and hours={hours!r} must be 0 or more")
        return self.gpus * hours * per_gpu_hour


def fleet(
    weight_bytes: float,
    *,
    gpu_bytes: float,
    replicas: int = 1,
    reserve: float = 0.3,
    gpus_per_node: int | None = None,
    cache_bytes: float = 0,
) -> Fleet:
    """GPUs for a replica: ceil((weight_bytes + cache_bytes) / (gpu_bytes (1 - reserve))), or whole nodes of them.

    Args:
        weight_bytes: of the model.
        gpu_bytes: memory of one GPU.
        replicas: copies of the model that serve side by side.
        reserve: the share of each GPU that weights and cache may not use, from 0 to less than 1.
        gpus_per_node: round up to nodes of so many; None buys single GPUs.
        cache_bytes: KV cache of all texts that a replica serves at a time, where it is not counted in the reserve.

    Raises:
        ValueError: a size or a number outside its range.

    >>> [fleet(140e9 * share, gpu_bytes=40e9, replicas=12, gpus_per_node=4).gpus for share in (1, 1 / 2, 1 / 4)]
    [96, 48, 48]
    >>> [fleet(140e9 * share, gpu_bytes=40e9, replicas=12).gpus for share in (1, 1 / 2, 1 / 4)]
    [60, 36, 24]
    """
    if not weight_bytes > 0 or not gpu_bytes > 0:
        raise ValueError(
            f"weight_bytes={weight_bytes!r} and gpu_bytes={gpu_bytes!r} must be above 0"
        )
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve={reserve!r} must be from 0 to less than 1")
    for name, count in {
        "replicas": replicas,
        "gpus_per_node": 1 if gpus_per_node is None else gpus_per_node,
    }.items():
        if type(count) is not int or count < 1:
            raise ValueError(
                f"{name}={count!r} must be a whole number (a Python int) of at least 1"
            )
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes={cache_bytes!r} must be 0 or more")
    needed, usable = weight_bytes + cache_bytes, gpu_bytes * (1 - reserve)
    nodes = None if gpus_per_node is None else _ceil(needed / (usable * gpus_per_node))
    gpus = (
        _ceil(needed / usable) if nodes is None or gpus_per_node is None else nodes * gpus_per_node
    )
    return Fleet(gpus, nodes, replicas, gpus * usable, needed)


def _ceil(share: float) -> int:
    """Rounded up, where what is above a whole number is more than the rounding of floats: 24 (1 - 0.3) is not 16.8."""
    return math.ceil(share * (1 - 1e-12))
