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
from collections.abc import Iterator
from functools import partial

import torch
from _gpu import SHAPES, Captured, capture, copies, copy_bytes_per_s, gpu_stamp, quartiles, times_us
from _int4_contenders import Contender, contenders
from _int4_on_cpu import on_cpu
from _stamp import RESULTS, report, stamp

from qcourse.kernels.triton_available import unavailable_reason
from qcourse.kernels.triton_int4_configs import BATCHES, load_table

REPEATS = 15


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
            median_us = us["median"]
            nbytes = ways[name].nbytes(M, N, K)
            row = {"N": N, "K": K, "batch": M, "contender": name, "us": us}
            row["GB_per_s"] = round(nbytes / median_us / 1e3)
            row["over_fp16"] = round(base_us / median_us, 3)
            yield row


def made_weights(ways: dict[str, Contender]) -> dict[str, list[tuple]]:
    """Return copies of each contender's weight; print which contenders cannot run."""
    weights = {}
    for name, way in ways.items():
        try:
            weights[name] = [way.make() for _ in range(copies(way.weight_nbytes))]
        except Exception as error:  # the other contenders go on
            print(f"  {name} left out: {short(error)}", flush=True)
    return weights


def captured(M: int, K: int, way: Contender, weights: list[tuple], name: str) -> Captured | None:
    """Return the contender's graph for a batch; None where it is not timed or fails."""
    if M not in way.batches:
        return None
    x = torch.randn(M, K, device="cuda").to(way.dtype)
    try:
        return capture([partial(way.call, x, *weight) for weight in weights])
    except Exception as error:  # a library's kernel may refuse a batch
        print(f"  {name} refuses batch {M}: {short(error)}", flush=True)
        return None


def short(error: Exception) -> str:
    """Return an error's type and the beginning of its message."""
    return f"{type(error).__name__}: {str(error)[:150]}"


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
    batches = "".join(f"{M:>9}" for M in BATCHES)
    print(f"\n{N} x {K}, us{batches}")
    for name in dict.fromkeys(row["contender"] for row in rows):
        by_batch = {row["batch"]: row for row in rows if row["contender"] == name}
        times = {M: f"{row['us']['median']:.1f}" for M, row in by_batch.items()}
        print(table_line(name, times))
        if name == "tuned fp16":
            speedups = {M: f"{row['over_fp16']:.2f}" for M, row in by_batch.items()}
            print(table_line("   over fp16", speedups))
    print(end="", flush=True)


def table_line(name: str, cells: dict[int, str]) -> str:
    """Return a line of the table; batches without a cell stay empty."""
    columns = [f"{cells.get(M, ''):>9}" for M in BATCHES]
    return f"{name:18}" + "".join(columns)


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
