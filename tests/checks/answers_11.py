"""Sheet 11, an INT4 kernel: right answers in other styles, and mistakes as people write them."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qcourse import IntQuantizer, PerGroup
from qcourse.kernels.int4_planes import BLOCK, pack_planes, unpack_planes
from qcourse.numerics.packing import unpack
from qcourse.numerics.quantized import Parameters, QuantizedTensor

# Right answers.


def pack_loop(codes: Tensor) -> Tensor:
    words = torch.zeros(len(codes), codes.shape[1] // 8, dtype=torch.int64)
    for k in range(codes.shape[1]):
        block, within = divmod(k, 128)
        i, rest = divmod(within, 32)
        words[:, 16 * block + rest // 2] += codes[:, k].long() << 4 * (i + 4 * (rest % 2))
    return torch.where(words >= 2**31, words - 2**32, words).int()


def pack_bytes(codes: Tensor) -> np.ndarray:
    """Pack little-endian bytes: planes 0 and 1 in the first and third, 2 and 3 in the others."""
    plane = codes.numpy().reshape(len(codes), -1, 4, 16, 2).transpose(2, 0, 1, 3, 4)
    # (rows, blocks, 16, halves)
    low = plane[0] | plane[1] << 4
    high = plane[2] | plane[3] << 4
    return np.stack([low, high], axis=-1).reshape(len(codes), -1).view("<i4")


def decode_of_package(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    # the package unpacks whole blocks of 16 words
    padded = F.pad(words, (0, -len(words) % 16))
    codes = unpack_planes(padded[None], 8 * len(padded))
    pairs = codes.reshape(-1, 4, 16, 2)[:, plane].reshape(-1, 2)[: len(words)].int()
    return pairs[:, 0] | pairs[:, 1] << 16 | 0x64006400, pairs - zero_point


def decode_numpy(words: Tensor, plane: int, zero_point: int) -> tuple[np.ndarray, np.ndarray]:
    registers = words.numpy() >> 4 * plane & np.int32(0x000F000F) | np.int32(0x64006400)
    numbers = registers.view(np.float16).reshape(-1, 2).astype(np.float32)
    return registers, numbers - 1024 - zero_point


def decode_loop(words: Tensor, plane: int, zero_point: int) -> tuple[list, list]:
    registers = []
    values = []
    for word in words.tolist():
        low = word >> 4 * plane & 15
        high = word >> 4 * (plane + 4) & 15
        registers.append(0x64006400 + low + (high << 16))
        values.append([low - zero_point, high - zero_point])
    return registers, values


def groups_of_package(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    quantizer = IntQuantizer(4, symmetric=False, granularity=PerGroup(len(x) // scale.shape[1]))
    parameters = Parameters(scale, zero_point)
    w_hat = QuantizedTensor(codes, parameters, quantizer).dequantize()
    sums = (w_hat * x).unflatten(1, (scale.shape[1], -1)).sum(-1) / scale
    return sums, F.linear(x, w_hat)


def groups_loop(x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor) -> tuple[list, list]:
    size = len(x) // scale.shape[1]
    all_sums = []
    y = []
    rows = zip(codes.tolist(), zero_point.tolist(), scale.tolist(), strict=True)
    for row, zeros, scales in rows:
        numbers = [(code - zeros[k // size]) * x[k].item() for k, code in enumerate(row)]
        sums = [sum(numbers[k : k + size]) for k in range(0, len(x), size)]
        all_sums.append(sums)
        y.append(sum(a * b for a, b in zip(sums, scales, strict=True)))
    return all_sums, y


def groups_corrected(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The zero point comes out of the sum as well: less zero_point times the sum of x."""
    groups = x.reshape(scale.shape[1], -1)
    sums = torch.einsum("ngk,gk->ng", codes.double().reshape(*scale.shape, -1), groups.double())
    sums -= zero_point * groups.double().sum(1)
    return sums, torch.einsum("ng,ng->n", sums, scale.double())


def split_of_package(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    blocks = -(-x.shape[1] // BLOCK)
    blocks_a_split = -(-blocks // splits)
    firsts = range(0, blocks, blocks_a_split)
    parts = [slice(BLOCK * first, BLOCK * (first + blocks_a_split)) for first in firsts]
    return torch.stack([F.linear(x[:, part], w[:, part]) for part in parts]), F.linear(x, w)


def split_numpy(x: Tensor, w: Tensor, splits: int) -> tuple[np.ndarray, np.ndarray]:
    blocks = int(np.ceil(x.shape[1] / 128))
    size = 128 * int(np.ceil(blocks / splits))
    edges = np.arange(size, x.shape[1], size)
    parts = zip(np.split(x.numpy(), edges, axis=1), np.split(w.numpy(), edges, axis=1), strict=True)
    partials = np.array([a @ b.T for a, b in parts])
    return partials, partials.sum(axis=0)


def program_inputs(x: Tensor, splits: int) -> int:
    blocks = (x.shape[1] + 127) // 128
    return 128 * ((blocks + splits - 1) // splits)


def split_padded(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    size = program_inputs(x, splits)
    missing = -x.shape[1] % size
    x = F.pad(x, (0, missing)).unflatten(1, (-1, size))
    w = F.pad(w, (0, missing)).unflatten(1, (-1, size))
    partials = torch.einsum("mpk,npk->pmn", x, w)
    return partials, partials.sum(0)


def matvec_of_package(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    rows = [unpack(row, 4, len(x), signed=False) for row in packed]
    return groups_of_package(x, torch.stack(rows), zero_point, scale)[1]


def matvec_tiles(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, block: int = 32
) -> Tensor:
    """Compute as the kernel does, without Triton."""
    y = torch.zeros(len(packed))
    size = len(x) // scale.shape[1]
    for start in range(0, len(x), block):
        k = torch.arange(start, min(start + block, len(x)))
        code = packed[:, k // 2].int() >> 4 * (k % 2) & 15
        y += (x[k] * (code - zero_point[:, k // size].int()) * scale[:, k // size]).sum(1)
    return y


def matvec_numpy(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> np.ndarray:
    nibbles = np.stack([packed.numpy() & 15, packed.numpy() >> 4], axis=-1)
    codes = nibbles.reshape(len(packed), -1)[:, : len(x)]
    group_size = len(x) // scale.shape[1]
    zero_points = zero_point.numpy().astype(float).repeat(group_size, 1)
    scales = scale.numpy().repeat(group_size, 1)
    w_hat = (codes - zero_points) * scales
    return w_hat @ x.numpy()


THE_PACKAGE = {
    "11.1": pack_planes,
    "11.2": decode_of_package,
    "11.3": groups_of_package,
    "11.4": split_of_package,
    "11.5": matvec_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "11.1": (pack_loop, pack_bytes),
    "11.2": (decode_numpy, decode_loop),
    "11.3": (groups_loop, groups_corrected),
    "11.4": (split_numpy, split_padded),
    "11.5": (matvec_tiles, matvec_numpy),
}

# Mistakes.


def pack_reshaped(
    shape: tuple[int, ...], shift: Tensor, axes: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    def pack(codes: Tensor) -> Tensor:
        words = (codes.long().reshape(len(codes), *shape) << shift).sum(axes)
        return words.reshape(len(codes), -1).to(torch.int32)

    return pack


def pack_whole_rows(codes: Tensor) -> Tensor:
    plane = codes.long().reshape(len(codes), 4, -1, 2)
    words = torch.zeros_like(plane[:, 0, :, 0])
    for i in range(4):
        for h in range(2):
            words += plane[:, i, :, h] << 4 * (i + 4 * h)
    return words.to(torch.int32)


PLANE_THEN_HALF = 8 * torch.arange(4)[:, None, None] + 4 * torch.arange(2)
HALF_THEN_PLANE = 4 * (torch.arange(4)[:, None, None] + 4 * torch.arange(2))


def decode_without_zero_point(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    registers = (words >> 4 * plane) & 0x000F000F | 0x64006400
    return registers, registers.view(torch.float16).reshape(-1, 2) - 1024


def decode_symmetric(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    registers = (words >> 4 * plane) & 0x000F000F | 0x64006400
    return registers, registers.view(torch.float16).reshape(-1, 2) - 1032


def decode_masked_first(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    registers = ((words & 0x000F000F) >> 4 * plane) | 0x64006400
    return registers, registers.view(torch.float16).reshape(-1, 2) - (1024 + zero_point)


def decode_one_half(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    registers = (words >> 4 * plane) & 15 | 0x64006400
    return registers, registers.view(torch.float16).reshape(-1, 2) - (1024 + zero_point)


def decode_flipped(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    registers, values = decode_of_package(words, plane, zero_point)
    return registers, torch.stack([values[:, 1], values[:, 0]], dim=1)


def decode_one_magic(words: Tensor, plane: int, zero_point: int) -> tuple[Tensor, Tensor]:
    registers = (words >> 4 * plane) & 0x000F000F | 0x6400
    return registers, registers.view(torch.float16).reshape(-1, 2) - (1024 + zero_point)


def groups_wrapped(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    numbers = codes.reshape(*scale.shape, -1) - zero_point[..., None]
    sums = (numbers * x.reshape(scale.shape[1], -1)).sum(-1)
    return sums, (sums * scale).sum(1)


def groups_first_scales(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    sums, _ = groups_corrected(x, codes, zero_point, scale)
    return sums, sums.float() @ scale[0]


def groups_strided(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    groups = scale.shape[1]
    numbers = codes.reshape(len(codes), -1, groups).float() - zero_point[:, None].float()
    sums = (numbers * x.reshape(-1, groups)).sum(1)
    return sums, (sums * scale).sum(1)


def groups_scaled_sums(
    x: Tensor, codes: Tensor, zero_point: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    sums, y = groups_corrected(x, codes, zero_point, scale)
    return sums * scale, y


def split_floor(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    blocks = -(-x.shape[1] // 128)
    size = max(1, blocks // splits) * 128
    starts = [i * size for i in range(splits) if i * size < x.shape[1]]
    partials = torch.stack([x[:, i : i + size] @ w[:, i : i + size].T for i in starts])
    return partials, partials.sum(0)


def split_always(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    size = program_inputs(x, splits)
    partials = torch.zeros(splits, len(x), len(w))
    for i in range(splits):
        partials[i] = x[:, i * size : (i + 1) * size] @ w[:, i * size : (i + 1) * size].T
    return partials, partials.sum(0)


def split_in_turn(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    programs = len(split_padded(x, w, splits)[0])
    partials = torch.zeros(programs, len(x), len(w))
    for block, (a, b) in enumerate(zip(x.split(128, 1), w.split(128, 1), strict=True)):
        partials[block % programs] += a @ b.T
    return partials, partials.sum(0)


def split_overwritten(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    partials, _ = split_padded(x, w, splits)
    return partials, partials[-1]


def split_whole_blocks(x: Tensor, w: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    complete = x.shape[1] // 128 * 128
    return split_padded(x[:, :complete], w[:, :complete], splits)


def matvec_changed(change: Callable[..., tuple]) -> Callable[..., Tensor]:
    return lambda *args: matvec_tiles(*change(*args))


def matvec_whole_blocks(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    seen = x.clone()
    seen[len(x) // 64 * 64 :] = 0
    return matvec_tiles(seen, packed, scale, zero_point)


def matvec_last_block(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Write acc = instead of acc +=."""
    seen = torch.where(torch.arange(len(x)) < (len(x) - 1) // 32 * 32, 0, x)
    return matvec_tiles(seen, packed, scale, zero_point)


MISTAKES = [
    (
        "11.1",
        "eight codes in a row in one word",
        pack_reshaped((-1, 8), 4 * torch.arange(8), (-1,)),
    ),
    (
        "11.1",
        "neighbors in one byte, not in the two halves of the word",
        pack_reshaped((-1, 4, 16, 2), PLANE_THEN_HALF, (2, 4)),
    ),
    (
        "11.1",
        "the nibbles counted from the top",
        pack_reshaped((-1, 4, 16, 2), 28 - HALF_THEN_PLANE, (2, 4)),
    ),
    ("11.1", "planes of the whole row, not of a block", pack_whole_rows),
    ("11.1", "words that are no int32", lambda codes: pack_loop(codes).long() & 0xFFFFFFFF),
    ("11.2", "1024 is taken off, the zero point is not", decode_without_zero_point),
    ("11.2", "8 whatever the zero point", decode_symmetric),
    ("11.2", "masked before it is shifted", decode_masked_first),
    ("11.2", "one half only", decode_one_half),
    ("11.2", "the upper half first", decode_flipped),
    ("11.2", "", decode_one_magic),
    ("11.3", "bytes wrap below 0", groups_wrapped),
    (
        "11.3",
        "8 for every zero point",
        lambda x, c, z, s: groups_corrected(x, c, torch.full_like(z, 8), s),
    ),
    ("11.3", "no zero point", lambda x, c, z, s: groups_corrected(x, c, torch.zeros_like(z), s)),
    ("11.3", "one row's scales for all", groups_first_scales),
    ("11.3", "every so many-th input in one group", groups_strided),
    ("11.3", "", groups_scaled_sums),
    ("11.4", "blocks are lost: rounded down", split_floor),
    ("11.4", "programs without any work", split_always),
    ("11.4", "blocks dealt out in turn", split_in_turn),
    (
        "11.4",
        "the last program's sums for all",
        split_overwritten,
    ),
    ("11.4", "the last, incomplete block is left out", split_whole_blocks),
    (
        "11.5",
        "the high nibble first",
        matvec_changed(lambda x, p, s, z: (x, p << 4 | p >> 4, s, z)),
    ),
    (
        "11.5",
        "8 for every zero point",
        matvec_changed(lambda x, p, s, z: (x, p, s, torch.full_like(z, 8))),
    ),
    ("11.5", "one row's scales for all", matvec_changed(lambda x, p, s, z: (x, p, s[:1], z))),
    (
        "11.5",
        "one group's scale for the whole row",
        matvec_changed(lambda x, p, s, z: (x, p, s[:, :1].expand_as(s), z)),
    ),
    ("11.5", "the last, incomplete block is left out", matvec_whole_blocks),
    ("11.5", "", matvec_last_block),
]
