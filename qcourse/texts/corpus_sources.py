"""Read the running standard library as documents: help topics, docstrings and source.

Python modules are parsed, never imported; C modules have no source here and are imported for their
docstrings. Docstrings and signatures are "docs"; the remaining source is "code". Tests, tables and
folders that are not part of the library are left out.

Source: ``pydoc_data.topics``, ``sys.stdlib_module_names``.
`corpus.py` splits these documents and removes repetitions.
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

# encodings holds tables of characters.
_LEFT_OUT = {"test", "tests", "idle_test", "pydoc_data", "encodings", "site-packages"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = ast.ClassDef | _Function
Keep = Callable[[str], bool]


@dataclass(frozen=True)
class Document:
    """A text of one kind; name is a module's, or "topics." and a topic."""

    name: str
    kind: Literal["docs", "code"]
    text: str


def read_topics() -> Iterator[Document]:
    """Yield the chapters of the language reference that ``help()`` shows, by name.

    >>> next(read_topics()).name
    'topics.assert'
    """
    # Half a megabyte, rarely needed.
    from pydoc_data.topics import topics

    return (Document(f"topics.{name}", "docs", text) for name, text in sorted(topics.items()))


def top_level_names() -> list[str]:
    """Return the names of the library's modules and packages, on this machine or not.

    >>> {"json", "_json"} <= set(top_level_names()) and "test" not in top_level_names()
    True
    """
    return sorted(sys.stdlib_module_names - _LEFT_OUT)


def _keep_all(unit: str) -> bool:
    """Return True."""
    return True


def read_package(top: str, keep: Keep = _keep_all) -> Iterator[Document]:
    """Yield docs and code of each module of a package; nothing if the package is absent.

    ``keep("json.JSONDecoder")`` decides about that class of json, in any of its modules, and
    ``keep("json.decoder")`` about the rest of that module.

    >>> [(document.name, document.kind) for document in read_package("bisect")]
    [('bisect', 'docs'), ('bisect', 'code')]
    """
    root = Path(sysconfig.get_path("stdlib"))
    candidates = [root / f"{top}.py", *sorted((root / top).rglob("*.py"))]
    paths = [path for path in candidates if path.is_file()]
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            name = ".".join(part for part in parts if part != "__init__")
            yield from _python_documents(path, top, name, keep)
    if not paths and importlib.util.find_spec(top):
        yield from _extension_documents(top, keep)


def paragraphs(text: str) -> list[str]:
    """Split a text at its blank lines.

    >>> paragraphs("one" + chr(10) + "two" + 3 * chr(10) + "three")
    ['one\\ntwo', 'three']
    """
    return re.split(r"\n(?:[ \t]*\n)+", text.strip("\n"))


def _python_documents(path: Path, top: str, name: str, keep: Keep) -> Iterator[Document]:
    source = importlib.util.decode_source(path.read_bytes())
    try:
        with warnings.catch_warnings():
            # Newer parsers warn of escapes such as "\d" in old sources.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:  # a template, or a file that demonstrates an error
        return

    # splitlines would also split at form feeds, which Python's line numbers do not count.
    lines = source.split("\n")
    kept = [keep(name)] * len(lines)
    entries = []
    if keep(name):
        entries.append(_entry(name, "", ast.get_docstring(tree) or ""))
    for node in tree.body:
        if isinstance(node, _Definition):
            keep_unit = keep(f"{top}.{node.name}")
            _mark(kept, _first_line(node, lines), node.end_lineno, keep_unit)
            if keep_unit:
                entries += _entries(node, node.name)
    _drop_docstrings(tree, kept)

    # Dropped lines become blank, so that they separate paragraphs.
    remaining = [line if keep_it else "" for line, keep_it in zip(lines, kept, strict=True)]
    text = "\n".join(remaining)
    code = [part for part in paragraphs(text) if not _is_table(part)]
    yield Document(name, "docs", "\n\n".join(entries))
    yield Document(name, "code", "\n\n".join(code))


def _mark(kept: list[bool], start: int, end: int | None, value: bool) -> None:
    span = slice(start, end)
    kept[span] = [value] * len(kept[span])


def _drop_docstrings(tree: ast.Module, kept: list[bool]) -> None:
    """Mark the lines of all docstrings as not kept."""
    parts: list[ast.AST] = [tree]
    for node in tree.body:
        if kept[node.lineno - 1]:
            parts += ast.walk(node)
    for part in parts:
        if not isinstance(part, ast.Module | _Definition):
            continue
        if ast.get_docstring(part, clean=False) is not None:
            docstring = part.body[0]
            _mark(kept, docstring.lineno - 1, docstring.end_lineno, False)


def _first_line(node: _Definition, lines: list[str]) -> int:
    """Return the index of a definition's first line, with its decorators and comments above."""
    first = min(part.lineno for part in (node, *node.decorator_list)) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return first


def _is_table(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in paragraph)
    return len(paragraph) > 500 and letters < len(paragraph) / 2


def _entries(node: _Definition, name: str) -> Iterator[str]:
    """Yield signature and docstring of a definition, and of those inside it."""
    docstring = ast.get_docstring(node)
    if docstring:
        signature = f"({ast.unparse(node.args)})" if isinstance(node, _Function) else ""
        yield _entry(name, signature, docstring)
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _entries(child, f"{name}.{child.name}")


def _extension_documents(top: str, keep: Keep) -> Iterator[Document]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are deprecated
            module = importlib.import_module(top)
    except ImportError:  # an extension whose library this machine lacks
        return
    entries = []
    if keep(top):
        entries.append(_entry(top, "", inspect.getdoc(module) or ""))
    for name, member in _members(module):
        if keep(f"{top}.{name}"):
            entries += _c_entries(member, name)
    yield Document(top, "docs", "\n\n".join(entries))


def _c_entries(value: object, name: str) -> Iterator[str]:
    """Yield signature and docstring of an object of a C module, and of a class's members."""
    docstring = inspect.getdoc(value)
    if docstring:
        yield _entry(name, _c_signature(value), docstring)
    if isinstance(value, type):
        for key, member in _members(value):
            yield from _c_entries(member, f"{name}.{key}")


def _c_signature(value: object) -> str:
    try:
        signature = str(inspect.signature(value)) if callable(value) else ""
    except Exception:  # inspect evaluates a text of the module, which may fail in any way
        return ""
    # The address of a default value differs in each process.
    return re.sub(" at 0x[0-9a-f]+", "", signature)


def _members(value: object) -> list[tuple[str, object]]:
    members = []
    for name, member in sorted(vars(value).items()):
        documented = callable(member) or inspect.isdatadescriptor(member)
        if documented and not name.startswith("_"):
            members.append((name, member))
    return members


def _entry(name: str, signature: str, docstring: str) -> str:
    return f"{name}{signature}\n\n{docstring}"
