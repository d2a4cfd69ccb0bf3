"""Device functions that load tiles and store sums, for the kernels of ``triton_int4.py``.

How it differs from ``triton_int4_decoding.py``: that turns loaded words into floats.
"""

# A kernel's annotations are for triton's compiler, not for a type checker.
from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def tile(axis: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of this program's tile along an axis of the grid."""
    return tl.program_id(axis) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
@no_type_check
def row_pointers(ptr, m, stride):
    """Pointers to the rows m of a matrix, (1, BLOCK_M); in 64 bits, because it may be large."""
    row = m[None, :].to(tl.int64)
    return ptr + row * stride


@triton.jit
@no_type_check
def x_plane(ptrs, inside_m, inside_k, EVEN_K: tl.constexpr):
    """32 columns of x, transposed; 0 past its end, where the words are padding."""
    inside = inside_m[None, :]
    if not EVEN_K:
        inside &= inside_k
    return tl.load(ptrs, inside, 0.0)


@triton.jit
@no_type_check
def four_rows(ptr, block, blocks_per_group, N, GROUPS: tl.constexpr):
    """The rows of scales or zero points of a block's four planes; GROUPS 0 loads none."""
    at = ptr + block * GROUPS // blocks_per_group * N
    first = tl.load(at) if GROUPS else 0
    second = tl.load(at + N) if GROUPS == 4 else first
    third = tl.load(at + GROUPS // 2 * N) if GROUPS > 1 else first
    fourth = tl.load(at + 3 * N) if GROUPS == 4 else third
    return first, second, third, fourth


@triton.jit
@no_type_check
def add_up(acc, at, inside, sums_ptr, arrived_ptr, y_ptr, M, N):
    """Write this program's sums; the last program adds all up and clears the tile's counter."""
    splits = tl.num_programs(2)
    own_sums = sums_ptr + tl.program_id(2) * M * N
    tl.store(own_sums + at, acc, inside)
    tl.debug_barrier()  # all threads have written before the counter says so
    counters = arrived_ptr + tl.program_id(1) * tl.num_programs(0)
    counter = counters + tl.program_id(0)
    if tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros_like(acc)
        for split in range(splits):
            sums = sums_ptr + split * M * N
            # .cg skips the first-level cache, which may hold an older state.
            total += tl.load(sums + at, inside, 0.0, cache_modifier=".cg")
        y_ptrs = y_ptr + at
        tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), inside)
        tl.store(counter, 0)
