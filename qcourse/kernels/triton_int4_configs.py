"""How the INT4 kernel is cut for a shape and a batch: frozen in triton_int4_configs.json, by a rule where nothing is.

The idea: which tile is fastest depends on the matrix, the batch and the GPU, and finding out takes minutes. So it is
found once, by ``benchmarks/tune_int4.py``, and kept in a file: nothing is tuned at run time. A batch takes the entry of
the next size in BATCHES. On a GPU with another number of multiprocessors than the
table's, and for a matrix that it does not list, `tile_by_rule` speaks: tiles as small as the batch, and K split until there
are several programs for each multiprocessor to hide waiting behind.

How it differs from ``triton_int4_launch.py``: that starts the kernel that this chooses.
"""

import functools
import json
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from qcourse.kernels.int4_planes import BLOCK

FILE = Path(__file__).with_suffix(".json")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LEAST_BLOCKS = 4  # of 128 along K for one program: with fewer its loads never overlap
MOST_SPLITS = 16


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut, and what a program of the GPU is made of.

    Args:
        block_n: rows of W in a tile, a power of 2.
        block_m: rows of x in a tile, a power of 2 from 8.
        splits: programs that share the K of one tile.
        warps: groups of 32 threads in a program.
        stages: blocks of 128 along K in flight.
    """

    block_n: int
    block_m: int
    splits: int
    warps: int
    stages: int

    @property
    def shared_nbytes(self) -> int:
        """The shared memory that a program takes, at most: for each stage its words and, two bytes each, its x."""
        return self.stages * BLOCK * (self.block_n // 2 + 2 * self.block_m)


def choose(M: int, N: int, K: int, device: torch.device) -> TileConfig:
    """The configuration for x (M, K) and W (N, K) on a device: frozen where it is listed, else by the rule.

    >>> choose(1, 4096, 4096, torch.device("cpu"))
    TileConfig(block_n=64, block_m=8, splits=1, warps=2, stages=4)
    """
    if device.type != "cuda":  # the interpreter runs one program at a time
        return tile_by_rule(M, N, K, multiprocessors=1)
    properties = torch.cuda.get_device_properties(device)
    found = None
    if properties.multi_processor_count == table()["multiprocessors"]:
        found = frozen(M, N, K)
    config = found or tile_by_rule(
        M, N, K, multiprocessors=properties.multi_processor_count, widths=widths(device)
    )
    room = getattr(properties, "shared_memory_per_block_optin", 65_536)
    while config.shared_nbytes > room and config.stages > 2:
        config = replace(config, stages=config.stages - 1)
    return config


def frozen(M: int, N: int, K: int) -> TileConfig | None:
    """The table's configuration, or None for a matrix or a batch that it does not list."""
    bucket = next((batch for batch in BATCHES if batch >= M), None)
    entry = table()["configs"].get(f"{N}x{K}", {}).get(str(bucket))
    return TileConfig(*entry) if entry else None


def widths(device: torch.device) -> tuple[int, int]:
    """The narrowest and the widest tile, in tokens, for a GPU.

    AMD's matrix units take 16 at least. Blackwell's, which four warps are handed to, keep their numbers in a memory of
    their own: there this kernel takes twice as many instructions, and triton 3.7 makes wider tiles of eight warps into
    a trap. Tiles up to 32 tokens have two warps, which multiply in registers everywhere.
    """
    if torch.version.hip is not None:
        return 16, 128
    return 8, 32 if torch.cuda.get_device_capability(device)[0] >= 10 else 128


def tile_by_rule(
    M: int, N: int, K: int, *, multiprocessors: int, widths: tuple[int, int] = (8, 128)
) -> TileConfig:
    """A configuration from the sizes alone.

    >>> tile_by_rule(1, 8192, 8192, multiprocessors=132)
    TileConfig(block_n=64, block_m=8, splits=9, warps=2, stages=4)
    >>> tile_by_rule(200, 8192, 8192, multiprocessors=132)
    TileConfig(block_n=128, block_m=128, splits=3, warps=8, stages=3)
    """
    block_m = min(widths[1], max(widths[0], 1 << (M - 1).bit_length()))
    block_n, warps, stages, programs = (
        (64, 2, 4, 8) if block_m < 64 else (128, block_m // 16, 3, 256 // block_m)
    )
    tiles = -(-N // block_n) * -(-M // block_m)
    most = max(1, min(MOST_SPLITS, -(-K // BLOCK) // LEAST_BLOCKS))
    return TileConfig(
        block_n, block_m, min(most, -(-programs * multiprocessors // tiles)), warps, stages
    )


def crossover() -> int:
    """The most tokens for which the kernel is taken; for more, the weight is decoded first."""
    measured = table()["crossover"]
    return BATCHES[-1] if measured is None else measured


@functools.cache
def table() -> dict:
    """The file: "source", "multiprocessors" and, for "NxK" and a batch, the fields of `TileConfig` in order."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def write(
    configs: dict[str, dict[str, TileConfig]],
    *,
    source: str,
    multiprocessors: int,
    crossover: int | None = None,
) -> None:
    """Replace the file, a line a matrix; crossover is the largest batch for which the kernel beats decoding first."""
    lines = (
        f'    "{shape}": ' + json.dumps({batch: list(astuple(c)) for batch, c in entries.items()})
        for shape, entries in configs.items()
    )
    head = f'{{\n  "source": {json.dumps(source)},\n  "multiprocessors": {multiprocessors},\n'
    head += f'  "crossover": {json.dumps(crossover)},\n'
    FILE.write_text(head + '  "configs": {\n' + ",\n".join(lines) + "\n  }\n}\n", encoding="utf-8")
    table.cache_clear()
