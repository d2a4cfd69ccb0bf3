"""A floor of the package loads no floor above or beside it, and no library that is barred there.

The first test imports all modules of a floor in a fresh process and lists the loaded modules.
The second one builds a small package that breaks each rule, to prove that the first test can fail.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qcourse"
FLOORS = {
    "machine": 0,
    "course_files": 0,
    "numerics": 1,
    "methods": 2,
    "kernels": 2,
    "cost": 2,
    "formats": 2,
    "models": 3,
    "texts": 3,
    "trace": 3,
    "layers": 4,
    "recipes": 5,
    "lab": 6,
    "checks": 6,
    "chat": 6,
    "chat_command": 7,
    "check_command": 7,
    "fetch_smollm2": 7,
    "grading": 7,
    "cli": 8,
}
SHOWN = {"matplotlib", "ipywidgets", "IPython"}
BARRED = {
    "numerics": SHOWN | {"triton"},
    "methods": SHOWN | {"triton"},
    "kernels": SHOWN,
    "cost": SHOWN | {"triton", "torch"},
    "formats": SHOWN | {"triton"},
    "models": SHOWN | {"triton"},
    "texts": SHOWN | {"triton"},
    "trace": SHOWN | {"triton"},
    "layers": SHOWN | {"triton"},
    "recipes": SHOWN | {"triton"},
}
IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
no_triton = importlib.util.find_spec("triton") is None  # there is none for macOS and Windows
root = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(root, "__path__", []), root.__name__ + "."):
    imports_triton = module.name.endswith((".triton_int4", "_int4_decoding", "_int4_memory"))
    if not (no_triton and imports_triton):
        importlib.import_module(module.name)
print(json.dumps(sorted(sys.modules)))
"""


def loaded_by(name: str, folder: Path = ROOT) -> set[str]:
    """The modules that a fresh process holds after it has imported `name` and all modules in it."""
    command = [sys.executable, "-c", IMPORT_ALL, name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"importing {name} failed:\n{done.stderr}"
    return set(json.loads(done.stdout))


def broken_rules(
    house: str, floor: str, floors: dict[str, int], barred: dict[str, set[str]], folder: Path = ROOT
) -> list[str]:
    """What the floor has loaded against the rules: floors not below it, and barred libraries."""
    loaded = loaded_by(f"{house}.{floor}", folder)
    forbidden = set(barred.get(floor, ()))
    for other, level in floors.items():
        if other != floor and level >= floors[floor]:
            forbidden.add(f"{house}.{other}")
    return sorted(loaded & forbidden)


def parts() -> set[str]:
    """The packages and single modules in the package."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("[!_]*.py")}
    return packages | modules


@pytest.mark.parametrize("floor", sorted(parts() & set(FLOORS)))
def test_a_floor_loads_only_what_lies_below(floor: str) -> None:
    assert broken_rules("qcourse", floor, FLOORS, BARRED) == []


def test_every_part_of_the_package_is_a_floor() -> None:
    assert parts() <= set(FLOORS)


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, qcourse; print({'torch', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("source", "reported"),
    [
        ("import house.roof", ["house.roof"]),
        ("from house import roof", ["house.roof"]),
        ("import house.twin", ["house.twin"]),
        ("import wave", ["wave"]),
        ("import house.cellar", []),
    ],
)
def test_a_broken_house_is_reported(tmp_path: Path, source: str, reported: list[str]) -> None:
    house = tmp_path / "house"
    for part in ("cellar", "hall", "twin", "roof"):
        (house / part).mkdir(parents=True)
        (house / part / "__init__.py").touch()
    (house / "__init__.py").touch()
    (house / "hall" / "deep.py").write_text(source, encoding="utf-8")
    floors = {"cellar": 1, "hall": 2, "twin": 2, "roof": 3}
    assert broken_rules("house", "hall", floors, {"hall": {"wave"}}, tmp_path) == reported
