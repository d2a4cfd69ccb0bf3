"""How many GPUs a service needs, and what they cost.

The idea: a replica needs its bytes over the usable bytes of a GPU, rounded up to whole GPUs or
nodes. So weights of a quarter of the size rarely need a quarter of the GPUs, and the cache, which
does not shrink with them, still needs its room.
How it differs from `memory.py`: that counts bytes, this the GPUs that hold them.
"""

import math
from dataclasses import dataclass

from qcourse.numerics.whole import check_whole


@dataclass(frozen=True)
class Fleet:
    """The GPUs of a service, and the bytes of one replica; nodes are None if GPUs come singly."""

    gpus_per_replica: int
    nodes_per_replica: int | None
    replicas: int
    # Memory of the GPUs of a replica, without the reserve.
    usable_bytes: float
    # Weights and cache of a replica.
    needed_bytes: float

    @property
    def gpus(self) -> int:
        return self.gpus_per_replica * self.replicas

    @property
    def filled(self) -> float:
        return self.needed_bytes / self.usable_bytes

    def cost(self, per_gpu_hour: float, hours: float = 1.0) -> float:
        """Return gpus * hours * per_gpu_hour, in the unit of per_gpu_hour."""
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
    """Return ceil((weight_bytes + cache_bytes) / (gpu_bytes (1 - reserve))) GPUs per replica.

    `reserve` is the fraction of a GPU that is not used; gpus_per_node rounds up to whole nodes.

    >>> service = {"gpu_bytes": 40e9, "replicas": 12, "gpus_per_node": 4}
    >>> [fleet(size, **service).gpus for size in (140e9, 70e9, 35e9)]
    [96, 48, 48]
    """
    _check_arguments(weight_bytes, gpu_bytes, replicas, reserve, gpus_per_node, cache_bytes)
    needed = weight_bytes + cache_bytes
    usable_per_gpu = gpu_bytes * (1 - reserve)
    # Round up to whole GPUs or, where only whole nodes can be had, to those.
    nodes = None
    if gpus_per_node is None:
        gpus = _ceil(needed / usable_per_gpu)
    else:
        nodes = _ceil(needed / (usable_per_gpu * gpus_per_node))
        gpus = nodes * gpus_per_node
    return Fleet(gpus, nodes, replicas, gpus * usable_per_gpu, needed)


def _check_arguments(
    weight_bytes: float,
    gpu_bytes: float,
    replicas: int,
    reserve: float,
    gpus_per_node: int | None,
    cache_bytes: float,
) -> None:
    if not weight_bytes > 0 or not gpu_bytes > 0:
        raise ValueError(
            f"weight_bytes={weight_bytes!r} and gpu_bytes={gpu_bytes!r} must be above 0"
        )
    if not 0 <= reserve < 1:
        raise ValueError(f"reserve={reserve!r} must be from 0 to less than 1")
    counts = {"replicas": replicas}
    if gpus_per_node is not None:
        counts["gpus_per_node"] = gpus_per_node
    for name, count in counts.items():
        check_whole(name, count, least=1)
    if cache_bytes < 0:
        raise ValueError(f"cache_bytes={cache_bytes!r} must be 0 or more")


def _ceil(share: float) -> int:
    # 24 (1 - 0.3) is a little more than 16.8 in floats, and must not cost a GPU more.
    return math.ceil(share * (1 - 1e-12))
