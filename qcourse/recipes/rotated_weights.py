"""The weights of a Llama whose residual stream is rotated, so that it computes what it did.

Every layer of a Llama reads the residual stream through an RMSNorm and a linear layer, and writes
to it through another. With a rotated stream, x -> x Q, each can absorb the rotation:

    embedding E          becomes E Q
    gain g of a norm     becomes 1, because a rotation mixes channels; g moves into the readers
    q, k, v, gate, up    become W diag(g) Q; so does the head, which is no longer tied
    o, down              become Q^T W, whose outputs arrive rotated

RMSNorm itself is unchanged, because a rotation keeps the root mean square. Attention mixes tokens,
never the channels of a head, so within each head v's outputs and o's inputs can be rotated as well.

Source: Ashkboos et al., "QuaRot" (NeurIPS 2024), section 4, without the rotation across heads and
of the keys; Liu et al., "SpinQuant" (ICLR 2025), for a learned Q: gradients pass through all this.
`rotate.py` makes models of these tensors.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcourse.methods.hadamard import hadamard_transform
from qcourse.numerics.chunks import wide

Turn = Callable[[Tensor], Tensor]  # x (..., hidden) -> x Q

# The norms of a layer, with the linear layers that read each.
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def rotated_weights(model: nn.Module, turn: Turn, *, heads: bool = True) -> dict[str, Tensor]:
    """Return the parameters of a Llama that change, by name, for a residual stream turn(x).

    `turn` multiplies the last axis by an orthogonal matrix; autograd may pass through it. `heads`
    says whether v's outputs and o's inputs are rotated by a Hadamard matrix, in each head.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> model = random_llama(LlamaConfig(64, 32, 48, 1, 4, 2), seed=0)
    >>> weights = rotated_weights(model, hadamard_transform)
    >>> len(weights), weights["model.norm.weight"].unique().tolist()
    (12, [1.0])
    """
    # The embedding writes the stream first, so its rows are rotated: E Q.
    embedding = _wide_parameter(model, "model.embed_tokens.weight")
    new = {"model.embed_tokens.weight": turn(embedding)}
    for place in places(model):
        for norm, readers in READERS.items():
            for reader in readers:
                new |= _rotated_reader(model, f"{place}.{reader}", f"{place}.{norm}", turn)
        for writer in WRITERS:
            new |= _rotated_writer(model, f"{place}.{writer}", turn)
        if heads:
            new |= _rotated_heads(model, f"{place}.self_attn", new)
    # The head reads the stream last.
    new |= _rotated_reader(model, "lm_head", "model.norm", turn)
    # All was computed in at least float32; each parameter keeps its dtype.
    return {name: weight.to(model.get_parameter(name).dtype) for name, weight in new.items()}


def places(model: nn.Module) -> list[str]:
    """Return the names of the layers, "model.layers.0" first."""
    layers: Any = model.get_submodule("model.layers")
    return [f"model.layers.{i}" for i in range(len(layers))]


def misfit(model: nn.Module) -> str:
    """Return why a model lacks the parts of a Llama; "" where it has them.

    >>> misfit(nn.Linear(2, 2))
    'it has no model.layers, as a Llama would'
    """
    modules = dict(model.named_modules())
    if not isinstance(modules.get("model.layers"), nn.ModuleList):
        return "it has no model.layers, as a Llama would"
    norms = ["model.norm"]
    layers = ["lm_head"]
    for place in places(model):
        for norm, readers in READERS.items():
            norms.append(f"{place}.{norm}")
            layers += [f"{place}.{reader}" for reader in readers]
        layers += [f"{place}.{writer}" for writer in WRITERS]

    for path in ("model.embed_tokens", *norms, *layers):
        if path not in modules:
            return f"it has no {path}, as a Llama would"
    for path in norms:
        norm_module = modules[path]
        has_bias = getattr(norm_module, "bias", None) is not None
        if isinstance(norm_module, nn.LayerNorm) or has_bias:
            return (
                f"{path} is a LayerNorm, which subtracts a mean or adds a bias"
                " that no rotation keeps"
            )
    for path in layers:
        if not isinstance(modules[path], nn.Linear):
            kind = type(modules[path]).__name__
            return f"{path} is no nn.Linear but a {kind}: rotate before quantizing"
    return ""


def _rotated_reader(model: nn.Module, path: str, norm: str, turn: Turn) -> dict[str, Tensor]:
    # x diag(g) W^T = x Q (W diag(g) Q)^T: the layer takes the gain, and the norm keeps 1.
    gain = _wide_parameter(model, f"{norm}.weight")
    w = _wide_parameter(model, f"{path}.weight")
    return {f"{path}.weight": turn(w * gain), f"{norm}.weight": torch.ones_like(gain)}


def _rotated_writer(model: nn.Module, path: str, turn: Turn) -> dict[str, Tensor]:
    # y Q = z W^T Q = z (Q^T W)^T; turn multiplies rows by Q, hence the transposes.
    layer: Any = model.get_submodule(path)
    w = _wide(layer.weight)
    new = {f"{path}.weight": turn(w.T).T}
    if layer.bias is not None:
        new[f"{path}.bias"] = turn(_wide(layer.bias))
    return new


def _rotated_heads(model: nn.Module, path: str, new: dict[str, Tensor]) -> dict[str, Tensor]:
    """The new weights of v and o, with the channels of each head rotated."""
    attention: Any = model.get_submodule(path)

    def per_head(x: Tensor) -> Tensor:
        split = x.unflatten(-1, (-1, attention.head_dim))  # (..., heads, head_dim)
        return hadamard_transform(split).flatten(-2)

    # v writes and o reads the channels of a head, so both take the same rotation.
    v = new[f"{path}.v_proj.weight"]
    o = new[f"{path}.o_proj.weight"]
    changed = {
        f"{path}.v_proj.weight": per_head(v.T).T,
        f"{path}.o_proj.weight": per_head(o),
    }
    if attention.v_proj.bias is not None:
        changed[f"{path}.v_proj.bias"] = per_head(_wide(attention.v_proj.bias))
    return changed


def _wide_parameter(model: nn.Module, name: str) -> Tensor:
    return _wide(model.get_parameter(name))


def _wide(w: Tensor) -> Tensor:
    return w.to(wide(w.dtype))
