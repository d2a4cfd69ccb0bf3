"""Timing on a GPU: CUDA graphs of calls, over weights larger than the cache, contenders in turn.

A call of some microseconds is shorter than its launch from Python, so calls are captured into a
CUDA graph and replayed. The graph cycles through copies of the weights, at least 4 and more than
200 MB together, so that each call reads its weights from memory, as in a model. Contenders take
turns, so that a change of the clock affects all of them.
"""

import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcourse.kernels.int4_planes import scale_and_zero_rows

GROUP_SIZE = 128
SHAPES = [  # N, K: layers of models of 7, 8 and 70 billion parameters, the most important first
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
LEAST_COPIES = 4
LEAST_NBYTES = 200_000_000
GRAPH_MS = 2.0  # the intended duration of a graph
MOST_CALLS = 64  # per graph


@dataclass(frozen=True)
class Captured:
    """A CUDA graph, and the number of calls in it."""

    graph: torch.cuda.CUDAGraph
    calls: int


def copies(nbytes: int) -> int:
    """Return how many copies of a weight of `nbytes` exceed the caches."""
    return max(LEAST_COPIES, LEAST_NBYTES // nbytes + 1)


def int4_weight(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return a random weight as `int4_mm` takes it: words and scales."""
    words = torch.randint(-(2**31), 2**31, (N, K // 8), dtype=torch.int32, device="cuda")
    scale = torch.rand(N, K // GROUP_SIZE, device="cuda").mul_(0.01).add_(0.001).half()
    scale_rows, _ = scale_and_zero_rows(scale, group_size=GROUP_SIZE)
    return words, scale_rows


def capture(calls: Sequence[Callable[[], object]]) -> Captured:
    """Capture the calls, one per copy of the weights, repeated to fill GRAPH_MS."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The first calls compile the kernel and allocate what is kept between calls.
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        call_ms = elapsed_ms(calls[0])
    rounds_that_fill = int(GRAPH_MS / (call_ms * len(calls)))
    rounds = max(1, min(MOST_CALLS // len(calls), rounds_that_fill))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    return Captured(graph, rounds * len(calls))


def elapsed_ms(call: Callable[[], object]) -> float:
    """Return the milliseconds that the GPU takes for a call."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def times_us(contenders: dict[str, Captured], *, repeats: int) -> dict[str, list[float]]:
    """Return `repeats` times per call in us for each contender, after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, captured in contenders.items():
            times[name].append(1000 * elapsed_ms(captured.graph.replay) / captured.calls)
    return {name: values[1:] for name, values in times.items()}


def quartiles(values: list[float]) -> dict[str, float]:
    """Return the lower quartile, the median and the upper quartile, to four digits."""
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    names = ("lower", "median", "upper")
    return {name: float(f"{value:.4g}") for name, value in zip(names, cuts, strict=True)}


def copy_bytes_per_s(repeats: int = 15) -> float:
    """Return the bytes per second that a copy of 1 GiB reads and writes: the median."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    captured = capture([lambda: target.copy_(source)])
    times = times_us({"copy": captured}, repeats=repeats)["copy"]
    return 2 * source.nbytes / statistics.median(times) * 1e6


def gpu_stamp() -> dict[str, str]:
    """Return the GPU's name, its driver, and the versions of the toolkit and of triton."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver_version(),
        "toolkit": torch.version.cuda or torch.version.hip or "unknown",
        "triton": triton.__version__,
    }


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
