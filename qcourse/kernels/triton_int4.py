"""The INT4 product on a GPU, in three versions: y[m, n] = sum_k x[m, k] (code - zero_point) scale.

Every version computes y^T = W x^T tile by tile from the words of ``int4_planes.py``. W is the left
operand, so its numbers stay in registers; x passes through shared memory. The versions differ in
the instructions per weight:

- `naive`: each weight finds its word, shifts it, becomes a float and is multiplied by its scale.
- `planes`: a word is loaded once and decoded two weights at a time. The scale multiplies the sum of
  a group instead of each weight.
- `tuned`: eight weights are decoded in nine instructions of packed assembly. Scales are loaded one
  block ahead, because the compiler does not make such small loads asynchronous. Several programs
  may share a tile's K (split-K): the last to arrive adds up their sums in a fixed order, so one
  launch gives the same bits every time.

Source: Frantar et al., "MARLIN" (2024), for the layout and for scaling after the sum.

How it differs from ``triton_int4_launch.py``: that calls these kernels and imports no triton.
"""

# A kernel's annotations are for triton's compiler, not for a type checker.
from typing import no_type_check

import triton
import triton.language as tl

from qcourse.kernels.triton_int4_decoding import four_planes, one_plane
from qcourse.kernels.triton_int4_memory import add_up, four_rows, row_pointers, tile, x_plane


@triton.jit(do_not_specialize=["M"])  # one kernel for every batch that has the same tile
@no_type_check
def naive(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, group_size, stride_xm, stride_wn,
    HAS_ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty

    # The tile: BLOCK_N rows of W by BLOCK_M rows of x.
    m = tile(0, BLOCK_M)
    n = tile(1, BLOCK_N)
    inside_n = (n < N)[:, None]

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, 32):
        k = start + tl.arange(0, 32)
        inside_w = inside_n & (k < K)[None, :]

        # Each weight's code: nibble i + 4 h of word j, where k = 32 i + 2 j + h in its block.
        word_of_k = k // 128 * 16 + k % 32 // 2
        word_rows = words_ptr + n[:, None] * stride_wn
        word_ptrs = word_rows + word_of_k[None, :]
        word = tl.load(word_ptrs, inside_w, 0)  # (BLOCK_N, 32)
        plane_shift = k % 128 // 32 * 4
        shift = plane_shift + k % 2 * 16
        code = (word >> shift[None, :]) & 15

        # w_hat = (code - zero_point) scale, with the group's scale and zero point.
        group = (k // group_size)[None, :] * N
        group += n[:, None]
        zero = 8
        if HAS_ZERO:
            zero_point = tl.load(zero_ptr + group, inside_w, 8)
            zero = zero_point.to(tl.int32)
        difference = (code - zero).to(tl.float32)
        scale = tl.load(scale_ptr + group, inside_w, 0)
        w_hat = difference * scale.to(tl.float32)

        # x is read transposed.
        x_rows = row_pointers(x_ptr, m, stride_xm)
        x_ptrs = x_rows + k[:, None]
        inside_m = (m < M)[None, :]
        inside_x = inside_m & (k < K)[:, None]
        x = tl.load(x_ptrs, inside_x, 0.0)  # (32, BLOCK_M)
        acc = tl.dot(w_hat.to(dtype), x, acc, input_precision="ieee")

    y_rows = row_pointers(y_ptr, m, N)
    y_ptrs = y_rows + n[:, None]
    y = acc.to(dtype)
    inside_y = inside_n & (m < M)[None, :]
    tl.store(y_ptrs, y, inside_y)


@triton.jit(do_not_specialize=["M"])
@no_type_check
def planes(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, M, N, K, blocks_per_group, stride_xm, stride_wn,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty

    # The tile. Past the last row of W the last row is read again, so loads need no mask; its
    # sums are not stored.
    m = tile(0, BLOCK_M)
    n = tile(1, BLOCK_N)
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, 32)[:, None]
    word_rows = words_ptr + row[:, None] * stride_wn
    word_ptrs = word_rows + tl.arange(0, 16)[None, :]
    x_rows = row_pointers(x_ptr, m, stride_xm)
    x_ptrs = x_rows + k

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES):
        words = tl.load(word_ptrs + block * 16)  # (BLOCK_N, 16): 128 codes per row
        group = block * GROUPS // blocks_per_group * N + row
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(4):
            # Plane i: 32 columns of x and of W, without the scale.
            first_k = block * 128 + i * 32
            plane_ptrs = x_ptrs + first_k
            inside_m = m < M
            inside_k = first_k + k < K
            x = x_plane(plane_ptrs, inside_m, inside_k, EVEN_K)  # (32, BLOCK_M)
            group_of_plane = group + i * GROUPS // 4 * N
            zero = 8
            if HAS_ZERO:
                zero = tl.load(zero_ptr + group_of_plane)[:, None]
            shifted = words >> 4 * i
            w = one_plane(shifted, zero, dtype, HAS_ZERO, BLOCK_N)  # (BLOCK_N, 32)
            part = tl.dot(w, x, part)

            # Where a group ends, its scale multiplies its sum.
            if (i + 1) * GROUPS % 4 == 0:
                scale_row = tl.load(scale_ptr + group_of_plane)
                scale = scale_row.to(tl.float32)
                acc += part * scale[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    y_rows = row_pointers(y_ptr, m, N)
    y_ptrs = y_rows + n[:, None]
    y = acc.to(dtype)
    inside_n = (n < N)[:, None]
    inside_y = inside_n & (m < M)[None, :]
    tl.store(y_ptrs, y, inside_y)


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
@no_type_check
def tuned(
    x_ptr, words_ptr, scale_ptr, zero_ptr, y_ptr, sums_ptr, arrived_ptr, M, N, K, blocks_per_group,
    stride_xm, stride_wn, blocks_per_split,
    GROUPS: tl.constexpr, HAS_ZERO: tl.constexpr, EVEN_K: tl.constexpr, SPLIT: tl.constexpr,
    PACKED: tl.constexpr, SCALE_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    ZERO_GROUPS: tl.constexpr = GROUPS if HAS_ZERO else 0

    # The tile, as in `planes`, and this program's share of the blocks along K.
    m = tile(0, BLOCK_M)
    n = tile(1, BLOCK_N)
    row = tl.minimum(n, N - 1)
    k = tl.arange(0, 32)[:, None]
    blocks = tl.cdiv(K, 128)
    first = tl.program_id(2) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    word_rows = words_ptr + row[:, None] * stride_wn
    word_columns = word_rows + tl.arange(0, 32)[None, :]
    word_ptrs = word_columns + first * 32
    x_rows = row_pointers(x_ptr, m, stride_xm)
    x_ptrs = x_rows + k + first * 128

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    scales = four_rows(scale_ptr + row, first, blocks_per_group, N, GROUPS)
    zeros = four_rows(zero_ptr + row, first, blocks_per_group, N, ZERO_GROUPS)
    for block in tl.range(first, last, num_stages=STAGES):
        words = tl.load(word_ptrs, eviction_policy="evict_first")  # (BLOCK_N, 32) int16

        # Load the scales of the next block now, so that the product need not wait for them.
        ahead = tl.minimum(block + 1, blocks - 1)
        next_scales = four_rows(scale_ptr + row, ahead, blocks_per_group, N, GROUPS)
        next_zeros = four_rows(zero_ptr + row, ahead, blocks_per_group, N, ZERO_GROUPS)

        # Decode all four planes, then multiply plane by plane.
        w = four_planes(words, zeros, dtype, HAS_ZERO, PACKED)  # four of (BLOCK_N, 32)
        part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in tl.static_range(4):
            plane_ptrs = x_ptrs + i * 32
            inside_m = m < M
            first_k = block * 128 + i * 32
            inside_k = first_k + k < K
            x = x_plane(plane_ptrs, inside_m, inside_k, EVEN_K)  # (32, BLOCK_M)
            if SCALE_FIRST:  # a wide tile has registers for one sum only
                rounded_scale = scales[i].to(dtype)
                w_hat = w[i] * rounded_scale[:, None]
                acc = tl.dot(w_hat, x, acc)
            else:
                part = tl.dot(w[i], x, part)
            if (i + 1) * GROUPS % 4 == 0 and not SCALE_FIRST:
                scale = scales[i].to(tl.float32)
                acc += part * scale[:, None]
                part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

        scales = next_scales
        zeros = next_zeros
        word_ptrs += 32
        x_ptrs += 128

    at = m[None, :].to(tl.int64) * N
    at += n[:, None]
    inside_n = (n < N)[:, None]
    inside = inside_n & (m < M)[None, :]
    if SPLIT:
        add_up(acc, at, inside, sums_ptr, arrived_ptr, y_ptr, M, N)
    else:
        tl.store(y_ptr + at, acc.to(dtype), inside)
