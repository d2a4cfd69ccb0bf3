"""The tiles of the INT4 kernel that `tune_int4.py` tries for a matrix and a batch."""

from collections.abc import Iterator

import torch

from qcourse.kernels.int4_planes import BLOCK, ceil_div
from qcourse.kernels.triton_int4_configs import (
    LEAST_BLOCKS,
    MOST_SPLITS,
    TileConfig,
    tile_widths,
)

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


def candidates(M: int, N: int, K: int) -> Iterator[TileConfig]:
    """Yield the grid, without tiles that leave most of the GPU idle or do not fit on it."""
    properties = torch.cuda.get_device_properties(0)
    _, widest = tile_widths(torch.device("cuda", 0))
    for block_m in candidate_widths(M):
        for block_n, warps in TILES[block_m]:
            if widest < 64 and warps > 2:
                continue
            tiles = ceil_div(N, block_n) * ceil_div(M, block_m)
            for splits in candidate_splits(K, tiles, block_m, warps):
                for stages in STAGES[block_m]:
                    config = TileConfig(block_n, block_m, splits, warps, stages)
                    if config.shared_nbytes <= properties.shared_memory_per_block_optin:
                        yield config


def candidate_widths(M: int) -> list[int]:
    """Return the widths of a tile, in tokens, to try for a batch."""
    narrowest, widest = tile_widths(torch.device("cuda", 0))
    most = widest if widest < 128 else 256
    next_power_of_2 = max(8, 1 << (M - 1).bit_length())
    tried = {128: (64, 128), 256: (128, 256)}.get(next_power_of_2, (next_power_of_2,))
    allowed = {max(narrowest, min(width, most)) for width in tried}
    return sorted(allowed)


def candidate_splits(K: int, tiles: int, block_m: int, warps: int) -> list[int]:
    """Return the splits of K that fill the GPU within a factor of 3."""
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    warps_at_once = 16 if block_m < 64 else 8  # per multiprocessor, to hide the latency of memory
    wanted = warps_at_once * multiprocessors / warps / tiles
    most = min(MOST_SPLITS, ceil_div(K, BLOCK) // LEAST_BLOCKS)
    chosen = [1]
    for splits in SPLITS[1:]:
        if splits <= most and wanted / 3 <= splits <= 3 * wanted:
            chosen.append(splits)
    return chosen
