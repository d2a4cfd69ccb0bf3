"""The public face: what `qcourse` offers, where it comes from, and what it costs to ask."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest

import qcourse
import qcourse.lab

PACKAGE = Path(qcourse.__file__).parent
NOTEBOOKS = sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
NOTEBOOKS += sorted((PACKAGE.parent / "solutions").glob("*.ipynb"))


def homes(package: str) -> dict[str, str]:
    """Each name that a package's stub lists, with the module that it comes from."""
    folder = PACKAGE.joinpath(*package.split(".")[1:])
    tree = ast.parse((folder / "__init__.pyi").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.asname == alias.name  # so that type checkers pass it on
                found[alias.name] = ".".join(filter(None, [package, node.module]))
    return found


def run(code: str) -> str:
    """What `code` prints in a fresh process."""
    command = [sys.executable, "-c", code]
    folder = PACKAGE.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", [qcourse, qcourse.lab])
def test_every_name_of_the_stub_is_there(package: object) -> None:
    listed = homes(package.__name__)
    assert sorted(listed) == sorted(package.__all__)
    assert sorted(listed) == sorted(dir(package))
    for name, home in listed.items():
        assert hasattr(package, name)
        if name != "tiny_triton":  # a module
            assert getattr(package, name) is getattr(import_module(home), name)


def test_a_name_that_is_not_there() -> None:
    words = "module 'qcourse' has no attribute 'quantise'; did you mean 'quantize'?"
    with pytest.raises(AttributeError, match=words):
        _ = qcourse.quantise
    with pytest.raises(AttributeError, match=r"has no attribute 'xyz'; it has .*quantize"):
        _ = qcourse.xyz


def test_a_star_brings_every_name() -> None:
    namespace: dict = {}
    exec("from qcourse import *", namespace)
    assert set(qcourse.__all__) <= set(namespace)


def test_importing_the_package_loads_next_to_nothing() -> None:
    new = "{name.partition('.')[0] for name in set(sys.modules) - before}"
    code = f"import sys; before = set(sys.modules); import qcourse; print(sorted({new}))"
    loaded = set(ast.literal_eval(run(code)))
    assert loaded - sys.stdlib_module_names == {"qcourse", "lazy_loader"}


def test_cost_works_where_torch_cannot_be_imported() -> None:
    no_torch = "import sys; sys.modules['torch'] = None; "
    works = "from qcourse import bytes_per_parameter; print(bytes_per_parameter(4, 128))"
    assert run(no_torch + works) == "0.515625"
    # Without torch the quantizers fail: so the line above is known to bar it.
    fails = (
        "import qcourse\n"
        "try: qcourse.quantize\n"
        "except ImportError as error: print(type(error).__name__)"
    )
    assert "ModuleNotFoundError" in run(no_torch + fails)


def imported_modules(path: Path) -> set[str]:
    """The modules of qcourse that the code cells of a notebook import from."""
    modules = set()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and not cell.source.startswith("%"):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.ImportFrom):
                    modules.add(node.module)
                if isinstance(node, ast.Import):
                    modules |= {alias.name for alias in node.names}
    return {name for name in modules if name.partition(".")[0] == "qcourse"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_notebook_imports_from_the_face_alone(path: Path) -> None:
    assert imported_modules(path) <= {"qcourse", "qcourse.lab"}
