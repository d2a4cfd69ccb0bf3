"""Llama: the decoder that most open language models are, in plain torch.

The idea: a token's vector passes through layers of attention and MLP, each added to its input; the last one, multiplied
with the head, gives the logits of the next token. Four parts make it a Llama. RMSNorm divides by the root mean square
only. RoPE turns queries and keys by an angle that grows with their position, so that their product depends on the
distance alone. SwiGLU gates the MLP, silu(gate) * up. Grouped queries: several query heads share one key-value head,
which makes the KV cache, what attention must remember of earlier tokens, smaller by that factor.

Modules carry the names that transformers' LlamaForCausalLM gives its weights: checkpoints load both ways as they are.
All that a method quantizes are ``nn.Linear`` layers, which are called and used in no other way.

Source: Touvron 2023, "Llama"; Zhang 2019 (RMSNorm), Su 2021 (RoPE), Shazeer 2020 (SwiGLU), Ainslie 2023 (groups).

How it differs from ``minilm.py``: it looks back only, and so can write: one token after another.
"""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from qcourse.models.llama_config import LlamaConfig


@runtime_checkable
class Cache(Protocol):
    """What attention remembers of earlier tokens: ``update`` appends a layer's k and v, and returns all of both."""

    @property
    def length(self) -> int: ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """Keys and values of each layer as they are, grown by one concatenation a call."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (batch, kv_heads, tokens, head_dim) to the layer's; return all of them."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


def rope(config: LlamaConfig, positions: Int[Tensor, " tokens"]) -> Float[Tensor, "2 tokens half"]:
    """Cosine and sine of the angle by which pair i of a head turns: position * theta^(-2 i / head_dim)."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[:, None] * config.rope_theta**-exponent  # (tokens, half)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(
    x: Float[Tensor, "*any dim"], turn: Float[Tensor, "2 tokens half"]
) -> Float[Tensor, "*any dim"]:
    """Turn each pair (x_i, x_{i + dim/2}) by its angle: (a cos - b sin, b cos + a sin); turn holds cos and sin."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), turn.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention, o(softmax(q k^T / sqrt(head_dim)) v), with grouped queries."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        kv_size = config.num_key_value_heads * config.head_dim
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, turn: Tensor, cache: Cache | None) -> Tensor:
        """Mix x (batch, tokens, hidden) over the tokens up to each one, those in the cache included."""
        q, k, v = (
            linear(x)
            .unflatten(2, (-1, self.head_dim))
            .transpose(1, 2)  # (batch, heads, tokens, head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rope(q, turn), apply_rope(k, turn)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        past = k.shape[2] - q.shape[2]
        mask = None
        if past and q.shape[2] > 1:  # a single token sees all
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=x.device).tril(past)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not past, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (batch, tokens, hidden)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to each token of x (batch, tokens, hidden) alone."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer: x = x + attention(norm(x)), then x = x + MLP(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, turn: Tensor, cache: Cache | None) -> Tensor:
        """Map x (batch, tokens, hidden) to the next layer's."""
        x = x + self.self_attn(self.input_layernorm(x), turn, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm: all but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        empty = torch.zeros(
            config.vocab_size, config.hidden_size
        )  # nn.Embedding's random numbers are slow on "meta"
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(
            Layer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Llama(nn.Module):
    """The language model. ``load_weights`` makes it from a checkpoint, ``random_llama`` to be trained."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, ids: Int[Tensor, "batch tokens"], cache: Cache | None = None
    ) -> Float[Tensor, "batch tokens vocabulary"]:
        """Map token ids to the logits of the token that follows each; ids go on from what the cache holds."""
        start = 0 if cache is None else cache.length
        turn = rope(self.config, torch.arange(start, start + ids.shape[1], device=ids.device))
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, turn, cache)
        return self.lm_head(self.model.norm(x))


def load_weights(config: LlamaConfig, weights: Mapping[str, Tensor]) -> Llama:
    """Make a model of these very tensors (no copy), named as in transformers' LlamaForCausalLM.

    Args:
        weights: a state dict, or what a safetensors file holds; a tied head may be left out.

    Returns:
        The model in eval mode, without gradients, in the weights' dtype.

    Raises:
        ValueError: a weight is missing, or not one of this model, or of another shape; the message lists them.

    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> torch.equal(load_weights(model.config, model.state_dict()).lm_head.weight, model.lm_head.weight)
    True
    """
    with torch.device("meta"):  # no memory, no random numbers: the weights follow
        model = Llama(config)
    if config.tie_word_embeddings and "model.embed_tokens.weight" in weights:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit config: {error}") from error
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def random_llama(config: LlamaConfig, *, seed: int) -> Llama:
    """Make a model to train: deviation 0.02, and 0.02 / sqrt(2 layers) for what adds to the residual stream.

    >>> random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 64])
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        weights = Llama(config).state_dict()
    for name, w in weights.items():
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.02 / math.sqrt(2 * config.num_hidden_layers if adds else 1)
        weights[name] = (
            torch.ones(w.shape)
            if w.ndim == 1
            else torch.empty(w.shape).normal_(0, std, generator=generator)
        )
    return load_weights(config, weights).train().requires_grad_()
