"""A checkpoint on disk loads as one of the hub would, and quantizes; what cannot be loaded says what was tried."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qcourse import IntQuantizer, PerGroup
from qcourse.models.hub import load_hub
from qcourse.models.llama_config import LlamaConfig as Sizes
from qcourse.models.quantize import quantize_model

WORDS = {word: i for i, word in enumerate(["<unk>", "print", "a", "list", "of", "names"])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a hub's repository holds: a tiny Llama in bfloat16 and its tokenizer."""
    config = LlamaConfig(**Sizes(len(WORDS), 64, 96, 2, 4, 2).to_transformers())
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    return tmp_path


def test_a_checkpoint_on_disk(folder: Path) -> None:
    model, tokenizer = load_hub(folder)
    stored = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert tokenizer("print a list of names")["input_ids"] == [1, 2, 3, 4, 5]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_it_quantizes(folder: Path) -> None:
    model, tokenizer = load_hub(str(folder), dtype=torch.float32)
    ids = tokenizer("print a list of names", return_tensors="pt")["input_ids"]
    new, report = quantize_model(model, IntQuantizer(8, granularity=PerGroup(32)), calibration=[ids], progress=False)
    assert len(report.layers) == 14
    assert [kept.name for kept in report.kept] == ["lm_head"]
    torch.testing.assert_close(new(ids).logits, model(ids).logits, atol=0.02, rtol=0)


def test_a_model_that_is_not_here() -> None:
    with pytest.raises(OSError, match=r"(?s)could not load nobody/nothing\. Tried: the hub and its cache") as caught:
        load_hub("nobody/nothing", revision="0123abc")
    assert "at revision '0123abc'" in str(caught.value)
    assert "What works without a network: a folder on disk" in str(caught.value)


def test_a_folder_that_lacks_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"Tried: the folder .*model\.safetensors"):
        load_hub(folder)


def test_a_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"revision='main' pins a model of the hub; .* is a folder"):
        load_hub(folder, revision="main")


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="must be 'owner/model' or a folder"):
        load_hub(name)
