"""Which linear layers of a model are quantized, and why the others are not.

The idea: by default all but the head, which stays in floats, as the embedding does, in nearly every published result.
Everything about the choice is settled before any work is done: a group size that does not fit layer 100 is refused at
once, with all the layers that it does not fit.

Source: what stays in floats by default is as in GPTQ's and AWQ's published code.

How it differs from ``inspect.linears``: there, all linear layers; here, those that are chosen.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qcourse.numerics.granularity import Granularity
from qcourse.recipes.report import KeptLayer, nbytes
from qcourse.trace.linears import linears

Layers = Iterable[str] | Callable[[str, nn.Linear], Any] | None


def choose(
    model: nn.Module, layers: Layers, granularity: Granularity, on_indivisible: str
) -> tuple[dict[str, nn.Linear], list[KeptLayer]]:
    """The layers to quantize by name, and all other linear layers with why not.

    Args:
        model: any module. A layer of a class that computes more than nn.Linear does, or whose weight is used without
            calling it (in nn.MultiheadAttention), is never chosen.
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
        raise ValueError(
            f"model must have an nn.Linear layer, and this {type(model).__name__} has none"
        )
    special = {name: _special(layer) for name, layer in found.items()}
    why = _unwanted(model, found, layers) | {
        name: words for name, words in special.items() if words
    }
    misfits = {
        name: _misfit(layer, granularity) for name, layer in found.items() if name not in why
    }
    misfits = {name: words for name, words in misfits.items() if words}
    if misfits and on_indivisible == "refuse":
        raise ValueError(
            "these layers do not suit the quantizer (on_indivisible='keep' leaves them in floats):\n"
            + "\n".join(f"- {name}: {words}" for name, words in misfits.items())
        )
    why |= misfits
    kept = [
        KeptLayer(name, _shape(layer), nbytes(layer), why[name])
        for name, layer in found.items()
        if name in why
    ]
    if len(kept) == len(found):
        raise ValueError(
            "no layer is left to quantize:\n"
            + "\n".join(f"- {each.name}: {each.why}" for each in kept)
        )
    return {name: layer for name, layer in found.items() if name not in why}, kept


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _unwanted(model: nn.Module, found: dict[str, nn.Linear], layers: Layers) -> dict[str, str]:
    """Why each linear layer that is not wanted is not."""
    if layers is None:
        return dict.fromkeys(_heads(model, found), "it is the head")
    if isinstance(layers, str):
        raise TypeError(
            f"layers must be a list of names or a predicate, got the string {layers!r}: write [{layers!r}]"
        )
    if callable(layers):
        return {name: "not chosen" for name, layer in found.items() if not layers(name, layer)}
    names = list(layers)
    for name in names:
        if name not in found:
            near = difflib.get_close_matches(str(name), found, cutoff=0) or list(found)[:3]
            raise ValueError(
                f"layers has {name!r}, which is no linear layer of the model; it has, for example, {near}"
            )
    return dict.fromkeys(found.keys() - names, "not chosen")


def _heads(model: nn.Module, found: Mapping[str, nn.Linear]) -> list[str]:
    told = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, layer in found.items()
        if layer is told or layer.weight in embeddings or name.rpartition(".")[2] == "lm_head"
    ]


def _special(layer: nn.Linear) -> str:
    if type(layer).forward is not nn.Linear.forward:
        return f"a {type(layer).__name__} computes more than a linear layer"
    return (
        "its weight is used without calling it"
        if isinstance(layer, NonDynamicallyQuantizableLinear)
        else ""
    )


def _misfit(layer: nn.Linear, granularity: Granularity) -> str:
    try:
        granularity.scale_shape(layer.weight.shape)
    except ValueError as error:
        return str(error)
    return ""
