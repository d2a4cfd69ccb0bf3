"""The command `qcourse check`: progress over all sheets, or one sheet run cell by cell.

How it differs from ``checks/judge.py``: that judges one answer; this runs a learner's notebook,
whose cells call it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcourse.course_files import find

# heavy imports wait until they are needed, so that `qcourse --help` is fast
if TYPE_CHECKING:
    from nbformat import NotebookNode

CELL_TIMEOUT_S = 120


def progress_table() -> str:
    """Return a table of the points of every exercise and when they were earned, by sheet."""
    from qcourse.checks.progress import read_progress
    from qcourse.checks.registry import load_sheet, sheet_ids

    best = read_progress()
    none_yet = {"points": 0, "date": "-"}
    lines: list[str] = []
    all_points = 0.0
    all_most = 0
    for sheet_id in sheet_ids():
        sheet = load_sheet(sheet_id)
        sheet_points = 0.0
        sheet_most = 0
        rows = []
        for exercise in sheet.exercises:
            earned = best.get(exercise.id, none_yet)
            score = f"{_points(earned['points'])} of {exercise.points:<3}"
            rows.append(f"  {exercise.id} {exercise.title:36} {score} {earned['date']}")
            sheet_points += earned["points"]
            sheet_most += exercise.points

        # the sum of a sheet stands above its exercises
        score = f"{_points(sheet_points)} of {sheet_most}"
        lines.append(f"{sheet.id}    {sheet.title:36} {score}")
        lines += rows
        all_points += sheet_points
        all_most += sheet_most

    lines.append(f"all   {'':36} {_points(all_points)} of {all_most}")
    return "\n".join(lines)


def _points(value: float) -> str:
    # a sum of hundredths is not always a hundredth: 0.1 + 0.2
    return f"{round(value, 2):5g}"


def check_sheet(sheet_id: str) -> int:
    """Run the learner's notebook of a sheet and print each verdict; return 0 if all passed, else 1.

    Raises:
        ValueError: there is no such sheet, or the notebook is not readable.
        FileNotFoundError: there is no such notebook.
    """
    from qcourse.checks.judge import PASSED
    from qcourse.checks.registry import load_sheet

    sheet = load_sheet(sheet_id)
    path = find(f"exercises/{sheet.id}_*.ipynb")
    notebook = _read_notebook(path)
    print(path, flush=True)

    passed = set()
    for line in run_cells(notebook, path.parent):
        print(line, flush=True)
        for exercise in sheet.exercises:
            if line.startswith(f"{exercise.id} {PASSED}"):
                passed.add(exercise.id)

    total = len(sheet.exercises)
    print(f"{len(passed)} of {total} exercises passed.")
    return 0 if len(passed) == total else 1


def _read_notebook(path: Path) -> "NotebookNode":
    import nbformat

    # a file may be no JSON, or JSON that is no notebook
    unreadable = (ValueError, AttributeError, nbformat.ValidationError)
    try:
        return nbformat.read(path, as_version=4)
    except unreadable as error:
        raise ValueError(f"{path} is not a notebook that can be read.") from error


def run_cells(notebook: "NotebookNode", folder: Path) -> Iterator[str]:
    """Run all code cells in order, also after an error; yield each verdict and each error."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    # else a kernel warns that its loopback is not encrypted
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT_S,
        interrupt_on_timeout=True,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=quiet,
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, index)
            except DeadKernelError:
                yield f"cell {index + 1}: Python itself ended here, so the cells below were not run"
                return
            yield from _verdicts(index, cell)


def _verdicts(index: int, cell: "NotebookNode") -> Iterator[str]:
    """Yield the verdicts in a cell's outputs, and its error."""
    where = f"cell {index + 1}"
    for output in cell.get("outputs", []):
        # a cell over the time limit is interrupted
        if output.output_type == "error" and output.ename == "KeyboardInterrupt":
            yield f"{where}: stopped after {CELL_TIMEOUT_S} s"
        elif output.output_type == "error":
            yield f"{where}: {output.ename}: {output.evalue}"
        elif output.output_type == "execute_result" and "check(" in cell.source:
            yield output.data.get("text/plain", "")
