"""The tile of the INT4 kernel for a shape and a batch: stored in a file, else found by a rule.

The idea: the fastest tile depends on the matrix, the batch and the GPU, and finding it takes
minutes. ``benchmarks/tune_int4.py`` finds it once and stores it in triton_int4_configs.json. A
batch takes the entry of the next size in BATCHES. `tile_by_rule` covers other matrices, and GPUs
with another number of multiprocessors.

How it differs from ``triton_int4_launch.py``: that launches the kernel with the tile chosen here.
"""

import functools
import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from qcourse.kernels.int4_planes import BLOCK, ceil_div

FILE = Path(__file__).with_suffix(".json")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LEAST_BLOCKS = 4  # of 128 along K per program: with fewer its loads never overlap
MOST_SPLITS = 16
LEAST_SHARED_NBYTES = 65_536  # where torch does not report the shared memory per program


@dataclass(frozen=True)
class TileConfig:
    """The tile of one program of the GPU, and the resources it uses."""

    block_n: int  # rows of W per tile, a power of 2
    block_m: int  # rows of x per tile, a power of 2 from 8
    splits: int  # programs that share the K of one tile
    warps: int  # groups of 32 threads per program
    stages: int  # blocks of 128 along K that are loaded ahead

    @property
    def shared_nbytes(self) -> int:
        """The most shared memory that a program takes: per stage its words, and x in two bytes."""
        words_nbytes = BLOCK * self.block_n // 2
        x_nbytes = BLOCK * self.block_m * 2
        return self.stages * (words_nbytes + x_nbytes)


def choose_config(M: int, N: int, K: int, device: torch.device) -> TileConfig:
    """Return the configuration for x (M, K) and W (N, K): the stored one, else that of the rule.

    >>> choose_config(1, 4096, 4096, torch.device("cpu"))
    TileConfig(block_n=64, block_m=8, splits=1, warps=2, stages=4)
    """
    if device.type != "cuda":  # the interpreter runs one program at a time
        return tile_by_rule(M, N, K, multiprocessors=1)
    properties = torch.cuda.get_device_properties(device)
    multiprocessors = properties.multi_processor_count
    config = None
    if multiprocessors == load_table()["multiprocessors"]:
        config = stored_config(M, N, K)
    if config is None:
        limits = tile_widths(device)
        config = tile_by_rule(M, N, K, multiprocessors=multiprocessors, widths=limits)
    # Load fewer blocks ahead where the GPU has less shared memory.
    room = getattr(properties, "shared_memory_per_block_optin", LEAST_SHARED_NBYTES)
    while config.shared_nbytes > room and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


def stored_config(M: int, N: int, K: int) -> TileConfig | None:
    """Return the stored configuration; None for a matrix or batch that the file does not list."""
    batch = next((batch for batch in BATCHES if batch >= M), None)
    entries = load_table()["configs"].get(f"{N}x{K}", {})
    entry = entries.get(str(batch))
    return TileConfig(*entry) if entry else None


def tile_widths(device: torch.device) -> tuple[int, int]:
    """Return the narrowest and the widest tile of a GPU, in tokens."""
    # AMD's matrix units take at least 16. On Blackwell, tiles of four warps and more use a separate
    # memory for tensor cores, where this kernel takes twice as many instructions, and triton 3.7
    # compiles tiles of eight warps into a trap. Tiles up to 32 tokens have two warps.
    if torch.version.hip is not None:
        return 16, 128
    major, _ = torch.cuda.get_device_capability(device)
    widest = 32 if major >= 10 else 128
    return 8, widest


def tile_by_rule(
    M: int, N: int, K: int, *, multiprocessors: int, widths: tuple[int, int] = (8, 128)
) -> TileConfig:
    """Return a configuration from the sizes alone: as narrow as the batch, K split to fill the GPU.

    >>> tile_by_rule(1, 8192, 8192, multiprocessors=132)
    TileConfig(block_n=64, block_m=8, splits=9, warps=2, stages=4)
    >>> tile_by_rule(200, 8192, 8192, multiprocessors=132)
    TileConfig(block_n=128, block_m=128, splits=3, warps=8, stages=3)
    """
    narrowest, widest = widths
    next_power_of_2 = 1 << (M - 1).bit_length()
    block_m = min(widest, max(narrowest, next_power_of_2))
    if block_m < 64:
        block_n = 64
        warps = 2
        stages = 4
        programs_per_multiprocessor = 8
    else:
        block_n = 128
        warps = block_m // 16
        stages = 3
        programs_per_multiprocessor = 256 // block_m

    # Split K until the GPU has enough programs to hide the latency of memory.
    tiles = ceil_div(N, block_n) * ceil_div(M, block_m)
    wanted_splits = ceil_div(programs_per_multiprocessor * multiprocessors, tiles)
    most_splits = min(MOST_SPLITS, ceil_div(K, BLOCK) // LEAST_BLOCKS)
    splits = min(wanted_splits, max(1, most_splits))
    return TileConfig(block_n, block_m, splits, warps, stages)


def most_kernel_tokens() -> int:
    """Return the most tokens for which the kernel is used; beyond, the weight is decoded first."""
    measured = load_table()["crossover"]
    return BATCHES[-1] if measured is None else measured


@functools.cache
def load_table() -> dict:
    """Return the file; its "configs" list the fields of TileConfig by "NxK" and batch."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def save_table(
    configs: dict[str, dict[str, TileConfig]],
    *,
    source: str,
    multiprocessors: int,
    crossover: int | None = None,
) -> None:
    """Replace the file: configurations by "NxK" and batch, one line per matrix.

    The crossover is the largest batch for which the kernel beats decoding first; None if unknown.
    """
    lines = []
    for shape, entries in configs.items():
        stored = {batch: astuple(config) for batch, config in entries.items()}
        lines.append(f'    "{shape}": {json.dumps(stored)}')
    rows = ",\n".join(lines)
    text = (
        "{\n"
        f'  "source": {json.dumps(source)},\n'
        f'  "multiprocessors": {multiprocessors},\n'
        f'  "crossover": {json.dumps(crossover)},\n'
        f'  "configs": {{\n{rows}\n  }}\n'
        "}\n"
    )
    FILE.write_text(text, encoding="utf-8")
    load_table.cache_clear()
