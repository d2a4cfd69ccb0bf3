"""The tiny language model: a Llama of six million parameters that writes Python documentation, and its tokenizer.

The idea: what quantization does to a language model is seen on a language model, and this one is on every learner's
machine: it comes with the package, and was trained on what else is there, the standard library's documentation and
source. A text that it never saw is there too (``stdlib_corpus("held_out")``), so its perplexity means something.

Source: trained by tools/train_tinylm.py; MODEL_CARD.md beside the weights says on what, for how long, and how well.

How it differs from ``llama.py``: there is the architecture, here one set of weights for it, with the words it knows.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load as parse_safetensors
from tokenizers import Tokenizer

from qcourse.models.llama import Llama, load_weights
from qcourse.models.llama_config import LlamaConfig

FOLDER = Path(__file__).parent / "data" / "tinylm"
FILES = ("config.json", "tokenizer.json", "model.safetensors")
CHECKSUMS = "SHA256SUMS"  # written with the files; in the format that sha256sum reads


class TinyLM(NamedTuple):
    """A language model and its tokenizer; id 0 (``<|endoftext|>``) begins and ends a text."""

    model: Llama
    tokenizer: Tokenizer


def load_tinylm(folder: Path | None = None, *, dtype: torch.dtype = torch.float32) -> TinyLM:
    """Load the model that comes with the package, after checking its files' SHA-256; nothing is downloaded.

    Args:
        folder: holds config.json, tokenizer.json, model.safetensors and their SHA256SUMS; by default the package's own.
            transformers reads the same folder: ``AutoModelForCausalLM.from_pretrained(folder)``.
        dtype: what to compute in; the stored weights are bfloat16, which float32 holds exactly.

    Returns:
        The model in eval mode, without gradients, and the tokenizer.

    Raises:
        FileNotFoundError: a file is missing; the message says which, and how to get it.
        ValueError: a file is not the one that SHA256SUMS describes; the message gives both hashes.

    >>> from qcourse.models.generate import generate
    >>> model, tokenizer = load_tinylm()
    >>> prompt = torch.tensor([0, *tokenizer.encode("Return a list of the").ids])
    >>> tokenizer.decode(generate(model, prompt, 8).tolist()).startswith("Return a list of the")
    True
    """
    folder = FOLDER if folder is None else folder
    config, tokenizer, weights = _read_checked(folder)
    tensors = {name: weight.to(dtype) for name, weight in parse_safetensors(weights).items()}
    sizes = LlamaConfig.from_transformers(json.loads(config))
    return TinyLM(load_weights(sizes, tensors), Tokenizer.from_buffer(tokenizer))


def _read_checked(folder: Path) -> list[bytes]:
    missing = [name for name in (CHECKSUMS, *FILES) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the tiny language model is incomplete: {folder} lacks {' and '.join(missing)}. It comes with the package:"
            " install that again, or make another one with tools/train_tinylm.py"
        )
    lines = (folder / CHECKSUMS).read_text(encoding="ascii").splitlines()
    expected = {name: digest for digest, name in (line.split() for line in lines)}
    contents = []
    for name in FILES:
        content = (folder / name).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected.get(name):
            raise ValueError(
                f"{folder / name} is damaged or another version: its SHA-256 is {found}, expected"
                f" {expected.get(name)}. It comes with the package: install that again"
            )
        contents.append(content)
    return contents
