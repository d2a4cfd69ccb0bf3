"""Packing against NumPy's bit stream and compressed-tensors' int32 words; and what does not fit."""

import re

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcourse import integer_range, pack, unpack
from qcourse.numerics.packing import CHUNK, pack_int32, packed_nbytes, unpack_int32

WIDTHS = range(1, 9)


def random_codes(bits: int, *shape: int, signed: bool = True, seed: int = 0) -> Tensor:
    """Return codes that are all equally likely, int8 when signed and uint8 when not."""
    qmin, qmax = integer_range(bits, signed=signed)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(qmin, qmax + 1, shape, generator=generator)
    return codes.to(torch.int8 if signed else torch.uint8)


def bit_stream(codes: Tensor, bits: int) -> list[int]:
    """Return the dense little-endian bit stream, one bit at a time, by NumPy."""
    each_bit = (codes.numpy().astype(np.int64).reshape(-1, 1) >> np.arange(bits)) & 1
    return np.packbits(each_bit.reshape(-1), bitorder="little").tolist()


@st.composite
def codes_of_a_width(draw: st.DrawFn) -> tuple[Tensor, int, bool]:
    """0 to 40 codes, their width, and whether they are signed."""
    bits = draw(st.sampled_from(WIDTHS))
    signed = draw(st.booleans())
    values = draw(st.lists(st.integers(*integer_range(bits, signed=signed)), max_size=40))
    return torch.tensor(values, dtype=torch.int8 if signed else torch.uint8), bits, signed


@given(codes_of_a_width())
def test_unpack_undoes_pack(case: tuple[Tensor, int, bool]) -> None:
    codes, bits, signed = case
    packed = pack(codes, bits)
    assert packed.shape == (packed_nbytes(len(codes), bits),)
    back = unpack(packed, bits, len(codes), signed)
    assert back.dtype == codes.dtype
    assert torch.equal(back, codes)


@given(codes_of_a_width())
def test_the_bytes_are_the_bit_stream(case: tuple[Tensor, int, bool]) -> None:
    codes, bits, _ = case
    assert pack(codes, bits).tolist() == bit_stream(codes, bits)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_at_every_place(bits: int, signed: bool) -> None:
    qmin, qmax = integer_range(bits, signed=signed)
    codes = torch.arange(qmin, qmax + 1).to(torch.int8 if signed else torch.uint8)
    for before in range(8):
        moved = torch.cat([torch.zeros(before, dtype=codes.dtype), codes])
        assert pack(moved, bits).tolist() == bit_stream(moved, bits)
        assert torch.equal(unpack(pack(moved, bits), bits, len(moved), signed), moved)


@pytest.mark.parametrize("count", [CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 8, 2 * CHUNK + 5])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_work_in_chunks_leaves_no_seam(bits: int, count: int) -> None:
    codes = random_codes(bits, count)
    packed = pack(codes, bits)
    assert packed.tolist() == bit_stream(codes, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("signed", [True, False])
def test_any_integer_dtype_packs_alike(signed: bool, dtype: torch.dtype) -> None:
    codes = random_codes(7, 20, signed=signed)
    if signed and dtype == torch.uint8:
        codes = codes.abs() % 64
    assert pack(codes.to(dtype), 7).tolist() == bit_stream(codes, 7)


def test_int64_codes_fill_a_byte() -> None:
    assert pack(torch.tensor([0, 128, 255]), 8).tolist() == [0, 128, 255]
    assert pack(torch.tensor([-128, 127]), 8).tolist() == [128, 127]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("start", [1, 3, 8])
def test_a_piece_of_a_tensor_packs_as_its_copy(bits: int, start: int) -> None:
    codes = random_codes(bits, 32)[start : start + 16]  # its memory starts off the 8-byte grid
    packed = torch.cat([torch.zeros(start, dtype=torch.uint8), pack(codes.clone(), bits)])[start:]
    assert torch.equal(pack(codes, bits), packed)
    assert torch.equal(unpack(packed, bits, 16), codes)


def test_codes_in_any_layout_pack_in_reading_order() -> None:
    codes = random_codes(4, 6, 10)
    assert torch.equal(pack(codes.T, 4), pack(codes.T.contiguous(), 4))
    assert torch.equal(pack(codes, 4), pack(codes.reshape(-1), 4))
    assert pack(torch.tensor(-3), 4).tolist() == [0x0D]


def test_the_arguments_are_not_changed() -> None:
    codes = random_codes(4, 16)
    before = codes.clone()
    packed = pack(codes, 4)
    stored = packed.clone()
    unpack(packed, 4, 16)
    assert torch.equal(codes, before)
    assert torch.equal(packed, stored)


def test_the_last_byte_is_filled_with_zeros() -> None:
    assert pack(torch.tensor([-1]), 3).tolist() == [0b111]
    assert pack(torch.tensor([-1, -1, -1]), 3).tolist() == [0xFF, 0b1]


def test_two_codes_a_byte_low_nibble_first() -> None:
    assert pack(torch.tensor([-6, -2, 0, 7]), 4)[0] == 0xEA  # claim 10
    assert pack(torch.tensor([-3, 6]), 4).tolist() == [0x6D]  # claim 11


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("columns", [32, 64, 96, 1024])
def test_int32_words_equal_those_of_compressed_tensors(bits: int, rows: int, columns: int) -> None:
    codes = random_codes(bits, rows, columns, seed=columns + rows)
    words = pack_int32(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_int32(words, bits), unpack_from_int32(words, bits, codes.shape))
    assert torch.equal(unpack_int32(words, bits), codes)


@pytest.mark.parametrize(
    ("bits", "columns"), [(4, 8), (4, 24), (8, 4), (8, 20), (2, 16), (1, 32), (4, 4096)]
)
def test_the_shortest_rows_of_whole_words(bits: int, columns: int) -> None:
    codes = random_codes(bits, 5, columns)
    assert torch.equal(pack_int32(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", WIDTHS)
def test_int32_words_are_the_bytes_of_code_less_qmin(bits: int) -> None:
    codes = random_codes(bits, 2, 32)
    unsigned = (codes.int() - integer_range(bits)[0]).to(torch.uint8)
    assert torch.equal(pack_int32(codes, bits).view(torch.uint8).reshape(-1), pack(unsigned, bits))


def test_int32_words_of_a_view_and_of_nothing() -> None:
    codes = random_codes(4, 16, 8)
    assert torch.equal(pack_int32(codes.T.contiguous().T, 4), pack_int32(codes, 4))
    words = pack_int32(codes, 4)
    assert torch.equal(unpack_int32(words[1:], 4), codes[1:])
    assert unpack_int32(pack_int32(codes[:0], 4), 4).shape == (0, 8)
    assert unpack_int32(pack_int32(codes[:, :0], 4), 4).shape == (16, 0)


# What is refused


@pytest.mark.parametrize(
    ("codes", "bits", "words"),
    [
        ([8], 4, "codes run from 8 to 8; bits=4 holds [-8, 7] or [0, 15]"),
        ([-1, 8], 4, "codes run from -1 to 8; bits=4 holds [-8, 7] or [0, 15]"),
        ([16], 4, "codes run from 16 to 16"),
        ([-9, 0], 4, "codes run from -9 to 0"),
        ([-1, 1], 1, "codes run from -1 to 1; bits=1 holds [-1, 0] or [0, 1]"),
        ([256], 8, "codes run from 256 to 256; bits=8 holds [-128, 127] or [0, 255]"),
        ([-1, 128], 8, "codes run from -1 to 128"),
        ([2**40], 8, "codes run from 1099511627776"),
    ],
)
def test_codes_that_do_not_fit(codes: list[int], bits: int, words: str) -> None:
    signed_only = codes == [8]  # these do fit unsigned, but int32 words take signed codes alone
    if not signed_only:
        with pytest.raises(ValueError, match=re.escape(words)):
            pack(torch.tensor(codes), bits)
    with pytest.raises(ValueError, match=re.escape(words.split(" or ")[0])):
        pack_int32(torch.tensor([codes * 32]), bits)


@pytest.mark.parametrize(
    "codes",
    [torch.ones(8), torch.ones(8, dtype=torch.bool), torch.ones(8, dtype=torch.uint16), [1, 2]],
)
@pytest.mark.usefixtures("unchecked")
def test_codes_that_are_no_integers(codes: object) -> None:
    for function in (pack, pack_int32):
        with pytest.raises(TypeError, match="codes are a tensor of integers"):
            function(codes, 4)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, True, "4"])
@pytest.mark.usefixtures("unchecked")
def test_bits(bits: object) -> None:
    words = re.escape(f"bits={bits!r} must be a whole number (a Python int) from 1 to 8")
    for call in (
        lambda: pack(torch.zeros(1, 8).int(), bits),
        lambda: pack_int32(torch.zeros(1, 8).int(), bits),
        lambda: unpack(torch.zeros(4, dtype=torch.uint8), bits, 8),
        lambda: unpack_int32(torch.zeros(1, 1).int(), bits),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("nbytes", "bits", "count", "needed"),
    [(3, 4, 8, 4), (5, 4, 8, 4), (0, 4, 1, 1), (1, 4, 0, 0), (3, 3, 9, 4)],
)
def test_packed_bytes_of_the_wrong_length(nbytes: int, bits: int, count: int, needed: int) -> None:
    words = (
        f"packed has shape ({nbytes},);"
        f" count={count} codes of bits={bits} take exactly {needed} bytes"
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        unpack(torch.zeros(nbytes, dtype=torch.uint8), bits, count)


@pytest.mark.usefixtures("unchecked")
def test_packed_bytes_of_the_wrong_kind() -> None:
    with pytest.raises(ValueError, match="count=-1"):
        unpack(torch.zeros(0, dtype=torch.uint8), 4, -1)
    with pytest.raises(ValueError, match=r"packed has shape \(2, 2\)"):
        unpack(torch.zeros(2, 2, dtype=torch.uint8), 4, 8)
    for packed in (torch.zeros(4, dtype=torch.int8), b"\0\0\0\0"):
        with pytest.raises(TypeError, match=r"packed codes are a tensor of torch.uint8"):
            unpack(packed, 4, 8)


@pytest.mark.parametrize(
    ("shape", "bits", "whole"),
    [((2, 12), 4, 8), ((8,), 4, 8), ((2, 2), 8, 4), ((1, 16), 3, 32), ((1, 8), 6, 16)],
)
def test_rows_that_do_not_fill_words(shape: tuple[int, ...], bits: int, whole: int) -> None:
    words = re.escape(f"codes of shape {shape} must be (out, in) with in a multiple of {whole}")
    with pytest.raises(ValueError, match=words):
        pack_int32(torch.zeros(shape, dtype=torch.int8), bits)


def test_words_of_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match=r"words are a tensor of torch.int32"):
        unpack_int32(torch.zeros(1, 3, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match=r"words of shape \(3,\) must be \(out, words\)"):
        unpack_int32(torch.zeros(3, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="a row whole codes of bits=3"):
        unpack_int32(torch.zeros(1, 2, dtype=torch.int32), 3)
