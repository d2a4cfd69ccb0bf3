"""Write exercises/ from solutions/: the same notebooks without the solutions and without outputs.

    python tools/make_exercises.py            write them
    python tools/make_exercises.py --check    write nothing; fail where a file is not what would be written

A sheet that holds answers is never written over, and it is checked only in CI (CI=true), where nobody learns.

The steps are nbgrader's own preprocessors, in the order of its generate_assignment, so that what a teacher hands out
from here and what nbgrader would make of the solutions are the same. Equal solutions give equal bytes: cells keep their
ids, and no time or version is written.
"""

import argparse
import os
import sys
from pathlib import Path

import nbformat
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearOutput,
    ClearSolutions,
    ComputeChecksums,
    LockCells,
)
from nbgrader.utils import compute_checksum

from qcourse.checks.answers import STUB

ROOT = Path(__file__).resolve().parent.parent
CODE_STUB = {"python": f'raise NotImplementedError("{STUB}")'}
STEPS = (
    LockCells(),
    ClearSolutions(code_stub=CODE_STUB),
    ClearOutput(),
    CheckCellMetadata(),
    ComputeChecksums(),
    ClearHiddenTests(),
    ComputeChecksums(),  # again, over what is left
    CheckCellMetadata(),
)


def make_exercise(solution: str) -> str:
    """The text of the exercise notebook that a solution notebook's text becomes.

    Raises:
        RuntimeError, jsonschema.ValidationError: a solution region that does not end, or outside a solution cell;
            nbgrader metadata that is not as it should be.
    """
    notebook, resources = nbformat.reads(solution, as_version=4), {}
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    for step in STEPS:
        notebook, resources = step.preprocess(notebook, resources)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def wanted(solutions: Path) -> dict[str, str]:
    """What exercises/ should hold: names and texts."""
    return {
        path.name: make_exercise(path.read_text(encoding="utf-8"))
        for path in sorted(solutions.glob("*.ipynb"))
    }


def differing(solutions: Path, exercises: Path) -> list[str]:
    """The names of the sheets that are missing, not as they would be written, or left over."""
    sheets = wanted(solutions)
    found = {path.name: path.read_text(encoding="utf-8") for path in exercises.glob("*.ipynb")}
    return sorted(
        name for name in sheets.keys() | found.keys() if sheets.get(name) != found.get(name)
    )


def answered(path: Path) -> bool:
    """Whether someone has written into a sheet: a solution cell whose checksum is not the one it was written with."""
    cells = nbformat.read(path, as_version=4).cells if path.exists() else []
    marked = [(cell, cell.metadata.get("nbgrader", {})) for cell in cells]
    return any(
        marks.get("solution") and marks.get("checksum") != compute_checksum(cell)
        for cell, marks in marked
    )


def is_learners(path: Path) -> bool:
    """Whether a sheet is none of our business: it holds answers, and this is not CI."""
    return os.environ.get("CI") != "true" and answered(path)


def write(solutions: Path, exercises: Path) -> list[str]:
    """Make exercises/ what it should be, without the sheets that hold answers; returns the names of these."""
    sheets = wanted(solutions)
    exercises.mkdir(exist_ok=True)
    names = sheets.keys() | {path.name for path in exercises.glob("*.ipynb")}
    kept = sorted(name for name in names if answered(exercises / name))
    for name in sorted(names - set(kept)):
        if name in sheets:
            (exercises / name).write_text(sheets[name], encoding="utf-8", newline="\n")
            print(f"exercises/{name}")
        else:
            (exercises / name).unlink()
    return kept


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    folders = root / "solutions", root / "exercises"
    if not parser.parse_args(arguments).check:
        kept = write(*folders)
        if kept:
            print(
                f"Not written, for answers would be lost: {', '.join(kept)}. Move them away first.",
                file=sys.stderr,
            )
        return int(bool(kept))
    names = differing(*folders)
    learners = [name for name in names if is_learners(folders[1] / name)]
    if learners:
        print(f"Skipped, for answers are in them: {', '.join(learners)}.")
    names = [name for name in names if name not in learners]
    if names:
        print(
            f"Not what solutions/ would make: {', '.join(names)}. Run `make exercises`.",
            file=sys.stderr,
        )
    return int(bool(names))


if __name__ == "__main__":
    sys.exit(main())
