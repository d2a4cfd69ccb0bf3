"""A retrieval task from the docstrings of the running standard library.

An encoder is good if a query finds its document. The summary line of a docstring is the query; the
documented name and the rest of the docstring are the document. The source files are parsed, never
imported. Pairs are ordered by a hash of their name, so another version of Python changes few pairs
and keeps the order. A few hundred short pairs tell a good encoder from a damaged one.

Source: PEP 257 (summary line); Muennighoff et al. 2023, "MTEB" (top-1 retrieval).
`corpus.py` makes running text for a decoder.
"""

import ast
import hashlib
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.texts.cached_rows import cached_rows

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function

# Not part of every installation or version of Python, or near-copies of each other (turtle).
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
BODY_WORDS = 12  # at least: shorter ones ("See the manual.") fit many summaries
BODY_CHARS = 300  # at most, cut at a word: short documents make an evaluation of seconds


@dataclass(frozen=True)
class StdlibText:
    """One docstring: the documented name, its summary line, and name and body."""

    name: str
    query: str
    document: str


def stdlib_texts(count: int, *, root: Path | None = None) -> tuple[StdlibText, ...]:
    """Return the first ``count`` pairs of query and document, in the order of SHA-256(name).

    root is the folder of the source files. Raises ValueError if there are fewer pairs.

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
    """Return the mean over i of [argmax_j cos(q_i, d_j) = i], for embeddings (texts, width).

    Raises ValueError if the shapes differ or a value is not finite.

    >>> retrieval_accuracy(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
    0.5
    """
    if queries.ndim != 2 or queries.shape != documents.shape or queries.numel() == 0:
        raise ValueError(
            "queries and documents must have one shape (texts, width),"
            f" got {tuple(queries.shape)} and {tuple(documents.shape)}"
        )
    # The cosine is the product of unit vectors; float64 avoids ties by rounding.
    unit_queries = torch.nn.functional.normalize(queries.double())
    unit_documents = torch.nn.functional.normalize(documents.double())
    similarity = unit_queries @ unit_documents.T  # (queries, documents)
    if not similarity.isfinite().all():
        raise ValueError("queries and documents must be finite: they hold NaN or infinity")
    own = torch.arange(len(queries), device=similarity.device)
    found = similarity.argmax(dim=1) == own
    return found.double().mean().item()


@cache
def _all_texts() -> tuple[StdlibText, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    return cached_rows("stdlib_texts", StdlibText, partial(_read_texts, root), [__file__])


def _read_texts(root: Path) -> tuple[StdlibText, ...]:
    pairs = {}
    for path, module in _sources(root):
        for name, summary, body in _docstrings(path, module):
            pairs[name] = (summary, body)

    # No summary and no body occurs twice: a query must have one right answer.
    seen: set[str] = set()
    texts = []
    for name in sorted(pairs, key=_digest):
        summary, body = pairs[name]
        if seen.isdisjoint((summary, body)):
            texts.append(StdlibText(name, summary, f"{name}: {body}"))
            seen |= {summary, body}
    return tuple(texts)


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _sources(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield path and name of the library's public modules."""
    # Go by the library's own list of names: site-packages and others are in the same folder.
    for top in sorted(sys.stdlib_module_names - SKIPPED):
        for path in [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]:
            parts = path.relative_to(root).with_suffix("").parts
            names = [part for part in parts if part != "__init__"]
            private = any(name.startswith("_") for name in names)
            if path.is_file() and not private and {"test", "tests"}.isdisjoint(names):
                yield path, ".".join(names)


def _docstrings(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """Yield name, summary and body of each docstring that makes a good pair."""
    try:
        with warnings.catch_warnings():
            # Newer parsers warn of escapes such as "\d" in old sources.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, an example of an error, or not a text
        return
    for name, node in _documented(tree, module):
        docstring = ast.get_docstring(node) or ""
        summary, _, rest = docstring.partition("\n\n")
        body = textwrap.shorten(rest, BODY_CHARS, placeholder="")
        plain = "\n" not in summary and summary not in body
        long_enough = len(body.split()) >= BODY_WORDS
        if plain and long_enough and len(summary.split()) in SUMMARY_WORDS:
            yield name, summary, body


def _documented(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """Yield a module, class or function and the public ones inside it, with their names."""
    yield name, node
    if isinstance(node, Function):  # what a function defines inside is not public
        return
    for child in node.body:
        if isinstance(child, ast.ClassDef | Function) and not child.name.startswith("_"):
            yield from _documented(child, f"{name}.{child.name}")
