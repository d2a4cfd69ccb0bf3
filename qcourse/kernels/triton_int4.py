"""The INT4 product on a GPU, in three versions: y[m, n] = sum_k x[m, k] (code[n, k] - zero_point) scale.

Every version computes tile by tile y^T = W x^T, BLOCK_N rows of W at a time, from the words of ``int4_planes.py``. What
they differ in is what a weight costs, in instructions:

- `naive`: each weight finds its own word, shifts, converts to float, and is multiplied by its scale.
- `planes`: a word is loaded once, and two weights at a time become fp16 by a mask and a magic number. Their scale
  multiplies the sum of a group, not the weights.
- `tuned`: the words are read as int16, so that eight weights become floats in nine instructions of packed assembly
  (where there is none, the same in plain Triton). Scales are loaded one block ahead, for such small loads are not made
  asynchronous by the compiler. Several programs share a tile's K (split-K): each leaves its sums in a workspace, the
  last to arrive adds them up in a fixed order. One launch, the same bits every time, and the counter is back at 0.

`decode` is for batches so large that decoding once, for all of x, is faster: it writes w_hat out.

W is the left operand of the product, so its numbers stay in registers; x comes through shared memory.

Source: Triton's documentation; Frantar et al., "MARLIN" (2024), for what the layout and the scales after the sum save.

How it differs from its neighbours: this file holds what a GPU runs and alone imports triton. What surrounds a launch is
in ``triton_int4_launch.py``.
"""

from typing import (
    no_type_check,  # a kernel's annotations are for triton's compiler, not for a checker of types
)

import triton
import triton.language as tl

# Eight weights: the planes 0 to 3 of a register of two int16. The magic number is or'd in by lop3 ((a & b) | c); the
# odd planes of fp16 save a shift: bits 4 to 7 count 16, so 1024 + 16 code, times 1/16, is 64 + code.
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
# bf16 has 7 bits after the point: 128 + code is all it holds, and every plane is shifted to the bottom.
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
_REGISTERS = tl.constexpr(
    "=r,=r,=r,=r,r,r,r,r,r"
)  # four planes from a word and what four planes are less by


@triton.jit(do_not_specialize=["M"])
@no_type_check
def naive(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, group_size, stride_xm, stride_wn,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = (n < N)[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, 32):
        k = start + tl.arange(0, 32)
        inside = inside_n & (k < K)[None, :]
        word = tl.load(
            words_ptr + n[:, None] * stride_wn + (k // 128 * 16 + k % 32 // 2)[None, :], inside, 0
        )
        code = (word >> (k % 128 // 32 * 4 + k % 2 * 16)[None, :]) & 15
        group = (k // group_size)[None, :] * N + n[:, None]
        zero = tl.load(zero_ptr + group, inside, 8).to(tl.int32) if HAS_ZERO else 8
        w = (code - zero).to(tl.float32) * tl.load(scale_ptr + group, inside, 0).to(tl.float32)
        x = tl.load(
            x_ptr + m[None, :].to(tl.int64) * stride_xm + k[:, None],
            (m < M)[None, :] & (k < K)[:, None],
            0.0,
        )
        acc = tl.dot(w.to(dtype), x, acc, input_precision="ieee")
    tl.store(
        y_ptr + m[None, :].to(tl.int64) * N + n[:, None], acc.to(dtype), inside_n & (m < M)[None, :]
    )


@triton.jit(do_not_specialize=["M"])  # one kernel for every batch that has the same tile
@no_type_check
def planes(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, blocks_a_group, stride_xm, stride_wn,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(
        n, N - 1
    )  # past the end the last row again: loads need no mask, and nothing of it is stored
    k = tl.arange(0, 32)[:, None]
    words_ptrs = words_ptr + row[:, None] * stride_wn + tl.arange(0, 16)[None, :]
    x_ptrs = x_ptr + m[None, :].to(tl.int64) * stride_xm + k
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        words = tl.load(words_ptrs + block * 16)
        group = block * GROUPS // blocks_a_group * N + row
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(4):
            x = _x_plane(
                x_ptrs + (block * 128 + i * 32), m < M, block * 128 + i * 32 + k < K, EVEN_K
            )
            at = group + i * GROUPS // 4 * N
            zero = tl.load(zero_ptr + at)[:, None] if HAS_ZERO else 8
            part = tl.dot(_plane(words >> 4 * i, zero, dtype, HAS_ZERO, BLOCK_N), x, part)
            if (i + 1) * GROUPS % 4 == 0:  # the group ends: its scale, once
                acc += part * tl.load(scale_ptr + at).to(tl.float32)[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    tl.store(
        y_ptr + m[None, :].to(tl.int64) * N + n[:, None],
        acc.to(dtype),
        (n < N)[:, None] & (m < M)[None, :],
    )


@triton.jit(do_not_specialize=["M", "blocks_a_split"])
@no_type_check
def tuned(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, sums_ptr, arrived_ptr, M, N, K, blocks_a_group, stride_xm, stride_wn,
    blocks_a_split, GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr, SCALE_FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
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
    zeros = _four_rows(zero_ptr + row, first, blocks_a_group, N, GROUPS if HAS_ZERO else 0)
    for block in tl.range(first, last, num_stages=STAGES):
        words = tl.load(words_ptrs, eviction_policy="evict_first")
        ahead = tl.minimum(block + 1, blocks - 1)
        next_scales = _four_rows(scale_ptr + row, ahead, blocks_a_group, N, GROUPS)
        next_zeros = _four_rows(zero_ptr + row, ahead, blocks_a_group, N, GROUPS if HAS_ZERO else 0)
        w = _four_planes(words, zeros, dtype, HAS_ZERO, PACKED)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(4):
            x = _x_plane(x_ptrs + i * 32, m < M, block * 128 + i * 32 + k < K, EVEN_K)
            if SCALE_FIRST:  # then one sum is enough, where the registers do not hold two
                acc = tl.dot(w[i] * scales[i].to(dtype)[:, None], x, acc)
            else:
                part = tl.dot(w[i], x, part)
            if (i + 1) * GROUPS % 4 == 0 and not SCALE_FIRST:
                acc += part * scales[i].to(tl.float32)[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        scales, zeros = next_scales, next_zeros
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
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, PACKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The rows of w_hat from first up to last; a program writes a block of 128 columns."""
    dtype = w_ptr.dtype.element_ty
    n, block = first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    row = tl.minimum(n, N - 1)
    words = tl.load(words_ptr + row[:, None] * stride_wn + block * 32 + tl.arange(0, 32)[None, :])
    scales = _four_rows(scale_ptr + row, block, blocks_a_group, N, GROUPS)
    zeros = _four_rows(zero_ptr + row, block, blocks_a_group, N, GROUPS if HAS_ZERO else 0)
    w = _four_planes(words, zeros, dtype, HAS_ZERO, PACKED)
    for i in tl.static_range(4):
        k = (block * 128 + i * 32 + tl.arange(0, 32))[None, :]
        w_hat = (w[i].to(tl.float32) * scales[i].to(tl.float32)[:, None]).to(dtype)
        inside = (n < last)[:, None] if EVEN_K else (n < last)[:, None] & (k < K)
        tl.store(w_ptr + (n - first)[:, None].to(tl.int64) * K + k, w_hat, inside)


@triton.jit
@no_type_check
def _add_up(acc, at, inside, sums_ptr, arrived_ptr, y_ptr, M, N):
    """Leave this program's sums; if all of its tile's are there, add them up in order and put the counter back to 0."""
    splits = tl.num_programs(2)
    tl.store(sums_ptr + tl.program_id(2) * M * N + at, acc, inside)
    tl.debug_barrier()  # every thread's sums are written before one of them tells
    counter = arrived_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros_like(acc)
        for split in range(splits):  # past the first-level cache, which may hold an older state
            total += tl.load(sums_ptr + split * M * N + at, inside, 0.0, cache_modifier=".cg")
        tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), inside)
        tl.store(counter, 0)


@triton.jit
@no_type_check
def _x_plane(ptrs, inside_m, inside_k, EVEN_K: tl.constexpr):
    """32 of x's columns, transposed; 0 past its end, where the words are filled up."""
    return tl.load(ptrs, inside_m[None, :] if EVEN_K else inside_m[None, :] & inside_k, 0.0)


@triton.jit
@no_type_check
def _four_rows(ptr, block, blocks_a_group, N, GROUPS: tl.constexpr):
    """The rows of scales, or of zero points, that belong to a block's four planes."""
    at = ptr + block * GROUPS // blocks_a_group * N
    first = tl.load(at) if GROUPS else 0
    second = tl.load(at + N) if GROUPS == 4 else first
    third = tl.load(at + GROUPS // 2 * N) if GROUPS > 1 else first
    return first, second, third, tl.load(at + 3 * N) if GROUPS == 4 else third


@triton.jit
@no_type_check
def _magic(code, dtype: tl.constexpr):
    """1024 + code in fp16 or 128 + code in bf16: the code in the last bits of that power of two."""
    MAGIC: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    return (code.to(tl.int16) | MAGIC).to(dtype, bitcast=True)


@triton.jit
@no_type_check
def _symmetric_base(dtype: tl.constexpr):
    """What code 8 reads as: a literal, for a number known only when the kernel runs costs a trip through memory."""
    return tl.full((), 1032.0 if dtype == tl.float16 else 136.0, dtype)


@triton.jit
@no_type_check
def _plane(words, zero, dtype: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr):
    """The plane at the bottom of both halves of each int32 word, less its zero points, as (BLOCK_N, 32) floats."""
    MAGIC: tl.constexpr = 0x64006400 if dtype == tl.float16 else 0x43004300
    pair = (words & 0x000F000F) | MAGIC
    low = (pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(dtype, bitcast=True)
    base = _magic(zero, dtype) if HAS_ZERO else _symmetric_base(dtype)
    return tl.reshape(tl.join(low - base, high - base), (BLOCK_N, 32))


@triton.jit
@no_type_check
def _four_planes(words, zeros, dtype: tl.constexpr, HAS_ZERO: tl.constexpr, PACKED: tl.constexpr):
    """The planes 0 to 3 of int16 words as floats, less what stands for 0."""
    HALF: tl.constexpr = dtype == tl.float16
    if HAS_ZERO:
        c0, c1 = -_magic(zeros[0], dtype)[:, None], -_magic(zeros[1], dtype)[:, None]
        c2, c3 = -_magic(zeros[2], dtype)[:, None], -_magic(zeros[3], dtype)[:, None]
    else:
        c0 = -_symmetric_base(dtype)
        c1, c2, c3 = c0, c0, c0
    if not PACKED:
        w0, w1 = _magic(words & 15, dtype) + c0, _magic((words >> 4) & 15, dtype) + c1
        w2, w3 = _magic((words >> 8) & 15, dtype) + c2, _magic((words >> 12) & 15, dtype) + c3
    elif HALF:
        FP16: tl.constexpr = (tl.float16, tl.float16, tl.float16, tl.float16)
        offsets = [words, c0, c1 + 960, c2, c3 + 960]  # less 64 + zero where 1024 + zero was
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _FP16_PLANES, _REGISTERS, offsets, FP16, is_pure=True, pack=2
        )
    else:
        BF16: tl.constexpr = (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16)
        offsets = [words, c0, c1, c2, c3]
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _BF16_PLANES, _REGISTERS, offsets, BF16, is_pure=True, pack=2
        )
    return w0, w1, w2, w3
