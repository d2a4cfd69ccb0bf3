"""Read the standard library of the running Python as texts: its help topics, its docstrings, its source.

The idea: what is written in Python is parsed and never imported; what is written in C has no source here, and is
imported for its docstrings. Each text is of one kind: docstrings and signatures are "docs", and are cut out of what
remains as "code". Left out are tests, tables, and what is no part of the library though it lies in its folder.

Source: ``pydoc_data.topics``, ``sys.stdlib_module_names``.

How it differs from ``corpus.py``: here texts are read as they stand, there they are split and rid of repetitions.
"""

import ast
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "pydoc_data",
    "encodings",
    "site-packages",
}  # encodings: tables of characters
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.ClassDef | _Function


@dataclass(frozen=True)
class Document:
    """A text of one kind, and the qualified name of what it is about: a module, or "topics." and a topic."""

    name: str
    kind: Literal["docs", "code"]
    text: str


def read_topics() -> Iterator[Document]:
    """Read the chapters of the language reference that ``help()`` shows, by name.

    >>> next(read_topics()).name
    'topics.assert'
    """
    from pydoc_data.topics import topics  # half a megabyte, seldom needed

    return (Document(f"topics.{name}", "docs", text) for name, text in sorted(topics.items()))


def top_level_names() -> list[str]:
    """Name the library's modules and packages, those included that this machine lacks.

    >>> {"json", "_json"} <= set(top_level_names()) and "test" not in top_level_names()
    True
    """
    return sorted(sys.stdlib_module_names - _LEFT_OUT)


def read_package(top: str, keep: Callable[[str], bool] = lambda unit: True) -> Iterator[Document]:
    """Read a module, or all of a package: docstrings, then the rest of the source; nothing if it is absent.

    Args:
        top: the name of the module or package.
        keep: tells which units to read. "json.JSONDecoder" is the class or function with all that is in it, whichever
            module of json defines it; "json.decoder" is that module's docstring and what stands outside of those.

    >>> [(document.name, document.kind) for document in read_package("bisect")]
    [('bisect', 'docs'), ('bisect', 'code')]
    """
    root = Path(sysconfig.get_path("stdlib"))
    paths = [
        path for path in (root / f"{top}.py", *sorted((root / top).rglob("*.py"))) if path.is_file()
    ]
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            yield from _source(
                path, top, ".".join(part for part in parts if part != "__init__"), keep
            )
    if not paths and importlib.util.find_spec(top):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some are deprecated
                module = importlib.import_module(top)
        except ImportError:  # an extension whose library this machine lacks
            return
        entries = [_entry(top, "", inspect.getdoc(module) or "")] if keep(top) else []
        for name, member in _members(module):
            if keep(f"{top}.{name}"):
                entries += _c_entries(member, name)
        yield Document(top, "docs", "\n\n".join(entries))


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines.

    >>> paragraphs("one" + chr(10) + "two" + 3 * chr(10) + "three")
    ['one\\ntwo', 'three']
    """
    return re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))


def _source(path: Path, top: str, name: str, keep: Callable[[str], bool]) -> Iterator[Document]:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # old sources have escapes such as "\d" that newer parsers warn of
        source = importlib.util.decode_source(path.read_bytes())
        try:
            tree = ast.parse(source)
        except SyntaxError:  # a template, or a file that shows an error
            return
    entries = [_entry(name, "", ast.get_docstring(tree) or "")] if keep(name) else []
    lines = source.split("\n")  # and not by splitlines, to which a form feed is one
    kept = [keep(name)] * len(lines)
    for node in tree.body:
        if isinstance(node, _Definition):
            span, keep_it = (
                slice(_first_line(node, lines), node.end_lineno),
                keep(f"{top}.{node.name}"),
            )
            kept[span] = [keep_it] * len(kept[span])
            entries += _entries(node, node.name) if keep_it else []
    for part in [
        tree,
        *(part for node in tree.body if kept[node.lineno - 1] for part in ast.walk(node)),
    ]:
        if (
            isinstance(part, ast.Module | _Definition)
            and ast.get_docstring(part, clean=False) is not None
        ):
            span = slice(part.body[0].lineno - 1, part.body[0].end_lineno)
            kept[span] = [False] * len(kept[span])
    code = paragraphs(
        "\n".join(line if keep_it else "" for line, keep_it in zip(lines, kept, strict=True))
    )
    yield Document(name, "docs", "\n\n".join(entries))
    yield Document(
        name, "code", "\n\n".join(paragraph for paragraph in code if not _is_table(paragraph))
    )


def _first_line(node: _Definition, lines: list[str]) -> int:
    """The index of a definition's first line: that of its decorators, and of comments right above."""
    first = min(part.lineno for part in (node, *node.decorator_list)) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return first


def _is_table(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return len(paragraph) > 500 and letters < len(paragraph) / 2


def _entries(node: _Definition, name: str) -> Iterator[str]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield _entry(
            name, f"({ast.unparse(node.args)})" if isinstance(node, _Function) else "", docstring
        )
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _entries(child, f"{name}.{child.name}")


def _c_entries(value: object, name: str) -> Iterator[str]:
    docstring = inspect.getdoc(value)
    if docstring:
        try:
            signature = str(inspect.signature(value)) if callable(value) else ""
            signature = re.sub(
                " at 0x[0-9a-f]+", "", signature
            )  # where a default lies in memory: new each time
        except Exception:  # its text is evaluated, and may fail in any way
            signature = ""
        yield _entry(name, signature, docstring)
    if isinstance(value, type):
        for key, member in _members(value):
            yield from _c_entries(member, f"{name}.{key}")


def _members(value: object) -> list[tuple[str, object]]:
    members = sorted(vars(value).items())
    return [
        (k, v)
        for k, v in members
        if not k.startswith("_") and (callable(v) or inspect.isdatadescriptor(v))
    ]


def _entry(name: str, signature: str, docstring: str) -> str:
    return f"{name}{signature}\n\n{docstring}"
