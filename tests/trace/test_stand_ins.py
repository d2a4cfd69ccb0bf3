"""Stand-ins return stored outputs and remove themselves; placeholders never turn into numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qcourse.trace.stand_ins import (
    FinishedBlocks,
    NoChain,
    Placeholder,
    StandIn,
    has_placeholder,
    without_values,
)

REAL = torch.ones(2, 3)


def test_a_stand_in_returns_the_outputs_in_order_and_removes_itself() -> None:
    block = nn.Linear(3, 3)
    with StandIn(block, [REAL, 2 * REAL]):
        assert torch.equal(block(torch.zeros(1)), REAL)
        assert torch.equal(block(), 2 * REAL)
        with pytest.raises(NoChain, match="more often"):
            block(REAL)
    assert torch.equal(block(REAL), nn.functional.linear(REAL, block.weight, block.bias))


def test_a_stand_in_removes_itself_after_an_error() -> None:
    block = nn.Identity()
    with pytest.raises(KeyError), StandIn(block, []):
        raise KeyError
    assert block(REAL) is REAL


def test_what_the_model_writes_into_an_output_is_not_stored() -> None:
    block = nn.Identity()
    stored = [(REAL.clone(), "word")]
    for _ in range(2):
        with StandIn(block, stored):
            output, word = block(REAL)
            assert (torch.equal(output, REAL), word) == (True, "word")
            output.zero_()


def test_only_the_last_finished_block_has_values() -> None:
    blocks = [nn.Identity() for _ in range(3)]
    finished = FinishedBlocks()
    for number, block in enumerate(blocks):
        finished.append(block, [[number * REAL], [-number * REAL]])
    with finished.standing_in(1):
        outputs = [block(REAL) for block in blocks]
    assert [has_placeholder(output) for output in outputs] == [True, True, False]
    assert torch.equal(outputs[2], -2 * REAL)
    assert len(finished) == 3


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x + REAL,
        lambda x: REAL @ x.T,
        lambda x: torch.stack([REAL, x]).mean(0),
        lambda x: x > 0,
        lambda x: x.argmax(-1),
        lambda x: x.add_(REAL),
        lambda x: x[:, :1],
        lambda x: nn.functional.layer_norm(x, (3,), torch.ones(3), torch.zeros(3)),
        lambda x: nn.Linear(3, 5)(x),
        lambda x: torch.where(REAL > 0, x, REAL),
        lambda x: x.to(torch.float64).to(x.device),
        lambda x: torch.zeros_like(x),
        lambda x: x.split(1)[0],
    ],
)
def test_what_is_computed_from_a_placeholder_is_one(operation: Callable[[Tensor], Tensor]) -> None:
    result = operation(without_values(REAL))
    expected = operation(REAL.clone())
    assert isinstance(result, Placeholder)
    assert (result.shape, result.dtype, result.device) == (
        expected.shape,
        expected.dtype,
        expected.device,
    )


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: torch.equal(x, REAL),
        lambda x: x.nonzero(),
        lambda x: REAL.clone().add_(x),
        lambda x: REAL.clone().copy_(x),
        lambda x: REAL.clone().__setitem__(0, x[0]),
        lambda x: torch.add(x, x, out=REAL.clone()),
    ],
)
def test_what_needs_values_says_so(operation: Callable[[Tensor], object]) -> None:
    with pytest.raises(NoChain, match="values of an earlier block"):
        operation(without_values(REAL))


def test_only_floats_lose_their_values() -> None:
    ids = torch.arange(3)
    assert without_values(ids) is ids
    assert without_values("word") == "word"
    placeholder = without_values(REAL.half())
    assert without_values(placeholder) is placeholder
    assert placeholder.dtype == torch.half
