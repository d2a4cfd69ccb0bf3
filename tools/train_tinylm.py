"""Train the tiny language model that ships with the course, on the standard library of the Python that runs this.

    python tools/train_tinylm.py RUN --minutes 75 --compile     (once more after a stop: it goes on)
    python tools/export_tinylm.py RUN FOLDER                    (then: weights, evaluation and model card)

The idea: the loop of every language model, as small as it gets: predict the next token, AdamW, warm-up, a cosine down.
The schedule runs on the larger of two shares, of the steps and of the minutes that are allowed, so that on a machine
that others use too the learning rate still ends where it should. With --steps alone, a run that was stopped and goes on
ends with the same weights, bit for bit, as one that was not.

Source: Kaplan et al. 2020 and Hoffmann et al. 2022 for the recipe; Loshchilov and Hutter 2017, 2019 (cosine, AdamW).

How it differs from ``tinylm_data.py``: there the corpus becomes batches, here batches become weights.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tinylm_data import batch, train_tokenizer
from torch import Tensor
from tqdm import tqdm

from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.texts.corpus import encode_documents, stdlib_corpus
from qcourse.texts.corpus_sources import Document

CHECKPOINT_EVERY_S = 180


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside the corpus. It ends with its steps or its minutes, whichever come first."""

    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    batch_size: int = 16
    context: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    docs_share: float = 0.4  # more repeats the docs so often that they are learnt by heart
    device: str = "cpu"
    compile: bool = False
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    def llama(self) -> LlamaConfig:
        """The model's sizes: the head is the embedding, and it is meant for the context that it was trained on."""
        sizes = {
            name: value
            for name, value in asdict(self).items()
            if name in LlamaConfig.__dataclass_fields__
        }
        return LlamaConfig(**sizes, max_position_embeddings=self.context, tie_word_embeddings=True)

    def share_done(self, step: int, elapsed_s: float) -> float:
        """The larger share used up, of steps and of minutes; 1 is the end."""
        return max(step / (self.steps or math.inf), elapsed_s / 60 / (self.minutes or math.inf))

    def learning_rate_at(self, step: int, elapsed_s: float) -> float:
        """Linear warm-up, then a half cosine from the learning rate down to 2% of it."""
        cosine = 0.51 + 0.49 * math.cos(math.pi * min(1.0, self.share_done(step, elapsed_s)))
        return self.learning_rate * min(cosine, (step + 1) / self.warmup_steps)


def make_optimizer(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, in which matrices decay and the norms' weights do not."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim == 2],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def loss_of(model: Llama, ids: Tensor) -> Tensor:
    """Mean nats a token, for ids (batch, context + 1); matrix products in bfloat16."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(
    recipe: Recipe, streams: Mapping[str, Tensor], folder: Path, *, stop_at: float = math.inf
) -> Llama:
    """Train to the recipe's end, going on from the folder's checkpoint if there is one; stop_at cuts it short."""
    model = random_llama(recipe.llama(), seed=recipe.seed).to(recipe.device)
    optimizer = make_optimizer(model, recipe)
    step, elapsed_s, curve = _resume(folder, model, optimizer)
    loss_fn: Callable[[Llama, Tensor], Tensor] = (
        torch.compile(loss_of) if recipe.compile else loss_of
    )
    sample = {"seed": recipe.seed, "size": recipe.batch_size, "context": recipe.context}
    started, saved = time.monotonic() - elapsed_s, time.monotonic()
    with tqdm(total=recipe.steps, initial=step, unit="step", mininterval=10) as bar:
        while (
            step < stop_at and recipe.share_done(step, elapsed_s := time.monotonic() - started) < 1
        ):
            ids = batch(streams, step, docs_share=recipe.docs_share, **sample).to(recipe.device)
            curve.append(
                _update(
                    loss_fn(model, ids), optimizer, recipe, recipe.learning_rate_at(step, elapsed_s)
                )
            )
            step += 1
            bar.set_postfix(loss=f"{sum(curve[-50:]) / len(curve[-50:]):.3f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > CHECKPOINT_EVERY_S:
                _save(folder, model, optimizer, step, time.monotonic() - started, curve)
                saved = time.monotonic()
    _save(folder, model, optimizer, step, time.monotonic() - started, curve)
    return model


def _update(
    loss: Tensor, optimizer: torch.optim.Optimizer, recipe: Recipe, learning_rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
        (p for group in optimizer.param_groups for p in group["params"]), recipe.clip
    )
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _save(
    folder: Path,
    model: Llama,
    optimizer: torch.optim.Optimizer,
    step: int,
    elapsed_s: float,
    curve: list[float],
) -> None:
    # Aside, then renamed: a stop while writing leaves the old one whole.
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(
        state | {"step": step, "elapsed_s": elapsed_s, "curve": curve}, folder / "checkpoint.new"
    )
    (folder / "checkpoint.new").replace(folder / "checkpoint.pt")


def _resume(
    folder: Path, model: Llama, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[float]]:
    if not (folder / "checkpoint.pt").is_file():
        return 0, 0.0, []
    state: dict[str, Any] = torch.load(
        folder / "checkpoint.pt", weights_only=True, map_location="cpu"
    )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["elapsed_s"], state["curve"]


def prepare(documents: tuple[Document, ...], recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Learn the tokenizer, encode the documents, and write down in the folder what they were."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents, vocabulary=recipe.vocab_size)
    streams, sizes = {}, {}
    for kind in ("docs", "code"):
        of_kind = [document for document in documents if document.kind == kind]
        streams[kind] = encode_documents(of_kind, tokenizer).to(torch.int32)
        sizes[kind] = {
            "documents": len(of_kind),
            "bytes": sum(len(document.text.encode()) for document in of_kind),
            "tokens": len(streams[kind]),
        }
    corpus = {"python": platform.python_version(), "torch": torch.__version__, **sizes}
    (folder / "corpus.json").write_text(json.dumps(corpus, indent=1) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(streams, folder / "streams.safetensors")  # last: with it, the folder is prepared
    return streams


def main(arguments: list[str] | None = None) -> None:
    """Take the recipe from the command line, and the streams from the folder if an earlier run left them there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="where checkpoints go, and where a stopped run goes on from"
    )
    for field in fields(Recipe):
        options = (
            {"action": argparse.BooleanOptionalAction}
            if field.type is bool
            else {"type": _parser_of(field.type)}
        )
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **options)
    given = vars(parser.parse_args(arguments))
    folder = given.pop("folder")
    try:
        recipe = Recipe(**given)
    except ValueError as error:
        parser.error(str(error))
    if recipe.steps is None and recipe.minutes is None:
        parser.error("say when to end: --steps or --minutes")
    prepared = folder / "streams.safetensors"
    streams = (
        load_file(prepared)
        if prepared.is_file()
        else prepare(stdlib_corpus("train"), recipe, folder)
    )
    (folder / "recipe.json").write_text(
        json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8"
    )
    print(*(f"{kind}: {len(ids):,} tokens" for kind, ids in streams.items()), sep=", ")
    train(recipe, streams, folder)


def _parser_of(annotation: Any) -> Callable[[str], Any]:
    return {int | None: int, float | None: float}.get(annotation, annotation)


if __name__ == "__main__":
    main()
