"""Find the configurations of the INT4 kernel on this GPU and freeze them in qcourse/kernels/triton_int4_configs.json.

For each matrix and batch a small grid of tiles, splits and stages is timed (see `_gpu.py`), the best four once more and
more carefully. It takes some minutes, prints as it goes and keeps what it has found in results/int4_tuning_gpu.json:
run again, it goes on where it was. `--seconds` ends it early, what is found so far frozen and the rest by rule.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple

import torch
from _gpu import GROUP_SIZE, SHAPES, capture, copies, gpu_stamp, int4_weight, times_us
from _stamp import RESULTS, stamp

from qcourse.kernels.triton_int4_configs import (
    BATCHES,
    LEAST_BLOCKS,
    MOST_SPLITS,
    TileConfig,
    choose,
    tile_by_rule,
    widths,
    write,
)
from qcourse.kernels.triton_int4_launch import unavailable_reason, decode, int4_mm

SERVES = {1: (1, 2, 4)}  # a batch that is tuned for others too
TUNED = (1, 8, 16, 32, 64, 128, 256)
TILES = {  # block_m: pairs of block_n and warps
    8: [(64, 2), (128, 4), (32, 1), (64, 4)],
    16: [(64, 2), (128, 4), (32, 1)],
    32: [(64, 2), (128, 4)],
    64: [(128, 4), (256, 8), (64, 4)],
    128: [(128, 8), (256, 8), (128, 4)],
    256: [(128, 8)],
}
STAGES = {8: (4, 6), 16: (4, 6), 32: (3, 4), 64: (3, 4), 128: (3, 4), 256: (2, 3)}
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
FILE = RESULTS / "int4_tuning_gpu.json"


def candidates(M: int, N: int, K: int) -> Iterator[TileConfig]:
    """The grid, less what would leave most of the GPU idle or cannot fit it."""
    properties, (narrowest, widest) = (
        torch.cuda.get_device_properties(0),
        widths(torch.device("cuda", 0)),
    )
    width = 1 << (M - 1).bit_length()
    tried = {8: (8,), 128: (64, 128), 256: (128, 256)}.get(max(8, width), (width,))
    for block_m in sorted(
        {max(narrowest, min(each, widest if widest < 128 else 256)) for each in tried}
    ):
        for block_n, warps in TILES[block_m]:
            if widest < 64 and warps > 2:
                continue
            tiles = -(-N // block_n) * -(-M // block_m)
            warps_at_once = (
                16 if block_m < 64 else 8
            )  # of one multiprocessor, to hide waiting behind
            wanted = warps_at_once * properties.multi_processor_count / warps / tiles
            for splits in SPLITS:
                fits = splits <= min(MOST_SPLITS, -(-K // 128) // LEAST_BLOCKS)
                if splits > 1 and (not fits or not wanted / 3 <= splits <= 3 * wanted):
                    continue
                for stages in STAGES[block_m]:
                    config = TileConfig(block_n, block_m, splits, warps, stages)
                    if config.shared_nbytes <= properties.shared_memory_per_block_optin:
                        yield config


def weights(N: int, K: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random words and scales, as many copies as no cache holds."""
    return [int4_weight(N, K) for _ in range(copies(N * K // 2))]


def calls(x: torch.Tensor, packed: list, config: TileConfig) -> list:
    """The kernel on each copy."""
    return [
        lambda words=words, scale=scale: int4_mm(
            x, words, scale, group_size=GROUP_SIZE, config=config
        )
        for words, scale in packed
    ]


def best(M: int, K: int, packed: list, grid: list[TileConfig]) -> tuple[TileConfig, float]:
    """The fastest of the grid, and its microseconds."""
    x = torch.randn(M, K, device="cuda", dtype=torch.float16)
    graphs, first = {}, {}
    for config in grid:
        name = str(astuple(config))
        try:
            graphs[name] = capture(calls(x, packed, config))
        except (
            Exception
        ) as error:  # a compiler or driver that refuses is no candidate; why is printed
            print(f"    {name}: {type(error).__name__}: {str(error)[:120]}", flush=True)
            continue
        first[name] = statistics.median(times_us({name: graphs[name]}, repeats=3)[name])
    leaders = sorted(first, key=first.__getitem__)[:4]
    again = times_us({name: graphs[name] for name in leaders}, repeats=11)
    winner = min(leaders, key=lambda name: statistics.median(again[name]))
    return TileConfig(*json.loads(winner.replace("(", "[").replace(")", "]"))), statistics.median(
        again[winner]
    )


def crossover() -> int:
    """The largest batch for which the kernel beats writing w_hat out and a dense product, for 8192 x 8192."""
    N = K = 8192
    packed, last = weights(N, K), 0
    for M in (*BATCHES, 512, 1024, 2048, 4096):
        x = torch.randn(M, K, device="cuda", dtype=torch.float16)
        dense = [
            lambda words=words, scale=scale, x=x: torch.nn.functional.linear(
                x, decode(words, scale, group_size=GROUP_SIZE, inputs=K, dtype=torch.float16)
            )
            for words, scale in packed
        ]
        ours = capture(calls(x, packed, choose(M, N, K, x.device)))
        found = times_us({"kernel": ours, "decode": capture(dense)}, repeats=7)
        kernel, decoded = (statistics.median(found[name]) for name in ("kernel", "decode"))
        print(f"batch {M}: kernel {kernel:.1f} us, decode and dense {decoded:.1f} us", flush=True)
        if kernel > decoded:
            break
        last = M
    return last


def freeze(found: dict, *, crossover: int | None) -> None:
    """Write the table: what was found, the rest by rule."""
    count = torch.cuda.get_device_properties(0).multi_processor_count
    table: dict[str, dict[str, TileConfig]] = {}
    for N, K in SHAPES:
        known = found.get(f"{N}x{K}", {})
        limits = widths(torch.device("cuda", 0))
        entries = {
            str(M): tile_by_rule(M, N, K, multiprocessors=count, widths=limits) for M in BATCHES
        }
        for at, tuned in known.items():
            entries |= {
                str(M): TileConfig(*tuned["config"]) for M in SERVES.get(int(at), (int(at),))
            }
        table[f"{N}x{K}"] = entries
    missing = sum(len(TUNED) - len(found.get(f"{N}x{K}", {})) for N, K in SHAPES)
    source = f"benchmarks/tune_int4.py on {torch.cuda.get_device_name()}, {stamp()['date']}"
    source += f"; {missing} of {len(SHAPES) * len(TUNED)} by rule" if missing else ""
    write(table, source=source, multiprocessors=count, crossover=crossover)


def main(seconds: float) -> None:
    """Tune what is not yet tuned, until the time is over."""
    start, here = time.perf_counter(), gpu_stamp()
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    found = kept["found"] if kept.get("stamp", {}).get("gpu") == here["gpu"] else {}
    for N, K in SHAPES:
        entries = found.setdefault(f"{N}x{K}", {})
        if len(entries) == len(TUNED):
            continue
        packed = weights(N, K)
        for M in TUNED:
            if str(M) in entries or time.perf_counter() - start > seconds:
                continue
            grid = list(candidates(M, N, K))
            config, us = best(M, K, packed, grid)
            entries[str(M)] = {
                "config": list(astuple(config)),
                "us": round(us, 2),
                "tried": len(grid),
            }
            spent, rate = time.perf_counter() - start, N * K / 2 / us / 1e6
            print(
                f"{spent:4.0f} s  {N}x{K} batch {M}: {config}, {us:.1f} us, {rate:.2f} TB/s",
                flush=True,
            )
            kept = {"stamp": stamp("cuda") | here, "found": found}
            FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        del packed
        torch.cuda.empty_cache()
        freeze(found, crossover=None)
    freeze(found, crossover=None)  # the crossover is measured with what was found
    freeze(found, crossover=crossover())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=420, help="begin nothing new after so long"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or unavailable_reason():
        sys.exit(f"nothing to tune: {unavailable_reason() or 'triton interprets'}")
    main(arguments.seconds)
