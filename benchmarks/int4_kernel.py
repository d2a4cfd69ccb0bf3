"""How fast weights of 4 bits are multiplied: our kernels, torch's own, and the dense products they have to beat.

On a GPU: microseconds a call for each matrix, batch and contender (see `_gpu.py` for how; x is there, quantized for FP8
where FP8 is meant), the bytes a second that the call needs to read and write, beside what a copy reaches in the same
run, and the speed over F.linear in float16. On the CPU: milliseconds for 4096 x 4096 and 8192 x 8192, in float32,
bfloat16, INT8 and INT4, and both ways that INT4 can go. Without a GPU that table stays empty, and so does its file.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache

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
from _stamp import RESULTS, report, stamp, timed_ms
from torch import Tensor

from qcourse import PerChannel, PerGroup, quantize
from qcourse.kernels import int4_cpu
from qcourse.kernels.int4_matmul import int4_matmul
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.kernels.reference import dense
from qcourse.kernels.triton_int4_configs import BATCHES, table
from qcourse.kernels.triton_int4_launch import unavailable_reason, decode, int4_mm

CPU_BATCHES = (1, 4, 16, 32, 64, 128, 256, 512)
CPU_STACK_NBYTES = 100_000_000
LADDER = (1, 16)  # the batches for which the slower versions are timed too
REPEATS = 15


@dataclass(frozen=True)
class Contender:
    """One way to multiply by a weight.

    Args:
        nbytes: what the weight takes, scales included.
        make: a weight, random, for one copy.
        call: x and such a weight to the product.
        dtype: of x.
        batches: for which it is timed.
    """

    nbytes: int
    make: Callable[[], tuple]
    call: Callable[..., object]
    dtype: torch.dtype = torch.float16
    batches: tuple[int, ...] = BATCHES


def contenders(N: int, K: int) -> Iterator[tuple[str, Contender]]:
    """All that this GPU and this torch have."""
    packed, groups = N * K // 2, K // GROUP_SIZE

    def dense(dtype: torch.dtype) -> tuple[Tensor]:
        return (torch.randn(N, K, device="cuda", dtype=dtype).mul_(0.02),)

    def ours() -> tuple[Tensor, Tensor]:
        return int4_weight(N, K)

    def multiply(x: Tensor, words: Tensor, scale: Tensor, version: str = "tuned") -> Tensor:
        return int4_mm(x, words, scale, group_size=GROUP_SIZE, version=version)

    def decoded(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
        return F.linear(x, decode(words, scale, group_size=GROUP_SIZE, inputs=K, dtype=x.dtype))

    def slower(version: str) -> Callable[..., Tensor]:
        return lambda x, words, scale: multiply(x, words, scale, version)

    half, bf16 = torch.float16, torch.bfloat16
    our_nbytes = packed + 2 * N * groups
    yield "F.linear fp16", Contender(2 * N * K, lambda: dense(half), F.linear)
    yield "F.linear bf16", Contender(2 * N * K, lambda: dense(bf16), F.linear, bf16)
    yield "naive", Contender(our_nbytes, ours, slower("naive"), batches=LADDER)
    yield "planes", Contender(our_nbytes, ours, slower("planes"), batches=LADDER)
    yield "tuned fp16", Contender(our_nbytes, ours, multiply)
    yield "tuned bf16", Contender(our_nbytes, ours, multiply, bf16)
    yield "int4_matmul", Contender(our_nbytes, lambda: whole_weight(N, K), int4_matmul)
    yield "decode and dense", Contender(our_nbytes, ours, decoded)
    yield (
        "tinygemm",
        Contender(packed + 4 * N * groups, lambda: tinygemm(N, K), tinygemm_call, bf16),
    )
    yield "FP8", Contender(N * K, lambda: fp8(N, K), fp8_call, FP8)
    try:
        import gemlite  # noqa: F401
    except ImportError:
        return
    yield (
        "gemlite",
        Contender(our_nbytes, lambda: (gemlite_layer(N, K),), lambda x, layer: layer(x)),
    )


FP8 = torch.float8_e4m3fn


def tinygemm(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Torch's own packed weight, and its scales and zeros; the even column lies in the high nibble."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    return packed, torch.rand(K // GROUP_SIZE, N, 2, device="cuda", dtype=torch.bfloat16).mul_(0.01)


def tinygemm_call(x: Tensor, packed: Tensor, scales_and_zeros: Tensor) -> Tensor:
    """Torch's own INT4 product."""
    return torch.ops.aten._weight_int4pack_mm(x, packed, GROUP_SIZE, scales_and_zeros)


def fp8(N: int, K: int) -> tuple[Tensor, Tensor]:
    """An FP8 weight, and the scale 1."""
    return torch.ones(N, K, device="cuda").to(FP8), torch.ones((), device="cuda")


def whole_weight(N: int, K: int) -> tuple[Int4Weight]:
    """A weight as int4_matmul takes it."""
    w = torch.randn(N, K, device="cuda", dtype=torch.float16).mul_(0.02)
    return (
        Int4Weight.from_quantized(
            quantize(w, 4, granularity=PerGroup(GROUP_SIZE), scale_dtype=torch.float16)
        ),
    )


def fp8_call(x: Tensor, w: Tensor, one: Tensor) -> Tensor:
    """Torch's FP8 product, scaled by 1."""
    return torch._scaled_mm(x, w.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def gemlite_layer(N: int, K: int) -> object:
    """gemlite's layer, with random codes."""
    from gemlite.core import DType, GemLiteLinearTriton

    layer = GemLiteLinearTriton(
        4, GROUP_SIZE, K, N, input_dtype=DType.FP16, output_dtype=DType.FP16
    )
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda")
    scale = torch.rand(N, K // GROUP_SIZE, device="cuda").mul_(0.01).half()
    layer.pack(codes, scale, torch.full_like(scale, 8), None)
    return layer


def measured(N: int, K: int) -> Iterator[dict]:
    """A row for each batch and contender of one matrix."""
    ways = dict(contenders(N, K))
    weights: dict[str, list[tuple]] = {}
    for name, way in ways.items():
        try:
            weights[name] = [way.make() for _ in range(copies(way.nbytes))]
        except Exception as error:  # a contender that cannot run is named, and the others go on
            print(f"  {name} left out: {type(error).__name__}: {str(error)[:150]}", flush=True)
    for M in BATCHES:
        graphs = {
            name: each
            for name in weights
            if M in ways[name].batches and (each := captured(M, K, ways[name], weights[name], name))
        }
        times = times_us(graphs, repeats=REPEATS)
        base = quartiles(times["F.linear fp16"])["median"]
        for name, values in times.items():
            us, size = quartiles(values), 2 if ways[name].dtype != FP8 else 1
            nbytes = ways[name].nbytes + M * (K * size + N * 2)
            rates = {
                "GB_per_s": round(nbytes / us["median"] / 1e3),
                "over_fp16": round(base / us["median"], 3),
            }
            yield {"N": N, "K": K, "batch": M, "contender": name, "us": us, **rates}


def captured(M: int, K: int, way: Contender, weights: list[tuple], name: str) -> Captured | None:
    """The contender's graph for a batch; None, and a word, where it refuses."""
    x = torch.randn(M, K, device="cuda").to(way.dtype)
    try:
        return capture([lambda weight=weight: way.call(x, *weight) for weight in weights])
    except Exception as error:  # a library's kernel may refuse a batch
        print(f"  {name} refuses batch {M}: {type(error).__name__}: {str(error)[:150]}", flush=True)
        return None


def on_gpu(shapes: list[tuple[int, int]], seconds: float) -> None:
    """Measure, print, and write results/int4_kernel_gpu.json after each matrix."""
    start, copied = time.perf_counter(), copy_bytes_per_s()
    head = {
        "stamp": stamp("cuda") | gpu_stamp(),
        "configurations": table()["source"],
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
        text = (
            json.dumps(head | {"results": []})[:-2]
            + "\n"
            + ",\n".join(map(json.dumps, rows))
            + "\n]}\n"
        )
        (RESULTS / "int4_kernel_gpu.json").write_text(text, encoding="utf-8")


def show(N: int, K: int, rows: list[dict]) -> None:
    """Microseconds a call, contenders by batches; under ours, the speed over F.linear in float16."""
    print(f"\n{N} x {K}, us" + "".join(f"{M:>9}" for M in BATCHES))
    for name in dict.fromkeys(row["contender"] for row in rows):
        found = {row["batch"]: row for row in rows if row["contender"] == name}
        print(
            f"{name:18}"
            + "".join(
                f"{found[M]['us']['median']:>9.1f}" if M in found else " " * 9 for M in BATCHES
            )
        )
        if name == "tuned fp16":
            print(
                f"{'   over fp16':18}"
                + "".join(f"{found[M]['over_fp16']:>9.2f}" for M in BATCHES if M in found)
            )
    print(end="", flush=True)


def on_cpu() -> list[dict]:
    """Rows for the CPU, milliseconds a product, a stack of weights gone through that no cache holds."""
    return [
        row for side in (4096, 8192) for M in CPU_BATCHES for row in cpu_rows(side, M, stacks(side))
    ]


@cache
def stacks(side: int) -> dict[str, list]:
    """Copies of one weight in each format, each format more than CPU_STACK_NBYTES."""
    w = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    w4 = Int4Weight.from_quantized(
        quantize(w, 4, granularity=PerGroup(GROUP_SIZE), scale_dtype=torch.bfloat16)
    )
    codes = quantize(w, 8, granularity=PerChannel(0)).codes
    count = [CPU_STACK_NBYTES // (side * side * bits // 8) + 1 for bits in (32, 16, 8, 4)]
    return {
        "fp32": [w.clone() for _ in range(count[0])],
        "bf16": [w.bfloat16() for _ in range(count[1])],
        "int8": [codes.clone() for _ in range(count[2])],
        "int4": [replace(w4, packed=w4.packed.clone()) for _ in range(count[3])],
    }


def cpu_rows(side: int, M: int, stack: dict[str, list]) -> list[dict]:
    """All contenders at one batch, and the two ways that int4_matmul has to choose from."""
    x32 = torch.randn(M, side, generator=torch.Generator().manual_seed(1))
    x, scale = x32.bfloat16(), torch.ones(side, dtype=torch.bfloat16)
    only = {"group_size": GROUP_SIZE, "outputs": side}
    contenders: dict[str, tuple[str, Callable]] = {
        "F.linear fp32": ("fp32", lambda w: F.linear(x32, w)),
        "F.linear bf16": ("bf16", lambda w: F.linear(x, w)),
        "INT8 weights, torch's product": (
            "int8",
            lambda w: torch.ops.aten._weight_int8pack_mm(x, w, scale),
        ),
        "INT4, int4_matmul": ("int4", lambda w: int4_matmul(x, w)),
        "  torch's INT4 product alone": (
            "int4",
            lambda w: int4_cpu.multiply(x, w.packed, *w.extras, **only),
        ),
        "  decoded, then dense": ("int4", lambda w: dense(x, w)),
    }
    rows, repeats = [], 7 if M <= 16 else 3
    for what, (kind, call) in contenders.items():
        weights = stack[kind] if M <= 16 else stack[kind][:1]  # a large batch waits for no memory
        took = timed_ms(
            lambda call=call, weights=weights: [call(w) for w in weights], repeats=repeats
        )
        took = {name: float(f"{value / len(weights):.4g}") for name, value in took.items()}
        rows.append({"what": f"{side}, batch {M}: {what}", "unit": "ms", **took, "target": None})
    plain = rows[1]["min"]
    return [row | {"over_bf16": float(f"{plain / row['min']:.3g}")} for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["cpu", "gpu"], help="one of the tables")
    parser.add_argument("--shapes", nargs="*", help="such as 8192x8192; all where none is named")
    parser.add_argument(
        "--seconds", type=float, default=480, help="begin no matrix on the GPU after so long"
    )
    arguments = parser.parse_args()
    if arguments.only != "gpu":
        report("int4_kernel_cpu", on_cpu())
    if arguments.only != "cpu":
        reason = (
            unavailable_reason()
            if torch.cuda.is_available()
            else "there is no GPU that torch can use"
        )
        if reason:
            print(f"No table for a GPU: {reason}")
        else:
            named = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes or []]
            on_gpu(named or SHAPES, arguments.seconds)  # type: ignore[arg-type]
