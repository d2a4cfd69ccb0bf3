"""Write exercises/ from solutions/: the same notebooks without the solutions and without outputs.

    python tools/make_exercises.py            write them
    python tools/make_exercises.py --check    write nothing; fail if a file differs

A sheet that holds answers is never overwritten, and only CI (CI=true), where no learner works,
checks it.

The idea: the steps are nbgrader's own preprocessors, in the order of its generate_assignment, so
this tool and nbgrader make the same sheets of the solutions. Equal solutions give equal bytes:
cells keep their ids, and no time or version is written.
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

# checksums are computed twice: hidden tests are removed in between
STEPS = (
    LockCells(),
    ClearSolutions(code_stub=CODE_STUB),
    ClearOutput(),
    CheckCellMetadata(),
    ComputeChecksums(),
    ClearHiddenTests(),
    ComputeChecksums(),
    CheckCellMetadata(),
)


def make_exercise(solution: str) -> str:
    """Return the text of the exercise notebook for the text of a solution notebook.

    Raises:
        RuntimeError, jsonschema.ValidationError: a solution region that does not end, or outside a
            solution cell; invalid nbgrader metadata.
    """
    notebook = nbformat.reads(solution, as_version=4)
    resources: dict = {}
    # other metadata may differ from machine to machine
    notebook.metadata = {name: notebook.metadata[name] for name in ("kernelspec", "language_info")}
    for step in STEPS:
        notebook, resources = step.preprocess(notebook, resources)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def wanted(solutions: Path) -> dict[str, str]:
    """Return what exercises/ should hold: texts by file name."""
    sheets = {}
    for path in sorted(solutions.glob("*.ipynb")):
        sheets[path.name] = make_exercise(path.read_text(encoding="utf-8"))
    return sheets


def differing(solutions: Path, exercises: Path) -> list[str]:
    """Return the names of the sheets that are missing, different, or left over."""
    sheets = wanted(solutions)
    # what is there, and what should be there
    found = {path.name: path.read_text(encoding="utf-8") for path in exercises.glob("*.ipynb")}
    names = sheets.keys() | found.keys()
    return sorted(name for name in names if sheets.get(name) != found.get(name))


def answered(path: Path) -> bool:
    """Return whether a sheet holds answers: a solution cell that differs from its checksum."""
    if not path.exists():
        return False
    for cell in nbformat.read(path, as_version=4).cells:
        # nbgrader stores the checksum of the empty cell in its metadata
        marks = cell.metadata.get("nbgrader", {})
        if marks.get("solution") and marks.get("checksum") != compute_checksum(cell):
            return True
    return False


def is_learners(path: Path) -> bool:
    """Return whether a sheet belongs to a learner: it holds answers, and this is not CI."""
    return os.environ.get("CI") != "true" and answered(path)


def write(solutions: Path, exercises: Path) -> list[str]:
    """Update exercises/, except sheets that hold answers; return the names of those."""
    sheets = wanted(solutions)
    exercises.mkdir(exist_ok=True)
    # sheets to write, and files that may be left over
    names = sheets.keys() | {path.name for path in exercises.glob("*.ipynb")}
    kept = []
    for name in sorted(names):
        path = exercises / name
        if answered(path):
            kept.append(name)
        elif name in sheets:
            path.write_text(sheets[name], encoding="utf-8", newline="\n")
            print(f"exercises/{name}")
        # a sheet without a solution is left over
        else:
            path.unlink()
    return kept


def run_write(solutions: Path, exercises: Path) -> int:
    """Write the sheets; return 1 if some were kept because they hold answers."""
    kept = write(solutions, exercises)
    if kept:
        reason = f"Not written, because answers would be lost: {', '.join(kept)}."
        print(f"{reason} Move these files away first.", file=sys.stderr)
    return 1 if kept else 0


def run_check(solutions: Path, exercises: Path) -> int:
    """Compare the sheets with their solutions; return 1 if one differs."""
    stale = []
    learners = []
    for name in differing(solutions, exercises):
        if is_learners(exercises / name):
            learners.append(name)
        else:
            stale.append(name)
    if learners:
        print(f"Skipped, because they hold answers: {', '.join(learners)}.")
    if stale:
        reason = f"These sheets differ from solutions/: {', '.join(stale)}."
        print(f"{reason} Run `make exercises`.", file=sys.stderr)
    return 1 if stale else 0


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or compare; return the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    # both compare solutions/ with exercises/
    action = run_check if options.check else run_write
    return action(root / "solutions", root / "exercises")


if __name__ == "__main__":
    sys.exit(main())
