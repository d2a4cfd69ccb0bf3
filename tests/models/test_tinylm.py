"""The model that ships: complete, equal in transformers, as good as its card says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_tinylm import SIZE_LIMIT_BYTES, evaluate_kind
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcourse.models.evaluate import agreement, perplexity
from qcourse.models.generate import generate
from qcourse.models.tinylm import CHECKSUMS, FILES, FOLDER, TinyLM, load_tinylm
from qcourse.texts.corpus import stdlib_corpus

XZ_SHARE = 0.6  # of the bits that xz needs: what makes it a language model worth quantizing


@pytest.fixture(scope="module")
def tinylm() -> TinyLM:
    return load_tinylm()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokens(tinylm: TinyLM) -> torch.Tensor:
    text = next(document.text for document in stdlib_corpus("held_out") if document.name == "json")
    return torch.tensor([0, *tinylm.tokenizer.encode(text).ids])


def test_it_fits_the_repository() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= SIZE_LIMIT_BYTES


def test_groups_of_128_divide_every_width(tinylm: TinyLM) -> None:
    assert tinylm.model.config.hidden_size % 128 == tinylm.model.config.intermediate_size % 128 == 0


def test_transformers_reads_the_same_model_and_tokenizer(
    tinylm: TinyLM, tokens: torch.Tensor
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    found = agreement(theirs, tinylm.model, tokens, 256)
    assert found.kl == pytest.approx(0, abs=1e-6)
    ids = tokens[None, :200]
    torch.testing.assert_close(theirs(ids).logits, tinylm.model(ids), atol=1e-4, rtol=0)
    assert torch.equal(generate(theirs, tokens[:9], 20), generate(tinylm.model, tokens[:9], 20))
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    text = 'def f(naïve):\n    """Return ∑."""\n\n\treturn  1234  # 🐍\r\n'
    ids = tokenizer(text).input_ids
    assert ids == tinylm.tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == tinylm.tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 0)


@pytest.fixture(scope="module")
def measured(tinylm: TinyLM) -> dict[str, dict[str, float]]:
    return {kind: evaluate_kind(tinylm, kind, stride=256) for kind in ("docs", "code")}


@pytest.mark.parametrize("kind", ["docs", "code"])
def test_it_is_as_good_as_its_card_says(
    measured: dict[str, dict[str, float]], report: dict[str, Any], kind: str
) -> None:
    told = report["held_out"][kind][0]
    # Each version of Python has its own documents.
    for measure in ("perplexity", "bits_per_byte", "xz_bits_per_byte"):
        assert measured[kind][measure] == pytest.approx(told[measure], rel=0.05)
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"| 256 | {told['perplexity']:.2f} | {told['bits_per_byte']:.3f} |" in card


def test_it_knows_python_documentation(measured: dict[str, dict[str, float]]) -> None:
    assert measured["docs"]["bits_per_byte"] < XZ_SHARE * measured["docs"]["xz_bits_per_byte"]


def test_order_matters_to_it(tinylm: TinyLM, tokens: torch.Tensor) -> None:
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    in_order = perplexity(tinylm.model, tokens, 128).perplexity
    out_of_order = perplexity(tinylm.model, shuffled, 128).perplexity
    assert out_of_order > 20 * in_order


def test_it_generates_words_of_documentation(tinylm: TinyLM) -> None:
    known = {word for document in stdlib_corpus("held_out") for word in document.text.split()}
    prompt = torch.tensor([0, *tinylm.tokenizer.encode("Return a list of").ids])
    generator = torch.Generator().manual_seed(0)
    ids = generate(tinylm.model, prompt, 200, temperature=0.7, generator=generator)
    words = tinylm.tokenizer.decode(ids.tolist()).split()
    assert len(set(words)) > 40
    assert sum(word in known for word in words) > 0.6 * len(words)


def test_it_loads_in_another_dtype(tokens: torch.Tensor, tinylm: TinyLM) -> None:
    halved = load_tinylm(dtype=torch.bfloat16).model
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    assert agreement(halved, tinylm.model, tokens, 128).top1 > 0.9


def test_it_needs_no_gradients_and_shares_nothing(tinylm: TinyLM) -> None:
    assert not any(p.requires_grad for p in tinylm.model.parameters())
    assert not tinylm.model.training
    again = load_tinylm().model
    again.lm_head.weight.zero_()
    assert tinylm.model.lm_head.weight.abs().sum() > 0


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-1], lambda content: b"\xff" + content[1:], lambda content: b""],
)
def test_a_damaged_file_is_refused_with_both_hashes(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes]
) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(damage((FOLDER / name).read_bytes()))
    words = rf"{name} is damaged.*[0-9a-f]{{64}}, expected [0-9a-f]{{64}}"
    with pytest.raises(ValueError, match=words):
        load_tinylm(tmp_path)


@pytest.mark.parametrize("name", [CHECKSUMS, *FILES])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {name}. It comes with the package"):
        load_tinylm(tmp_path)


def test_a_file_without_a_checksum_is_refused(tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    (tmp_path / CHECKSUMS).write_text("", encoding="ascii")
    with pytest.raises(ValueError, match="expected None"):
        load_tinylm(tmp_path)
