"""Codes to bytes and back, 1 to 8 bits a code.

The idea: one rule for every width. The codes form a dense little-endian bit stream: code i takes bits [i b, (i + 1) b),
and bit k of the stream is bit k % 8 of byte k // 8. At 4 bits that is two codes a byte, the low nibble first. Signed
codes are two's complement. The last byte is filled up with zero bits.

How it is done: eight codes, a byte each, are one 64-bit word; three folds (neighbours together in 16 bits, in 32, in
64) push out the unused bits, and the word's first b bytes are the result. Unpacking unfolds.

Source: compressed-tensors orders codes this way inside its int32 words (`pack_int32` agrees with it bit for bit).
Others differ: PyTorch's int4 kernels take the first code in the HIGH nibble, GGUF pairs code i with code i + 16.
`affine.py` makes the codes; this file does not know what they mean.
"""

import math
import sys

import torch
from jaxtyping import Int8, Int32, Shaped, UInt8
from torch import Tensor

CHUNK = 1 << 19  # codes worked on at a time, so that intermediates stay in the cache

if sys.byteorder != "little":  # the 64-bit words below are views of bytes
    raise ImportError("qcourse.numerics.packing needs a little-endian machine")


def packed_nbytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take: ceil(count * bits / 8).

    >>> packed_nbytes(5, bits=3)
    2
    """
    return -(-count * bits // 8)


def pack(codes: Shaped[Tensor, "*shape"], bits: int) -> UInt8[Tensor, " nbytes"]:
    """The codes as a dense little-endian bit stream.

    Args:
        codes: integers, any shape, all within the signed or all within the unsigned range of `bits` bits.
        bits: 1 to 8.

    Raises:
        TypeError: codes that are not integers.
        ValueError: bits outside 1..8; a code that does not fit.

    >>> [hex(byte) for byte in pack(torch.tensor([-6, -2, 0, 7]), bits=4).tolist()]
    ['0xea', '0x70']
    """
    _check_codes(codes, bits)
    flat = (
        codes.reshape(-1)
        .to(torch.int8 if codes.dtype != torch.uint8 else torch.uint8)
        .view(torch.uint8)
    )
    if flat.numel() % 8 or flat.storage_offset() % 8:  # the view as 64-bit words needs both
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    out = torch.empty(flat.numel() // 8, bits, dtype=torch.uint8, device=codes.device)
    for part, part_out in zip(flat.split(CHUNK), out.split(CHUNK // 8), strict=True):
        part_out.copy_(
            _fold(part.view(torch.int64), bits).view(torch.uint8).reshape(-1, 8)[:, :bits]
        )
    return out.reshape(-1)[: packed_nbytes(codes.numel(), bits)]


def unpack(
    packed: Shaped[Tensor, "..."], bits: int, count: int, signed: bool = True
) -> Shaped[Tensor, " count"]:
    """The inverse of `pack`: `count` codes, int8 when signed and uint8 when not.

    Raises:
        TypeError: packed is not uint8.
        ValueError: bits outside 1..8; a negative count; a length other than packed_nbytes(count, bits).

    >>> unpack(torch.tensor([0xEA, 0x70], dtype=torch.uint8), bits=4, count=4).tolist()
    [-6, -2, 0, 7]
    """
    _check_bits(bits)
    if _dtype(packed) != torch.uint8:
        raise TypeError(f"packed is of {_dtype(packed)}; packed codes are a tensor of torch.uint8")
    if count < 0 or packed.shape != (packed_nbytes(count, bits),):
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; count={count} codes of bits={bits} take exactly "
            f"{packed_nbytes(max(count, 0), bits)} bytes"
        )
    words = -(-count // 8)
    padded = torch.nn.functional.pad(packed, (0, words * bits - packed.numel())).reshape(
        words, bits
    )
    out = torch.empty(words, dtype=torch.int64, device=packed.device)
    for part, part_out in zip(padded.split(CHUNK // 8), out.split(CHUNK // 8), strict=True):
        eight = torch.nn.functional.pad(part, (0, 8 - bits))  # bits bytes -> 8 bytes
        part_out.copy_(_unfold(eight.view(torch.int64).reshape(-1), bits))
    codes = out.view(torch.uint8)[:count]
    if not signed:
        return codes
    sign = 1 << bits - 1
    return (
        codes.bitwise_xor_(sign).sub_(sign).view(torch.int8)
    )  # the sign bit carried into the upper bits


def pack_int32(codes: Shaped[Tensor, "..."], bits: int) -> Int32[Tensor, "out words"]:
    """Signed codes as int32 words, each code stored as code - qmin: the layout of compressed-tensors.

    Read as bytes, the words are what `pack` makes of code - qmin.

    Raises:
        TypeError: codes that are not integers.
        ValueError: bits outside 1..8; a row that does not fill whole words; a code that does not fit.

    >>> [hex(word) for word in pack_int32(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]]), bits=4)[0].tolist()]
    ['0x76543210']
    """
    _check_codes(codes, bits, signed=True)
    if codes.ndim != 2 or codes.shape[1] * bits % 32:
        whole = 32 // math.gcd(32, bits)
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} must be (out, in) with in a multiple of {whole}"
        )
    unsigned = codes.to(torch.uint8) + (
        1 << bits - 1
    )  # modulo 256, as uint8 reckons: -8 is 248, and 248 + 8 is 0
    return (
        pack(unsigned, bits).view(torch.int32).reshape(codes.shape[0], codes.shape[1] * bits // 32)
    )


def unpack_int32(words: Shaped[Tensor, "..."], bits: int) -> Int8[Tensor, "out in"]:
    """The inverse of `pack_int32`: int8 codes.

    Raises:
        TypeError: words that are not int32.
        ValueError: bits outside 1..8; words that are not (out, words); a row of words that does not end with a code.

    >>> unpack_int32(torch.tensor([[0x76543210]], dtype=torch.int32), bits=4).tolist()
    [[-8, -7, -6, -5, -4, -3, -2, -1]]
    """
    _check_bits(bits)
    if _dtype(words) != torch.int32:
        raise TypeError(f"words is of {_dtype(words)}; words are a tensor of torch.int32")
    if words.ndim != 2 or words.shape[1] * 32 % bits:
        raise ValueError(
            f"words of shape {tuple(words.shape)} must be (out, words), a row whole codes of bits={bits}"
        )
    out, count = words.shape[0], words.shape[1] * 32 // bits
    unsigned = unpack(
        words.contiguous().view(torch.uint8).reshape(-1), bits, out * count, signed=False
    )
    return (unsigned - (1 << bits - 1)).view(torch.int8).reshape(out, count)  # modulo 256 again


def _dtype(value: object) -> object:
    """A tensor's dtype; for anything else its type, which is no dtype."""
    return value.dtype if isinstance(value, Tensor) else type(value)


def _check_bits(bits: int) -> None:
    if type(bits) is not int or bits not in range(1, 9):
        raise ValueError(f"bits={bits!r} must be a whole number (a Python int) from 1 to 8")


def _check_codes(codes: Tensor, bits: int, *, signed: bool = False) -> None:
    """Refuse codes that `bits` bits cannot hold: all of one sign convention, two's complement or unsigned."""
    _check_bits(bits)
    if _dtype(codes) not in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"codes is of {_dtype(codes)}; codes are a tensor of integers")
    if codes.numel() == 0:
        return
    low, high = (int(end) for end in torch.aminmax(codes))
    smallest, largest = -(1 << bits - 1), (1 << bits - 1) - 1
    fits_signed = smallest <= low and high <= largest
    fits_unsigned = low >= 0 and high < 1 << bits
    if not (fits_signed or (fits_unsigned and not signed)):
        unsigned = "" if signed else f" or [0, {(1 << bits) - 1}]"
        raise ValueError(
            f"codes run from {low} to {high}; bits={bits} holds [{smallest}, {largest}]{unsigned}"
        )


def _lanes(width: int, every: int) -> int:
    """A 64-bit mask, as int64: the low `width` bits of every lane of `every` bits."""
    mask = sum((1 << width) - 1 << start for start in range(0, 64, every))
    return mask - (1 << 64) * (mask >> 63)


def _fold(words: Tensor, bits: int) -> Tensor:
    """Eight codes, a byte each, pushed together into the low 8 * bits bits of each int64."""
    if bits == 8:
        return words
    for lane in (8, 16, 32):
        used = bits * lane // 8
        low = _lanes(used, 2 * lane)
        words = (words & low) | ((words >> lane - used) & (low << used))
    return words


def _unfold(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_fold`."""
    if bits == 8:
        return words
    for lane in (32, 16, 8):
        used = bits * lane // 8
        low = _lanes(used, 2 * lane)
        words = (words & low) | ((words & (low << used)) << lane - used)
    return words
