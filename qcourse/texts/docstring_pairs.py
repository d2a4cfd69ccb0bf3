"""Texts that every learner has: the docstrings of Python's own standard library, as a retrieval task.

The idea: an encoder is good if a question finds its answer. A docstring brings both: its summary line is the query; the
name of what it documents, with the rest of the docstring, is the document. The texts are read from the source files of
the Python that runs (parsed, never imported), so there is nothing to download. They are ordered by a hash of their
qualified name: a text that another version adds, drops or edits changes one pair, and leaves the others in their order.
Parsing takes seconds, so what it found is kept in the user's cache folder, for this Python and this file as it is.

Source: PEP 257 for the summary line; top-1 retrieval is a usual measure for sentence encoders (Muennighoff et al. 2023,
"MTEB").

How it differs from a corpus that trains a model: a few hundred short pairs are enough to tell a good encoder from a
damaged one.
"""

import ast
import hashlib
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.texts.cached_rows import cached_rows

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function

# Not part of every installation or version of Python, or near-copies of one another (the two graphics libraries).
SKIPPED = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "tkinter",
    "turtle",
    "turtledemo",
}
SUMMARY_WORDS = range(4, 21)
BODY_WORDS = 12  # at least: shorter ones ("See the manual.") belong to no summary in particular
BODY_CHARS = 300  # at most, cut at a word: short texts make an evaluation of seconds


@dataclass(frozen=True)
class StdlibText:
    """One docstring: the name of what it documents, its summary line (query), and name and body (document)."""

    name: str
    query: str
    document: str


def stdlib_texts(count: int, *, root: Path | None = None) -> tuple[StdlibText, ...]:
    """Take the first ``count`` pairs of query and document, in the order of SHA-256(name).

    Args:
        count: how many; a larger count begins with the same texts.
        root: the folder of the standard library's source; by default that of the running Python.

    Returns:
        Pairs from public modules, classes, methods and functions; no summary line and no body occurs twice.

    Raises:
        ValueError: count is not positive, or is more than there are.

    >>> stdlib_texts(300)[:10] == stdlib_texts(10)
    True
    """
    texts = _all_texts() if root is None else _read_texts(root)
    if not 1 <= count <= len(texts):
        raise ValueError(
            f"count must be from 1 to {len(texts)}, the number of texts found, got {count}"
        )
    return texts[:count]


def retrieval_accuracy(queries: Shaped[Tensor, "..."], documents: Shaped[Tensor, "..."]) -> float:
    """Share of queries whose most similar document, by cosine, is their own: mean over i of [argmax_j q_i . d_j = i].

    Args:
        queries: embeddings (texts, width) of any length; row i belongs to row i of documents.
        documents: embeddings of the same shape.

    Returns:
        Between 0 and 1; chance is 1 / texts.

    Raises:
        ValueError: the shapes differ, are empty or not two-dimensional, or a value is not finite.

    >>> retrieval_accuracy(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
    0.5
    """
    if queries.ndim != 2 or queries.shape != documents.shape or queries.numel() == 0:
        raise ValueError(
            f"queries and documents must have one shape (texts, width), got {tuple(queries.shape)} and"
            f" {tuple(documents.shape)}"
        )
    unit = [torch.nn.functional.normalize(rows.double()) for rows in (queries, documents)]
    similarity = unit[0] @ unit[1].T
    if not similarity.isfinite().all():
        raise ValueError("queries and documents must be finite: they hold NaN or infinity")
    own = torch.arange(len(queries), device=similarity.device)
    return (similarity.argmax(dim=1) == own).double().mean().item()


@cache
def _all_texts() -> tuple[StdlibText, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    return cached_rows("stdlib_texts", StdlibText, lambda: _read_texts(root), [__file__])


def _read_texts(root: Path) -> tuple[StdlibText, ...]:
    pairs = {
        name: pair for path, module in _sources(root) for name, *pair in _docstrings(path, module)
    }
    seen: set[str] = set()
    texts = []
    for name in sorted(pairs, key=lambda name: hashlib.sha256(name.encode()).digest()):
        summary, body = pairs[name]
        if seen.isdisjoint((summary, body)):
            texts.append(StdlibText(name, summary, f"{name}: {body}"))
            seen |= {summary, body}
    return tuple(texts)


def _sources(root: Path) -> Iterator[tuple[Path, str]]:
    # By the list of the library's own names, since site-packages and much else lie in the same folder.
    for top in sorted(sys.stdlib_module_names - SKIPPED):
        for path in [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]:
            parts = [
                part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"
            ]
            if path.is_file() and not any(
                part.startswith("_") or part in ("test", "tests") for part in parts
            ):
                yield path, ".".join(parts)


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # old sources have escapes such as "\d" that newer parsers warn of
        try:
            tree = ast.parse(path.read_bytes())
        except (
            SyntaxError,
            ValueError,
        ):  # a template, a file that shows an error, one that is no text
            return
    for name, node in _documented(tree, module):
        summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
        body = textwrap.shorten(rest, BODY_CHARS, placeholder="")
        plain = "\n" not in summary and summary not in body
        if plain and len(summary.split()) in SUMMARY_WORDS and len(body.split()) >= BODY_WORDS:
            yield name, summary, body


def _documented(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    yield name, node
    if not isinstance(node, Function):  # what a function defines inside is not public
        for child in node.body:
            if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
                yield from _documented(child, f"{name}.{child.name}")
