"""The order of 4-bit codes that our GPU kernel reads: blocks of 128 codes, in four planes of 32.

The idea: a tensor core takes fp16 numbers in pairs, two neighbors along K per register. A block of
128 codes is stored as 16 words of 32 bits. Nibble i + 4 h of word j holds the code of

    k = 32 i + 2 j + h,      i in 0..3 (the plane), h in 0..1 (the half)

(w >> 4 i) & 0x000F000F is then two neighbors of plane i, one at the bottom of each half. OR'd with
0x64006400, the halves read as the fp16 numbers 1024 + code: one subtraction is left, and no
conversion. Rows are padded with code 0 to whole blocks; a kernel must read x as 0 there.

Source: Kim et al., "Who Says Elephants Can't Run" (2022), section 3, for the magic number; Frantar
et al., "MARLIN" (2024), for reordered nibbles.

How it differs from ``numerics/packing.py``: that is a dense stream for storage, in reading order.
"""

import sys

import torch
import torch.nn.functional as F
from jaxtyping import Int32, Shaped, UInt8
from torch import Tensor

BLOCK = 128  # codes along K per block
PLANES = 4
PLANE = BLOCK // PLANES  # codes per plane
WORDS = BLOCK // 8  # int32 words per block

if sys.byteorder != "little":  # words below are views of bytes
    raise ImportError("qcourse.kernels.int4_planes needs a little-endian machine")


def pack_planes(codes: Shaped[Tensor, "..."]) -> Int32[Tensor, "N words"]:
    """Return the words (N, 16 ceil(K / 128)) of codes (N, K), uint8 in 0..15.

    Raises:
        TypeError, ValueError: codes are not such a matrix.

    >>> codes = torch.zeros(1, 128, dtype=torch.uint8)
    >>> codes[0, [0, 1, 32, 33]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    >>> hex(pack_planes(codes)[0, 0])
    '0x420031'
    """
    _check_matrix("codes", codes, torch.uint8)
    largest = int(codes.max())
    if largest > 15:
        raise ValueError(f"codes go up to {largest}; 4 bits hold 0 to 15")
    missing = -codes.shape[1] % BLOCK
    padded = F.pad(codes, (0, missing)) if missing else codes
    planes = padded.reshape(len(codes), -1, PLANES, PLANE)  # (N, blocks, 4, 32)
    _, blocks, _, _ = planes.shape
    # A word is four bytes: planes 0 and 1 of its first code, planes 2 and 3 of it, then the same of
    # its second code. In a byte the odd plane is the high nibble, so it counts 16.
    packed = codes.new_empty(len(codes), blocks, PLANE, 2)  # (N, blocks, 32, 2) bytes
    first, second, third, fourth = planes.unbind(2)  # four of (N, blocks, 32)
    low_byte, high_byte = packed.unbind(-1)
    torch.add(first, second, alpha=16, out=low_byte)
    torch.add(third, fourth, alpha=16, out=high_byte)
    return packed.reshape(len(codes), -1).view(torch.int32)  # (N, 16 blocks)


def unpack_planes(words: Shaped[Tensor, "..."], inputs: int) -> UInt8[Tensor, "N K"]:
    """Return the codes (N, K) that ``pack_planes`` packed; inputs is K.

    Raises:
        TypeError, ValueError: words are not (N, 16 ceil(K / 128)) int32.

    >>> codes = torch.arange(14, dtype=torch.uint8).reshape(2, 7)
    >>> torch.equal(unpack_planes(pack_planes(codes), inputs=7), codes)
    True
    """
    _check_matrix("words", words, torch.int32)
    expected = row_words(inputs)
    if words.shape[1] != expected:
        raise ValueError(f"inputs={inputs} takes {expected} words per row, got {words.shape[1]}")
    packed = words.contiguous().view(torch.uint8)
    pairs = packed.reshape(len(words), -1, PLANE, 2)  # (N, blocks, 32, 2) bytes
    low, high = pairs.unbind(-1)
    four = (low & 15, low >> 4, high & 15, high >> 4)
    planes = torch.stack(four, dim=2)  # (N, blocks, 4, 32)
    return planes.reshape(len(words), -1)[:, :inputs]  # (N, K)


def supports_group_size(group_size: int, inputs: int) -> bool:
    """Return whether the kernels take the group size: 32, 64, 128 n, or the whole row.

    >>> supports_group_size(128, 4096), supports_group_size(48, 96)
    (True, False)
    """
    if group_size == inputs:
        return True
    whole_planes = group_size in (32, 64) or group_size % BLOCK == 0
    return whole_planes and inputs % group_size == 0


def scale_and_zero_rows(
    scale: Shaped[Tensor, "N groups"],
    zero_point: Shaped[Tensor, "N groups"] | None = None,
    *,
    group_size: int,
) -> tuple[Shaped[Tensor, "rows N"], UInt8[Tensor, "rows N"] | None]:
    """Return scales and zero points as the kernels read them: one row per group, in whole blocks.

    Args:
        scale: (N, K / G), fp16, bf16 or fp32; the dtype is kept.
        zero_point: (N, K / G) codes in 0..15; None where each is 8.
        group_size: G.

    >>> zero_point = torch.full((5, 3), 8)
    >>> scale, zero_point = scale_and_zero_rows(torch.ones(5, 3), zero_point, group_size=64)
    >>> scale.shape, zero_point.dtype
    (torch.Size([4, 5]), torch.uint8)
    """
    groups_per_block, _ = groups_and_blocks(group_size)
    # Fill up with rows of 0 to whole blocks of 128 codes.
    fill = (0, 0, 0, -scale.shape[1] % groups_per_block)
    scale_rows = F.pad(scale.T, fill).contiguous()
    if zero_point is None:
        return scale_rows, None
    zero_rows = F.pad(zero_point.T.to(torch.uint8), fill).contiguous()
    return scale_rows, zero_rows


def groups_and_blocks(group_size: int) -> tuple[int, int]:
    """Return (groups per block, blocks per group); one of the two is 1.

    >>> groups_and_blocks(32), groups_and_blocks(256)
    ((4, 1), (1, 2))
    """
    if group_size in (32, 64):
        return BLOCK // group_size, 1
    return 1, ceil_div(group_size, BLOCK)


def row_words(inputs: int) -> int:
    """Return the words per row of `inputs` codes, 16 ceil(inputs / 128).

    >>> row_words(128), row_words(129)
    (16, 32)
    """
    return WORDS * ceil_div(inputs, BLOCK)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up.

    >>> ceil_div(8, 4), ceil_div(9, 4)
    (2, 3)
    """
    return -(-a // b)


def _check_matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tensor.ndim != 2 or not tensor.numel():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} must be a matrix with at least one entry"
        )
