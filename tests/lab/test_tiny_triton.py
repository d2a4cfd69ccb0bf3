"""The stand-in for Triton does what Triton's words mean, and refuses what a GPU would do in silence."""

import pytest
import torch
from torch import Tensor

from qcourse.lab import tiny_triton as triton
from qcourse.lab.tiny_triton import language as tl


@triton.jit
def product(a_ptr, b_ptr, y_ptr, M, N, K, stride_a, BLOCK: tl.constexpr):
    """y = a b^T, a tile a program."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a = tl.load(a_ptr + m[:, None] * stride_a + k[None, :], (m < M)[:, None] & (k < K)[None, :], 0.0)
        b = tl.load(b_ptr + n[None, :] * K + k[:, None], (n < N)[None, :] & (k < K)[:, None], 0.0)
        acc = tl.dot(a, b, acc)
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc.to(y_ptr.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def shifted(x_ptr, y_ptr, N, by, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + n, tl.load(x_ptr + n + by, n < N, 0.0), n < N)


def whole(*shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_make_a_product(dtype: torch.dtype) -> None:
    a, b = whole(7, 20), whole(5, 13)
    y = torch.full((7, 5), torch.nan, dtype=dtype)
    grid = triton.cdiv(7, 4), triton.cdiv(5, 4)
    product[grid](a[:, 3:16], b, y, 7, 5, 13, 20, BLOCK=4, num_warps=2)  # a part of a: its rows are 20 apart
    assert torch.equal(y, (a[:, 3:16] @ b.T).to(dtype))


def test_what_leaves_the_tensor_is_refused() -> None:
    x, y = torch.arange(10.0), torch.zeros(10)
    shifted[(3,)](x, y, 10, 0, BLOCK=4)
    assert torch.equal(x, y)
    for by in (1, -1):
        with pytest.raises(IndexError, match="of a tensor of 10 elements: a mask is missing"):
            shifted[(3,)](x, y, 10, by, BLOCK=4)


@pytest.mark.parametrize(("start", "end"), [(0, 3), (0, 0), (4, 16)])
def test_blocks_are_powers_of_two(start: int, end: int) -> None:
    with pytest.raises(ValueError, match=rf"arange\({start}, {end}\) has .* power of 2"):
        tl.arange(start, end)


def test_masked_places_get_the_other_value_in_the_tensor_s_dtype() -> None:
    codes = triton.Pointer(torch.tensor([3, 4], dtype=torch.uint8))
    found = tl.load(codes + tl.arange(0, 4), tl.arange(0, 4) < 2, 8)
    assert (found.tolist(), found.dtype) == ([3, 4, 8, 8], torch.uint8)
