"""The speed of products with 4-bit weights: our kernels, torch's, and the dense products to beat.

On a GPU: microseconds per call for each matrix, batch and contender (see `_gpu.py`), the bytes per
second that the call needs, next to a copy measured in the same run, and the speedup over F.linear
in float16. For FP8, x is already quantized. On the CPU: milliseconds for 4096 x 4096 and
8192 x 8192 in float32, bfloat16, INT8 and INT4, and the two ways that INT4 can take. Without a GPU
that table is skipped.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from _gpu import (
    GROUP_SIZE,
    SHAPES,
    Captured,
    capture,
    copies,
    copy_bytes_per_s,
    gpu_stamp,
    int4_weight,
    quartiles,
    times_us,
)
from _stamp import RESULTS, four_digits, report, stamp, timed_ms
from torch import Tensor

from qcourse import PerChannel, PerGroup, quantize
from qcourse.kernels import backend_dense, int4_cpu
from qcourse.kernels.int4_matmul import int4_matmul
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.kernels.triton_available import unavailable_reason
from qcourse.kernels.triton_int4_configs import BATCHES, load_table
from qcourse.kernels.triton_int4_launch import decode, int4_mm

CPU_SIDES = (4096, 8192)
CPU_BATCHES = (1, 4, 16, 32, 64, 128, 256, 512)
CPU_STACK_NBYTES = 100_000_000
MEMORY_BOUND = 16  # the largest batch on the CPU that is timed over a whole stack of weights
LADDER = (1, 16)  # the batches that the slower versions are timed at
REPEATS = 15
FP16 = torch.float16
BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Contender:
    """One way to multiply by a weight.

    Args:
        weight_nbytes: bytes of the weight, scales included.
        make: returns the tensors of one copy of a random weight.
        call: x and such tensors to the product.
        dtype: of x.
        batches: the batches that it is timed at.
    """

    weight_nbytes: int
    make: Callable[[], tuple]
    call: Callable[..., object]
    dtype: torch.dtype = FP16
    batches: tuple[int, ...] = BATCHES

    def nbytes(self, M: int, N: int, K: int) -> int:
        """The bytes that a call reads and writes."""
        x_nbytes = M * K * self.dtype.itemsize
        y_nbytes = M * N * 2
        return self.weight_nbytes + x_nbytes + y_nbytes


def contenders(N: int, K: int) -> dict[str, Contender]:
    """Return all contenders of this GPU and this torch, by name."""
    codes_nbytes = N * K // 2
    groups = N * K // GROUP_SIZE
    our_nbytes = codes_nbytes + 2 * groups
    tinygemm_nbytes = codes_nbytes + 4 * groups
    ours = partial(int4_weight, N, K)
    found = {
        "F.linear fp16": Contender(2 * N * K, partial(dense_weight, N, K, FP16), F.linear),
        "F.linear bf16": Contender(2 * N * K, partial(dense_weight, N, K, BF16), F.linear, BF16),
        "naive": Contender(our_nbytes, ours, partial(our_call, version="naive"), batches=LADDER),
        "planes": Contender(our_nbytes, ours, partial(our_call, version="planes"), batches=LADDER),
        "tuned fp16": Contender(our_nbytes, ours, our_call),
        "tuned bf16": Contender(our_nbytes, ours, our_call, BF16),
        "int4_matmul": Contender(our_nbytes, partial(whole_weight, N, K), int4_matmul),
        "decode and dense": Contender(our_nbytes, ours, decode_and_multiply),
        "tinygemm": Contender(tinygemm_nbytes, partial(tinygemm, N, K), tinygemm_call, BF16),
        "FP8": Contender(N * K, partial(fp8_weight, N, K), fp8_call, FP8),
    }
    if find_spec("gemlite"):
        layer = partial(gemlite_layer, N, K)
        found["gemlite"] = Contender(our_nbytes, layer, gemlite_call)
    return found


def dense_weight(N: int, K: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Return a random weight in floats."""
    return (torch.randn(N, K, device="cuda", dtype=dtype).mul_(0.02),)


def our_call(x: Tensor, words: Tensor, scale: Tensor, version: str = "tuned") -> Tensor:
    """Return our product."""
    return int4_mm(x, words, scale, group_size=GROUP_SIZE, version=version)


def decode_and_multiply(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Write w_hat out, then multiply it as floats."""
    w_hat = decode(words, scale, group_size=GROUP_SIZE, inputs=x.shape[1], dtype=x.dtype)
    return F.linear(x, w_hat)


def whole_weight(N: int, K: int) -> tuple[Int4Weight]:
    """Return a weight as int4_matmul takes it."""
    (w,) = dense_weight(N, K, FP16)
    q = quantize(w, 4, granularity=PerGroup(GROUP_SIZE), scale_dtype=FP16)
    return (Int4Weight.from_quantized(q),)


def tinygemm(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return torch's packed weight (even columns in the high nibble), its scales and zeros."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales_and_zeros = torch.rand(K // GROUP_SIZE, N, 2, device="cuda", dtype=BF16)
    return packed, scales_and_zeros.mul_(0.01)


def tinygemm_call(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """Return torch's own INT4 product."""
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_and_zeros)


def fp8_weight(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Return an FP8 weight, and the scale 1."""
    return torch.ones(N, K, device="cuda").to(FP8), torch.ones((), device="cuda")


def fp8_call(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
    """Return torch's FP8 product, scaled by 1."""
    return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=BF16)


def gemlite_layer(N: int, K: int) -> tuple[Callable]:
    """Return gemlite's layer, with random codes."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        4, GROUP_SIZE, K, N, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda")
    scale = torch.rand(N, K // GROUP_SIZE, device="cuda").mul_(0.01).half()
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    return (layer,)


def gemlite_call(x: Tensor, layer: Callable) -> Tensor:
    """Return gemlite's product."""
    return layer(x)


def measured(N: int, K: int) -> Iterator[dict]:
    """Yield a row per batch and contender of one matrix."""
    ways = contenders(N, K)
    weights = made_weights(ways)
    for M in BATCHES:
        graphs = {}
        for name in weights:
            graph = captured(M, K, ways[name], weights[name], name)
            if graph:
                graphs[name] = graph
        times = times_us(graphs, repeats=REPEATS)
        base_us = quartiles(times["F.linear fp16"])["median"]
        for name, values in times.items():
            us = quartiles(values)
            yield {
                "N": N,
                "K": K,
                "batch": M,
                "contender": name,
                "us": us,
                "GB_per_s": round(ways[name].nbytes(M, N, K) / us["median"] / 1e3),
                "over_fp16": round(base_us / us["median"], 3),
            }


def made_weights(ways: dict[str, Contender]) -> dict[str, list[tuple]]:
    """Return copies of each contender's weight; print which contenders cannot run."""
    weights = {}
    for name, way in ways.items():
        try:
            weights[name] = [way.make() for _ in range(copies(way.weight_nbytes))]
        except Exception as error:  # the other contenders go on
            print(f"  {name} left out: {type(error).__name__}: {str(error)[:150]}", flush=True)
    return weights


def captured(M: int, K: int, way: Contender, weights: list[tuple], name: str) -> Captured | None:
    """Return the contender's graph for a batch; None where it is not timed or fails."""
    if M not in way.batches:
        return None
    x = torch.randn(M, K, device="cuda").to(way.dtype)
    try:
        return capture([partial(way.call, x, *weight) for weight in weights])
    except Exception as error:  # a library's kernel may refuse a batch
        print(f"  {name} refuses batch {M}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return None


def on_gpu(shapes: list[tuple[int, int]], seconds: float) -> None:
    """Measure, print, and write results/int4_kernel_gpu.json after each matrix."""
    start = time.perf_counter()
    copied = copy_bytes_per_s()
    head = {
        "stamp": stamp("cuda") | gpu_stamp(),
        "configurations": load_table()["source"],
        "copy_GB_per_s": round(copied / 1e9),
    }
    print(json.dumps(head, indent=1))
    rows: list[dict] = []
    for N, K in shapes:
        if time.perf_counter() - start > seconds:
            print(f"no time for {N} x {K}")
            continue
        new = list(measured(N, K))
        rows += new
        show(N, K, new)
        torch.cuda.empty_cache()
        write_rows(head, rows)


def write_rows(head: dict, rows: list[dict]) -> None:
    """Write the head and, one per line, the rows as JSON."""
    lines = ",\n".join(map(json.dumps, rows))
    opening = json.dumps(head).removesuffix("}")
    text = f'{opening}, "results": [\n{lines}\n]}}\n'
    (RESULTS / "int4_kernel_gpu.json").write_text(text, encoding="utf-8")


def show(N: int, K: int, rows: list[dict]) -> None:
    """Print microseconds by contender and batch; below ours, the speedup over F.linear in fp16."""
    print(f"\n{N} x {K}, us" + "".join(f"{M:>9}" for M in BATCHES))
    for name in dict.fromkeys(row["contender"] for row in rows):
        by_batch = {row["batch"]: row for row in rows if row["contender"] == name}
        cells = [f"{by_batch[M]['us']['median']:.1f}" if M in by_batch else "" for M in BATCHES]
        print(f"{name:18}" + "".join(f"{cell:>9}" for cell in cells))
        if name == "tuned fp16":
            speedups = [by_batch[M]["over_fp16"] for M in BATCHES if M in by_batch]
            print(f"{'   over fp16':18}" + "".join(f"{speedup:>9.2f}" for speedup in speedups))
    print(end="", flush=True)


def on_cpu() -> list[dict]:
    """Return rows for the CPU in milliseconds per product, over weights larger than the cache."""
    rows = []
    for side in CPU_SIDES:
        for M in CPU_BATCHES:
            rows += cpu_rows(side, M, stacks(side))
    return rows


@cache
def stacks(side: int) -> dict[str, list]:
    """Return copies of one weight in each format, more than CPU_STACK_NBYTES per format."""
    w = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    q4 = quantize(w, 4, granularity=PerGroup(GROUP_SIZE), scale_dtype=BF16)
    w4 = Int4Weight.from_quantized(q4)
    codes = quantize(w, 8, granularity=PerChannel(0)).codes

    def count(bits: int) -> int:
        return CPU_STACK_NBYTES // (side * side * bits // 8) + 1

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


def main() -> None:
    """Measure the tables that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["cpu", "gpu"], help="one of the tables")
    parser.add_argument("--shapes", nargs="*", help="such as 8192x8192; default: all")
    parser.add_argument(
        "--seconds", type=float, default=480, help="start no matrix on the GPU after this"
    )
    arguments = parser.parse_args()
    if arguments.only != "gpu":
        report("int4_kernel_cpu", on_cpu())
    if arguments.only == "cpu":
        return
    reason = unavailable_reason()
    if not torch.cuda.is_available():
        reason = "there is no GPU that torch can use"
    if reason:
        print(f"No table for a GPU: {reason}")
        return
    shapes = SHAPES
    if arguments.shapes:
        shapes = []
        for shape in arguments.shapes:
            N, K = map(int, shape.split("x"))
            shapes.append((N, K))
    on_gpu(shapes, arguments.seconds)


if __name__ == "__main__":
    main()
