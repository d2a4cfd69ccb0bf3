"""Any causal language model of the Hugging Face hub, by name, at a revision of one's choice.

The idea: what quantizes the course's own model quantizes any other, so all that is to be added is a way to get one. A
name on the hub is a moving target; ``revision`` pins it to a commit. Without a network, a folder on disk or what an
earlier call has left in the cache serves as well.

Source: transformers' AutoModelForCausalLM and AutoTokenizer.

How it differs from ``tinylm.py`` and ``minilm.py``: their weights come with the course; these are downloaded.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

OFFLINE = (
    "What works without a network: a folder on disk (load_hub('path/to/model'), with config.json, the weights and the"
    " tokenizer's files); a model that an earlier load_hub has left in the cache; load_tinylm() and load_minilm()"
)


class HubModel(NamedTuple):
    """A language model and its tokenizer, both as transformers makes them."""

    model: nn.Module
    tokenizer: Any


def load_hub(
    name: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> HubModel:
    """Load a causal language model and its tokenizer through transformers; no code of the checkpoint's is run.

    Args:
        name: "owner/model" on the hub, or a folder on disk.
        revision: commit, tag or branch on the hub; by default the newest. Give a commit's hash for a result that others
            are to find again.
        dtype: what to hold the weights in; by default as they are stored.

    Returns:
        The model in eval mode, without gradients, and the tokenizer.

    Raises:
        ImportError: transformers is not installed.
        OSError: the model, or this revision of it, was not found, or the hub not reached; the message says what was
            tried and what works offline.
        ValueError: name is empty, or a folder with a revision, or holds no causal language model; the tokenizer or a
            tensor is missing, damaged, or does not fit; or it would need code of its own.
    """
    _check(name, revision)
    try:
        from transformers import (  # slow to import, and needed here alone
            AutoModelForCausalLM,
            AutoTokenizer,
        )
    except ImportError as error:
        raise ImportError("load_hub needs transformers: pip install transformers") from error
    try:
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        options |= {"dtype": "auto" if dtype is None else dtype, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        at = "" if revision is None else f" at revision {revision!r}"
        hub = f"the hub and its cache on this machine for {name!r}{at}"
        where = f"the folder {name}" if Path(name).is_dir() else hub
        raise OSError(
            f"could not load {name}. Tried: {where}. transformers says: {error}\n{OFFLINE}"
        ) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} is no causal language model that can be loaded: {error}"
        ) from error
    model, found = loaded
    if found["missing_keys"]:  # transformers fills them with random numbers
        raise ValueError(f"{name} lacks the weights {sorted(found['missing_keys'])}")
    return HubModel(model.eval().requires_grad_(False), tokenizer)


def _check(name: str | Path, revision: str | None) -> None:
    if not str(name).strip():
        raise ValueError(f"name={name!r} must be 'owner/model' or a folder")
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} pins a model of the hub; {name} is a folder, which has one version only"
            )
    elif isinstance(name, Path) or name.startswith((".", "/")) or name.count("/") > 1:
        raise FileNotFoundError(f"could not load {name}: there is no such folder. {OFFLINE}")
