"""One block of a model, run alone on random tokens: to see what reads what, and whether a change of it changes nothing.

The idea: names such as input_layernorm mean different things in different models; what a block does when it is run
does not depend on them. Blocks are like each other, so the arguments that the model gives to the first one (masks,
positions) fit all: they are caught on the way, the tokens replaced by random ones, and each block can be called alone.
It is run on float64 copies of its tensors: a branch that adds little to the residual, or nearly nothing, then shows.

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
from torch.func import functional_call

from qcourse.layers.quantized_linear import QuantizedLinear

TOKENS = 8
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # narrower ones are codes
SAME = 1e-6  # powers of two change no bit, so what is the same is so to within the order of sums in float64


@dataclass(frozen=True, eq=False)
class Block:
    """A member of a model's longest list of modules, and what to call it with.

    Args:
        name: in the model.
        args, named: its arguments, in which the tokens are random and floats are float64.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """What it puts out (batch, tokens, hidden) with these for its own; None where it cannot work in float64."""
        args, named = copy.deepcopy((self.args, self.named))  # a cache among them would remember
        try:
            output = functional_call(self.module, dict(tensors), args, named, tie_weights=False)
        except RuntimeError:
            return None
        return output[0] if isinstance(output, tuple) else output

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers by their names within it, floats as float64."""
        parameters = self.module.named_parameters(remove_duplicate=False)
        buffers = self.module.named_buffers(remove_duplicate=False)
        return {name: _double(tensor) for name, tensor in (*parameters, *buffers)}

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
            self.run(self.tensors())
        return found

    def takes(self, name: str, keys: Sequence[str], layers: Sequence[str]) -> bool:
        """Whether it puts out the same with a module divided by a scale and the inputs of layers multiplied by it.

        The same: within SAME of what the factor on the inputs does alone, which has to be something.

        Args:
            name: of the module, in the model.
            keys: those of its tensors that have a row for each number of the scale.
            layers: their names in the model.
        """
        old, short = self.tensors(), len(self.name) + 1
        places = [f"{name[short:]}.{key}" for key in keys]
        if not old.keys() >= set(places):
            return False  # made of other tensors
        powers = torch.randint(
            -2, 3, (len(old[places[0]]),), generator=torch.Generator().manual_seed(0)
        )
        scale = torch.exp2(powers.double()).to(old[places[0]].device)
        new = {
            place: old[place] / scale.reshape(-1, *[1] * (old[place].ndim - 1)) for place in places
        }
        before = self.run(old)
        with ExitStack() as hooks:
            for layer in layers:
                module = self.module.get_submodule(layer[short:])
                hooks.enter_context(
                    module.register_forward_pre_hook(lambda layer, args: (args[0] * scale,))
                )
            without, after = self.run(old), self.run(old | new)
        if before is None or without is None or after is None:
            return False
        return bool(0 < (without - before).norm() >= (after - before).norm() / SAME)


def put(module: nn.Module, new: Mapping[str, Tensor]) -> None:
    """Give a module other tensors, by name; what was to be trained still is."""
    for key, value in new.items():
        old = getattr(module, key)
        make = isinstance(old, nn.Parameter) and not isinstance(value, nn.Parameter)
        setattr(
            module, key, nn.Parameter(value, requires_grad=old.requires_grad) if make else value
        )


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
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    embedding = next(
        (module for module in model.modules() if isinstance(module, nn.Embedding)), None
    )
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


def _arguments(
    model: nn.Module, block: nn.Module, ids: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
    args, named = _double(found[0])
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (_random_like(args[0]), *args[1:]), named
    x = named.get("hidden_states")
    return (args, {**named, "hidden_states": _random_like(x)}) if isinstance(x, Tensor) else None


def _random_like(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x)


def _double(value: Any) -> Any:
    """A tensor of floats in float64, also within tuples, lists and dicts; all else as it is."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.dtype in FLOATS else value
    if type(value) in (tuple, list):
        return type(value)(map(_double, value))
    return {key: _double(each) for key, each in value.items()} if type(value) is dict else value
