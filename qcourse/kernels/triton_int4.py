"""The INT4 product on a GPU, in three versions: y[m, n] = sum_k x[m, k] (code - zero_point) scale.

Every version computes y^T = W x^T tile by tile, BLOCK_N rows of W at a time, from the words of
``int4_planes.py``. The versions differ in the instructions that they need per weight:

- `naive`: each weight finds its own word, shifts it, becomes a float and is multiplied by its
  scale.
- `planes`: a word is loaded once, and two weights at a time become fp16 by a mask and a magic
  number. The scale multiplies the sum of a group instead of each weight.
- `tuned`: words are read as int16, and eight weights become floats in nine instructions of packed
  assembly (without NVIDIA's assembly, the same in plain Triton). Scales are loaded one block ahead,
  because the compiler does not make such small loads asynchronous. Several programs may share a
  tile's K (split-K): each writes its sums to a workspace, and the last to arrive adds them up in a
  fixed order. That is one launch with the same bits every time, and it leaves the counter at 0.

`decode` writes w_hat out, for batches so large that decoding once is faster. W is the left operand
of every product, so its numbers stay in registers; x passes through shared memory.

Source: Triton's documentation; Frantar et al., "MARLIN" (2024), for the layout and for scaling
after the sum.

How it differs from its neighbors: this file alone imports triton; ``triton_int4_launch.py`` calls
it.
"""

# A kernel's annotations are for triton's compiler, not for a type checker.
from typing import no_type_check

import triton
import triton.language as tl

# Eight weights, the planes 0 to 3 of a register of two int16. lop3 computes (a & b) | c, which
# masks a plane and ORs the magic number in. The odd planes of fp16 need no shift: their bits count
# 16, so (1024 + 16 code) / 16 = 64 + code.
_FP16_PLANES = tl.constexpr("""{
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
_BF16_PLANES = tl.constexpr("""{
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
_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r")


@triton.jit(do_not_specialize=["M"])  # one kernel for every batch that has the same tile
@no_type_check
def naive(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, group_size, stride_xm, stride_wn,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty

    # The tile: BLOCK_N rows of W by BLOCK_M rows of x.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = (n < N)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, 32):
        k = start + tl.arange(0, 32)
        inside = inside_n & (k < K)[None, :]

        # Each weight's code: nibble i + 4 h of word j, where k = 32 i + 2 j + h in its block.
        word_of_k = k // 128 * 16 + k % 32 // 2
        words_ptrs = words_ptr + n[:, None] * stride_wn + word_of_k[None, :]
        word = tl.load(words_ptrs, inside, 0)  # (BLOCK_N, 32)
        shift = k % 128 // 32 * 4 + k % 2 * 16
        code = (word >> shift[None, :]) & 15

        # w_hat = (code - zero_point) scale, with the group's scale and zero point.
        group = (k // group_size)[None, :] * N + n[:, None]
        zero = tl.load(zero_ptr + group, inside, 8).to(tl.int32) if HAS_ZERO else 8
        difference = (code - zero).to(tl.float32)
        w = difference * tl.load(scale_ptr + group, inside, 0).to(tl.float32)

        x_ptrs = x_ptr + m[None, :].to(tl.int64) * stride_xm + k[:, None]
        x = tl.load(x_ptrs, (m < M)[None, :] & (k < K)[:, None], 0.0)  # (32, BLOCK_M)
        acc = tl.dot(w.to(dtype), x, acc, input_precision="ieee")

    y_ptrs = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_ptrs, acc.to(dtype), inside_n & (m < M)[None, :])


@triton.jit(do_not_specialize=["M"])
@no_type_check
def planes(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, blocks_a_group, stride_xm, stride_wn,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty

    # The tile. Past the last row of W the last row is read again, so loads need no mask; its
    # sums are not stored.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, 32)[:, None]
    words_ptrs = words_ptr + row[:, None] * stride_wn + tl.arange(0, 16)[None, :]
    x_ptrs = x_ptr + m[None, :].to(tl.int64) * stride_xm + k

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        words = tl.load(words_ptrs + block * 16)  # (BLOCK_N, 16): 128 codes per row
        group = block * GROUPS // blocks_a_group * N + row
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(4):
            # Plane i: 32 columns of x and of W, without the scale.
            first_k = block * 128 + i * 32
            x = _x_plane(x_ptrs + first_k, m < M, first_k + k < K, EVEN_K)  # (32, BLOCK_M)
            group_of_plane = group + i * GROUPS // 4 * N
            zero = tl.load(zero_ptr + group_of_plane)[:, None] if HAS_ZERO else 8
            w = _plane(words >> 4 * i, zero, dtype, HAS_ZERO, BLOCK_N)  # (BLOCK_N, 32)
            part = tl.dot(w, x, part)

            # Where a group ends, its scale multiplies its sum.
            if (i + 1) * GROUPS % 4 == 0:
                scale = tl.load(scale_ptr + group_of_plane).to(tl.float32)
                acc += part * scale[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    y_ptrs = y_ptr + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(y_ptrs, acc.to(dtype), (n < N)[:, None] & (m < M)[None, :])


@triton.jit(do_not_specialize=["M", "blocks_a_split"])
@no_type_check
def tuned(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, sums_ptr, arrived_ptr, M, N, K, blocks_a_group,
    stride_xm, stride_wn, blocks_a_split,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    ZERO_GROUPS: tl.constexpr = GROUPS if HAS_ZERO else 0

    # The tile, as in `planes`, and this program's share of the blocks along K.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, 32)[:, None]
    blocks = tl.cdiv(K, 128)
    first = tl.program_id(2) * blocks_a_split
    last = tl.minimum(first + blocks_a_split, blocks)
    words_ptrs = words_ptr + row[:, None] * stride_wn + tl.arange(0, 32)[None, :] + first * 32
    x_ptrs = x_ptr + m[None, :].to(tl.int64) * stride_xm + k + first * 128

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scales = _four_rows(scale_ptr + row, first, blocks_a_group, N, GROUPS)
    zeros = _four_rows(zero_ptr + row, first, blocks_a_group, N, ZERO_GROUPS)
    for block in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_ptrs, eviction_policy="evict_first")  # (BLOCK_N, 32) int16

        # Load the scales of the next block now, so that the product need not wait for them.
        ahead = tl.minimum(block + 1, blocks - 1)
        next_scales = _four_rows(scale_ptr + row, ahead, blocks_a_group, N, GROUPS)
        next_zeros = _four_rows(zero_ptr + row, ahead, blocks_a_group, N, ZERO_GROUPS)

        # Decode all four planes, then multiply plane by plane.
        w = _four_planes(words, zeros, dtype, HAS_ZERO, PACKED)  # four of (BLOCK_N, 32)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(4):
            x = _x_plane(x_ptrs + i * 32, m < M, block * 128 + i * 32 + k < K, EVEN_K)
            if SCALE_FIRST:  # a wide tile has registers for one sum only
                acc = tl.dot(w[i] * scales[i].to(dtype)[:, None], x, acc)
            else:
                part = tl.dot(w[i], x, part)
            if (i + 1) * GROUPS % 4 == 0 and not SCALE_FIRST:
                acc += part * scales[i].to(tl.float32)[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

        scales = next_scales
        zeros = next_zeros
        words_ptrs += 32
        x_ptrs += 128

    at = m[None, :].to(tl.int64) * N + n[:, None]
    inside = (n < N)[:, None] & (m < M)[None, :]
    if SPLIT:
        _add_up(acc, at, inside, sums_ptr, arrived_ptr, y_ptr, M, N)
    else:
        tl.store(y_ptr + at, acc.to(dtype), inside)


@triton.jit(do_not_specialize=["first", "last"])
@no_type_check
def decode(
    words_ptr, scale_ptr, zero_ptr, w_ptr, first, last, N, K, blocks_a_group, stride_wn,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write rows first to last of w_hat; a program writes BLOCK_N rows of a block of 128 columns."""
    dtype = w_ptr.dtype.element_ty
    ZERO_GROUPS: tl.constexpr = GROUPS if HAS_ZERO else 0
    n = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    row = tl.minimum(n, N - 1)
    words = tl.load(words_ptr + row[:, None] * stride_wn + block * 32 + tl.arange(0, 32)[None, :])
    scales = _four_rows(scale_ptr + row, block, blocks_a_group, N, GROUPS)
    zeros = _four_rows(zero_ptr + row, block, blocks_a_group, N, ZERO_GROUPS)
    w = _four_planes(words, zeros, dtype, HAS_ZERO, PACKED)  # four of (BLOCK_N, 32)
    for i in tl.static_range(4):
        k = (block * 128 + i * 32 + tl.arange(0, 32))[None, :]
        # Multiply in float32 and round once.
        w_hat = (w[i].to(tl.float32) * scales[i].to(tl.float32)[:, None]).to(dtype)
        inside = (n < last)[:, None] if EVEN_K else (n < last)[:, None] & (k < K)
        tl.store(w_ptr + (n - first)[:, None].to(tl.int64) * K + k, w_hat, inside)


@triton.jit
@no_type_check
def _add_up(acc, at, inside, sums_ptr, arrived_ptr, y_ptr, M, N):
    """Write this program's sums; the last program of the tile adds all up and clears the counter."""
    splits = tl.num_programs(2)
    tl.store(sums_ptr + tl.program_id(2) * M * N + at, acc, inside)
    tl.debug_barrier()  # all threads have written before the counter says so
    counter = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros_like(acc)
        for split in range(splits):  # .cg: the first-level cache may hold an older state
            total += tl.load(sums_ptr + split * M * N + at, inside, 0.0, cache_modifier=".cg")
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), inside)
        tl.store(counter, 0)


@triton.jit
@no_type_check
def _x_plane(ptrs, inside_m, inside_k, EVEN_K: tl.constexpr):
    """32 columns of x, transposed; 0 past its end, where the words are padding."""
    return tl.load(ptrs, inside_m[None, :] if EVEN_K else inside_m[None, :] & inside_k, 0.0)


@triton.jit
@no_type_check
def _four_rows(ptr, block, blocks_a_group, N, GROUPS: tl.constexpr):
    """The rows of scales or zero points of a block's four planes; GROUPS 0 loads none."""
    at = ptr + block * GROUPS // blocks_a_group * N
    first = tl.load(at) if GROUPS else 0
    second = tl.load(at + N) if GROUPS == 4 else first
    third = tl.load(at + GROUPS // 2 * N) if GROUPS > 1 else first
    fourth = tl.load(at + 3 * N) if GROUPS == 4 else third
    return first, second, third, fourth


@triton.jit
@no_type_check
def _magic(code, dtype: tl.constexpr):
    """1024 + code in fp16, 128 + code in bf16: the code is the last bits of that power of two."""
    MAGIC: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    return (code.to(tl.int16) | MAGIC).to(dtype, bitcast=True)


@triton.jit
@no_type_check
def _symmetric_base(dtype: tl.constexpr):
    """What code 8 reads as. It is a literal: a runtime scalar would pass through shared memory."""
    return tl.full((), 1032.0 if dtype == tl.float16 else 136.0, dtype)


@triton.jit
@no_type_check
def _plane(words, zero, dtype: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr):
    """The plane in the low nibbles of both halves of int32 words, less its zero points."""
    MAGIC: tl.constexpr = 0x64006400 if dtype == tl.float16 else 0x43004300
    # Both halves of a word become floats at once, then are taken apart and interleaved.
    pair = (words & 0x000F000F) | MAGIC
    low = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    base = _magic(zero, dtype) if HAS_ZERO else _symmetric_base(dtype)
    return tl.reshape(tl.join(low - base, high - base), (BLOCK_N, 32))


@triton.jit
@no_type_check
def _four_planes(words, zeros, dtype: tl.constexpr, HAS_ZERO: tl.constexpr, PACKED: tl.constexpr):
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
            _FP16_PLANES, _REGISTERS, operands, FP16, is_pure=True, pack=2
        )
    else:
        BF16: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        operands = [words, c0, c1, c2, c3]
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _BF16_PLANES, _REGISTERS, operands, BF16, is_pure=True, pack=2
        )
    return w0, w1, w2, w3
