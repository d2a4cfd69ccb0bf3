"""Find the fastest tiles of the INT4 kernel on this GPU and store them for `qcourse`.

For each matrix and batch a small grid of tiles, splits and stages is timed (see `_gpu.py`), and the
best four are timed again with more repeats. This takes some minutes and prints its progress. Every
result is kept in results/int4_tuning_gpu.json, so a second run continues where the first stopped.
After `--seconds` nothing new is started: the rest of the table follows the rule.

The table is qcourse/kernels/triton_int4_configs.json.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, astuple
from functools import partial

import torch
import torch.nn.functional as F
from _gpu import GROUP_SIZE, SHAPES, capture, copies, gpu_stamp, int4_weight, times_us
from _int4_tiles import candidates
from _stamp import RESULTS, stamp
from torch import Tensor

from qcourse.kernels.triton_available import unavailable_reason
from qcourse.kernels.triton_int4_configs import (
    BATCHES,
    TileConfig,
    choose_config,
    save_table,
    tile_by_rule,
    tile_widths,
)
from qcourse.kernels.triton_int4_launch import decode, int4_mm

COVERS = {1: (1, 2, 4)}  # a tuned batch whose result is used for others too
TUNED = (1, 8, 16, 32, 64, 128, 256)
FILE = RESULTS / "int4_tuning_gpu.json"
Weights = list[tuple[Tensor, Tensor]]


def weights(N: int, K: int) -> Weights:
    """Return random words and scales, more copies than the cache holds."""
    return [int4_weight(N, K) for _ in range(copies(N * K // 2))]


def kernel_calls(x: Tensor, packed: Weights, config: TileConfig) -> list[Callable[[], Tensor]]:
    """Return one call of the kernel per copy."""
    product = partial(int4_mm, x, group_size=GROUP_SIZE, config=config)
    return [partial(product, words, scale) for words, scale in packed]


def best(M: int, K: int, packed: Weights, grid: list[TileConfig]) -> tuple[TileConfig, float]:
    """Return the fastest configuration of the grid, and its microseconds."""
    x = torch.randn(M, K, device="cuda", dtype=torch.float16)
    configs = {str(astuple(config)): config for config in grid}
    graphs = {}
    first = {}
    for name, config in configs.items():
        try:
            graphs[name] = capture(kernel_calls(x, packed, config))
        except Exception as error:  # the compiler or the driver refuses this tile
            print(f"    {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        times = times_us({name: graphs[name]}, repeats=3)
        first[name] = statistics.median(times[name])

    # Time the best four again, in turn.
    leaders = sorted(first, key=first.__getitem__)[:4]
    times = times_us({name: graphs[name] for name in leaders}, repeats=11)
    medians = {name: statistics.median(values) for name, values in times.items()}
    winner = min(medians, key=medians.__getitem__)
    return configs[winner], medians[winner]


def decode_and_multiply(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """Write w_hat out, then multiply it as floats."""
    w_hat = decode(words, scale, group_size=GROUP_SIZE, inputs=x.shape[1], dtype=x.dtype)
    return F.linear(x, w_hat)


def measure_crossover() -> int:
    """Return the largest batch for which the kernel beats decoding first, for 8192 x 8192."""
    N = 8192
    K = 8192
    packed = weights(N, K)
    last = 0
    for M in (*BATCHES, 512, 1024, 2048, 4096):
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        config = choose_config(M, N, K, x.device)
        dense_calls = [partial(decode_and_multiply, x, words, scale) for words, scale in packed]
        graphs = {
            "kernel": capture(kernel_calls(x, packed, config)),
            "decode": capture(dense_calls),
        }
        times = times_us(graphs, repeats=7)
        kernel = statistics.median(times["kernel"])
        decoded = statistics.median(times["decode"])
        print(f"batch {M}: kernel {kernel:.1f} us, decode and dense {decoded:.1f} us", flush=True)
        if kernel > decoded:
            break
        last = M
    return last


def table_entries(N: int, K: int, tuned: dict) -> dict[str, TileConfig]:
    """Return a configuration per batch: the tuned ones, the rest by the rule."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    limits = tile_widths(torch.device("cuda", 0))
    entries = {}
    for M in BATCHES:
        config = tile_by_rule(M, N, K, multiprocessors=multiprocessors, widths=limits)
        entries[str(M)] = config
    for batch, result in tuned.items():
        for M in COVERS.get(int(batch), (int(batch),)):
            entries[str(M)] = TileConfig(**result["config"])
    return entries


def store(found: dict, *, crossover: int | None) -> None:
    """Write the table of `qcourse`."""
    table = {}
    tuned_count = 0
    for N, K in SHAPES:
        tuned = found.get(f"{N}x{K}", {})
        tuned_count += len(tuned)
        table[f"{N}x{K}"] = table_entries(N, K, tuned)
    source = f"benchmarks/tune_int4.py on {torch.cuda.get_device_name()}, {stamp()['date']}"
    total = len(SHAPES) * len(TUNED)
    if tuned_count < total:
        source += f"; {total - tuned_count} of {total} by rule"
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    save_table(table, source=source, multiprocessors=multiprocessors, crossover=crossover)


def tune_matrix(
    N: int, K: int, entries: dict, *, deadline_s: float, keep: Callable[[], None]
) -> None:
    """Add a result per batch that has none, until the deadline; call `keep` after each."""
    if len(entries) == len(TUNED):
        return
    packed = weights(N, K)
    for M in TUNED:
        if str(M) in entries or time.perf_counter() > deadline_s:
            continue
        grid = list(candidates(M, N, K))
        config, us = best(M, K, packed, grid)
        entries[str(M)] = {"config": asdict(config), "us": round(us, 2), "tried": len(grid)}
        rate = N * K / 2 / us / 1e6
        print(f"{N}x{K} batch {M}: {config}, {us:.1f} us, {rate:.2f} TB/s", flush=True)
        keep()


def main(seconds: float) -> None:
    """Tune every matrix and batch that has no result yet, until the time is over."""
    deadline_s = time.perf_counter() + seconds
    here = gpu_stamp()
    found = {}
    if FILE.exists():
        kept = json.loads(FILE.read_text(encoding="utf-8"))
        if kept["stamp"]["gpu"] == here["gpu"]:
            found = kept["found"]

    def keep() -> None:
        stamped = {"stamp": stamp("cuda") | here, "found": found}
        FILE.write_text(json.dumps(stamped, indent=1) + "\n", encoding="utf-8")

    for N, K in SHAPES:
        entries = found.setdefault(f"{N}x{K}", {})
        tune_matrix(N, K, entries, deadline_s=deadline_s, keep=keep)
        torch.cuda.empty_cache()
        store(found, crossover=None)
    # The crossover is measured with the tiles that were found.
    store(found, crossover=measure_crossover())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=420, help="start nothing new after this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or unavailable_reason():
        sys.exit(f"nothing to tune: {unavailable_reason() or 'triton interprets'}")
    main(arguments.seconds)
