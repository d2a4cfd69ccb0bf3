"""The public face: what `qcourse` offers, where it comes from, and what it costs to ask."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import qcourse

SOURCE = Path(qcourse.__file__)


def names_for_type_checkers() -> dict[str, str]:
    """Each name of the TYPE_CHECKING block with the module it comes from."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname: node.module for node in imports for alias in node.names}


def run(code: str) -> str:
    """What `code` prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_type_checkers_see_what_is_there() -> None:
    assert names_for_type_checkers() == qcourse._HOME
    assert sorted(qcourse.__all__) == dir(qcourse) == sorted(qcourse._HOME)


@pytest.mark.parametrize("name", qcourse.__all__)
def test_a_name_leads_home(name: str) -> None:
    assert getattr(qcourse, name) is getattr(import_module(qcourse._HOME[name]), name)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match=r"module 'qcourse' has no attribute 'quantise'; it has .*quantize"):
        _ = qcourse.quantise


def test_a_star_brings_every_name() -> None:
    namespace: dict = {}
    exec("from qcourse import *", namespace)
    assert set(qcourse.__all__) <= set(namespace)


def test_importing_the_package_loads_the_standard_library_alone() -> None:
    loaded = "{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names"
    assert run(f"import sys; before = set(sys.modules); import qcourse; print({loaded})") == "{'qcourse'}"


def test_cost_works_where_torch_cannot_be_imported() -> None:
    no_torch = "import sys; sys.modules['torch'] = None; "
    assert run(no_torch + "from qcourse.cost.memory import *; print(bytes_per_parameter(4, 128))") == "0.515625"
    assert "ModuleNotFoundError" in run(  # so that the line above is known to bar torch
        no_torch + "import qcourse\ntry: qcourse.quantize\nexcept ImportError as error: print(type(error).__name__)"
    )
