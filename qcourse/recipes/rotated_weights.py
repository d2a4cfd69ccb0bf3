"""The weights of a Llama whose residual stream is rotated, and which computes what it did.

The idea: in a Llama every layer reads the residual stream through an RMSNorm and a linear layer, and writes to it
through another. Rotate the stream once, x -> x Q, and each of them can absorb it:

    embedding E          becomes E Q
    gain g of a norm     becomes 1, for a rotation does not pass a gain; g moves into the layers that read the norm
    q, k, v, gate, up    become W diag(g) Q, and so does the head, which then is no longer tied to the embedding
    o, down              become Q^T W, whose outputs arrive rotated

RMSNorm itself does not mind: a rotation keeps the root mean square. Attention mixes tokens, never a head's channels, so
within each head v's outputs and o's inputs can be rotated as well.

Source: Ashkboos et al., "QuaRot" (NeurIPS 2024), section 4, without the rotation across heads and that of the keys;
Liu et al., "SpinQuant" (ICLR 2025), for a Q that is learned: gradients pass through all of this.

How it differs from ``rotate.py``: here tensors, by name; there models.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcourse.methods.hadamard import hadamard_transform
from qcourse.numerics.chunks import wide

Turn = Callable[[Tensor], Tensor]  # x (..., hidden) -> x Q
NORMS = {  # of a layer, with the linear layers that read it
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
ALONE = ("model.embed_tokens", "model.norm", "lm_head")


def rotated_weights(model: nn.Module, turn: Turn, *, heads: bool = True) -> dict[str, Tensor]:
    """The parameters of a Llama by name, for a residual stream x -> turn(x); autograd may look through it into turn.

    Args:
        model: has what `unfit` looks for; not changed.
        turn: multiplies the last axis by an orthogonal matrix.
        heads: whether v's outputs and o's inputs are rotated within each head, by a Hadamard matrix.

    Returns:
        Every parameter that changes, in its old dtype; gains become 1.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> weights = rotated_weights(random_llama(LlamaConfig(64, 32, 48, 1, 4, 2), seed=0), hadamard_transform)
    >>> len(weights), weights["model.norm.weight"].unique().tolist()
    (12, [1.0])
    """
    new: dict[str, Tensor] = {}

    def reads(path: str, norm: str) -> None:
        gain = _wide(model.get_parameter(f"{norm}.weight"))
        new[f"{path}.weight"] = turn(_wide(model.get_parameter(f"{path}.weight")) * gain)
        new[f"{norm}.weight"] = torch.ones_like(gain)

    new["model.embed_tokens.weight"] = turn(_wide(model.get_parameter("model.embed_tokens.weight")))
    for place in places(model):
        for norm, readers in NORMS.items():
            for reader in readers:
                reads(f"{place}.{reader}", f"{place}.{norm}")
        for path in (f"{place}.{writer}" for writer in WRITERS):
            layer: Any = model.get_submodule(path)
            new[f"{path}.weight"] = turn(_wide(layer.weight).T).T
            if layer.bias is not None:
                new[f"{path}.bias"] = turn(_wide(layer.bias))
        if heads:
            new |= _rotated_heads(
                new, f"{place}.self_attn", model.get_submodule(f"{place}.self_attn")
            )
    reads("lm_head", "model.norm")
    return {name: weight.to(model.get_parameter(name).dtype) for name, weight in new.items()}


def places(model: nn.Module) -> list[str]:
    """Names of the layers, "model.layers.0" first."""
    layers: Any = model.get_submodule("model.layers")
    return [f"model.layers.{i}" for i in range(len(layers))]


def unfit(model: nn.Module) -> str:
    """Why a model has not the parts of a Llama; "" where it has.

    >>> unfit(nn.Linear(2, 2))
    'it has no model.layers, as a Llama would'
    """
    modules = dict(model.named_modules())
    if not isinstance(modules.get("model.layers"), nn.ModuleList):
        return "it has no model.layers, as a Llama would"
    norms = ["model.norm", *(f"{place}.{norm}" for place in places(model) for norm in NORMS)]
    readers = [reader for several in NORMS.values() for reader in several]
    layers = [
        "lm_head",
        *(f"{place}.{path}" for place in places(model) for path in (*readers, *WRITERS)),
    ]
    for path in ("model.embed_tokens", *norms, *layers):
        if path not in modules:
            return f"it has no {path}, as a Llama would"
    for path in norms:
        if (
            isinstance(modules[path], nn.LayerNorm)
            or getattr(modules[path], "bias", None) is not None
        ):
            return f"{path} is a LayerNorm, which subtracts a mean or adds a bias that no rotation keeps"
    for path in layers:
        if not isinstance(modules[path], nn.Linear):
            return f"{path} is no nn.Linear but a {type(modules[path]).__name__}: rotate before quantizing"
    return ""


def _rotated_heads(new: dict[str, Tensor], path: str, attention: Any) -> dict[str, Tensor]:
    """v and o of one layer once more, with each head's channels rotated."""

    def per_head(x: Tensor) -> Tensor:
        return hadamard_transform(x.unflatten(-1, (-1, attention.head_dim))).flatten(
            -2
        )  # (..., heads, head_dim)

    changed = {
        f"{path}.v_proj.weight": per_head(new[f"{path}.v_proj.weight"].T).T,
        f"{path}.o_proj.weight": per_head(new[f"{path}.o_proj.weight"]),
    }
    bias = attention.v_proj.bias
    return changed if bias is None else {**changed, f"{path}.v_proj.bias": per_head(_wide(bias))}


def _wide(w: Tensor) -> Tensor:
    return w.to(wide(w.dtype))
