"""Models whose activations are rotated, and which compute what they did: ready for a grid that channels share.

The idea: in a Llama the rotation of the residual stream disappears in the weights around it (``rotated_weights.py``)
and is free. What enters ``down`` is a product, silu(gate) * up, which nothing before it can rotate: there a fast
Hadamard transform is put in front.

A post-norm model such as MiniLM has LayerNorms with gains in the stream itself: nothing can be absorbed, and each layer
rotates its own input at run time (``rotate_at_run_time``), a fast transform before each product.

Source: Ashkboos et al., "QuaRot" (NeurIPS 2024), section 4.

How it differs from ``fold.py``: there a scale for each channel moves between two layers; here all layers change at
once.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from qcourse.methods.hadamard import check_size
from qcourse.methods.rotation import Rotation, check_orthogonal
from qcourse.models.llama_config import LlamaConfig
from qcourse.numerics.chunks import wide
from qcourse.numerics.granularity import PerTensor
from qcourse.recipes.block_probe import TOKENS, put
from qcourse.recipes.rotated_weights import Turn, places, rotated_weights, unfit
from qcourse.recipes.selection import Layers, choose
from qcourse.trace.model_copy import ModelCopy


@dataclass(frozen=True)
class RotationReport:
    """What was done to which module, by name.

    Args:
        fused: their weights hold the rotation, which costs nothing at run time.
        at_run_time: these layers rotate their input at each call.
        left: what stays as it was, and why; all of a model under the name "".
    """

    fused: tuple[str, ...] = ()
    at_run_time: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        """Counts, then what was left."""
        lines = [
            f"{len(self.fused)} modules hold the rotation, {len(self.at_run_time)} layers rotate at run time"
        ]
        return "\n".join(
            [
                *lines,
                *(f"{name or 'the model'} is left as it was: {why}" for name, why in self.left),
            ]
        )


class RotatedModel(NamedTuple):
    """A model and what was done; the very model that was given where nothing could be."""

    model: nn.Module
    report: RotationReport


@torch.no_grad()
def rotate_model(
    model: nn.Module,
    rotation: Shaped[Tensor, "..."] | None = None,
    *,
    seed: int = 0,
    heads: bool = True,
    down: bool = True,
) -> RotatedModel:
    """A copy of a Llama with its residual stream rotated, x -> x Q, whose outputs are the same but for rounding.

    Args:
        model: ours, or transformers' with the same names (Llama, Mistral, Qwen2); not changed. Names are not enough: if
            the rotated model answers otherwise on a few tokens, the model is left.
        rotation: Q, orthogonal (hidden, hidden); by default a random Hadamard matrix.
        seed: of its signs.
        heads: whether v's outputs and o's inputs are rotated within each head, by a Hadamard matrix.
        down: whether what enters down_proj is rotated, at run time: it becomes nn.Sequential(Rotation, nn.Linear).

    Returns:
        The new model and the report; where a norm cannot give its gain away, the old one and why.

    Raises:
        TypeError: rotation is no floating-point tensor.
        ValueError: rotation is not orthogonal, or of another width; there is no Hadamard matrix for a width that needs
            one (the message says which argument avoids it).

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0).eval()
    >>> rotated, report = rotate_model(model)
    >>> print(report)
    21 modules hold the rotation, 2 layers rotate at run time
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> torch.allclose(rotated(ids), model(ids), atol=1e-5)
    True
    """
    why = unfit(model)
    if why:
        return RotatedModel(model, RotationReport(left=(("", why),)))
    turn = _turn(model, rotation, seed)
    for place in places(model):
        layer: Any = model.get_submodule(place)
        if heads:
            _check_width(layer.self_attn.head_dim, "a head: give heads=False")
        if down:
            _check_width(layer.mlp.down_proj.in_features, "down_proj: give down=False")
    weights = rotated_weights(model, turn, heads=heads)
    new = copy.deepcopy(
        model, {id(old): old for old in map(model.get_parameter, weights)}
    )  # all but these
    _say_untied(new)
    for path, _, key in (name.rpartition(".") for name in weights):
        put(new.get_submodule(path), {key: weights[f"{path}.{key}"]})
    at_run_time = tuple(_rotate_down(new)) if down else ()
    if not _same(model, new):
        why = "rotated, it answers otherwise: it computes more than a Llama does"
        return RotatedModel(model, RotationReport(left=(("", why),)))
    fused = dict.fromkeys(name.rpartition(".")[0] for name in weights)
    return RotatedModel(new, RotationReport(tuple(fused), at_run_time))


def rotate_at_run_time(model: nn.Module, *, seed: int = 0, layers: Layers = None) -> RotatedModel:
    """A copy of any model in which linear layers are nn.Sequential(Rotation, nn.Linear), with w Q for w.

    Args:
        model: not changed.
        seed: of the signs, the same for all layers of one width: those that read the same input rotate it alike.
        layers: as in ``quantize_model``; by default all but the head.

    Returns:
        The new model, and the report: layers of a width without a Hadamard matrix stay as they were.

    Raises:
        ValueError: as ``quantize_model`` does where no layer is left; none that is chosen has a width that fits.

    >>> model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 8))
    >>> rotated, report = rotate_at_run_time(model)
    >>> report.at_run_time, [name for name, why in report.left]
    (('0',), ['1'])
    >>> x = torch.randn(5, 12)
    >>> torch.allclose(rotated(x), model(x), atol=1e-5)
    True
    """
    chosen, kept = choose(model, layers, PerTensor(), "keep")
    misfits = {
        name: words for name, layer in chosen.items() if (words := _misfit(layer.in_features))
    }
    fits = {name: layer for name, layer in chosen.items() if name not in misfits}
    if not fits:
        raise ValueError(
            "no layer can be rotated:\n"
            + "\n".join(f"- {name}: {why}" for name, why in misfits.items())
        )
    work = ModelCopy(model, fits)
    for name, layer in fits.items():
        work.replace(name, _with_rotation(layer, Rotation(layer.in_features, seed=seed)))
    left = *((each.name, each.why) for each in kept), *misfits.items()
    return RotatedModel(work.model, RotationReport(at_run_time=tuple(fits), left=left))


def _rotate_down(model: nn.Module) -> Iterator[str]:
    for name in (f"{place}.mlp.down_proj" for place in places(model)):
        old: Any = model.get_submodule(name)
        model.set_submodule(name, _with_rotation(old, Rotation(old.in_features)))
        yield name


def _with_rotation(layer: nn.Linear, rotation: Rotation) -> nn.Sequential:
    """The rotation and then a layer with w Q, of weights of its own."""
    w = layer.weight.detach()
    with torch.device("meta"):
        new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    turned = rotation.to(w.device)(w.to(wide(w.dtype))).to(w.dtype)
    new.weight = nn.Parameter(turned, layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return nn.Sequential(rotation, new).train(layer.training)


def _turn(model: nn.Module, rotation: Tensor | None, seed: int) -> Turn:
    """x -> x Q of the residual stream."""
    weight = model.get_parameter("model.embed_tokens.weight")
    hidden = weight.shape[1]
    if rotation is None:
        _check_width(hidden, "the residual stream: give a matrix by rotation=")
        return Rotation(hidden, seed=seed).to(weight.device)
    check_orthogonal(rotation, "rotation")
    if rotation.shape != (hidden, hidden):
        raise ValueError(
            f"rotation of shape {tuple(rotation.shape)} must be {(hidden, hidden)}, the residual stream's"
        )
    q = rotation.to(weight.device)
    return lambda x: x @ q.to(x.dtype)


def _check_width(n: int, what: str) -> None:
    if words := _misfit(n):
        raise ValueError(f"{what} ({words})")


def _misfit(n: int) -> str:
    try:
        check_size(n)
    except ValueError as error:
        return str(error)
    return ""


def _say_untied(model: Any) -> None:
    """The head has a weight of its own now, and the config says so: ours is frozen, transformers' is not."""
    config = getattr(model, "config", None)
    if isinstance(config, LlamaConfig):
        model.config = replace(config, tie_word_embeddings=False)
    elif config is not None:
        config.tie_word_embeddings = False


def _same(model: nn.Module, new: nn.Module) -> bool:
    """Whether both answer alike on a few tokens, as far as their dtype lets them."""
    weight = model.get_parameter("model.embed_tokens.weight")
    ids = torch.arange(TOKENS, device=weight.device)[None] % len(weight)
    was, now = (getattr(out, "logits", out).double() for out in (model(ids), new(ids)))
    return bool(
        (now - was).norm() <= (1e-3 if weight.dtype == wide(weight.dtype) else 0.1) * was.norm()
    )
