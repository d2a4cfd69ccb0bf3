"""Layers named, weights mapped in a copy, activations recorded: for any module."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from qcourse.trace.linears import linears, map_weights, record_inputs


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and one layer that forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.idle = nn.Linear(4, 4)
        with torch.no_grad():  # the same numbers in each run
            for p in self.parameters():
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_linears_are_the_layers_themselves_in_order() -> None:
    model = Tied()
    assert list(linears(model)) == ["body.0", "head", "idle"]
    assert linears(model)["head"] is model.head
    assert linears(nn.ReLU()) == {}


def test_a_layer_used_twice_is_listed_once() -> None:
    layer = nn.Linear(2, 2)
    assert list(linears(nn.Sequential(layer, nn.ReLU(), layer))) == ["0"]


def test_map_weights_changes_linear_weights_alone() -> None:
    model = Tied()
    before = state(model)
    mapped = map_weights(model, lambda w: 2 * w)
    doubled = {"body.0.weight", "head.weight", "idle.weight"}
    for name, value in mapped.state_dict().items():
        assert torch.equal(value, before[name] * (2 if name in doubled else 1)), name
    assert isinstance(mapped, Tied)


@pytest.mark.parametrize("fn", [lambda w: w, lambda w: w.mul_(3), lambda w: w.view(w.shape)])
def test_the_original_and_the_copy_share_nothing(fn) -> None:
    model = Tied()
    before = state(model)
    mapped = map_weights(model, fn)
    with torch.no_grad():
        for value in mapped.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_fn_returns_is_copied() -> None:
    kept = torch.ones(1, 2)
    mapped = map_weights(nn.Linear(2, 1), lambda w: kept)
    kept.zero_()
    assert torch.equal(mapped.weight, torch.ones(1, 2))


def test_dtype_and_gradient_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).half()
    model[1].requires_grad_(False)
    mapped = map_weights(model, lambda w: w.double())
    assert [(p.dtype, p.requires_grad) for p in mapped.parameters()] == [(torch.half, True)] * 2 + [
        (torch.half, False)
    ] * 2


@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda w: w.T, ValueError, r"shape of layer '', \(1, 2\), got \(2, 1\)"),
        (lambda w: w.tolist(), TypeError, "got list for layer ''"),
    ],
)
def test_a_wrong_result_of_fn_is_refused(fn, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        map_weights(nn.Linear(2, 1), fn)


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="this ReLU has none"):
        map_weights(nn.ReLU(), lambda w: w)


def test_inputs_are_recorded_by_layer_over_all_calls() -> None:
    model = Tied()
    a = torch.tensor([[0, 1], [2, 3]])
    b = torch.tensor([4])
    inputs = record_inputs(model, lambda: (model(a), model(b)))
    embedded = model.embedding.weight.detach()
    assert list(inputs) == ["body.0", "head"]  # idle was not called
    assert torch.equal(inputs["body.0"], embedded)
    assert_close(
        inputs["head"], model.body(embedded).detach()
    )  # the order of sums depends on the batch
    assert not any(x.requires_grad for x in inputs.values())


def test_recorded_inputs_are_copies() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)
    recorded = record_inputs(model, lambda: (model(x), x.zero_()))[""]
    assert torch.equal(recorded, torch.ones(3, 2))


def test_a_single_vector_is_one_token() -> None:
    model = nn.Linear(2, 1)
    assert record_inputs(model, lambda: model(torch.ones(2)))[""].shape == (1, 2)


def test_an_input_passed_by_name_is_recorded() -> None:
    model = nn.Linear(2, 1)
    x = torch.ones(3, 2)
    assert torch.equal(record_inputs(model, lambda: model(input=x))[""], x)


def test_max_tokens_keeps_the_first() -> None:
    model = nn.Linear(1, 1)
    x = torch.arange(10.0)[:, None]
    for size in (3, 10):
        for kept in (1, 3, 4, 10, 11):
            inputs = record_inputs(
                model, lambda size=size: [model(part) for part in x.split(size)], max_tokens=kept
            )
            assert torch.equal(inputs[""], x[:kept])


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_is_positive(max_tokens: int) -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        record_inputs(model, lambda: model(torch.ones(1, 1)), max_tokens=max_tokens)


def test_hooks_are_gone_even_after_an_error() -> None:
    model = Tied()
    with pytest.raises(IndexError):
        record_inputs(model, lambda: model(torch.tensor([99])))
    record_inputs(model, lambda: model(torch.tensor([0])))
    assert not any(layer._forward_pre_hooks for layer in linears(model).values())


def test_running_another_model_is_noticed() -> None:
    model = nn.Linear(1, 1)
    other = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="run called none of the 1 linear layers"):
        record_inputs(model, lambda: other(torch.ones(1, 1)))
