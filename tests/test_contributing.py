"""CONTRIBUTING.md tells which file to edit for what: it names each room and each larger module."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORDS = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\s]+)`", WORDS))
LEAST_LINES = 60
MODULES = [
    path
    for path in sorted((ROOT / "qcourse").rglob("*.py"))
    if not path.name.startswith("sheet_")
    and path.read_text(encoding="utf-8").count("\n") > LEAST_LINES
]
ROOMS = sorted(path.parent for path in (ROOT / "qcourse").rglob("__init__.py"))[1:]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_of_a_size_is_named(path: Path) -> None:
    assert path.name in NAMED


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.relative_to(ROOT).as_posix())
def test_a_room_is_named(room: Path) -> None:
    assert f"{room.relative_to(ROOT / 'qcourse').as_posix()}/" in NAMED


def test_what_is_named_is_there() -> None:
    """A module that was renamed leaves no old name behind."""
    there = {path.name for path in (ROOT / "qcourse").rglob("*.py")}
    files = {name for name in NAMED if name.endswith(".py") and "/" not in name}
    assert files - there - {"sheet_NN.py", "answers_NN.py"} == set()
    paths = {name for name in NAMED if "/" in name and "NN" not in name and "*" not in name}
    for name in paths:
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "qcourse")), name
