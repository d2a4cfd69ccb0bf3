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


class Copy:
    """A copy of a model; ``model`` is it, once ``replace`` or ``own`` was called for each of the layers named.

    Args:
        model: it is not changed.
        layers: those of its linear layers that will be replaced, by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        weights = {id(layer.weight): layer.weight for layer in layers.values()}
        self._holder = nn.Module()  # so that the model has a parent too, should it be itself a layer
        self._holder.model = copy.deepcopy(model, {**weights})
        found = ((name, self.model.get_submodule(name)) for name in layers)
        self.pending = {name: layer for name, layer in found if isinstance(layer, nn.Linear)}
        self.untied: dict[str, list[str]] = {}  # layer -> the parameters that it shared its weight with
        own: dict[int, nn.Parameter] = {}
        names = {id(layer.weight): name for name, layer in layers.items()}
        for path, module in self.model.named_modules():
            for key, weight in module._parameters.items():
                if id(weight) in weights and weight is not None and module not in self.pending.values():
                    module._parameters[key] = own.setdefault(id(weight), _owned(weight))
                    self.untied.setdefault(names[id(weight)], []).append(f"{path}.{key}")

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self._holder.get_submodule("model")

    def replace(self, name: str, new: nn.Module) -> None:
        """Put another module in a layer's place, under all the names that it has."""
        old = self.pending.pop(name)
        for parent in list(self._holder.modules()):
            for key, child in parent._modules.items():
                if child is old:
                    parent._modules[key] = new

    def own(self, name: str) -> None:
        """Let a layer stay, with a weight of its own."""
        layer = self.pending.pop(name)
        layer.weight = _owned(layer.weight)


def _owned(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
