"""Turn a finished run of train_tinylm.py into the folder that ships: weights, tokenizer, evaluation, model card.

    python tools/export_tinylm.py RUN FOLDER

The idea: everything that the card says is computed here, with the model as it will be loaded, from the held-out text of
the Python that runs; so the card cannot praise another model than the one beside it.

Source: the files of a model folder are those of transformers; Mitchell et al. 2019, "Model Cards".

How it differs from ``train_tinylm.py``: nothing is learned here.
"""

import argparse
import hashlib
import itertools
import json
import lzma
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tinylm_card import card
from torch import Tensor
from train_tinylm import Recipe

from qcourse.models.evaluate import perplexity
from qcourse.models.generate import generate
from qcourse.models.tinylm import CHECKSUMS, FILES, TinyLM, load_tinylm
from qcourse.texts.corpus import SEPARATOR, encode_documents, stdlib_corpus

CURVE_POINTS = 40
PROMPTS = ("Return a list of", "class Queue", "The following functions are")
SAMPLE_TOKENS = 120
TEMPERATURE = 0.7
SIZE_LIMIT_BYTES = 20_000_000


def export(run: Path, folder: Path) -> dict[str, Any]:
    """Write the folder; return what was measured, which training.json holds too."""
    recipe = Recipe(**_read_json(run / "recipe.json"))
    state = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    _write_model(state["model"], recipe, run, folder)
    tinylm = load_tinylm(folder)
    report = {
        "recipe": _read_json(run / "recipe.json"),
        "parameters": sum(p.numel() for p in tinylm.model.parameters()),
        "corpus": _read_json(run / "corpus.json"),
        "steps": state["step"],
        "tokens": state["step"] * recipe.batch_size * recipe.context,
        "minutes": round(state["elapsed_s"] / 60, 1),
        "loss": thinned(state["curve"]),
        "held_out": {
            kind: [
                evaluate_kind(tinylm, kind, stride=recipe.context // overlap) for overlap in (1, 4)
            ]
            for kind in ("docs", "code")
        },
        "samples": {prompt: sample(tinylm, prompt) for prompt in PROMPTS},
    }
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(card(report), encoding="utf-8")
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    if size_bytes > SIZE_LIMIT_BYTES:
        raise ValueError(
            f"the folder must stay below {SIZE_LIMIT_BYTES:,} bytes, got {size_bytes:,}"
        )
    return report


def _write_model(weights: dict[str, Tensor], recipe: Recipe, run: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    halved = {name: w.bfloat16() for name, w in weights.items() if name != "lm_head.weight"}  # tied
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(run / "tokenizer.json", folder)
    _write_configs(recipe, folder)
    sums = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES
    )
    (folder / CHECKSUMS).write_text(sums, encoding="ascii")


def _write_configs(recipe: Recipe, folder: Path) -> None:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    configs = {
        "config.json": {**recipe.llama().to_transformers(), **ends, "dtype": "bfloat16"},
        "generation_config.json": {**ends, "do_sample": True, "temperature": TEMPERATURE},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SEPARATOR,
            "eos_token": SEPARATOR,
            "model_max_length": recipe.context,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def evaluate_kind(tinylm: TinyLM, kind: str, *, stride: int) -> dict[str, float]:
    """Measure the model on the held-out texts of a kind, and xz on the same bytes."""
    documents = [document for document in stdlib_corpus("held_out") if document.kind == kind]
    text = "\n\n".join(document.text for document in documents).encode()
    tokens = encode_documents(documents, tinylm.tokenizer)
    found = perplexity(
        tinylm.model, tokens, tinylm.model.config.max_position_embeddings, stride=stride
    )
    return asdict(found) | {
        "bytes": len(text),
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte(len(text)),
        "xz_bits_per_byte": xz_bits_per_byte(text),
    }


def xz_bits_per_byte(text: bytes) -> float:
    """What ``xz -9`` needs for the text: the measure of a compressor that knows nothing of Python beforehand."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def thinned(losses: list[float]) -> list[tuple[int, float]]:
    """Mean loss of each of at most 40 stretches of equal length, with the step that ends it."""
    ends = [round(i * len(losses) / CURVE_POINTS) for i in range(CURVE_POINTS + 1)]
    stretches = [(start, end) for start, end in itertools.pairwise(ends) if end > start]
    return [(end, sum(losses[start:end]) / (end - start)) for start, end in stretches]


def sample(tinylm: TinyLM, prompt: str) -> str:
    """Let the model go on from a prompt that begins a text; seeded."""
    positions = tinylm.model.config.max_position_embeddings
    ids = torch.tensor([0, *tinylm.tokenizer.encode(prompt).ids])[:positions]
    generator = torch.Generator().manual_seed(0)
    room = min(SAMPLE_TOKENS, positions - len(ids))
    text = generate(tinylm.model, ids, room, temperature=TEMPERATURE, generator=generator, stop=0)
    return tinylm.tokenizer.decode(text.tolist())


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    """Export, and print the card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(card(export(arguments.run, arguments.folder)))


if __name__ == "__main__":
    main()
