"""One block of a model, run alone on random tokens: to see what reads what, and whether a change of it changes nothing.

The idea: names such as input_layernorm mean different things in different models; what a block does when it is run
does not depend on them. Blocks are like each other, so the arguments that the model gives to the first one (masks,
positions) fit all: they are caught on the way, the tokens replaced by random ones, and each block can be called alone.

Source: none.

How it differs from ``replay.py``: that runs a model on calibration data; this needs none.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcourse.models.quantized_linear import QuantizedLinear

TOKENS = 8


@dataclass(frozen=True, eq=False)
class Block:
    """A member of a model's longest list of modules, and what to call it with.

    Args:
        name: in the model.
        args, named: its arguments, in which the tokens are random.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]

    def run(self) -> Tensor:
        """What it puts out (batch, tokens, hidden); always the same while the block is."""
        args, named = copy.deepcopy((self.args, self.named))  # a cache among them would remember
        output = self.module(*args, **named)
        return output[0] if isinstance(output, tuple) else output

    def readers(self) -> dict[str, list[str]]:
        """For each norm whose output is the input of linear layers, these layers; names are the model's."""
        made: list[tuple[Tensor, str]] = []
        found: dict[str, list[str]] = {}

        def read(name: str, x: Tensor) -> None:
            for output, norm in made:
                if output is x:
                    found.setdefault(norm, []).append(name)

        with ExitStack() as hooks:
            for short, module in self.module.named_modules():
                name = f"{self.name}.{short}"
                if isinstance(module, nn.Linear | QuantizedLinear):
                    look = lambda module, args, name=name: read(name, args[0])  # noqa: E731
                    hooks.enter_context(module.register_forward_pre_hook(look))
                elif getattr(getattr(module, "weight", None), "ndim", 0) == 1:
                    keep = lambda module, args, output, name=name: made.append((output, name))  # noqa: E731
                    hooks.enter_context(module.register_forward_hook(keep))
            self.run()
        return found

    def is_same(self, module: nn.Module, new: Mapping[str, Tensor], layers: Sequence[nn.Module], scale: Tensor) -> bool:
        """Whether it puts out the same with new tensors in one of its modules and the inputs of layers times scale.

        The same: within a thousandth of what the factor on the inputs does alone.
        """
        old = {key: getattr(module, key) for key in new}
        before = self.run()
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.register_forward_pre_hook(lambda layer, args: (args[0] * scale.to(args[0]),))
                stack.enter_context(hook)
            without = self.run()
            stack.callback(put, module, old)
            put(module, new)
            return bool((self.run() - before).norm() <= 1e-3 * (without - before).norm())


def put(module: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Give a module other tensors, by name; what was to be trained still is."""
    for key, value in new.items():
        old = getattr(module, key)
        make = isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter)
        setattr(module, key, nn.Parameter(value, requires_grad=old.requires_grad) if make else value)


def blocks(model: nn.Module) -> list[Block]:
    """The blocks of a model that runs on token ids alone; none of any other.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> first, second = blocks(random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0))
    >>> second.name, second.readers()["model.layers.1.post_attention_layernorm"]
    ('model.layers.1', ['model.layers.1.mlp.gate_proj', 'model.layers.1.mlp.up_proj'])
    >>> blocks(nn.Linear(2, 2))
    []
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    embedding = next((module for module in model.modules() if isinstance(module, nn.Embedding)), None)
    path, chain = max(lists, key=lambda each: len(each[1]), default=("", nn.ModuleList()))
    if embedding is None or not len(chain):
        return []
    ids = torch.arange(TOKENS, device=embedding.weight.device)[None] % embedding.num_embeddings
    caught = _arguments(model, chain[0], ids)
    if caught is None:
        return []
    return [Block(f"{path}.{i}".removeprefix("."), block, *caught) for i, block in enumerate(chain)]


class _Caught(Exception):  # noqa: N818  (nothing is wrong)
    """Ends the forward pass that brought the arguments."""


def _arguments(model: nn.Module, block: nn.Module, ids: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """How the model calls a block, the tokens replaced by random ones; None where it does not get there on ids."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def catch(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((args, named))
        raise _Caught

    with block.register_forward_pre_hook(catch, with_kwargs=True):
        try:
            model(ids)
        except _Caught:
            pass
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):
            return None
    if not found:
        return None
    args, named = found[0]
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (_random_like(args[0]), *args[1:]), named
    x = named.get("hidden_states")
    return (args, {**named, "hidden_states": _random_like(x)}) if isinstance(x, Tensor) else None


def _random_like(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x)
