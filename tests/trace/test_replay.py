"""A calibrated method observes what the half-quantized model computes, chain of blocks or not."""

import itertools
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM, Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from qcourse import IntQuantizer, fake_quantize
from qcourse.models.generate import generate
from qcourse.models.llama import random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.trace.linears import linears, record_inputs
from qcourse.trace.replay import Replay

SIZES = LlamaConfig(96, 64, 96, 3, 4, 2)
IDS = torch.arange(14).reshape(2, 7)


@dataclass(frozen=True)
class Rows:
    """Keeps all that it observes."""

    quantizer: IntQuantizer
    calibrated: bool = True

    def observe(self, seen: Tensor | None, x: Tensor) -> Tensor:
        return x.clone() if seen is None else torch.cat([seen, x])

    def quantize(self, weights: Mapping[str, Tensor], seen: Any) -> Mapping[str, Any]:
        raise NotImplementedError


def forward(model: nn.Module, batch: Any) -> object:
    return model(batch)


@torch.no_grad()
def replayed(
    model: nn.Module, batches: list[Any], run: Callable[[nn.Module, Any], object] = forward
) -> Replay:
    """Round each group harshly; each must observe what a whole run of a copy records then."""
    model.eval()
    replay = Replay.traced(model, linears(model), batches, run)
    shown = []
    for names, seen in replay.in_order(Rows(IntQuantizer(4))):
        copied = deepcopy(model)
        inputs = record_inputs(
            copied, lambda copied=copied: [run(copied, batch) for batch in batches]
        )
        for name in names:
            torch.testing.assert_close(seen, inputs[name], rtol=1e-4, atol=1e-4)
            weight = linears(model)[name].weight
            weight.copy_(fake_quantize(weight, 2))
        shown += names
    assert sorted(shown) == sorted(inputs)
    return replay


class Block(nn.Module):
    """Two layers, so that a block is run more than once for itself."""

    def __init__(self, size: int = 32, out: int = 32) -> None:
        super().__init__()
        self.one = nn.Linear(size, 32)
        self.two = nn.Linear(32, out)

    def forward(self, x: Tensor, more: Tensor | float = 0.0) -> Tensor:
        return self.two(torch.tanh(self.one(x) + more))


class Chain(nn.Module):
    """Four blocks, each of which reads the one before; subclasses do not keep to that."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


class Gathering(Chain):
    """The last layer reads all blocks."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x := layer(x) for layer in self.layers]
        return self.out(torch.stack(outputs).mean(0))


class Skipping(Chain):
    """Each block reads the block before the last as well."""

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for layer in self.layers:
            before, x = x, layer(x + before)
        return self.out(x)


class Beside(Chain):
    """What the first block puts out reaches the others as a second argument."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x, first)
        return self.out(x)


class Disordered(Chain):
    """Long inputs take the blocks in another order."""

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 2, 1, 3) if len(x) > 4 else range(4):
            x = self.layers[i](x)
        return self.out(x)


class Leaving(Chain):
    """Short inputs leave after two blocks."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: 4 if len(x) > 4 else 2]:
            x = layer(x)
        return self.out(x)


class Detour(Chain):
    """In the first block, short inputs are spared one layer."""

    class First(Block):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            y = self.one(x)
            return self.two(torch.tanh(self.more(y) if len(x) > 4 else y))

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = self.First()


class InPlace(Chain):
    """Blocks write into what they are given."""

    class Adding(Block):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.add_(super().forward(x)).mul_(0.7)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Adding() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clone())


class Widths(Chain):
    """Blocks of other widths, with norms that would notice."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [32, 48, 64, 24, 32]
        self.layers = nn.ModuleList(Block(*pair) for pair in itertools.pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(layer(x))
        return self.out(x)


class Bare(Chain):
    """The blocks are the layers themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))


class Named(Chain):
    """Passes inputs by name."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x=layer.one(input=x))
        return self.out(input=x)


class Comparing(Chain):
    """The last layer reads where the first block's output is positive."""

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x)
        return self.out(x + (first > 0))


class Filing(Chain):
    """The last layer reads all blocks, from one tensor that their outputs are written into."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = torch.zeros(len(self.layers), *x.shape)
        for i, layer in enumerate(self.layers):
            x = layer(x)
            outputs[i] = x
        return self.out(outputs.mean(0))


class Deciding(Chain):
    """Between two blocks a number decides, and NumPy takes part."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.mean() > 0:
                x = x / float(np.abs(x.detach().numpy()).max())
        return self.out(x)


LONG = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
SHORT = torch.ones(3, 32)

CHAINS = (Chain, Detour, InPlace, Widths, Named)
NO_CHAINS = (Gathering, Skipping, Beside, Disordered, Bare, Comparing, Filing, Deciding)


@pytest.mark.parametrize(
    "batches", [[LONG, SHORT], [SHORT, LONG]], ids=["long first", "short first"]
)
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(
    "kind",
    [*CHAINS, *NO_CHAINS, Leaving],
)
def test_whatever_a_model_reads_it_is_right(
    kind: type[Chain], passes: int, batches: list[Tensor]
) -> None:
    run = lambda model, x: [model(x / (i + 1)) for i in range(passes)]  # noqa: E731
    replay = replayed(kind(), batches, run)
    # Whether Leaving is a chain depends on which input comes first. A single pass needs no chain.
    if kind is not Leaving and passes > 1:
        assert len(replay.blocks) == (4 if kind in CHAINS else 0)


def llamas() -> tuple[nn.Module, nn.Module]:
    ours = random_llama(SIZES, seed=0).requires_grad_(False)
    for layer in linears(ours).values():
        layer.weight *= 5
    theirs = LlamaForCausalLM(TheirConfig(**SIZES.to_transformers()))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "transformers"])
def test_a_run_that_writes_text_with_a_cache(theirs: bool) -> None:
    model = llamas()[theirs]
    replay = replayed(model, [IDS[0], IDS[1]], lambda model, ids: generate(model, ids, 3))
    assert not replay.blocks
    assert len(replayed(model, [IDS, IDS[:1]]).blocks) == 3  # without, it is a chain


def test_a_model_of_transformers_whose_head_weighs_all_blocks() -> None:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    convolutions = {
        "conv_dim": (32, 32),
        "conv_stride": (5, 2),
        "conv_kernel": (10, 3),
        "num_feat_extract_layers": 2,
    }
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    config = Wav2Vec2Config(
        **sizes, **convolutions, **positions, use_weighted_layer_sum=True, classifier_proj_size=16
    )
    model = Wav2Vec2ForSequenceClassification(config)
    batches = [torch.randn(2, 600)]
    replayed(model, batches)  # a single pass needs no chain
    assert not replayed(model, batches, lambda model, x: [model(x), model(x)]).blocks
