"""A Llama and its tokenizer from a GGUF file.

The file has llama.cpp's names and its order of rows. RoPE turns neighbors (2 i, 2 i + 1) of a head
in llama.cpp, and (i, i + dim/2) in `llama.py`, so rows of q and k are put back in order.

Source: convert_hf_to_gguf.py and llama-vocab.cpp in the public repository of llama.cpp.
`hub.py` reads checkpoints of transformers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from qcourse.formats.gguf import GGUFFile
from qcourse.models.llama import Llama, load_weights
from qcourse.models.llama_config import LlamaConfig

# llama.cpp's names and ours, outside and inside a block.
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # the token type of <|im_start|> and the like

# How text is cut before the merges, by tokenizer.ggml.pre. "smollm" splits off each digit.
_CUT_AT_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_PRE_TOKENIZERS = {
    "gpt-2": _CUT_AT_WORDS,
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _CUT_AT_WORDS]
    ),
}


def config_from_gguf(file: GGUFFile) -> LlamaConfig:
    """Return the sizes in the file's metadata; ValueError if one is missing or it is no Llama."""
    metadata = file.metadata
    architecture = _require(file, "general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file.path} holds a {architecture!r} model; this reads 'llama'")
    heads = _require(file, "llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(_require(file, "tokenizer.ggml.tokens")),
        hidden_size=_require(file, "llama.embedding_length"),
        intermediate_size=_require(file, "llama.feed_forward_length"),
        num_hidden_layers=_require(file, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=_require(file, "llama.context_length"),
        rms_norm_eps=_require(file, "llama.attention.layer_norm_rms_epsilon"),
        rope_theta=metadata.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def llama_from_gguf(file: GGUFFile, *, dtype: torch.dtype = torch.float32) -> Llama:
    """Return the model in eval mode, with weights that the file's codes decode to, in `dtype`.

    Raises ValueError if the file is no Llama, or a weight is missing, unknown or of another shape.
    """
    config = config_from_gguf(file)
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads,
    }
    weights = {}
    for name, tensor in file.tensors.items():
        w = tensor.dequantize()
        part = name.split(".")[-2]
        if part in heads:
            w = _halves_of_heads(w, heads[part])
        weights[_our_name(name)] = w.to(dtype)
    return load_weights(config, weights)


def tokenizer_from_gguf(file: GGUFFile) -> Tokenizer:
    """Return the byte-level BPE tokenizer in the file's metadata.

    Raises ValueError if the file has none, or one of another kind.
    """
    kind = _require(file, "tokenizer.ggml.model")
    cut = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or cut not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ValueError(
            f"{file.path} has a tokenizer {kind!r} that cuts text as {cut!r};"
            f" this reads 'gpt2' that cuts as one of {known}"
        )
    tokens = _require(file, "tokenizer.ggml.tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _require(file, "tokenizer.ggml.merges")]

    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[cut]
    tokenizer.decoder = decoders.ByteLevel()
    control = []
    for token, token_type in zip(tokens, _require(file, "tokenizer.ggml.token_type"), strict=True):
        if token_type == _CONTROL_TOKEN:
            control.append(AddedToken(token, special=True, normalized=False))
    tokenizer.add_special_tokens(control)
    return tokenizer


def _require(file: GGUFFile, key: str) -> Any:
    metadata: Mapping[str, Any] = file.metadata
    if key not in metadata:
        raise ValueError(f"{file.path} lacks the metadata {key!r}")
    return metadata[key]


def _our_name(name: str) -> str:
    """Return transformers' name of a weight; an unknown name stays, and `load_weights` names it.

    >>> _our_name("blk.3.ffn_up.weight")
    'model.layers.3.mlp.up_proj.weight'
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    block, _, inside = name.removeprefix("blk.").partition(".")
    part = inside.removesuffix(".weight")
    return f"model.layers.{block}.{_INSIDE[part]}.weight" if part in _INSIDE else name


def _halves_of_heads(w: Float[Tensor, "out in"], heads: int) -> Float[Tensor, "out in"]:
    """Return the rows with (2 i, 2 i + 1) of each head moved to (i, i + dim/2)."""
    pairs = w.unflatten(0, (heads, -1, 2))  # (heads, dim/2, 2, in)
    return pairs.transpose(1, 2).reshape(w.shape)
