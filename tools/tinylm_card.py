"""The tiny language model's card: the measurements of export_tinylm.py as text and tables.

The idea: one page says what the model is, what it was trained on, how, and how good it is. Every
number comes from the report.

Source: Mitchell et al. 2019, "Model Cards for Model Reporting".

How it differs from training.json: that holds the same numbers for programs.
"""

from dataclasses import fields
from typing import Any

from tinylm_recipe import Recipe


def card(report: dict[str, Any]) -> str:
    """Return the card in Markdown, from the report of ``export_tinylm.export``."""
    sections = [
        _what(report),
        _read(report),
        _made(report),
        _good(report),
        _writes(report),
        _again(report),
    ]
    return "\n\n".join(sections)


def _row(*cells: object) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _what(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    # the table of sizes has one row
    millions = report["parameters"] / 1e6
    sizes = _row(
        recipe["num_hidden_layers"],
        recipe["hidden_size"],
        recipe["intermediate_size"],
        recipe["num_attention_heads"],
        recipe["num_key_value_heads"],
        recipe["vocab_size"],
        recipe["context"],
        "tied to the embedding",
        "bfloat16",
    )
    return f"""# Tiny LM

A Llama of {millions:.1f} million parameters that continues Python documentation and source. The
course quantizes it: it is small enough to ship with the course and to run on any laptop, and it is
trained, so its weights and activations are those of a real language model. Its text is not
reliable: do not use it for anything else.

| layers | hidden | MLP | heads | key-value heads | vocabulary | context | head | stored as |
|---|---|---|---|---|---|---|---|---|
{sizes}

`qcourse.models.tinylm.load_tinylm()` reads this folder, and so does transformers:
`AutoModelForCausalLM.from_pretrained(folder)`. Every text begins with the token 0,
`<|endoftext|>`."""


def _read(report: dict[str, Any]) -> str:
    corpus = report["corpus"]
    rows = []
    for kind in ("docs", "code"):
        sizes = corpus[kind]
        row = _row(kind, f"{sizes['documents']:,}", f"{sizes['bytes']:,}", f"{sizes['tokens']:,}")
        rows.append(row)
    table = "\n".join(rows)
    return f"""## What it has read

The standard library of Python {corpus["python"]}: help topics and docstrings ("docs"), and source
without its docstrings ("code"); no tests. A twentieth is held out, chosen by the SHA-256 of the
qualified name: top-level classes and functions of a package with their docstrings, source and C
twin, and help topics. Every paragraph of 40 characters that they share with other texts is removed
from those (`qcourse/texts/corpus.py`). CPython is copyright of the Python Software Foundation,
under the PSF License.

| kind | documents | bytes | tokens |
|---|---|---|---|
{table}"""


def _made(report: dict[str, Any]) -> str:
    return f"""## How it was made

{_training(report)}

The loss of training, in nats per token (more points in training.json):

| up to step | mean loss |
|---|---|
{_curve(report)}"""


def _training(report: dict[str, Any]) -> str:
    """Return a paragraph on the steps and the optimizer."""
    recipe = report["recipe"]
    # how often the run has read each document of the docs
    docs_tokens = report["tokens"] * recipe["docs_share"]
    epochs = docs_tokens / report["corpus"]["docs"]["tokens"]
    lines = [
        f"{report['steps']:,} steps of {recipe['batch_size']} x {recipe['context']} tokens,",
        f"{report['tokens'] / 1e6:.1f} million in all, in {report['minutes']:.0f} minutes.",
        f"{recipe['docs_share']:.0%} of the windows are docs, which makes {epochs:.1f} epochs.",
        f"AdamW at {recipe['learning_rate']:g} (warm-up {recipe['warmup_steps']} steps, cosine to",
        f"2%), weight decay {recipe['weight_decay']:g}, gradients clipped at {recipe['clip']:g},",
        f"matrix products in bfloat16, seed {recipe['seed']}; torch {report['corpus']['torch']}.",
    ]
    return "\n".join(lines)


def _curve(report: dict[str, Any]) -> str:
    """Return the rows of the training loss, every third point of the report."""
    # a third of the points is enough for a page
    points = report["loss"][1::3]
    return "\n".join(_row(f"{step:,}", f"{loss:.3f}") for step, loss in points)


def _good(report: dict[str, Any]) -> str:
    context = report["recipe"]["context"]
    # two strides per kind of text
    rows = []
    for kind, measured in report["held_out"].items():
        for scores in measured:
            rows.append(_score_row(kind, scores))
    table = "\n".join(rows)
    return f"""## How good it is

On the held-out text of the same Python, in windows of {context} tokens, adjacent and overlapping (a
smaller stride); beside it what `xz -9` needs for the same bytes, and the model's share of that.

| kind | bytes | tokens | stride | perplexity | bits per byte | xz: bits per byte | share |
|---|---|---|---|---|---|---|---|
{table}"""


def _score_row(kind: str, scores: dict[str, Any]) -> str:
    bits = scores["bits_per_byte"]
    # the share: bits of the model per bit of xz
    xz_bits = scores["xz_bits_per_byte"]
    return _row(
        kind,
        f"{scores['bytes']:,}",
        f"{scores['tokens']:,}",
        scores["stride"],
        f"{scores['perplexity']:.2f}",
        f"{bits:.3f}",
        f"{xz_bits:.3f}",
        f"{bits / xz_bits:.2f}",
    )


def _writes(report: dict[str, Any]) -> str:
    blocks = [f"```text\n{text}\n```" for text in report["samples"].values()]
    samples = "\n\n".join(blocks)
    return f"## What it writes\n\n{samples}"


def _again(report: dict[str, Any]) -> str:
    options = _options(report["recipe"])
    command = " ".join(["python tools/train_tinylm.py RUN", *options])
    python = report["corpus"]["python"]
    return f"""## To make it again

`{command}`, then `python tools/export_tinylm.py RUN FOLDER`, with Python
{python}: another version has other texts, which give other weights.
"""


def _options(recipe: dict[str, Any]) -> list[str]:
    """Return the options of train_tinylm.py that differ from the recipe's defaults."""
    options = []
    for field in fields(Recipe):
        value = recipe[field.name]
        name = field.name.replace("_", "-")
        if value == field.default:
            continue
        # argparse spells a switch as --compile or --no-compile
        if field.type is bool:
            options.append(f"--{name}" if value else f"--no-{name}")
        else:
            options.append(f"--{name} {value}")
    return options
