"""Models with rotated activations that compute the same, ready for scales that channels share.

The rotation of a Llama's residual stream is absorbed by the weights around it
(`rotated_weights.py`) and is free. The input of ``down`` is a product, silu(gate) * up, so no
weight before it can absorb a rotation; there a fast Hadamard transform runs at each call. In a
post-norm model such as MiniLM the gains of LayerNorms are part of the stream, so nothing can be
absorbed, and each layer rotates its own input (`run_time_rotation.py`). Source: Ashkboos et al.,
"QuaRot" (NeurIPS 2024), section 4. `fold.py` moves a scale between two layers only.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from qcourse.methods.rotation import Rotation, check_orthogonal
from qcourse.models.llama_config import LlamaConfig
from qcourse.numerics.chunks import wide
from qcourse.recipes.block_probe import TOKENS, put
from qcourse.recipes.rotated_weights import Turn, misfit, places, rotated_weights
from qcourse.recipes.run_time_rotation import (
    RotatedModel,
    RotationReport,
    width_misfit,
    with_rotation,
)

NO_LLAMA = "rotated, it computes something else, so it is more than a Llama"


@torch.no_grad()
def rotate_model(
    model: nn.Module,
    rotation: Shaped[Tensor, "..."] | None = None,
    *,
    seed: int = 0,
    heads: bool = True,
    down: bool = True,
) -> RotatedModel:
    """Return a copy of a Llama with a rotated residual stream, x -> x Q, that computes the same.

    Args:
        model: ours, or transformers' with the same names (Llama, Mistral, Qwen2); not changed. It
            is returned itself, with a reason, if it lacks the parts of a Llama, or if the rotated
            model computes something else on a few tokens.
        rotation: Q, orthogonal (hidden, hidden); by default a random Hadamard matrix.
        seed: of its signs.
        heads: whether v's outputs and o's inputs are rotated by a Hadamard matrix, in each head.
        down: whether down_proj rotates its input: it becomes nn.Sequential(Rotation, nn.Linear).

    Raises TypeError or ValueError if rotation is not orthogonal or has another width, ValueError if
    a width has no Hadamard matrix (the message names the argument that avoids it).

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
    why = misfit(model)
    if why:
        return _left_alone(model, why)
    # Widths without a Hadamard matrix are refused before any weight is computed.
    turn = _turn(model, rotation, seed)
    _check_widths(model, heads, down)

    # New parameters where the rotation is absorbed; all others are copied.
    weights = rotated_weights(model, turn, heads=heads)
    new = _copy_with(weights, model)
    _mark_as_untied(new)
    at_run_time = tuple(_rotate_down(new)) if down else ()
    # A model with the names of a Llama may still do more, such as scale a gain.
    if not _compute_the_same(model, new):
        return _left_alone(model, NO_LLAMA)
    # A module with two new parameters is listed once.
    modules = dict.fromkeys(name.rpartition(".")[0] for name in weights)
    return RotatedModel(new, RotationReport(tuple(modules), at_run_time))


def _left_alone(model: nn.Module, why: str) -> RotatedModel:
    return RotatedModel(model, RotationReport(left=(("", why),)))


def _turn(model: nn.Module, rotation: Tensor | None, seed: int) -> Turn:
    """The map x -> x Q of the residual stream."""
    weight = model.get_parameter("model.embed_tokens.weight")
    hidden = weight.shape[1]
    if rotation is None:
        _check_width(hidden, "the residual stream", "rotation=")
        return Rotation(hidden, seed=seed).to(weight.device)
    check_orthogonal(rotation, "rotation")
    expected = (hidden, hidden)
    if rotation.shape != expected:
        raise ValueError(
            f"rotation of shape {tuple(rotation.shape)} must be {expected}, the residual stream's"
        )
    # A given matrix is multiplied; no fast transform is known for it.
    q = rotation.to(weight.device)

    def turn(x: Tensor) -> Tensor:
        return x @ q.to(x.dtype)

    return turn


def _check_widths(model: nn.Module, heads: bool, down: bool) -> None:
    for place in places(model):
        layer: Any = model.get_submodule(place)
        if heads:
            _check_width(layer.self_attn.head_dim, "a head", "heads=False")
        if down:
            _check_width(layer.mlp.down_proj.in_features, "the input of down_proj", "down=False")


def _check_width(n: int, what: str, way_out: str) -> None:
    why = width_misfit(n)
    if why:
        sizes = why.removeprefix(f"n={n} has no Hadamard matrix here: ")
        raise ValueError(f"no Hadamard matrix for {what} of width {n} ({sizes}); pass {way_out}")


def _copy_with(weights: dict[str, Tensor], model: nn.Module) -> nn.Module:
    # A memo of the old parameters keeps deepcopy from copying them.
    old = [model.get_parameter(name) for name in weights]
    new = copy.deepcopy(model, {id(parameter): parameter for parameter in old})
    for name, weight in weights.items():
        path, _, key = name.rpartition(".")
        put(new.get_submodule(path), {key: weight})
    return new


def _rotate_down(model: nn.Module) -> Iterator[str]:
    for place in places(model):
        name = f"{place}.mlp.down_proj"
        old: Any = model.get_submodule(name)
        model.set_submodule(name, with_rotation(old, Rotation(old.in_features)))
        yield name


def _mark_as_untied(model: Any) -> None:
    config = getattr(model, "config", None)
    if isinstance(config, LlamaConfig):  # ours is frozen, transformers' is not
        model.config = replace(config, tie_word_embeddings=False)
    elif config is not None:
        config.tie_word_embeddings = False


def _compute_the_same(model: nn.Module, new: nn.Module) -> bool:
    """Whether both models give the same logits for a few tokens, within their dtype."""
    weight = model.get_parameter("model.embed_tokens.weight")
    # A few different ids are enough to show a difference.
    ids = torch.arange(TOKENS, device=weight.device)[None] % len(weight)
    before = _logits(model, ids)
    difference = _logits(new, ids) - before
    # Half precision rounds each activation, so the logits differ by a few percent.
    tolerance = 1e-3 if weight.dtype == wide(weight.dtype) else 0.1
    return bool(difference.norm() <= tolerance * before.norm())


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    return getattr(output, "logits", output).double()
