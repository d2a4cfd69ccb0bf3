"""4-bit codes in the order that a tensor core wants them: four planes of adjacent pairs in a block of 16 words.

The idea: a tensor core takes fp16 numbers in pairs, two neighbours along K in one register. So a row's block of 128
codes is kept as 16 words of 32 bits, and word j holds in its nibble i + 4 h the code of

    k = 32 i + 2 j + h,      i in 0..3 (the plane), h in 0..1 (the half)

(w >> 4 i) & 0x000F000F is then two neighbours of plane i, each at the bottom of its half of the register. Or'd with
0x64006400 the halves read as the fp16 numbers 1024 + code, for 0x6400 is 1024 and its last bit counts 1: a subtraction
is left, and no conversion. A plane of 32 is the depth of two tensor core instructions; groups of 32, 64 and 128 are
whole planes.

A row is filled up to whole blocks with code 0. Whoever multiplies must read x as 0 there, as the kernels do: then what
the code stands for does not matter.

Source: the magic number is from Kim et al., "Who Says Elephants Can't Run" (2022), section 3; Frantar et al.,
"MARLIN" (2024), orders nibbles for the same reason, otherwise than here.

How it differs from ``numerics/packing.py``: that is one dense stream, for storage; this is a layout for one kernel.
"""

import sys

import torch
from jaxtyping import Int32, Shaped, UInt8
from torch import Tensor

BLOCK = 128  # codes along K that lie together
PLANES = 4
WORDS = BLOCK // 8  # int32 words a block

if sys.byteorder != "little":  # words below are views of bytes
    raise ImportError("qcourse.kernels.int4_planes needs a little-endian machine")


def pack_planes(codes: Shaped[Tensor, "..."]) -> Int32[Tensor, "N words"]:
    """Words of eight codes: bits [4 (i + 4 h), 4 (i + 4 h) + 4) of word j hold code 32 i + 2 j + h of its block.

    Args:
        codes: (N, K) uint8 within 0..15.

    Returns:
        (N, 16 ceil(K / 128)) int32, on the codes' device; codes past K are 0.

    Raises:
        TypeError: codes that are not uint8.
        ValueError: codes that are no matrix, or empty; a code above 15.

    >>> codes = torch.zeros(1, 128, dtype=torch.uint8)
    >>> codes[0, [0, 1, 32, 33]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    >>> hex(pack_planes(codes)[0, 0])
    '0x420031'
    """
    _check_matrix("codes", codes, torch.uint8)
    if (largest := int(codes.max())) > 15:
        raise ValueError(f"codes go up to {largest}; 4 bits hold 0 to 15")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % BLOCK))
    plane = padded.reshape(len(codes), -1, PLANES, BLOCK // PLANES).unbind(
        2
    )  # four of (N, blocks, 32)
    both = torch.stack(
        (plane[0] | plane[1] << 4, plane[2] | plane[3] << 4), dim=-1
    )  # (N, blocks, 32, 2) bytes
    return both.reshape(len(codes), -1).view(torch.int32)  # (N, 16 blocks)


def unpack_planes(words: Shaped[Tensor, "..."], inputs: int) -> UInt8[Tensor, "N K"]:
    """The inverse of `pack_planes`.

    Args:
        words: (N, 16 ceil(K / 128)) int32.
        inputs: K, the codes in a row.

    Raises:
        TypeError: words that are not int32.
        ValueError: words that are no matrix, or empty; inputs that this many words do not hold.

    >>> codes = torch.arange(14, dtype=torch.uint8).reshape(2, 7)
    >>> torch.equal(unpack_planes(pack_planes(codes), inputs=7), codes)
    True
    """
    _check_matrix("words", words, torch.int32)
    if words.shape[1] != row_words(inputs):
        raise ValueError(
            f"inputs={inputs} takes {row_words(inputs)} words a row, got {words.shape[1]}"
        )
    low, high = (
        words.contiguous().view(torch.uint8).reshape(len(words), -1, BLOCK // PLANES, 2).unbind(-1)
    )
    planes = torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=2)  # (N, blocks, 4, 32)
    return planes.reshape(len(words), -1)[:, :inputs]  # (N, K)


def takes(group_size: int, inputs: int) -> bool:
    """Whether the kernels take such groups: 32, 64, multiples of 128 that divide K, or the whole row.

    >>> takes(128, 4096), takes(48, 96), takes(77, 77), takes(64, 96)
    (True, False, True, False)
    """
    return group_size == inputs or (
        (group_size in (32, 64) or group_size % BLOCK == 0) and inputs % group_size == 0
    )


def prepare(
    scale: Shaped[Tensor, "N groups"],
    zero_point: Shaped[Tensor, "N groups"] | None = None,
    *,
    group_size: int,
) -> tuple[Shaped[Tensor, "rows N"], UInt8[Tensor, "rows N"] | None]:
    """Scales and zero points as the kernels read them: a row a group, filled up with 0 to whole blocks of 128.

    Args:
        scale: (N, K / G), in fp16, bf16 or fp32, whose dtype is kept.
        zero_point: (N, K / G) whole codes in 0..15; None where each is 8.
        group_size: G.

    >>> scale, zero_point = prepare(torch.ones(5, 3), torch.full((5, 3), 8), group_size=64)
    >>> scale.shape, zero_point.dtype
    (torch.Size([4, 5]), torch.uint8)
    """
    fill = (0, 0, 0, -scale.shape[1] % groups_and_blocks(group_size)[0])
    rows = torch.nn.functional.pad(scale.T, fill).contiguous()
    if zero_point is None:
        return rows, None
    return rows, torch.nn.functional.pad(zero_point.T.to(torch.uint8), fill).contiguous()


def groups_and_blocks(group_size: int) -> tuple[int, int]:
    """Groups in a block of 128 and 1, or 1 and the blocks in a group.

    >>> groups_and_blocks(32), groups_and_blocks(256)
    ((4, 1), (1, 2))
    """
    return (BLOCK // group_size, 1) if group_size in (32, 64) else (1, -(-group_size // BLOCK))


def row_words(inputs: int) -> int:
    """Words that a row of `inputs` codes takes: 16 ceil(inputs / 128).

    >>> row_words(128), row_words(129)
    (16, 32)
    """
    return WORDS * -(-inputs // BLOCK)


def _check_matrix(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be {dtype}")
    if tensor.ndim != 2 or not tensor.numel():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} must be a matrix with at least one entry"
        )
