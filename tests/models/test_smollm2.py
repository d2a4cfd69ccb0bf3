"""SmolLM2 against transformers on the same file; skipped where the file is missing."""

import os
import re
import warnings
from collections.abc import Iterator

import pytest
import torch

from qcourse import generate, load_smollm2, stdlib_corpus
from qcourse.models.smollm2 import SmolLM2
from qcourse.models.smollm2_files import find_smollm2

try:
    PATH = find_smollm2()
except FileNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def ours() -> SmolLM2:
    return load_smollm2()


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def theirs() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PATH.parent, gguf_file=PATH.name)


def test_it_has_the_published_size(ours: SmolLM2) -> None:
    assert sum(p.numel() for p in ours.model.parameters()) == 134_515_008
    assert ours.model.config.num_hidden_layers == 30
    assert ours.tokenizer.get_vocab_size() == 49_152
    assert ours.tokenizer.token_to_id("<|im_end|>") == 2


def test_it_answers_a_question(ours: SmolLM2) -> None:
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(ours.tokenizer.encode(prompt).ids)
    answer = generate(ours.model, ids, 12, stop=2)[len(ids) :]
    assert "Paris" in ours.tokenizer.decode(answer.tolist())


def texts() -> list[str]:
    """1,000 texts of the standard library, and some that are hard for a tokenizer."""
    found = [document.text[:2000] for document in stdlib_corpus("held_out")]
    found += [document.text[:2000] for document in stdlib_corpus("train")]
    hard = ["", " ", "\n\n\n", "naïve café — 数字 🙂", "a\tb  c"]
    hard.append("<|im_start|>user\nHi<|im_end|>\n")
    return [*hard, *found[:1000]]


def test_the_tokenizer_is_that_of_transformers(ours: SmolLM2, theirs: object) -> None:
    # transformers reads a GGUF of this kind without the split at digits that the file's
    # tokenizer.ggml.pre ("smollm") asks for. That shows after several white spaces alone, because
    # no merge of this vocabulary joins a digit to anything.
    split = re.compile(r"\s\s\d")
    compared = [text for text in texts() if not split.search(text)]
    assert len(compared) > 800
    for text in compared:
        assert ours.tokenizer.encode(text).ids == theirs.encode(text)  # type: ignore[attr-defined]


def test_with_the_split_at_digits_transformers_agrees_on_all_texts(
    ours: SmolLM2, theirs: object
) -> None:
    from tokenizers import pre_tokenizers

    backend = theirs.backend_tokenizer  # type: ignore[attr-defined]
    before = backend.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    try:
        for text in texts():
            ids = ours.tokenizer.encode(text).ids
            assert ids == backend.encode(text).ids
            assert ours.tokenizer.decode(ids, skip_special_tokens=False) == text
    finally:
        backend.pre_tokenizer = before


def test_the_logits_are_those_of_transformers(ours: SmolLM2) -> None:
    from transformers import AutoModelForCausalLM

    os.environ["TQDM_DISABLE"] = "1"
    theirs = AutoModelForCausalLM.from_pretrained(
        PATH.parent, gguf_file=PATH.name, dtype=torch.float32
    )
    text = next(d.text for d in stdlib_corpus("held_out") if len(d.text) > 2000)
    ids = torch.tensor([ours.tokenizer.encode(text).ids[:256]])
    with torch.no_grad():
        found = ours.model(ids)
        expected = theirs(ids).logits
    # Sums of 576 and 1536 floats in another order: 5e-5 was measured, of logits up to 40.
    difference = (found - expected).abs()
    assert float(difference.mean()) < 1e-4
    assert float(difference.max()) < 1e-5 * float(expected.abs().max())


def test_another_dtype(ours: SmolLM2) -> None:
    model, _ = load_smollm2(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
