"""A copy of a model in which layers are to be replaced, made without copying what they weigh.

The idea: ``copy.deepcopy`` takes a memo of what has been copied already. Told that the weights of the layers to be
replaced have been, as themselves, it copies all the rest, and the copy works at once: until they are replaced, its
layers multiply with the original's weights.

Source: Python's ``copy`` module; nothing here is about quantization.

How it differs from ``inspect.map_weights``: that holds two whole models; this one and what is new in the other.
"""

import copy
from collections.abc import Mapping

from torch import Tensor, nn


class ModelCopy:
    """A copy of a model; ``model`` is it, once ``replace`` or ``own`` was called for each of the layers named.

    Args:
        model: it is not changed.
        layers: those of its linear layers that will be replaced, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        weights = {name: layer.weight for name, layer in layers.items()}
        self._holder = (
            nn.Module()
        )  # so that the model has a parent too, should it be itself a layer
        self._holder.model = copy.deepcopy(
            model, {id(weight): weight for weight in weights.values()}
        )
        found = ((name, self.model.get_submodule(name)) for name in layers)
        self.pending = {name: layer for name, layer in found if isinstance(layer, nn.Linear)}
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {
            layer: [] for layer in self.pending.values()
        }
        self._own: dict[Tensor, nn.Parameter] = {}  # for a weight of the original, the copy's
        users: dict[Tensor, list[str]] = {weight: [] for weight in weights.values()}
        for path, module in self._holder.named_modules():
            for key, child in module._modules.items():
                if child in self._places:
                    self._places[child].append((module, key))
            for key, weight in module._parameters.items():
                if weight in users:
                    users[weight].append(f"{path}.{key}".removeprefix("model."))
                    if module not in self._places:
                        module._parameters[key] = self._owned(weight)
        # layer -> the parameters that it shared its weight with
        self.untied = {
            name: [user for user in users[w] if user != _weight(name)]
            for name, w in weights.items()
        }

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self._holder.get_submodule("model")

    def replace(self, name: str, new: nn.Module) -> None:
        """Put another module in a layer's place, under all the names that it has."""
        for parent, key in self._places[self.pending.pop(name)]:
            parent._modules[key] = new

    def own(self, name: str) -> None:
        """Let a layer stay, with a weight of the copy's own."""
        layer = self.pending.pop(name)
        layer.weight = self._owned(layer.weight)

    def _owned(self, weight: Tensor) -> nn.Parameter:
        if weight not in self._own:
            self._own[weight] = nn.Parameter(
                weight.detach().clone(), requires_grad=weight.requires_grad
            )
        return self._own[weight]


def _weight(layer: str) -> str:
    return f"{layer}.weight".removeprefix(".")
