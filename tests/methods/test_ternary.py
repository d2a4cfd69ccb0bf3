"""Ternary codes: the absmean rule by hand, and every byte of five trits there and back."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import normal

from qcourse import PerChannel, PerGroup
from qcourse.methods.ternary import TernaryQuantizer, pack_trits, unpack_trits
from qcourse.numerics.packing import pack, unpack


@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(16)])
def test_absmean_by_hand(granularity: Any) -> None:
    w = normal(6, 32)
    q = TernaryQuantizer(granularity)(w)
    rows = granularity.rows(w).double()
    scale = rows.abs().mean(1)
    assert torch.equal(q.scale.flatten(), scale.float())
    expected = (rows.float() / scale.float()[:, None]).round().clamp(-1, 1)
    assert torch.equal(granularity.rows(q.codes.float()), expected)
    assert set(q.codes.unique().tolist()) == {-1, 0, 1}
    assert q.bits == 2


def test_rules_and_all_zero_weights() -> None:
    w = normal(4, 64)
    errors = {}
    for rule in ("absmean", "amax", "mse"):
        w_hat = TernaryQuantizer(scale_rule=rule)(w).dequantize()
        errors[rule] = float((w_hat - w).norm())
    assert errors["mse"] < errors["absmean"] < errors["amax"]
    zero = TernaryQuantizer()(torch.zeros(2, 4))
    assert zero.scale.item() == 1
    assert not zero.codes.any()
    with pytest.raises(ValueError, match="scale_rule='mean' must be one of absmean, amax, mse"):
        TernaryQuantizer(scale_rule="mean")
    with pytest.raises(ValueError, match="NaN"):
        TernaryQuantizer()(torch.tensor([torch.nan]))


def test_every_byte() -> None:
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5)), dtype=torch.int8)
    packed = pack_trits(every)
    assert sorted(packed.tolist()) == list(range(243))
    assert packed[0] == 0  # five times -1
    assert int(packed[1]) == 81  # the fifth counts 3^4
    assert torch.equal(unpack_trits(packed, every.numel()).reshape(every.shape), every)


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=40))
def test_there_and_back(values: list[int]) -> None:
    codes = torch.tensor(values, dtype=torch.int8)
    packed = pack_trits(codes)
    assert len(packed) == -(-len(values) // 5)
    assert torch.equal(unpack_trits(packed, len(values)), codes)
    assert torch.equal(unpack(pack(codes, 2), 2, len(values)), codes)  # and at two bits


def test_bits_per_weight() -> None:
    codes = TernaryQuantizer()(normal(64, 100)).codes
    assert 8 * pack_trits(codes).nbytes / codes.numel() == 1.6
    assert 8 * pack(codes, 2).nbytes / codes.numel() == 2


ONE_BYTE = torch.tensor([1], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: pack_trits(torch.tensor([1, 0])), TypeError, "trits are int8"),
        (
            lambda: pack_trits(torch.tensor([2]).to(torch.int8)),
            ValueError,
            "each of them -1, 0 or 1",
        ),
        (lambda: pack_trits(torch.tensor([]).to(torch.int8)), ValueError, "at least one"),
        (lambda: unpack_trits(torch.tensor([1]), 5), TypeError, "packed trits are uint8"),
        (lambda: unpack_trits(ONE_BYTE, 6), ValueError, "does not hold count=6"),
        (lambda: unpack_trits(ONE_BYTE, 0), ValueError, "does not hold count=0"),
        (lambda: unpack_trits(ONE_BYTE + 242, 5), ValueError, "the byte 243"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(call: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()
