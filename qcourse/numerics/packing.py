"""Codes to bytes and back, 1 to 8 bits per code.

The idea: codes form a dense little-endian bit stream. Code i takes bits [i b, (i + 1) b), and bit k
of the stream is bit k % 8 of byte k // 8: two 4-bit codes per byte, the low nibble first.
Signed codes are two's complement.
Source: compressed-tensors has this order in its int32 words. PyTorch's int4 kernels take the first
code in the HIGH nibble; GGUF pairs code i with code i + 16.
How it differs from `affine.py`: that makes the codes; this does not know what they mean.
"""

import math
import sys

import torch
from jaxtyping import Int8, Int32, Shaped, UInt8
from torch import Tensor
from torch.nn.functional import pad

from qcourse.numerics.whole import check_whole

CHUNK = 1 << 19  # codes per piece, so that intermediate values stay in the cache

# The 64-bit words below are views of bytes.
if sys.byteorder != "little":
    raise ImportError("qcourse.numerics.packing needs a little-endian machine")


def packed_nbytes(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take: ceil(count * bits / 8).

    >>> packed_nbytes(5, bits=3)
    2
    """
    return -(-count * bits // 8)


def pack(codes: Shaped[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " nbytes"]:
    """Return codes that fit `bits` bits, all signed or all unsigned, as a dense bit stream.

    >>> [hex(byte) for byte in pack(torch.tensor([-6, -2, 0, 7]), bits=4).tolist()]
    ['0xea', '0x70']
    """
    _check_codes(codes, bits)
    byte_dtype = torch.uint8 if codes.dtype == torch.uint8 else torch.int8
    flat = codes.reshape(-1).to(byte_dtype).view(torch.uint8)
    # The view as 64-bit words needs a multiple of 8 bytes and an aligned start.
    if flat.numel() % 8 or flat.storage_offset() % 8:
        flat = pad(flat, (0, -flat.numel() % 8))
    words = flat.numel() // 8
    out = torch.empty(words, bits, dtype=torch.uint8, device=codes.device)
    for part, out_part in zip(flat.split(CHUNK), out.split(CHUNK // 8), strict=True):
        out_part.copy_(_pack_bytes(part, bits))
    return out.reshape(-1)[: packed_nbytes(codes.numel(), bits)]


def unpack(
    packed: Shaped[Tensor, "..."], bits: int, count: int, signed: bool = True
) -> Shaped[Tensor, " count"]:
    """Return the `count` codes that `pack` packed, int8 if signed, else uint8.

    >>> unpack(torch.tensor([0xEA, 0x70], dtype=torch.uint8), bits=4, count=4).tolist()
    [-6, -2, 0, 7]
    """
    _check_packed(packed, bits, count)
    words = -(-count // 8)
    missing = words * bits - packed.numel()
    padded = pad(packed, (0, missing)).reshape(words, bits)
    out = torch.empty(words, dtype=torch.int64, device=packed.device)
    for part, out_part in zip(padded.split(CHUNK // 8), out.split(CHUNK // 8), strict=True):
        out_part.copy_(_unpack_words(part, bits))
    codes = out.view(torch.uint8)[:count]
    if not signed:
        return codes
    # (code ^ sign) - sign copies the sign bit into the upper bits.
    sign = 1 << bits - 1
    return codes.bitwise_xor_(sign).sub_(sign).view(torch.int8)


def pack_int32(codes: Shaped[Tensor, "..."], bits: int) -> Int32[Tensor, "out words"]:
    """Return int32 words of code - qmin for signed codes (out, in), as compressed-tensors does.

    >>> words = pack_int32(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]]), bits=4)
    >>> hex(words.item())
    '0x76543210'
    """
    _check_codes(codes, bits, signed=True)
    if codes.ndim != 2 or codes.shape[1] * bits % 32:
        whole = 32 // math.gcd(32, bits)
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} must be (out, in) with in a multiple of {whole}"
        )
    rows, columns = codes.shape
    # uint8 counts modulo 256: -8 is 248, and 248 + 8 is 0.
    unsigned = codes.to(torch.uint8) + (1 << bits - 1)
    words = pack(unsigned, bits).view(torch.int32)
    return words.reshape(rows, columns * bits // 32)


def unpack_int32(words: Shaped[Tensor, "..."], bits: int) -> Int8[Tensor, "out in"]:
    """Return the int8 codes that `pack_int32` packed.

    >>> unpack_int32(torch.tensor([[0x76543210]], dtype=torch.int32), bits=4).tolist()
    [[-8, -7, -6, -5, -4, -3, -2, -1]]
    """
    _check_bits(bits)
    if _dtype(words) != torch.int32:
        raise TypeError(f"words is of {_dtype(words)}; words are a tensor of torch.int32")
    if words.ndim != 2 or words.shape[1] * 32 % bits:
        raise ValueError(
            f"words of shape {tuple(words.shape)} must be (out, words),"
            f" a row whole codes of bits={bits}"
        )
    rows = words.shape[0]
    columns = words.shape[1] * 32 // bits
    packed = words.contiguous().view(torch.uint8).reshape(-1)
    unsigned = unpack(packed, bits, rows * columns, signed=False)
    # Adding qmin is modulo 256 again.
    codes = unsigned - (1 << bits - 1)
    return codes.view(torch.int8).reshape(rows, columns)


def _dtype(value: object) -> object:
    return value.dtype if isinstance(value, Tensor) else type(value)


def _check_bits(bits: int) -> None:
    check_whole("bits", bits, 1, 8)


def _check_packed(packed: Tensor, bits: int, count: int) -> None:
    _check_bits(bits)
    if _dtype(packed) != torch.uint8:
        raise TypeError(f"packed is of {_dtype(packed)}; packed codes are a tensor of torch.uint8")
    needed = packed_nbytes(max(count, 0), bits)
    if count < 0 or packed.shape != (needed,):
        raise ValueError(
            f"packed has shape {tuple(packed.shape)};"
            f" count={count} codes of bits={bits} take exactly {needed} bytes"
        )


def _check_codes(codes: Tensor, bits: int, *, signed: bool = False) -> None:
    """Refuse codes that do not all fit the signed range, or (unless signed) the unsigned one."""
    _check_bits(bits)
    if _dtype(codes) not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"codes is of {_dtype(codes)}; codes are a tensor of integers")
    if codes.numel() == 0:
        return
    ends = torch.aminmax(codes)
    low = int(ends.min)
    high = int(ends.max)
    half = 1 << bits - 1
    fits_signed = -half <= low and high < half
    fits_unsigned = not signed and low >= 0 and high < 2 * half
    if not fits_signed and not fits_unsigned:
        unsigned = "" if signed else f" or [0, {2 * half - 1}]"
        raise ValueError(
            f"codes run from {low} to {high}; bits={bits} holds [{-half}, {half - 1}]{unsigned}"
        )


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Return (words, bits) bytes for codes with a byte each."""
    # Eight codes become one 64-bit word whose first `bits` bytes hold all their bits.
    words = _fold(codes.view(torch.int64), bits)
    return words.view(torch.uint8).reshape(-1, 8)[:, :bits]


def _unpack_words(packed: Tensor, bits: int) -> Tensor:
    """Return 64-bit words with eight codes each for packed bytes (words, bits)."""
    # Fill each word up from `bits` bytes to 8, then give each code a byte.
    word_bytes = pad(packed, (0, 8 - bits))
    return _unfold(word_bytes.view(torch.int64).reshape(-1), bits)


def _lanes(width: int, every: int) -> int:
    """Return a 64-bit mask as int64: the low `width` bits of every lane of `every` bits."""
    lane = (1 << width) - 1
    mask = sum(lane << start for start in range(0, 64, every))
    # As a signed number, a mask with the topmost bit set is 2^64 less.
    return mask - (1 << 64) * (mask >> 63)


def _fold(words: Tensor, bits: int) -> Tensor:
    """Push eight codes, a byte each, together into the low 8 * bits bits of each int64."""
    if bits == 8:
        return words
    # Join neighbors in lanes of 16, then 32, then 64 bits: the upper one moves down to the lower.
    for lane in (8, 16, 32):
        used = bits * lane // 8
        low = _lanes(used, 2 * lane)
        upper = (words >> (lane - used)) & (low << used)
        words = (words & low) | upper
    return words


def _unfold(words: Tensor, bits: int) -> Tensor:
    """Return the inverse of `_fold`."""
    if bits == 8:
        return words
    for lane in (32, 16, 8):
        used = bits * lane // 8
        low = _lanes(used, 2 * lane)
        upper = (words & (low << used)) << (lane - used)
        words = (words & low) | upper
    return words
