"""The tiny language model's card: what export_tinylm.py measured, in words and tables.

The idea: a reader should learn from one page what the model is, what it has read, how it was made and how good it is;
every number on it comes from the report, none is typed.

Source: Mitchell et al. 2019, "Model Cards for Model Reporting".

How it differs from training.json, which holds the same numbers: this is for people.
"""

from dataclasses import fields
from typing import Any

from train_tinylm import Recipe


def card(report: dict[str, Any]) -> str:
    """Write the card, in Markdown, from the report of ``export_tinylm.export``."""
    return "\n\n".join(
        [
            _what(report),
            _read(report),
            _made(report),
            _good(report),
            _writes(report),
            _again(report),
        ]
    )


def _what(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    return f"""# Tiny LM

A Llama of {report["parameters"] / 1e6:.1f} million parameters that continues Python documentation and source. It is
here to be quantized: small enough to ship with the course and to run on any laptop, and trained, so that its weights
and activations are those of a real language model. It knows nothing reliable: do not use its text for anything else.

| layers | hidden | MLP | heads | key-value heads | vocabulary | context | head | stored as |
|---|---|---|---|---|---|---|---|---|
| {recipe["num_hidden_layers"]} | {recipe["hidden_size"]} | {recipe["intermediate_size"]} |\
 {recipe["num_attention_heads"]} | {recipe["num_key_value_heads"]} | {recipe["vocab_size"]} | {recipe["context"]} |\
 tied to the embedding | bfloat16 |

`qcourse.models.tinylm.load_tinylm()` reads this folder, and so does transformers:
`AutoModelForCausalLM.from_pretrained(folder)`. Every text begins with the token 0, `<|endoftext|>`."""


def _read(report: dict[str, Any]) -> str:
    corpus = report["corpus"]
    rows = "\n".join(
        f"| {kind} | {corpus[kind]['documents']:,} | {corpus[kind]['bytes']:,} | {corpus[kind]['tokens']:,} |"
        for kind in ("docs", "code")
    )
    return f"""## What it has read

The standard library of Python {corpus["python"]}: help topics and docstrings ("docs"), and source without its
docstrings ("code"); no tests. A twentieth is held out, by the SHA-256 of the qualified name: classes and functions of a
package's top level with their docstrings, source and C twin, and help topics. Every paragraph of 40 characters that
they share with other texts is cut out of those (`qcourse/texts/corpus.py`). CPython is copyright of the Python
Software Foundation, under the PSF License.

| kind | documents | bytes | tokens |
|---|---|---|---|
{rows}"""


def _made(report: dict[str, Any]) -> str:
    recipe = report["recipe"]
    epochs = report["tokens"] * recipe["docs_share"] / report["corpus"]["docs"]["tokens"]
    curve = "\n".join(f"| {step:,} | {loss:.3f} |" for step, loss in report["loss"][1::3])
    return f"""## How it was made

{report["steps"]:,} steps of {recipe["batch_size"]} x {recipe["context"]} tokens, {report["tokens"] / 1e6:.1f} million
in all, in {report["minutes"]:.0f} minutes; {recipe["docs_share"]:.0%} of the windows from docs, which is
{epochs:.1f} times all of them. AdamW at {recipe["learning_rate"]:g} (warm-up {recipe["warmup_steps"]} steps,
cosine to 2%), weight decay {recipe["weight_decay"]:g}, gradients clipped at {recipe["clip"]:g}, matrix products in
bfloat16, seed {recipe["seed"]}; torch {report["corpus"]["torch"]}. The loss of training, in nats a token (more points
in training.json):

| up to step | mean loss |
|---|---|
{curve}"""


def _good(report: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {kind} | {s['bytes']:,} | {s['tokens']:,} | {s['stride']} | {s['perplexity']:.2f} |"
        f" {s['bits_per_byte']:.3f} | {s['xz_bits_per_byte']:.3f} | {s['bits_per_byte'] / s['xz_bits_per_byte']:.2f} |"
        for kind, measured in report["held_out"].items()
        for s in measured
    )
    return f"""## How good it is

On the held-out text of the same Python, in windows of {report["recipe"]["context"]} tokens, side by side and
overlapping (a smaller stride); beside it what `xz -9` needs for the same bytes, and the model's share of that.

| kind | bytes | tokens | stride | perplexity | bits per byte | xz: bits per byte | share |
|---|---|---|---|---|---|---|---|
{rows}"""


def _writes(report: dict[str, Any]) -> str:
    samples = "\n\n".join(f"```text\n{text}\n```" for text in report["samples"].values())
    return f"## What it writes\n\n{samples}"


def _again(report: dict[str, Any]) -> str:
    command = " ".join(["python tools/train_tinylm.py RUN", *_options(report["recipe"])])
    return f"""## To make it again

`{command}`, then `python tools/export_tinylm.py RUN FOLDER`, with Python
{report["corpus"]["python"]}: another version has other texts, and other weights come out.
"""


def _options(recipe: dict[str, Any]) -> list[str]:
    """What the command line has to say: all that the recipe's own values do not."""
    options = []
    for field in fields(Recipe):
        value, option = recipe[field.name], f"--{field.name.replace('_', '-')}"
        if value != field.default:
            options.append(
                f"{option} {value}"
                if field.type is not bool
                else option
                if value
                else f"--no{option[1:]}"
            )
    return options
