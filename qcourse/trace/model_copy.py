"""A copy of a model in which layers will be replaced, made without copying their weights.

``copy.deepcopy`` takes a memo of what is copied already. The memo maps the weights of the layers to
be replaced to themselves, so only the rest is copied. The copy works at once, because its layers
multiply with the original's weights until they are replaced. `linears.map_weights` holds two whole
models in memory, this one and a half.
"""

import copy
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

Place = tuple[nn.Module, str]  # a parent module, and the key of a child or parameter in it


class ModelCopy:
    """A copy of a model; it is complete once each layer was given to ``replace`` or ``own``.

    `pending` has the copy's layers that remain, by name. `untied` has, per layer, the names of the
    other parameters that shared its weight.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]) -> None:
        weights = {name: layer.weight for name, layer in layers.items()}

        # The holder gives the model itself a parent, in case the model is a layer to be replaced.
        self._holder = nn.Module()
        self._holder.model = _copied_without(model, weights.values())

        self.pending = _layers_named(self.model, layers)
        self._places = _places_of(self.pending.values(), self._holder)

        # Other modules that use these weights get weights of the copy's own at once.
        users = _users_of(weights.values(), self._holder)
        self._own_weights: dict[Tensor, nn.Parameter] = {}
        self._give_own_weights(users)
        self.untied = _other_users(weights, users)

    @property
    def model(self) -> nn.Module:
        """The copy."""
        return self._holder.get_submodule("model")

    def replace(self, name: str, new: nn.Module) -> None:
        """Put another module in a layer's place, under each of its names."""
        layer = self.pending.pop(name)
        for parent, key in self._places[layer]:
            parent._modules[key] = new

    def own(self, name: str) -> None:
        """Keep a layer, with a weight of the copy's own."""
        layer = self.pending.pop(name)
        layer.weight = self._own(layer.weight)

    def _give_own_weights(self, users: Mapping[Tensor, list[tuple[str, Place]]]) -> None:
        for weight, found in users.items():
            for _, (module, key) in found:
                if module not in self._places:
                    module._parameters[key] = self._own(weight)

    def _own(self, weight: Tensor) -> nn.Parameter:
        # One new parameter per weight, however many modules use it.
        if weight not in self._own_weights:
            values = weight.detach().clone()
            own = nn.Parameter(values, requires_grad=weight.requires_grad)
            self._own_weights[weight] = own
        return self._own_weights[weight]


def _copied_without(model: nn.Module, weights: Iterable[Tensor]) -> nn.Module:
    # The memo says that the copy of each weight is the weight.
    memo = {id(weight): weight for weight in weights}
    return copy.deepcopy(model, memo)


def _layers_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            found[name] = layer
    return found


def _places_of(layers: Iterable[nn.Module], root: nn.Module) -> dict[nn.Module, list[Place]]:
    places: dict[nn.Module, list[Place]] = {layer: [] for layer in layers}
    # A layer that the model uses twice has several parents or keys.
    for parent in root.modules():
        for key, child in parent._modules.items():
            if child in places:
                places[child].append((parent, key))
    return places


def _users_of(
    weights: Iterable[Tensor], holder: nn.Module
) -> dict[Tensor, list[tuple[str, Place]]]:
    users: dict[Tensor, list[tuple[str, Place]]] = {weight: [] for weight in weights}
    # Their names within the model, and their places, so that they can be replaced.
    for path, module in holder.named_modules():
        for key, parameter in module._parameters.items():
            if parameter in users:
                name = f"{path}.{key}".removeprefix("model.")
                users[parameter].append((name, (module, key)))
    return users


def _other_users(
    weights: Mapping[str, Tensor], users: Mapping[Tensor, list[tuple[str, Place]]]
) -> dict[str, list[str]]:
    others = {}
    for layer, weight in weights.items():
        own_name = f"{layer}.weight".removeprefix(".")
        others[layer] = [name for name, _ in users[weight] if name != own_name]
    return others
