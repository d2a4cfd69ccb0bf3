"""Packed 4-bit codes to floats on a GPU: for the kernels of ``triton_int4.py``, and a kernel of it.

The idea: a code becomes a float without a conversion. OR'd into the last bits of a power of two it
reads as that power plus the code, and one subtraction removes the power and the zero point.
`decode` writes w_hat out, for batches so large that decoding once is faster.

Source: Kim et al., "Who Says Elephants Can't Run" (2022), section 3, for the magic number.

How it differs from ``triton_int4.py``: that loads tiles and multiplies them.
"""

# A kernel's annotations are for triton's compiler, not for a type checker.
from typing import no_type_check

import triton
import triton.language as tl

from qcourse.kernels.triton_int4_memory import four_rows

# Eight weights, the planes 0 to 3 of a register of two int16. lop3 computes (a & b) | c, which
# masks a plane and ORs the magic number in. The odd planes of fp16 need no shift: their bits count
# 16, so (1024 + 16 code) / 16 = 64 + code.
FP16_PLANES = tl.constexpr("""{
.reg .b32 t, one, sixteenth;
mov.b32 one, 0x3c003c00;
mov.b32 sixteenth, 0x2c002c00;
shr.u32 t, $4, 8;
lop3.b32 $0, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $1, $4, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 $2, t, 0x000f000f, 0x64006400, 0xea;
lop3.b32 $3, t, 0x00f000f0, 0x64006400, 0xea;
fma.rn.f16x2 $0, $0, one, $5;
fma.rn.f16x2 $1, $1, sixteenth, $6;
fma.rn.f16x2 $2, $2, one, $7;
fma.rn.f16x2 $3, $3, sixteenth, $8;
}""")
# bf16 has 7 fraction bits: it holds no more than 128 + code, so every plane is shifted down.
BF16_PLANES = tl.constexpr("""{
.reg .b32 t, one;
mov.b32 one, 0x3f803f80;
lop3.b32 $0, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000f000f, 0x43004300, 0xea;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, $0, one, $5;
fma.rn.bf16x2 $1, $1, one, $6;
fma.rn.bf16x2 $2, $2, one, $7;
fma.rn.bf16x2 $3, $3, one, $8;
}""")
# Results: four planes. Operands: a word, and the number to add to each plane.
REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r")


@triton.jit(do_not_specialize=["first", "last"])
@no_type_check
def decode(
    words_ptr, scale_ptr, zero_ptr, w_ptr, first, last, N, K, blocks_per_group, stride_wn,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write rows first to last of w_hat; a program writes BLOCK_N rows of 128 columns."""
    dtype = w_ptr.dtype.element_ty
    ZERO_GROUPS: tl.constexpr = GROUPS if HAS_ZERO else 0

    # The tile, and its codes, scales and zero points.
    start = first + tl.program_id(0) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    row = tl.minimum(n, N - 1)
    word_rows = words_ptr + row[:, None] * stride_wn
    word_blocks = word_rows + block * 32
    word_ptrs = word_blocks + tl.arange(0, 32)[None, :]
    words = tl.load(word_ptrs)  # (BLOCK_N, 32) int16
    scales = four_rows(scale_ptr + row, block, blocks_per_group, N, GROUPS)
    zeros = four_rows(zero_ptr + row, block, blocks_per_group, N, ZERO_GROUPS)
    w = four_planes(words, zeros, dtype, HAS_ZERO, PACKED)  # four of (BLOCK_N, 32)

    # Multiply in float32 and round once.
    for i in tl.static_range(4):
        first_k = block * 128 + i * 32
        k = (first_k + tl.arange(0, 32))[None, :]
        difference = w[i].to(tl.float32)  # code - zero_point
        scale = scales[i].to(tl.float32)
        w_hat = difference * scale[:, None]
        rounded = w_hat.to(dtype)
        inside = (n < last)[:, None]
        if not EVEN_K:
            inside &= k < K
        target_row = (n - first)[:, None].to(tl.int64)
        w_rows = w_ptr + target_row * K
        tl.store(w_rows + k, rounded, inside)


@triton.jit
@no_type_check
def _magic(code, dtype: tl.constexpr):
    """1024 + code in fp16, 128 + code in bf16: the code is the last bits of that power of two."""
    MAGIC: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    bits = code.to(tl.int16) | MAGIC
    return bits.to(dtype, bitcast=True)


@triton.jit
@no_type_check
def _symmetric_base(dtype: tl.constexpr):
    """What code 8 reads as. It is a literal: a runtime scalar would pass through shared memory."""
    return tl.full((), 1032.0 if dtype == tl.float16 else 136.0, dtype)


@triton.jit
@no_type_check
def one_plane(words, zero, dtype: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr):
    """The plane in the low nibbles of both halves of int32 words, less its zero points."""
    MAGIC: tl.constexpr = 0x64006400 if dtype == tl.float16 else 0x43004300
    # Both halves of a word become floats at once, then are taken apart and interleaved.
    pair = (words & 0x000F000F) | MAGIC
    low_half = (pair & 0xFFFF).to(tl.int16)
    low = low_half.to(dtype, bitcast=True)
    high_half = (pair >> 16).to(tl.int16)
    high = high_half.to(dtype, bitcast=True)
    base = _magic(zero, dtype) if HAS_ZERO else _symmetric_base(dtype)
    codes = tl.join(low - base, high - base)  # (BLOCK_N, 16, 2)
    return tl.reshape(codes, (BLOCK_N, 32))


@triton.jit
@no_type_check
def four_planes(words, zeros, dtype: tl.constexpr, HAS_ZERO: tl.constexpr, PACKED: tl.constexpr):
    """The planes 0 to 3 of int16 words as floats, less their zero points."""
    HALF: tl.constexpr = dtype == tl.float16

    # c0 to c3 are added to the planes: minus what the zero point of each plane reads as.
    if HAS_ZERO:
        c0 = -_magic(zeros[0], dtype)[:, None]
        c1 = -_magic(zeros[1], dtype)[:, None]
        c2 = -_magic(zeros[2], dtype)[:, None]
        c3 = -_magic(zeros[3], dtype)[:, None]
    else:
        c0 = -_symmetric_base(dtype)
        c1 = c0
        c2 = c0
        c3 = c0

    if not PACKED:
        w0 = _magic(words & 15, dtype) + c0
        w1 = _magic((words >> 4) & 15, dtype) + c1
        w2 = _magic((words >> 8) & 15, dtype) + c2
        w3 = _magic((words >> 12) & 15, dtype) + c3
    elif HALF:
        FP16: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        # The odd planes read as 64 + code, not 1024 + code: 960 less to subtract.
        operands = [words, c0, c1 + 960, c2, c3 + 960]
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            FP16_PLANES, REGISTERS, operands, FP16, is_pure=True, pack=2
        )
    else:
        BF16: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        operands = [words, c0, c1, c2, c3]
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            BF16_PLANES, REGISTERS, operands, BF16, is_pure=True, pack=2
        )
    return w0, w1, w2, w3
