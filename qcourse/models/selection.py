"""Which linear layers of a model are quantized, and why the others are not.

The idea: by default all but the head, which stays in floats, as the embedding does, in nearly every published result.
Everything about the choice is settled before any work is done: a group size that does not fit layer 100 is refused at
once, with all the layers that it does not fit.

Source: what stays in floats by default is as in GPTQ's and AWQ's published code.

How it differs from ``inspect.linears``: there, all linear layers; here, those that are chosen.
"""

import difflib
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from qcourse.models.inspect import linears
from qcourse.models.report import KeptLayer
from qcourse.numerics.granularity import Granularity

Layers = Collection[str] | Callable[[str, nn.Linear], Any] | None


def choose(
    model: nn.Module, layers: Layers, granularity: Granularity, on_indivisible: str
) -> tuple[dict[str, nn.Linear], list[KeptLayer]]:
    """The layers to quantize by name, and all other linear layers with why not.

    Args:
        model: any module.
        layers: names, a predicate of name and layer, or None for all but the head.
        granularity: has to fit the weights (out, in).
        on_indivisible: "refuse" or "keep" a layer that it does not fit.

    Raises:
        TypeError: layers is a single string.
        ValueError: there is no linear layer, or none remains; a name is not one of a linear layer; granularity does not
            fit a layer, and on_indivisible is "refuse", or is neither of the two.

    >>> from qcourse import PerGroup
    >>> model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    >>> chosen, kept = choose(model, None, PerGroup(4), "keep")
    >>> list(chosen), kept[0].name, kept[0].why[:43]
    (['0'], '1', 'group size=4 does not divide the last axis ')
    """
    if on_indivisible not in ("refuse", "keep"):
        raise ValueError(f"on_indivisible={on_indivisible!r} must be 'refuse' or 'keep'")
    found = linears(model)
    if not found:
        raise ValueError(f"model must have an nn.Linear layer, and this {type(model).__name__} has none")
    why = _unwanted(model, found, layers)
    misfits = {name: _misfit(layer, granularity) for name, layer in found.items() if name not in why}
    misfits = {name: words for name, words in misfits.items() if words}
    if misfits and on_indivisible == "refuse":
        raise ValueError(
            "these layers do not suit the quantizer (on_indivisible='keep' leaves them in floats):\n"
            + "\n".join(f"- {name}: {words}" for name, words in misfits.items())
        )
    why |= misfits
    kept = [KeptLayer(name, _shape(layer), size(layer), why[name]) for name, layer in found.items() if name in why]
    if len(kept) == len(found):
        raise ValueError("no layer is left to quantize:\n" + "\n".join(f"- {each.name}: {each.why}" for each in kept))
    return {name: layer for name, layer in found.items() if name not in why}, kept


def size(layer: nn.Linear) -> int:
    """Bytes of a layer's weight and bias."""
    return layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes)


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _unwanted(model: nn.Module, found: dict[str, nn.Linear], layers: Layers) -> dict[str, str]:
    """Why each linear layer that is not wanted is not."""
    if layers is None:
        return {name: "it is the head" for name, layer in found.items() if _is_head(model, name, layer)}
    if isinstance(layers, str):
        raise TypeError(f"layers must be a list of names or a predicate, got the string {layers!r}: write [{layers!r}]")
    if callable(layers):
        return {name: "not chosen" for name, layer in found.items() if not layers(name, layer)}
    for name in layers:
        if name not in found:
            near = difflib.get_close_matches(str(name), found, cutoff=0) or list(found)[:3]
            raise ValueError(f"layers has {name!r}, which is no linear layer of the model; it has, for example, {near}")
    return {name: "not chosen" for name in found if name not in layers}


def _is_head(model: nn.Module, name: str, layer: nn.Linear) -> bool:
    told = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    shared = any(embedding.weight is layer.weight for embedding in embeddings)
    return layer is told or shared or name.rpartition(".")[2] == "lm_head"


def _misfit(layer: nn.Linear, granularity: Granularity) -> str:
    try:
        granularity.scale_shape(layer.weight.shape)
    except ValueError as error:
        return str(error)
    return ""
