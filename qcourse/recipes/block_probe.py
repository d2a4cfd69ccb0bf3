"""Run one block of a model alone on random tokens, to test whether a change keeps its function.

Names such as input_layernorm mean different things in different models, but the output of a block
does not depend on names. The arguments of the first block (`block_arguments.py`) suit every block,
so each can run alone. It runs in float64, so that a branch that adds little to the residual stream
still shows. `trace/replay.py` runs a model on calibration data; this needs none.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.recipes.block_arguments import arguments_of, to_double
from qcourse.trace.hooks import on_input, on_output

TOKENS = 8
SAME = 1e-6  # scaling by powers of two is exact, so only the order of sums in float64 differs


@dataclass(frozen=True, eq=False)
class Block:
    """A member of a model's longest list of modules, by its full name, and arguments for it."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return its output (batch, tokens, hidden) with these tensors; None if float64 fails."""
        # A copy, because a cache among the arguments would remember this call.
        args, named = copy.deepcopy((self.args, self.named))
        try:
            output = functional_call(self.module, dict(tensors), args, named, tie_weights=False)
        except RuntimeError:
            return None
        return output[0] if isinstance(output, tuple) else output

    def tensors(self) -> dict[str, Tensor]:
        """Return its parameters and buffers by their names within it, floats as float64."""
        tensors: dict[str, Tensor] = {}
        # A tensor with two names needs both, because both are passed to the block.
        tensors |= dict(self.module.named_parameters(remove_duplicate=False))
        tensors |= dict(self.module.named_buffers(remove_duplicate=False))
        return {name: to_double(tensor) for name, tensor in tensors.items()}

    def readers(self) -> dict[str, list[str]]:
        """Return, for each norm, the linear layers that read its output; by their full names."""
        outputs: list[tuple[Tensor, str]] = []  # of each norm, and its name
        found: dict[str, list[str]] = {}

        def note_output(norm: str, output: Tensor) -> None:
            outputs.append((output, norm))

        def note_input(layer: str, x: Tensor) -> None:
            # The very same tensor object: a copy would be another module's output.
            for output, norm in outputs:
                if output is x:
                    found.setdefault(norm, []).append(layer)

        with ExitStack() as hooks:
            for short_name, module in self.module.named_modules():
                name = f"{self.name}.{short_name}"
                if isinstance(module, nn.Linear | QuantizedLinear):
                    hooks.enter_context(on_input(module, partial(note_input, name)))
                elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
                    # A weight with one axis is the gain of a norm.
                    hooks.enter_context(on_output(module, partial(note_output, name)))
            self.run(self.tensors())
        return found

    def takes(self, name: str, keys: Sequence[str], layers: Sequence[str]) -> bool:
        """Return whether the block's output is unchanged when module `name` is divided by a random
        scale and the inputs of `layers` are multiplied by it.

        `keys` are the tensors of the module that have one row per number of the scale. All names
        are full.
        """
        old = self.tensors()
        prefix = f"{self.name}."
        # functional_call takes names within the block.
        places = [f"{name.removeprefix(prefix)}.{key}" for key in keys]
        if not old.keys() >= set(places):
            return False  # the module has other tensors than these
        first = old[places[0]]
        scale = _random_powers_of_two(len(first)).to(first.device)
        new = dict(old)
        for place in places:
            new[place] = old[place] / _per_row(scale, old[place])

        before = self.run(old)
        # The block runs with multiplied inputs, first alone, then with the divided module as well.
        with ExitStack() as hooks:
            for layer in layers:
                module = self.module.get_submodule(layer.removeprefix(prefix))
                hooks.enter_context(_multiplied_input(module, scale))
            only_multiplied = self.run(old)
            both = self.run(new)
        if before is None or only_multiplied is None or both is None:
            return False
        # If the multiplied inputs alone change nothing, the test would show nothing.
        effect = (only_multiplied - before).norm()
        difference = (both - before).norm()
        return bool(0 < effect >= difference / SAME)


def put(module: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Replace tensors of a module, by name; parameters keep whether they need gradients."""
    for key, value in new.items():
        old = getattr(module, key)
        if isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(module, key, value)


def blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a model that runs on token ids alone; none of any other model.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> first, second = blocks(random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0))
    >>> second.name, second.readers()["model.layers.1.post_attention_layernorm"]
    ('model.layers.1', ['model.layers.1.mlp.gate_proj', 'model.layers.1.mlp.up_proj'])
    >>> blocks(nn.Linear(2, 2))
    []
    """
    # The longest list of modules holds the blocks.
    path = ""
    chain = nn.ModuleList()
    embeddings = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(chain):
            path = name
            chain = module
        elif isinstance(module, nn.Embedding):
            embeddings.append(module)
    if not embeddings or not len(chain):
        return []

    # Different ids, so that no two tokens are equal.
    vocabulary = embeddings[0].num_embeddings
    ids = torch.arange(TOKENS, device=embeddings[0].weight.device)[None] % vocabulary
    arguments = arguments_of(model, chain[0], ids)
    if arguments is None:
        return []
    args, named = arguments
    names = [f"{path}.{number}".removeprefix(".") for number in range(len(chain))]
    return [Block(name, block, args, named) for name, block in zip(names, chain, strict=True)]


def _random_powers_of_two(count: int) -> Tensor:
    """From 1/4 to 4, in float64; scaling by them changes no mantissa."""
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-2, 3, (count,), generator=generator)
    return torch.exp2(exponents.double())


def _per_row(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (tensor.ndim - 1))  # (rows, 1, ...)


def _multiplied_input(module: nn.Module, scale: Tensor) -> Any:
    """Multiply the input of a layer, in a with statement."""

    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * scale,)

    return module.register_forward_pre_hook(multiply)
