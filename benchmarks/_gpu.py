"""Timing on a GPU: whole graphs of calls, over weights that no cache holds, contenders in turn.

A call of some microseconds is shorter than it takes to launch it from Python, so calls are captured into a CUDA graph
and replayed. The graph goes round copies of the weights, at least 4 and together over 200 MB, so that each call reads
its weights from memory, as in a model. Contenders take turns, so that a clock that changes changes for all.
"""

import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcourse.kernels.int4_planes import prepare

GROUP_SIZE = 128
SHAPES = [  # N, K: of layers of 7, 8 and 70 billion parameters; the ones that most is said about first
    (8192, 8192),
    (28672, 8192),
    (8192, 28672),
    (4096, 4096),
    (57344, 8192),
    (6144, 4096),
    (28672, 4096),
    (4096, 14336),
    (10240, 8192),
]
LEAST_COPIES, LEAST_NBYTES = 4, 200_000_000
GRAPH_MS = 2.0  # as long as a graph is made, if it can be


@dataclass(frozen=True)
class Captured:
    """A graph of calls, and how many."""

    graph: torch.cuda.CUDAGraph
    calls: int


def copies(nbytes: int) -> int:
    """How many copies of a weight of so many bytes the caches cannot hold."""
    return max(LEAST_COPIES, LEAST_NBYTES // nbytes + 1)


def int4_weight(N: int, K: int) -> tuple[Tensor, Tensor]:
    """A random weight as `int4_mm` takes it: words and scales."""
    words = torch.randint(-(2**31), 2**31, (N, K // 8), dtype=torch.int32, device="cuda")
    scale = torch.rand(N, K // GROUP_SIZE, device="cuda").mul_(0.01).add_(0.001).half()
    return words, prepare(scale, group_size=GROUP_SIZE)[0]


def capture(calls: Sequence[Callable[[], object]]) -> Captured:
    """The calls, one for each copy, in turn as often as fills the time of a graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:  # compiles, and makes what is kept from call to call
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        calls[0]()
        end.record()
        torch.cuda.synchronize()
    rounds = max(1, min(64 // len(calls), int(GRAPH_MS / (start.elapsed_time(end) * len(calls)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    return Captured(graph, rounds * len(calls))


def times_us(contenders: dict[str, Captured], *, repeats: int) -> dict[str, list[float]]:
    """Microseconds a call of each contender, `repeats` times, one after the other in turn; one round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, captured in contenders.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            captured.graph.replay()
            end.record()
            end.synchronize()
            found[name].append(1000 * start.elapsed_time(end) / captured.calls)
    return {name: values[1:] for name, values in found.items()}


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median, upper quartile, to four digits."""
    found = statistics.quantiles(values, n=4, method="inclusive")
    return {
        name: float(f"{value:.4g}")
        for name, value in zip(("lower", "median", "upper"), found, strict=True)
    }


def copy_bytes_per_s(repeats: int = 15) -> float:
    """What a copy within the GPU's memory reads and writes a second: the median, of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    captured = capture([lambda: target.copy_(source)])
    return (
        2
        * source.nbytes
        / statistics.median(times_us({"copy": captured}, repeats=repeats)["copy"])
        * 1e6
    )


def gpu_stamp() -> dict[str, str]:
    """The GPU's name, its driver, and the versions that decide what runs on it."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = (
            subprocess.run(query, capture_output=True, text=True, check=True)
            .stdout.splitlines()[0]
            .strip()
        )
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    toolkit = torch.version.cuda or torch.version.hip or "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "toolkit": toolkit,
        "triton": triton.__version__,
    }
