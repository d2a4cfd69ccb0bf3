"""Training on a corpus of a few lines: it learns, resumes to the same bits, exports everything."""

import itertools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import export_tinylm
import pytest
import tinylm_card
import tinylm_data
import torch
import train_tinylm
from export_tinylm import export, thinned, xz_bits_per_byte
from torch import Tensor
from train_tinylm import Recipe, prepare, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcourse.models.llama import random_llama
from qcourse.models.tinylm import load_tinylm
from qcourse.texts.corpus import SEPARATOR, encode_documents
from qcourse.texts.corpus_sources import Document

TINY = Recipe(
    steps=12,
    batch_size=4,
    context=16,
    warmup_steps=3,
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DOCUMENTS = (
    Document("a", "docs", "Return the sum of two numbers.\n\n" * 8),
    Document("b", "docs", "Return the product of two numbers.\n\n" * 8),
    Document("a", "code", "def add(a, b):\n    return a + b\n\n" * 8),
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare(DOCUMENTS, TINY, folder)


def weights_of(
    recipe: Recipe, streams: dict[str, Tensor], folder: Path, **options: float
) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    return train(recipe, streams, folder, **options).state_dict()


def test_it_learns(prepared: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    train(replace(TINY, steps=60), prepared[1], tmp_path)
    curve = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["curve"]
    assert len(curve) == 60
    assert curve[0] == pytest.approx(math.log(TINY.vocab_size), abs=0.3)
    assert sum(curve[-5:]) / 5 < curve[0] / 2


@pytest.mark.parametrize("stops", [[5], [1, 2, 11]])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    prepared: tuple[Path, dict[str, Tensor]], tmp_path: Path, stops: list[int]
) -> None:
    expected = weights_of(TINY, prepared[1], tmp_path / "whole")
    for stop in stops:
        stopped = weights_of(TINY, prepared[1], tmp_path / "parts", stop_at=stop)
    assert not torch.equal(stopped["lm_head.weight"], expected["lm_head.weight"])
    found = weights_of(TINY, prepared[1], tmp_path / "parts")
    assert all(torch.equal(found[name], w) for name, w in expected.items())
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    parts = torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)
    assert whole["curve"] == parts["curve"]
    assert not list(tmp_path.rglob("*.new"))


def test_the_seed_decides(prepared: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    def head(name: str, seed: int) -> Tensor:
        recipe = replace(TINY, seed=seed, steps=2)
        return weights_of(recipe, prepared[1], tmp_path / name)["lm_head.weight"]

    one = head("one", 0)
    assert torch.equal(one, head("again", 0))
    assert not torch.equal(one, head("other", 1))


def test_minutes_end_a_run_and_count_over_a_stop(
    prepared: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(train_tinylm.time, "monotonic", lambda: next(clock) * 6.0)
    recipe = replace(TINY, steps=None, minutes=2)
    train(recipe, prepared[1], tmp_path, stop_at=3)
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["elapsed_s"]
    train(recipe, prepared[1], tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < before < 120 <= state["elapsed_s"] < 140
    assert state["step"] < 20


def test_a_checkpoint_is_written_on_the_way(
    prepared: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_tinylm, "CHECKPOINT_EVERY_S", 0)
    saved = []
    monkeypatch.setattr(train_tinylm, "_save", lambda *state: saved.append(state[3]))
    train(replace(TINY, steps=3), prepared[1], tmp_path)
    assert saved == [1, 2, 3, 3]


def test_the_schedule_warms_up_and_comes_down() -> None:
    recipe = Recipe(steps=1000, minutes=10, warmup_steps=10, learning_rate=1.0)
    rates = [recipe.learning_rate_at(step, 0.0) for step in range(1001)]
    assert rates[0] == 0.1
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[500] == pytest.approx(0.51)
    assert rates[1000] == pytest.approx(0.02)
    assert recipe.learning_rate_at(10, 600) == recipe.learning_rate_at(1000, 0) == rates[1000]
    assert recipe.learning_rate_at(10, 300) == pytest.approx(rates[500])
    assert replace(recipe, steps=None).share_done(10**9, 300) == 0.5
    assert replace(recipe, minutes=None).share_done(500, 1e9) == 0.5


@pytest.mark.parametrize("field", ["steps", "minutes", "warmup_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_a_recipe_that_never_ends_or_begins_is_refused(
    field: str, value: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"{field} must be above 0, got {value}"):
        replace(TINY, **{field: value})
    with pytest.raises(SystemExit):
        train_tinylm.main([str(tmp_path), f"--{field.replace('_', '-')}={value}"])
    assert f"{field} must be above 0" in capsys.readouterr().err


def test_matrices_decay_and_norms_do_not() -> None:
    groups = train_tinylm.make_optimizer(random_llama(TINY.llama(), seed=0), TINY).param_groups
    found = [(group["weight_decay"], {p.ndim for p in group["params"]}) for group in groups]
    assert found == [(0.1, {2}), (0.0, {1})]
    assert len(groups[0]["params"]) == 7 * 2 + 1  # the tied head once


def test_the_tokenizer_spells_anything_and_knows_its_corpus(
    prepared: tuple[Path, dict[str, Tensor]],
) -> None:
    tokenizer = tinylm_data.train_tokenizer(DOCUMENTS, vocabulary=300)
    assert tokenizer.token_to_id(SEPARATOR) == 0
    assert tokenizer.get_vocab_size() == 300
    for text in ["naïve ∑ 量子化 🐍\r\n\t x", "", " ", "\x00\x7f", DOCUMENTS[0].text]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("Return the sum").ids) < len("Return the sum") / 2
    ids = encode_documents([d for d in DOCUMENTS if d.kind == "docs"], tokenizer)
    assert (ids == 0).nonzero().flatten().tolist()[::2] == [0, len(ids) - 1]
    assert torch.equal(prepared[1]["docs"].long(), ids)


def test_batches_are_windows_of_the_streams_and_repeatable() -> None:
    streams = {"docs": torch.arange(100), "code": torch.arange(1000, 1100)}
    options = {"seed": 0, "size": 2000, "context": 16}
    rows = tinylm_data.batch(streams, 3, docs_share=0.75, **options)
    assert rows.shape == (2000, 17)
    # No window crosses from one stream to the other.
    assert torch.equal(rows, rows[:, :1] + torch.arange(17))
    assert 0.7 < (rows[:, 0] < 1000).double().mean() < 0.8
    assert {0, 83} <= set(rows[:, 0].tolist())  # the first and the last place there is
    assert torch.equal(rows, tinylm_data.batch(streams, 3, docs_share=0.75, **options))
    assert not torch.equal(rows, tinylm_data.batch(streams, 4, docs_share=0.75, **options))
    options["seed"] = 1
    assert not torch.equal(rows, tinylm_data.batch(streams, 3, docs_share=0.75, **options))


def test_the_export_is_whole(
    prepared: tuple[Path, dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = {"held_out": DOCUMENTS, "train": ()}
    monkeypatch.setattr(export_tinylm, "stdlib_corpus", corpus.__getitem__)
    run = prepared[0]
    folder = tmp_path / "model"
    trained = train(TINY, prepared[1], run)
    (run / "recipe.json").write_text(json.dumps(asdict(TINY)), encoding="utf-8")
    report = export(run, folder)
    model, tokenizer = load_tinylm(folder)
    for name, weight in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16().float())
    ids = torch.tensor([[0, *tokenizer.encode("Return the").ids]])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(folder)("Return the").input_ids == ids[0, 1:].tolist()
    assert theirs.generation_config.eos_token_id == 0
    docs, overlapping = report["held_out"]["docs"]
    assert (docs["stride"], overlapping["stride"]) == (16, 4)
    bits = math.log2(docs["perplexity"]) * docs["tokens"]
    assert docs["bits_per_byte"] == pytest.approx(bits / docs["bytes"], rel=1e-6)
    assert report["tokens"] == 12 * 4 * 16
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    for measured in (docs, overlapping):
        perplexity = f"{measured['perplexity']:.2f}"
        bits_per_byte = f"{measured['bits_per_byte']:.3f}"
        assert f"| {measured['stride']} | {perplexity} | {bits_per_byte} |" in text
    assert json.loads((folder / "training.json").read_text(encoding="utf-8"))["steps"] == 12
    command = re.search(r"`python tools/train_tinylm.py RUN (.*?)`", text)
    assert command is not None
    assert command[1].startswith("--steps 12 --batch-size 4 ")
    assert recipe_of(command[1], monkeypatch) == TINY


def recipe_of(options: str, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe that train_tinylm reads from a command line."""
    given: list[Recipe] = []

    def note(documents: object, recipe: Recipe, folder: Path) -> dict:
        given.append(recipe)
        return {}

    monkeypatch.setattr(train_tinylm, "prepare", note)
    monkeypatch.setattr(train_tinylm, "stdlib_corpus", lambda part: ())
    monkeypatch.setattr(train_tinylm, "train", lambda *_: None)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: 0)
    train_tinylm.main(["nowhere", *options.split()])
    return given[0]


@pytest.mark.parametrize(
    "recipe", [Recipe(minutes=75, compile=True), Recipe(steps=9, learning_rate=1e-4, device="cuda")]
)
def test_the_card_says_how_to_make_it_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tinylm_card._again({"recipe": asdict(recipe), "corpus": {"python": "3.12"}})
    command = text.split("`")[1].removeprefix("python tools/train_tinylm.py RUN ")
    assert recipe_of(command, monkeypatch) == recipe


def test_the_curve_is_thinned_to_means() -> None:
    assert thinned([4.0, 2.0]) == [(1, 4.0), (2, 2.0)]
    points = thinned([float(i) for i in range(1000)])
    assert [step for step, _ in points] == list(range(25, 1001, 25))
    assert [loss for _, loss in points] == [step - 13 for step, _ in points]


def test_xz_knows_a_repetition() -> None:
    assert xz_bits_per_byte(bytes(10_000)) < 0.2 < 8 < xz_bits_per_byte(bytes(range(256)))


def test_main_prepares_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = {"held_out": (), "train": DOCUMENTS}
    monkeypatch.setattr(train_tinylm, "stdlib_corpus", corpus.__getitem__)
    numbers = {name: value for name, value in asdict(TINY).items() if type(value) is int}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
    train_tinylm.main([str(tmp_path / "run"), *options, "--steps=4", "--no-compile"])
    monkeypatch.setattr(train_tinylm, "prepare", None)  # what is there is not made again
    train_tinylm.main([str(tmp_path / "run"), *options, "--steps=6"])
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 6
    assert json.loads((tmp_path / "run" / "recipe.json").read_text(encoding="utf-8"))["steps"] == 6
    corpus = json.loads((tmp_path / "run" / "corpus.json").read_text(encoding="utf-8"))
    assert corpus["docs"]["documents"] == 2


def test_main_asks_for_an_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_tinylm.main([str(tmp_path)])
    assert "--steps or --minutes" in capsys.readouterr().err
