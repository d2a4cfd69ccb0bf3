"""Passes pause before the layers of interest, go on through new ones, and end without a trace."""

import threading
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from qcourse import IntQuantizer, PerGroup, quantize_model
from qcourse.methods.gptq import Gptq
from qcourse.models.llama import random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.trace.hooks import on_output
from qcourse.trace.linears import linears
from qcourse.trace.paused_passes import PausedPass, PausedPasses

SIZES = LlamaConfig(96, 64, 96, 3, 4, 2)
IDS = torch.arange(14).reshape(2, 7)


def passes_over(model: nn.Module) -> PausedPasses:
    groups = [("0",), ("1",)]
    works = [partial(model, torch.ones(1, 2)), partial(model, 2 * torch.ones(1, 2))]
    return PausedPasses(model, linears(model), groups, works)


def test_a_pass_goes_on_through_the_layer_that_replaced_the_old_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    with passes_over(model) as passes:
        assert [x.tolist() for x in passes.inputs(0)] == [[[1.0, 1.0]], [[2.0, 2.0]]]
        model[0] = nn.Identity()
        assert [x.tolist() for x in passes.inputs(1)] == [[[1.0, 1.0]], [[2.0, 2.0]]]


def test_nothing_remains_in_the_model_between_two_groups_or_of_the_threads() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    threads = threading.active_count()
    with passes_over(model) as passes:
        list(passes.inputs(0))
        assert threading.active_count() == threads + 2
        assert model(torch.ones(1, 2)).shape == (1, 2)
        assert not any("forward" in vars(module) for module in model.modules())
    assert threading.active_count() == threads


def test_an_error_of_the_model_is_raised_where_the_pass_is_resumed() -> None:
    def fail() -> None:
        raise KeyError("id")

    each = PausedPass(fail)
    with pytest.raises(KeyError, match="id"):
        each.resume()
    each.cancel()
    assert each.is_done


def test_gradients_are_off_in_a_pass() -> None:
    found = []
    each = PausedPass(lambda: found.append(torch.is_grad_enabled()))
    each.resume()
    assert found == [False]


def test_each_block_runs_once_per_batch_and_the_head_never() -> None:
    model = random_llama(SIZES, seed=0).eval().requires_grad_(False)
    rows: Counter[str] = Counter()

    def count(name: str, output: torch.Tensor) -> None:
        rows[name] += type(output) is torch.Tensor  # not a placeholder of the trace

    # The hooks are copied with the model.
    for name, module in model.named_modules():
        if name.endswith(("lm_head", "self_attn", "mlp")):
            on_output(module, partial(count, name))
    method = Gptq(IntQuantizer(4, granularity=PerGroup(32)))
    report = quantize_model(model, method, calibration=[IDS, IDS + 1], progress=False).report
    assert all(row.output_error is not None for row in report.layers)
    # The last layer is down_proj of the last block, which no pass goes beyond.
    expected = {f"model.layers.{i}.{part}": 2 for i in range(3) for part in ("self_attn", "mlp")}
    expected["model.layers.2.mlp"] = 0
    assert {name: rows[name] for name in expected} == expected
    assert rows["lm_head"] == 0
