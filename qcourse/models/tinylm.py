"""The tiny language model: a Llama of six million parameters that writes Python documentation.

It comes with the package and was trained on the standard library's documentation and source. Its
held-out documents, ``stdlib_corpus("held_out")``, give a meaningful perplexity.

Source: tools/train_tinylm.py; MODEL_CARD.md beside the weights.
`llama.py` is the architecture; this is one set of weights and its tokenizer.
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
    """A language model and its tokenizer; id 0 (``<|endoftext|>``) begins and ends a document."""

    model: Llama
    tokenizer: Tokenizer


def load_tinylm(folder: Path | None = None, *, dtype: torch.dtype = torch.float32) -> TinyLM:
    """Return the model in eval mode and its tokenizer, after checking their SHA-256, offline.

    Raises:
        FileNotFoundError, ValueError: a file is missing, or its SHA-256 is not the stored one.

    >>> from qcourse.models.generate import generate
    >>> model, tokenizer = load_tinylm()
    >>> prompt = torch.tensor([0, *tokenizer.encode("Return a list of the").ids])
    >>> tokenizer.decode(generate(model, prompt, 8).tolist()).startswith("Return a list of the")
    True
    """
    folder = FOLDER if folder is None else folder
    config, tokenizer, weights = _read_checked(folder)
    # The file holds bfloat16; float32 represents it exactly.
    tensors = {name: weight.to(dtype) for name, weight in parse_safetensors(weights).items()}
    sizes = LlamaConfig.from_transformers(json.loads(config))
    model = load_weights(sizes, tensors)
    return TinyLM(model, Tokenizer.from_buffer(tokenizer))


def _read_checked(folder: Path) -> list[bytes]:
    """Return the contents of FILES; raise if one is missing or has another SHA-256."""
    missing = [name for name in (CHECKSUMS, *FILES) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"the tiny language model is incomplete: {folder} lacks {' and '.join(missing)}. It"
            " comes with the package: install that again, or make another one with"
            " tools/train_tinylm.py"
        )
    # A damaged file must not load: every number of the lessons is about these weights.
    expected = _stored_checksums(folder / CHECKSUMS)
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


def _stored_checksums(path: Path) -> dict[str, str]:
    """Return SHA-256 by file name."""
    checksums = {}
    for line in path.read_text(encoding="ascii").splitlines():
        digest, name = line.split()
        checksums[name] = digest
    return checksums
