"""Turn a run of train_tinylm.py into the folder that ships: weights, tokenizer, evaluation, card.

    python tools/export_tinylm.py RUN FOLDER

The idea: all numbers of the card are computed here, with the model as it will be loaded, on the
held-out text of the Python that runs. So the card always describes the model beside it.

Source: transformers, for the files of a model folder; Mitchell et al. 2019, "Model Cards".

How it differs from ``train_tinylm.py``: that trains; this measures and writes.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tinylm_card import card
from tinylm_recipe import Recipe
from torch import Tensor

from qcourse.models.evaluate import perplexity
from qcourse.models.generate import generate
from qcourse.models.tinylm import CHECKSUMS, FILES, TinyLM, load_tinylm
from qcourse.texts.corpus import SEPARATOR, encode_documents, stdlib_corpus

CURVE_POINTS = 40

# how the card's samples are generated
PROMPTS = ("Return a list of", "class Queue", "The following functions are")
SAMPLE_TOKENS = 120
TEMPERATURE = 0.7
SIZE_LIMIT_BYTES = 20_000_000


def export(run: Path, folder: Path) -> dict[str, Any]:
    """Write the folder; return its measurements, which training.json holds too."""
    recipe = Recipe(**_read_json(run / "recipe.json"))
    state = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    _write_model(state["model"], recipe, run, folder)

    # measured as a learner loads it: rounded to bfloat16
    tinylm = load_tinylm(folder)
    report = {
        "recipe": _read_json(run / "recipe.json"),
        "parameters": sum(p.numel() for p in tinylm.model.parameters()),
        "corpus": _read_json(run / "corpus.json"),
        "steps": state["step"],
        "tokens": state["step"] * recipe.batch_size * recipe.context,
        "minutes": round(state["elapsed_s"] / 60, 1),
        "loss": thinned(state["curve"]),
        "held_out": _evaluate(tinylm, recipe.context),
        "samples": {prompt: sample(tinylm, prompt) for prompt in PROMPTS},
    }
    _write_report(report, folder)
    return report


def _evaluate(tinylm: TinyLM, context: int) -> dict[str, list[dict[str, float]]]:
    """Return the measures of each kind of text, with adjacent and overlapping windows."""
    # with overlap, each token has more context, so its loss is lower
    strides = (context, context // 4)
    measures: dict[str, list[dict[str, float]]] = {}
    for kind in ("docs", "code"):
        measures[kind] = [evaluate_kind(tinylm, kind, stride=stride) for stride in strides]
    return measures


def _write_report(report: dict[str, Any], folder: Path) -> None:
    _write_json(folder / "training.json", report)
    (folder / "MODEL_CARD.md").write_text(card(report), encoding="utf-8")

    # the folder ships with the package
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    if size_bytes > SIZE_LIMIT_BYTES:
        limit = f"{SIZE_LIMIT_BYTES:,}"
        raise ValueError(f"the folder must stay below {limit} bytes, got {size_bytes:,}")


def _write_model(weights: dict[str, Tensor], recipe: Recipe, run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # the output layer shares the embedding's weights, so it is not stored
    halved = {name: w.bfloat16() for name, w in weights.items() if name != "lm_head.weight"}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(run / "tokenizer.json", folder)
    _write_configs(recipe, folder)

    # in the format of sha256sum
    lines = []
    for name in FILES:
        checksum = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        lines.append(f"{checksum}  {name}\n")
    (folder / CHECKSUMS).write_text("".join(lines), encoding="ascii")


def _write_configs(recipe: Recipe, folder: Path) -> None:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = {**recipe.llama().to_transformers(), **ends, "dtype": "bfloat16"}
    generation = {**ends, "do_sample": True, "temperature": TEMPERATURE}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SEPARATOR,
        "eos_token": SEPARATOR,
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "config.json", model)
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "tokenizer_config.json", tokenizer)


def evaluate_kind(tinylm: TinyLM, kind: str, *, stride: int) -> dict[str, float]:
    """Return the model's measures on the held-out text of a kind, and those of xz."""
    # no document of the training text
    documents = [document for document in stdlib_corpus("held_out") if document.kind == kind]
    text = "\n\n".join(document.text for document in documents).encode()
    tokens = encode_documents(documents, tinylm.tokenizer)
    context = tinylm.model.config.max_position_embeddings
    found = perplexity(tinylm.model, tokens, context, stride=stride)
    return {
        "nll": found.nll,
        "tokens": found.tokens,
        "context": found.context,
        "stride": found.stride,
        "bytes": len(text),
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte(len(text)),
        "xz_bits_per_byte": xz_bits_per_byte(text),
    }


def xz_bits_per_byte(text: bytes) -> float:
    """Return the bits per byte of ``xz -9``, a compressor without prior knowledge of Python."""
    compressed = lzma.compress(text, preset=9)
    return 8 * len(compressed) / len(text)


def thinned(losses: list[float]) -> list[tuple[int, float]]:
    """Return (last step, mean loss) of at most 40 stretches of equal length."""
    ends = [round(i * len(losses) / CURVE_POINTS) for i in range(CURVE_POINTS + 1)]
    points = []
    for start, end in itertools.pairwise(ends):
        # short runs have fewer steps than points
        if end > start:
            mean = sum(losses[start:end]) / (end - start)
            points.append((end, mean))
    return points


def sample(tinylm: TinyLM, prompt: str) -> str:
    """Return the model's continuation of a prompt at the beginning of a text, from seed 0."""
    positions = tinylm.model.config.max_position_embeddings
    # token 0 begins every text
    ids = torch.tensor([0, *tinylm.tokenizer.encode(prompt).ids])[:positions]
    # a prompt and its continuation fit the context
    generator = torch.Generator().manual_seed(0)
    room = min(SAMPLE_TOKENS, positions - len(ids))
    text = generate(tinylm.model, ids, room, temperature=TEMPERATURE, generator=generator, stop=0)
    return tinylm.tokenizer.decode(text.tolist())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Export, and print the card."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    report = export(arguments.run, arguments.folder)
    print(card(report))


if __name__ == "__main__":
    main()
