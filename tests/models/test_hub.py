"""A checkpoint on disk loads as one of the hub would, and quantizes; errors say what was tried."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qcourse import IntQuantizer, PerGroup
from qcourse.models.hub import load_hub
from qcourse.models.llama_config import LlamaConfig as Sizes
from qcourse.recipes.quantize import quantize_model

WORDS = {word: i for i, word in enumerate(["<unk>", "print", "a", "list", "of", "names"])}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of a hub repository: a tiny Llama in bfloat16 and its tokenizer."""
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
    int8 = IntQuantizer(8, granularity=PerGroup(32))
    new, report = quantize_model(model, int8, calibration=[ids], progress=False)
    assert len(report.layers) == 14
    assert [kept.name for kept in report.kept] == ["lm_head"]
    torch.testing.assert_close(new(ids).logits, model(ids).logits, atol=0.02, rtol=0)


def test_a_model_that_is_not_here() -> None:
    words = r"(?s)could not load nobody/nothing\. Tried: the hub and its cache"
    with pytest.raises(OSError, match=words) as caught:
        load_hub("nobody/nothing", revision="0123abc")
    assert "at revision '0123abc'" in str(caught.value)
    assert "What works without a network: a folder on disk" in str(caught.value)


def test_a_folder_that_lacks_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"Tried: the folder .*model\.safetensors"):
        load_hub(folder)


def test_a_revision_of_a_folder(folder: Path) -> None:
    words = r"revision='main' pins a model of the hub; .* is a folder"
    with pytest.raises(ValueError, match=words):
        load_hub(folder, revision="main")


def test_a_head_that_is_tied_is_not_missing(folder: Path) -> None:
    sizes = Sizes(len(WORDS), 64, 96, 2, 4, 2, tie_word_embeddings=True)
    config = LlamaConfig(**sizes.to_transformers())
    LlamaForCausalLM(config).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_hub(folder).model
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


UP = "model.layers.1.mlp.up_proj.weight"
MISMATCH = "no causal language model that can be loaded: .*mismatch"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(UP), rf"lacks the weights \['{UP}'\]"),
        (lambda w: w.update({UP: torch.ones(3)}), MISMATCH),
    ],
    ids=["missing", "of another shape"],
)
def test_weights_that_do_not_fit(
    folder: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words):
        load_hub(folder)


def test_weights_that_are_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    words = r"no causal language model that can be loaded: .*incomplete"
    with pytest.raises(ValueError, match=words):
        load_hub(folder)


def test_a_folder_that_lacks_the_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()
    words = r"(?s)no causal language model that can be loaded: .*tokenizer"
    with pytest.raises(ValueError, match=words):
        load_hub(folder)


@pytest.mark.parametrize("name", ["./nowhere", "no/where/at/all", "/nowhere", Path("nowhere")])
def test_a_folder_that_is_not_there(name: str | Path) -> None:
    words = r"could not load .*where.*: there is no such folder"
    with pytest.raises(FileNotFoundError, match=words):
        load_hub(name)


def test_code_of_the_checkpoint_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # a user who says yes
    with pytest.raises(ValueError, match="custom code"):
        load_hub(folder)


@pytest.mark.parametrize("name", ["", "  "])
def test_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="must be 'owner/model' or a folder"):
        load_hub(name)
