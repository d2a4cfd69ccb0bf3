"""The layout in planes: every code is where the formula says, and comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcourse.kernels.int4_planes import pack_planes, row_words, unpack_planes


def random_codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_a_nibble_holds_the_code_that_the_formula_names() -> None:
    codes = random_codes(3, 300)
    words = pack_planes(codes)
    assert words.shape == (3, 48)
    assert words.dtype == torch.int32
    for n in range(3):
        for block in range(3):
            for j in range(16):
                word = int(words[n, 16 * block + j]) & 0xFFFFFFFF
                for i in range(4):
                    for h in range(2):
                        k = 128 * block + 32 * i + 2 * j + h
                        assert word >> 4 * (i + 4 * h) & 15 == (int(codes[n, k]) if k < 300 else 0)


def test_two_neighbours_of_a_plane_are_the_halves_of_a_masked_word() -> None:
    codes = random_codes(2, 256)
    words = pack_planes(codes).long()
    for plane in range(4):
        halves = words >> 4 * plane & 0x000F000F
        pairs = torch.stack((halves & 0xFFFF, halves >> 16), dim=-1)  # (2, 32, 2)
        expected = codes.reshape(2, 2, 4, 32)[:, :, plane]
        assert torch.equal(pairs.reshape(2, 2, 32), expected.long())


@given(rows=st.integers(1, 4), columns=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_unpacking_is_the_inverse(rows: int, columns: int, seed: int) -> None:
    codes = random_codes(rows, columns, seed)
    words = pack_planes(codes)
    assert words.shape == (rows, row_words(columns))
    assert torch.equal(unpack_planes(words, columns), codes)


def test_codes_that_do_not_lie_side_by_side() -> None:
    codes = random_codes(130, 6).T
    words = pack_planes(codes)
    assert torch.equal(words, pack_planes(codes.contiguous()))
    assert torch.equal(unpack_planes(words.repeat(1, 2)[:, :32], 130), codes)


@pytest.mark.parametrize(
    ("codes", "kind", "words"),
    [
        (
            torch.zeros(2, 8, dtype=torch.int8),
            TypeError,
            r"codes has dtype torch.int8; it must be torch.uint8",
        ),
        (torch.zeros(8, dtype=torch.uint8), ValueError, r"codes of shape \(8,\) must be a matrix"),
        (torch.zeros(2, 0, dtype=torch.uint8), ValueError, "at least one entry"),
        (
            torch.full((2, 8), 16, dtype=torch.uint8),
            ValueError,
            "codes go up to 16; 4 bits hold 0 to 15",
        ),
    ],
)
def test_what_packing_refuses(codes: Tensor, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        pack_planes(codes)


@pytest.mark.parametrize(
    ("words", "inputs", "kind", "says"),
    [
        (torch.zeros(2, 16, dtype=torch.int64), 128, TypeError, "words has dtype torch.int64"),
        (torch.zeros(16, dtype=torch.int32), 128, ValueError, "must be a matrix"),
        (
            torch.zeros(2, 16, dtype=torch.int32),
            129,
            ValueError,
            "inputs=129 takes 32 words per row, got 16",
        ),
        (
            torch.zeros(2, 16, dtype=torch.int32),
            0,
            ValueError,
            "inputs=0 takes 0 words per row, got 16",
        ),
    ],
)
def test_what_unpacking_refuses(
    words: Tensor, inputs: int, kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        unpack_planes(words, inputs)
