"""A small Llama through GGUF and back; errors that name what is wrong with a file."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer

from qcourse import read_gguf
from qcourse.models.gguf_llama import config_from_gguf, llama_from_gguf, tokenizer_from_gguf
from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig

CONFIG = LlamaConfig(6, 32, 64, 2, 4, 2, 128, 1e-5, 500.0, True)
TOKENS = ["<|end|>", "a", "b", "1", "2", "ab"]


def model() -> Llama:
    return random_llama(CONFIG, seed=0).eval().requires_grad_(False)


def llama_cpp_order(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as convert_hf_to_gguf.py writes them."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1])
    return halves.swapaxes(1, 2).reshape(w.shape)


def write(path: Path, *, leave_out: str = "", **changes: object) -> Path:
    """The small model as float32; `leave_out` names a metadata key or a tensor to omit."""
    writer = GGUFWriter(path, str(changes.get("architecture", "llama")))
    metadata = {
        "llama.context_length": 128,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
    }
    for key, value in metadata.items():
        if key != leave_out:
            writer.add_uint32(key, value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32("llama.rope.freq_base", 500.0)
    writer.add_tokenizer_model(str(changes.get("tokenizer", "gpt2")))
    writer.add_tokenizer_pre(str(changes.get("pre", "smollm")))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])

    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm"}
    for name, w in model().state_dict().items():
        if name == "lm_head.weight":
            continue
        if name in outside:
            theirs = outside[name].removesuffix(".weight") + ".weight"
        else:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            theirs = f"blk.{layer}.{names[part]}.weight"
            if part.endswith("q_proj"):
                w = llama_cpp_order(w, 4)
            if part.endswith("k_proj"):
                w = llama_cpp_order(w, 2)
        if theirs != leave_out:
            writer.add_tensor(theirs, np.ascontiguousarray(w.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_weights_come_back_in_our_order(tmp_path: Path) -> None:
    file = read_gguf(write(tmp_path / "m.gguf"))
    found = config_from_gguf(file)
    assert found.rms_norm_eps == pytest.approx(1e-5)
    assert (found.num_key_value_heads, found.rope_theta) == (2, 500.0)
    assert found.tie_word_embeddings
    ours = llama_from_gguf(file)
    for name, w in model().state_dict().items():
        assert torch.equal(ours.state_dict()[name], w), name
    assert llama_from_gguf(file, dtype=torch.bfloat16).model.norm.weight.dtype == torch.bfloat16


def test_the_tokenizer_splits_digits_and_keeps_control_tokens(tmp_path: Path) -> None:
    tokenizer = tokenizer_from_gguf(read_gguf(write(tmp_path / "m.gguf")))
    assert isinstance(tokenizer, Tokenizer)
    assert tokenizer.encode("ab12<|end|>a").tokens == ["ab", "1", "2", "<|end|>", "a"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "qwen2"}, "holds a 'qwen2' model; this reads 'llama'"),
        ({"leave_out": "llama.block_count"}, r"lacks the metadata 'llama\.block_count'"),
        ({"leave_out": "blk.1.ffn_up.weight"}, r"Missing key.*layers\.1\.mlp\.up_proj"),
    ],
)
def test_a_file_that_is_no_whole_llama(tmp_path: Path, changes: dict, reason: str) -> None:
    file = read_gguf(write(tmp_path / "m.gguf", **changes))
    with pytest.raises(ValueError, match=reason):
        llama_from_gguf(file)


@pytest.mark.parametrize("changes", [{"tokenizer": "llama"}, {"pre": "qwen2"}])
def test_a_tokenizer_of_another_kind(tmp_path: Path, changes: dict) -> None:
    file = read_gguf(write(tmp_path / "m.gguf", **changes))
    with pytest.raises(ValueError, match="this reads 'gpt2' that cuts as one of gpt-2, smollm"):
        tokenizer_from_gguf(file)
