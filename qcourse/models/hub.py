"""Load any causal language model of the Hugging Face hub, at a pinned revision.

A name on the hub can change its content; ``revision`` pins it to a commit. Without a network, a
folder on disk or the cache of an earlier call works too.

Source: transformers' AutoModelForCausalLM and AutoTokenizer.
`tinylm.py` and `minilm.py` load weights that come with the course.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

OFFLINE = (
    "What works without a network: a folder on disk (load_hub('path/to/model'), with config.json,"
    " the weights and the tokenizer's files); a model that an earlier load_hub has left in the"
    " cache; load_tinylm() and load_minilm()"
)


class HubModel(NamedTuple):
    """A language model and its tokenizer, both as transformers makes them."""

    model: nn.Module
    tokenizer: Any


def load_hub(
    name: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> HubModel:
    """Return a causal language model in eval mode and its tokenizer; run no code of the checkpoint.

    Args:
        name: "owner/model" on the hub, or a folder on disk.
        revision: commit, tag or branch; a commit's hash makes a result reproducible.
        dtype: of the weights; by default the stored one.

    Raises:
        ImportError: transformers is not installed.
        OSError: the model or the hub was not found; the message lists what was tried.
        ValueError: name or revision is invalid, or the checkpoint cannot be loaded as it is.
    """
    _check_name(name, revision)
    auto_model, auto_tokenizer = _auto_classes()
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        tokenizer = auto_tokenizer.from_pretrained(name, **options)
        options["dtype"] = "auto" if dtype is None else dtype
        options["output_loading_info"] = True
        model, report = auto_model.from_pretrained(name, **options)
    except OSError as error:
        place = _place(name, revision)
        raise OSError(
            f"could not load {name}. Tried: {place}. transformers says: {error}\n{OFFLINE}"
        ) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{name} is no causal language model that can be loaded: {error}"
        ) from error

    # transformers fills missing weights with random numbers.
    if report["missing_keys"]:
        raise ValueError(f"{name} lacks the weights {sorted(report['missing_keys'])}")
    return HubModel(model.eval().requires_grad_(False), tokenizer)


def _auto_classes() -> tuple[Any, Any]:
    # Imported here because transformers is slow to import, and only load_hub needs it.
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("load_hub needs transformers: pip install transformers") from error
    return AutoModelForCausalLM, AutoTokenizer


def _place(name: str | Path, revision: str | None) -> str:
    """Return where transformers looked, for an error message."""
    if Path(name).is_dir():
        return f"the folder {name}"
    at = "" if revision is None else f" at revision {revision!r}"
    return f"the hub and its cache on this machine for {name!r}{at}"


def _check_name(name: str | Path, revision: str | None) -> None:
    if not str(name).strip():
        raise ValueError(f"name={name!r} must be 'owner/model' or a folder")
    # Refuse what can only be a mistake before transformers asks the hub for it.
    if Path(name).is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} pins a model of the hub; {name} is a folder, which has"
                " one version only"
            )
    elif isinstance(name, Path) or name.startswith((".", "/")) or name.count("/") > 1:
        raise FileNotFoundError(f"could not load {name}: there is no such folder. {OFFLINE}")
