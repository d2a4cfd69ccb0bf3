"""Choose the linear layers of a model to quantize, with the reason for every other one.

By default all but the head, which stays in floats in nearly every published result (as in the code
of GPTQ and AWQ). The choice is complete before any work starts: a group size that does not divide
the width of layer 100 is refused at once, with all the layers that it does not fit.
`linears.linears` lists all linear layers; this chooses among them.
"""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qcourse.numerics.granularity import Granularity
from qcourse.recipes.report import KeptLayer, kept_row
from qcourse.trace.linears import linears

Layers = Iterable[str] | Callable[[str, nn.Linear], Any] | None


def choose(
    model: nn.Module, layers: Layers, granularity: Granularity, on_indivisible: str
) -> tuple[dict[str, nn.Linear], list[KeptLayer]]:
    """Return the layers to quantize, by name, and all other linear layers with a reason.

    `layers` are names, a predicate of name and layer, or None for all but the head. A layer that
    computes more than nn.Linear, or whose weight is used without calling it (in
    nn.MultiheadAttention), is never chosen. `on_indivisible` is "refuse" or "keep", for layers that
    the granularity does not fit. Raises TypeError for a single string, ValueError for an unknown
    name, a misfit, or no layer.

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

    # Only a layer that would otherwise be chosen can be refused for its width.
    reasons = _reasons_against(model, found, layers)
    wanted = {name: layer for name, layer in found.items() if name not in reasons}
    misfits = _misfits(wanted, granularity)
    if misfits and on_indivisible == "refuse":
        raise ValueError(
            "these layers do not suit the quantizer"
            " (on_indivisible='keep' leaves them in floats):\n" + _listed(misfits)
        )
    reasons |= misfits

    chosen = {name: layer for name, layer in found.items() if name not in reasons}
    kept = [kept_row(name, found[name], reasons[name]) for name in found if name in reasons]
    if not chosen:
        in_order = {each.name: each.why for each in kept}
        raise ValueError("no layer is left to quantize:\n" + _listed(in_order))
    return chosen, kept


def _listed(reasons: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {reason}" for name, reason in reasons.items())


def _reasons_against(
    model: nn.Module, found: dict[str, nn.Linear], layers: Layers
) -> dict[str, str]:
    # A layer that must not be quantized has its own reason, even if it was named.
    reasons = _unwanted(model, found, layers)
    for name, layer in found.items():
        if type(layer).forward is not nn.Linear.forward:
            reasons[name] = f"a {type(layer).__name__} computes more than a linear layer"
        elif isinstance(layer, NonDynamicallyQuantizableLinear):
            reasons[name] = "its weight is used without calling it"
    return reasons


def _unwanted(model: nn.Module, found: dict[str, nn.Linear], layers: Layers) -> dict[str, str]:
    if layers is None:
        return dict.fromkeys(_heads(model, found), "it is the head")
    if isinstance(layers, str):
        raise TypeError(
            f"layers must be a list of names or a predicate, got the string {layers!r}:"
            f" write [{layers!r}]"
        )
    if callable(layers):
        return {name: "not chosen" for name, layer in found.items() if not layers(name, layer)}
    names = list(layers)
    for name in names:
        if name not in found:
            # Suggest the names that are spelled most alike.
            near = difflib.get_close_matches(str(name), found, cutoff=0) or list(found)[:3]
            raise ValueError(
                f"layers has {name!r}, which is no linear layer of the model;"
                f" it has, for example, {near}"
            )
    return dict.fromkeys(found.keys() - names, "not chosen")


def _heads(model: nn.Module, found: dict[str, nn.Linear]) -> list[str]:
    declared = None
    if hasattr(model, "get_output_embeddings"):
        declared = model.get_output_embeddings()  # type: ignore[operator]
    # A head may be tied to an embedding, or be known by its name.
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    heads = []
    for name, layer in found.items():
        is_named_head = name.rpartition(".")[2] == "lm_head"
        if layer is declared or layer.weight in embeddings or is_named_head:
            heads.append(name)
    return heads


def _misfits(layers: dict[str, nn.Linear], granularity: Granularity) -> dict[str, str]:
    misfits = {}
    for name, layer in layers.items():
        try:
            granularity.scale_shape(layer.weight.shape)
        except ValueError as error:
            misfits[name] = str(error)
    return misfits
