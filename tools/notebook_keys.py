"""Hashes of what a run of a notebook depends on: its code, its outputs, the modules it loaded.

Comments, layout and docstrings do not count, so a run stays valid when only these change.
"""

import ast
import hashlib
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def code_of(source: str) -> str:
    """Return the syntax tree of Python source without comments, layout and docstrings."""
    try:
        tree = ast.parse(source)
    # a magic command
    except SyntaxError:
        return source
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def notebook_key(path: Path) -> str:
    """Return a hash of a notebook's code and of the outputs that nbval compares."""
    # text cells do not change what a run computes
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        outputs = []
        if "nbval-ignore-output" not in tags:
            # nbval compares text; the pixels of a figure differ between machines
            outputs = [output for output in cell.outputs if "image/png" not in str(output)]
        parts += [code_of(cell.source), str(tags), str(outputs)]
    return digest("\n".join(parts))


def module_key(path: Path) -> str:
    """Return a hash of what a module of qcourse computes; empty if there is no such file."""
    if not path.exists():
        return ""
    return digest(code_of(path.read_text(encoding="utf-8")))


def run_key(notebook_hash: str, modules: str) -> str:
    """Return a hash of what a run depends on: the notebook, and the modules it loaded."""
    # a module that is gone has an empty hash, so the key changes
    hashes = [module_key(ROOT / name) for name in modules.split()]
    return digest(notebook_hash + "".join(hashes))


def digest(text: str) -> str:
    """Return 16 hexadecimal digits of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
