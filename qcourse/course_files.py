"""Where the course's files are, what the master of a sheet is, and what a grade depends on.

The idea: "is this grade still valid?" and "which file is that?" are answered here, so that only
this module changes when a file moves.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
FIRST_LESSON = "notebooks/00_start_here.ipynb"

# The modules that a sandbox is given: all that a worker needs, and no right answer. Each comes
# after the modules that it imports.
_IN_SANDBOX = (
    "checks.answers",
    "grading.sandbox.wire",
    "grading.sandbox.cell_names",
    "grading.sandbox.call_filter",
    "grading.sandbox.confine",
    "grading.sandbox.worker",
    "grading.sandbox.template",
    "lab.interpreter_bounds",
    "lab.tiny_triton",
)


def find(pattern: str) -> Path:
    """Return the first file of the course that matches a pattern such as "exercises/01_*.ipynb".

    Raises:
        FileNotFoundError: no file matches.
    """
    here = Path.cwd()
    found = _first_match(pattern, [here, *here.parents, PACKAGE.parent])
    if found is None:
        raise FileNotFoundError(f"There is no {pattern} here; run this in the course's folder.")
    return found


def master(sheet_id: str) -> Path:
    """Return the notebook in solutions/ that a sheet is made from.

    Raises:
        ValueError: the course's folder is not here.
    """
    # The folder beside the package comes first: the current folder may hold submissions, and
    # grading must not read a master from these.
    pattern = f"solutions/{sheet_id}_*.ipynb"
    here = Path.cwd()
    found = _first_match(pattern, [PACKAGE.parent, here, *here.parents])
    if found is None:
        raise ValueError(f"There is no {pattern} here; run this in the course's folder.")
    return found


def sandbox_sources() -> dict[str, str]:
    """Return the source of each module that a sandbox is given, by the module's full name."""
    return {f"qcourse.{name}": _module(name).read_text(encoding="utf-8") for name in _IN_SANDBOX}


def sheet_version(sheet_id: str) -> str:
    """Return a hash of what decides the points of one sheet: its master, its check, the judge."""
    checks = PACKAGE / "checks"
    own = [checks / f"sheet_{sheet_id}.py", master(sheet_id)]
    # all sheets share these: how answers are run, compared and given points
    shared = [path for path in checks.glob("*.py") if not path.name.startswith("sheet_")]
    return fingerprint([*own, *sorted(shared)])


def grader_version(*versions: str) -> str:
    """Return a hash of all that grades depend on: every sheet, the grader, and these versions."""
    # a change of any of these files may change a grade
    checks = PACKAGE.glob("checks/*.py")
    grading = PACKAGE.glob("grading/**/*.py")
    sandbox = map(_module, _IN_SANDBOX)
    masters = master("01").parent.glob("*.ipynb")
    return fingerprint(sorted({*checks, *grading, *sandbox, *masters}), *versions)


def fingerprint(paths: Iterable[Path], *texts: str) -> str:
    """Return 16 hexadecimal digits that change with the content of a file, or with a text."""
    parts = [text.encode() for text in texts]
    parts += [path.read_bytes() for path in paths]
    digest = hashlib.sha256(b"\0".join(parts))
    return digest.hexdigest()[:16]


def _module(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def _first_match(pattern: str, folders: Iterable[Path]) -> Path | None:
    for folder in folders:
        for path in sorted(folder.glob(pattern)):
            return path
    return None
