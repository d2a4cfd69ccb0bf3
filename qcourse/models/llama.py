"""Llama: the decoder architecture of most open language models, in plain torch.

RMSNorm divides by the root mean square. RoPE rotates queries and keys by an angle proportional to
the position, so q k^T depends on the distance. SwiGLU gates the MLP. With grouped queries several
query heads share one key-value head, which makes the KV cache smaller. Weights have the names of
transformers' LlamaForCausalLM. Everything that methods quantize is an ``nn.Linear``, only called.

Source: Touvron 2023 (Llama), Zhang 2019 (RMSNorm), Su 2021 (RoPE), Shazeer 2020 (SwiGLU),
Ainslie 2023 (grouped queries). `minilm.py` is an encoder: it attends in both directions.
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
    """Keys and values of earlier tokens; ``update`` appends a layer's k and v and returns all."""

    @property
    def length(self) -> int: ...

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...


class KVCache:
    """Keys and values of each layer in floats; each call concatenates."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (batch, kv_heads, tokens, head_dim) of a layer; return all of them."""
        if layer in self.layers:
            past_k, past_v = self.layers[layer]
            k = torch.cat([past_k, k], dim=2)
            v = torch.cat([past_v, v], dim=2)
        self.layers[layer] = (k, v)
        return k, v


def rope(config: LlamaConfig, positions: Int[Tensor, " tokens"]) -> Float[Tensor, "2 tokens half"]:
    """Return cos and sin of the angle of pair i of a head, position * theta^(-2 i / head_dim)."""
    even = torch.arange(0, config.head_dim, 2, device=positions.device)  # 2 i
    exponent = even / config.head_dim
    frequency = config.rope_theta**-exponent  # (half,)
    angles = positions[:, None] * frequency  # (tokens, half)
    return torch.stack([angles.cos(), angles.sin()])


def apply_rope(
    x: Float[Tensor, "*any dim"], cos_sin: Float[Tensor, "2 tokens half"]
) -> Float[Tensor, "*any dim"]:
    """Rotate each pair (a, b) = (x_i, x_{i + dim/2}) to (a cos - b sin, b cos + a sin)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos_sin.to(x.dtype)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    return torch.cat([rotated_a, rotated_b], dim=-1)


class Attention(nn.Module):
    """Causal self-attention o(softmax(q k^T / sqrt(head_dim)) v) with grouped queries."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        size = config.hidden_size
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(size, size, bias=False)
        self.k_proj = nn.Linear(size, kv_size, bias=False)
        self.v_proj = nn.Linear(size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos_sin: Tensor, cache: Cache | None) -> Tensor:
        """Mix each token of x (batch, tokens, hidden) with earlier and cached tokens."""
        q = apply_rope(self._heads(self.q_proj(x)), cos_sin)
        k = apply_rope(self._heads(self.k_proj(x)), cos_sin)
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)

        # Token i of this call sees all past tokens and tokens 0 to i. A single token sees all.
        tokens = q.shape[2]
        past = k.shape[2] - tokens
        mask = None
        if past and tokens > 1:
            mask = torch.ones(tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=not past, enable_gqa=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # (batch, tokens, hidden)

    def _heads(self, x: Tensor) -> Tensor:
        heads = x.unflatten(2, (-1, self.head_dim))  # (batch, tokens, heads, head_dim)
        return heads.transpose(1, 2)  # (batch, heads, tokens, head_dim)


class MLP(nn.Module):
    """SwiGLU on each token: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.gate_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class Layer(nn.Module):
    """One layer: x = x + attention(norm(x)), then x = x + MLP(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, cos_sin: Tensor, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and last norm: all but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # nn.Embedding's own random numbers are slow on the meta device.
        empty = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        layers = (Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Llama(nn.Module):
    """The language model; made by ``load_weights``, or by ``random_llama`` for training."""

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
        """Return the logits of the token after each id; ids continue the tokens in the cache."""
        # Tokens in the cache take the first positions.
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        cos_sin = rope(self.config, positions)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos_sin, cache)
        return self.lm_head(self.model.norm(x))


def load_weights(config: LlamaConfig, weights: Mapping[str, Tensor]) -> Llama:
    """Return a model of these tensors (no copy) in eval mode; a tied head may be missing.

    Raises ValueError, with a list, if a weight is missing, unknown or of another shape.

    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> same = load_weights(model.config, model.state_dict())
    >>> torch.equal(same.lm_head.weight, model.lm_head.weight)
    True
    """
    # On the meta device a model takes no memory and draws no random numbers.
    with torch.device("meta"):
        model = Llama(config)
    embedding = weights.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and embedding is not None:
        weights = {**weights, "lm_head.weight": embedding}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit config: {error}") from error
    # load_state_dict assigns two parameters; tie them again.
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval().requires_grad_(False)


def random_llama(config: LlamaConfig, *, seed: int) -> Llama:
    """Return a model to train, with weights of standard deviation 0.02 and norms of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        weights = Llama(config).state_dict()
    for name, w in weights.items():
        if w.ndim == 1:
            weights[name] = torch.ones(w.shape)
            continue
        # Two outputs per layer add to the residual stream; dividing keeps the variance of the sum.
        adds = name.endswith(("o_proj.weight", "down_proj.weight"))
        summands = 2 * config.num_hidden_layers if adds else 1
        std = 0.02 / math.sqrt(summands)
        weights[name] = torch.empty(w.shape).normal_(0, std, generator=generator)
    return load_weights(config, weights).train().requires_grad_()
