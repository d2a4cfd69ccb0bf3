"""Train the tiny language model of the course on the standard library of the Python that runs this.

    python tools/train_tinylm.py RUN --minutes 75 --compile     (a stopped run: the same command)
    python tools/export_tinylm.py RUN FOLDER                    (then: weights, evaluation, card)

The idea: the loop of every language model at its smallest: predict the next token, AdamW,
warm-up, cosine decay. The schedule follows the larger of two shares, of the steps and of the
minutes allowed, so the learning rate reaches its end on a busy machine too. With --steps alone, a
run that was stopped and resumed ends with the same weights, bit for bit, as one without a stop.

Source: Loshchilov and Hutter 2017, 2019 (cosine, AdamW).

How it differs from ``tinylm_data.py``: that turns the corpus into batches; this turns batches into
weights.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tinylm_data import batch, train_tokenizer
from tinylm_recipe import Recipe, add_options
from torch import Tensor
from tqdm import tqdm

from qcourse.models.llama import Llama, random_llama
from qcourse.texts.corpus import encode_documents, stdlib_corpus
from qcourse.texts.corpus_sources import Document

CHECKPOINT_EVERY_S = 180
SHOWN_STEPS = 50


def make_optimizer(model: Llama, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay for matrices and none for the weights of norms."""
    # weight decay shrinks matrices; a norm's weights must stay near 1
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def loss_of(model: Llama, ids: Tensor) -> Tensor:
    """Return the mean nats per token of ids (batch, context + 1); matrix products in bfloat16."""
    # each token predicts the next one
    inputs = ids[:, :-1]
    targets = ids[:, 1:]
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def train(
    recipe: Recipe, streams: Mapping[str, Tensor], folder: Path, *, stop_at: float = math.inf
) -> Llama:
    """Return the model after the recipe's end or `stop_at` steps, resuming the folder's run."""
    model = random_llama(recipe.llama(), seed=recipe.seed).to(recipe.device)
    optimizer = make_optimizer(model, recipe)
    step, elapsed_s, curve = _resume(folder, model, optimizer)
    loss_fn: Callable[[Llama, Tensor], Tensor] = loss_of
    if recipe.compile:
        loss_fn = torch.compile(loss_of)

    # as if the run had never stopped
    started = time.monotonic() - elapsed_s
    saved = time.monotonic()
    with tqdm(total=recipe.steps, initial=step, unit="step", mininterval=10) as bar:
        while step < stop_at:
            elapsed_s = time.monotonic() - started
            if recipe.share_done(step, elapsed_s) >= 1:
                break
            loss = loss_fn(model, _ids(recipe, streams, step))
            learning_rate = recipe.learning_rate_at(step, elapsed_s)
            curve.append(_update(loss, optimizer, recipe, learning_rate))
            step += 1
            _show(bar, curve)
            if time.monotonic() - saved > CHECKPOINT_EVERY_S:
                _save(folder, model, optimizer, step, time.monotonic() - started, curve)
                saved = time.monotonic()
    _save(folder, model, optimizer, step, time.monotonic() - started, curve)
    return model


def _ids(recipe: Recipe, streams: Mapping[str, Tensor], step: int) -> Tensor:
    """Return the batch of a step on the recipe's device."""
    sizes = {"size": recipe.batch_size, "context": recipe.context}
    ids = batch(streams, step, seed=recipe.seed, docs_share=recipe.docs_share, **sizes)
    return ids.to(recipe.device)


def _show(bar: tqdm, curve: list[float]) -> None:
    """Advance the progress bar, with the mean loss of the last steps."""
    last = curve[-SHOWN_STEPS:]
    bar.set_postfix(loss=f"{sum(last) / len(last):.3f}", refresh=False)
    bar.update()


def _update(
    loss: Tensor, optimizer: torch.optim.Optimizer, recipe: Recipe, learning_rate: float
) -> float:
    """Take one step of the optimizer and return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss.backward()
    # one norm over all gradients
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
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
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"step": step, "elapsed_s": elapsed_s, "curve": curve}
    # a rename is atomic: a stop during torch.save leaves the old checkpoint whole
    aside = folder / "checkpoint.new"
    torch.save(state, aside)
    aside.replace(folder / "checkpoint.pt")


def _resume(
    folder: Path, model: Llama, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[float]]:
    """Load the folder's checkpoint if there is one; return its step, seconds and losses."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return 0, 0.0, []
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["elapsed_s"], state["curve"]


def prepare(documents: tuple[Document, ...], recipe: Recipe, folder: Path) -> dict[str, Tensor]:
    """Train the tokenizer, encode the documents, save both in the folder; return the streams."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(documents, vocabulary=recipe.vocab_size)
    corpus: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    # one stream of token ids per kind, which batches draw from
    streams = {}
    for kind in ("docs", "code"):
        of_kind = [document for document in documents if document.kind == kind]
        streams[kind] = encode_documents(of_kind, tokenizer).to(torch.int32)
        corpus[kind] = {
            "documents": len(of_kind),
            "bytes": sum(len(document.text.encode()) for document in of_kind),
            "tokens": len(streams[kind]),
        }
    _write_json(folder / "corpus.json", corpus)
    tokenizer.save(str(folder / "tokenizer.json"))
    # last: this file marks the folder as prepared
    save_file(streams, folder / "streams.safetensors")
    return streams


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _arguments(arguments: list[str] | None) -> tuple[Path, Recipe]:
    """Return the folder and the recipe of a command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="the folder of checkpoints; a run resumes there")
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    folder = given.pop("folder")
    try:
        recipe = Recipe(**given)
    except ValueError as error:
        parser.error(str(error))
    if recipe.steps is None and recipe.minutes is None:
        parser.error("no end is set: give --steps or --minutes")
    return folder, recipe


def main(arguments: list[str] | None = None) -> None:
    """Train by the command line's recipe, on the streams that an earlier run left in the folder."""
    folder, recipe = _arguments(arguments)
    prepared = folder / "streams.safetensors"
    if prepared.is_file():
        streams = load_file(prepared)
    else:
        streams = prepare(stdlib_corpus("train"), recipe, folder)
    _write_json(folder / "recipe.json", asdict(recipe))
    sizes = [f"{kind}: {len(ids):,} tokens" for kind, ids in streams.items()]
    print(", ".join(sizes))
    train(recipe, streams, folder)


if __name__ == "__main__":
    main()
