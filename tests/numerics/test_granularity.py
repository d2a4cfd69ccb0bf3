"""Granularities: rows and back, scales that broadcast, and group sizes that do not divide."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcourse import PerChannel, PerGroup, PerTensor
from qcourse.numerics.granularity import Granularity, _nearest_divisors

X = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
CHANNELS = [PerChannel(axis) for axis in range(-4, 4)]
EVERY = [PerTensor(), *CHANNELS, PerGroup(1), PerGroup(3), PerGroup(6)]


@pytest.mark.parametrize("granularity", EVERY)
def test_unrows_undoes_rows(granularity: Granularity) -> None:
    back = granularity.unrows(granularity.rows(X), X.shape)
    assert torch.equal(back, X)
    assert back.is_contiguous()


@pytest.mark.parametrize("granularity", EVERY)
def test_there_is_a_scale_for_each_row(granularity: Granularity) -> None:
    assert torch.Size(granularity.scale_shape(X.shape)).numel() == len(granularity.rows(X))


@pytest.mark.parametrize("axis", range(-4, 4))
def test_a_channel_has_all_values_with_its_index(axis: int) -> None:
    rows = PerChannel(axis).rows(X)
    for index in range(X.shape[axis]):
        assert rows[index].tolist() == X.select(axis, index).reshape(-1).tolist()


@pytest.mark.parametrize("axis", range(-4, 4))
def test_a_channel_scale_broadcasts_against_the_tensor(axis: int) -> None:
    scale = torch.arange(1, X.shape[axis] + 1).reshape(PerChannel(axis).scale_shape(X.shape))
    by_row = PerChannel(axis).rows(X) * scale.reshape(-1, 1)
    assert torch.equal(X * scale, PerChannel(axis).unrows(by_row, X.shape))


def test_a_group_is_a_run_of_neighbors_in_a_row() -> None:
    rows = PerGroup(3).rows(torch.arange(12).reshape(2, 6))
    assert rows.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_integer_division_would_lose_the_last_columns() -> None:  # claim 17
    columns = 100
    size = 48
    assert columns - columns // size * size == 4
    with pytest.raises(ValueError, match=r"100 = 2 x 48 \+ 4"):
        PerGroup(size).scale_shape(torch.Size([2, columns]))


@given(st.integers(1, 500), st.integers(2, 600))
def test_the_divisors_that_the_message_names(length: int, size: int) -> None:
    if length % size == 0:
        return
    named = [int(word) for word in _nearest_divisors(length, size).split(" and ")]
    divisors = [d for d in range(1, length + 1) if length % d == 0]
    below = [d for d in divisors if d < size]
    above = [d for d in divisors if d > size]
    assert named == [below[-1], *above[:1]]
