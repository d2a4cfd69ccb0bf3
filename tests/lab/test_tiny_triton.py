"""The stand-in for Triton follows Triton's language and refuses what a GPU would do silently."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcourse.lab import tiny_triton as triton
from qcourse.lab.tiny_triton import language as tl


@triton.jit
def product(a_ptr, b_ptr, y_ptr, M, N, K, stride_a, BLOCK: tl.constexpr):
    """y = a b^T, one tile per program."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        a_at = a_ptr + m[:, None] * stride_a + k[None, :]
        a = tl.load(a_at, (m < M)[:, None] & (k < K)[None, :], 0.0)
        b_at = b_ptr + n[None, :] * K + k[:, None]
        b = tl.load(b_at, (n < N)[None, :] & (k < K)[:, None], 0.0)
        acc = tl.dot(a, b, acc)
    y_at = y_ptr + m[:, None] * N + n[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_at, y, (m < M)[:, None] & (n < N)[None, :])


@triton.jit
def shifted(x_ptr, y_ptr, N, by, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + n, tl.load(x_ptr + n + by, n < N, 0.0), n < N)


def whole(*shape: int) -> Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tiles_make_a_product(dtype: torch.dtype) -> None:
    a = whole(7, 20)
    b = whole(5, 13)
    y = torch.full((7, 5), torch.nan, dtype=dtype)
    grid = triton.cdiv(7, 4), triton.cdiv(5, 4)
    # a part of a: its rows are 20 apart
    part = a[:, 3:16]
    product[grid](part, b, y, 7, 5, 13, 20, BLOCK=4, num_warps=2)
    assert torch.equal(y, (part @ b.T).to(dtype))


def test_what_leaves_the_tensor_is_refused() -> None:
    x = torch.arange(10.0)
    y = torch.zeros(10)
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


@triton.jit
def negated(x_ptr, y_ptr, N, BLOCK: tl.constexpr = 4):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # 0 in a grid of one axis
    more = tl.program_id(1) + tl.num_programs(2) - 1
    tl.store(n + y_ptr, -tl.load(n + x_ptr, n < N, 0.0) + more, n < N)


def test_a_grid_may_be_a_function_and_a_tensor_have_a_name() -> None:
    x = torch.arange(7.0)
    y = torch.zeros(7)

    def by_size(meta: dict) -> tuple[int]:
        return (triton.cdiv(meta["N"], meta["BLOCK"]),)

    def by_length(meta: dict) -> tuple[int]:
        return (triton.cdiv(len(meta["x_ptr"]), meta["BLOCK"]),)

    negated[by_size](x, y_ptr=y, N=7, BLOCK=2)
    assert torch.equal(y, -x)
    # BLOCK by default
    negated[by_length](x_ptr=y, y_ptr=y, N=7)
    assert torch.equal(y, x)


WATCHED = """
import torch, triton, triton.language as tl
from qcourse.lab.tiny_triton import stay_inside

stay_inside()
stay_inside()  # twice is once

@triton.jit
def shifted(x_ptr, y_ptr, N, by, mask_end, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + n, tl.load(x_ptr + n + by, n < N, 0.0), n < mask_end)

for by, mask_end in ((0, 10), (1, 10), (-1, 10), (0, 11)):
    x, y = torch.arange(20.0)[10:], torch.zeros(10)
    x = x if by == 1 else x.clone()
    try:
        shifted[(3,)](x, y, 10, by, mask_end, BLOCK=4)
        print(y.tolist() == x.tolist())
    except Exception as error:
        print("a mask is missing" in str(error))
x, y = torch.arange(20.0), torch.zeros(10)
# before the view x[5:], but inside its memory
shifted[lambda meta: (3,)](x[5:], y, N=10, by=-5, mask_end=10, BLOCK=4)
print(y.tolist() == x[:10].tolist())
"""


def test_the_interpreter_learns_to_stay_inside(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # a process of its own: Triton reads TRITON_INTERPRET only once
    script = tmp_path / "watched.py"
    script.write_text(WATCHED, encoding="utf-8")
    command = [sys.executable, script]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 5
