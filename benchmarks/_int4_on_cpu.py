"""Products on the CPU in float32, bfloat16, INT8 and INT4, for `int4_kernel.py`."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
import torch.nn.functional as F
from _gpu import GROUP_SIZE
from _stamp import four_digits, timed_ms
from torch import Tensor

from qcourse import PerChannel, PerGroup, quantize
from qcourse.kernels import backend_dense, int4_cpu
from qcourse.kernels.int4_matmul import int4_matmul
from qcourse.kernels.int4_weight import Int4Weight

SIDES = (4096, 8192)
BATCHES = (1, 4, 16, 32, 64, 128, 256, 512)
STACK_NBYTES = 100_000_000
MEMORY_BOUND = 16  # the largest batch that is timed over a whole stack of weights
BF16 = torch.bfloat16


def on_cpu() -> list[dict]:
    """Return rows for the CPU in milliseconds per product, over weights larger than the cache."""
    rows = []
    for side in SIDES:
        for M in BATCHES:
            rows += cpu_rows(side, M, stacks(side))
    return rows


@cache
def stacks(side: int) -> dict[str, list]:
    """Return copies of one weight in each format, more than STACK_NBYTES per format."""
    w = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    q4 = quantize(w, 4, granularity=PerGroup(GROUP_SIZE), scale_dtype=BF16)
    w4 = Int4Weight.from_quantized(q4)
    codes = quantize(w, 8, granularity=PerChannel(0)).codes

    def count(bits: int) -> int:
        return STACK_NBYTES // (side * side * bits // 8) + 1

    return {
        "fp32": [w.clone() for _ in range(count(32))],
        "bf16": [w.bfloat16() for _ in range(count(16))],
        "int8": [codes.clone() for _ in range(count(8))],
        "int4": [replace(w4, packed=w4.packed.clone()) for _ in range(count(4))],
    }


def cpu_rows(side: int, M: int, stack: dict[str, list]) -> list[dict]:
    """Return a row per contender at one batch, and per way that int4_matmul can take."""
    x32 = torch.randn(M, side, generator=torch.Generator().manual_seed(1))
    x = x32.bfloat16()
    scale = torch.ones(side, dtype=BF16)
    bf16_name = "F.linear bf16"

    def int8_product(w: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, w, scale)

    def int4_product(w: Int4Weight) -> Tensor:
        return int4_cpu.multiply(x, w.packed, *w.extras, group_size=GROUP_SIZE, outputs=side)

    calls: dict[str, tuple[str, Callable]] = {
        "F.linear fp32": ("fp32", partial(F.linear, x32)),
        bf16_name: ("bf16", partial(F.linear, x)),
        "INT8 weights, torch's product": ("int8", int8_product),
        "INT4, int4_matmul": ("int4", partial(int4_matmul, x)),
        "  torch's INT4 product alone": ("int4", int4_product),
        "  decoded, then dense": ("int4", partial(backend_dense.multiply, x)),
    }
    times = {}
    for name, (kind, call) in calls.items():
        # A large batch is compute-bound: one weight is enough.
        weights = stack[kind] if M <= MEMORY_BOUND else stack[kind][:1]
        times[name] = cpu_times_ms(call, weights, repeats=7 if M <= MEMORY_BOUND else 3)
    rows = []
    for name, took in times.items():
        row = {"what": f"{side}, batch {M}: {name}", "unit": "ms", **took, "target": None}
        row["over_bf16"] = float(f"{times[bf16_name]['min'] / took['min']:.3g}")
        rows.append(row)
    return rows


def cpu_times_ms(call: Callable, weights: list, *, repeats: int) -> dict[str, float]:
    """Return the minimum and the median time per product of a pass over the weights."""

    def one_pass() -> None:
        for w in weights:
            call(w)

    times = timed_ms(one_pass, repeats=repeats)
    return {name: four_digits(value / len(weights)) for name, value in times.items()}
