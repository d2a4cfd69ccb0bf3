"""The command `qcourse`: the lessons in JupyterLab, progress over all sheets, one sheet checked, a class graded.

    qcourse lab         JupyterLab, opened at the first lesson
    qcourse check       the points of every exercise so far
    qcourse check 01    run your exercises/01_*.ipynb and print each verdict

For teachers (TEACHING.md):

    qcourse grade submitted/      grade STUDENT/SHEET.ipynb into graded/, in a sandbox
    qcourse feedback graded/      the students' pages again, after points were changed by hand
    qcourse export graded/        the grades as CSV, for Canvas or for Moodle

What stops a reader ends in one sentence.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qcourse.course_files import FIRST_LESSON, find
from qcourse.grading.commands import COMMANDS, add_commands
from qcourse.lab.server import serve

if TYPE_CHECKING:  # heavy imports wait until they are needed, so that `--help` answers at once
    from nbformat import NotebookNode

CELL_TIMEOUT_S = 120
OF_CLUSTER = ("cryptography", "dask", "distributed")  # what the extra `cluster` brings


def progress_table() -> str:
    """The points of every exercise and when they were earned, by sheet."""
    from qcourse.checks.progress import read_progress
    from qcourse.checks.registry import load_sheet, sheet_ids

    best = read_progress()
    lines: list[str] = []
    total, worth = 0.0, 0
    for sheet in map(load_sheet, sheet_ids()):
        earned = [best.get(exercise.id, {"points": 0, "date": "-"}) for exercise in sheet.exercises]
        points = sum(one["points"] for one in earned)
        most = sum(exercise.points for exercise in sheet.exercises)
        lines.append(f"{sheet.id}    {sheet.title:36} {_points(points)} of {most}")
        for exercise, one in zip(sheet.exercises, earned, strict=True):
            score = f"{_points(one['points'])} of {exercise.points:<3}"
            lines.append(f"  {exercise.id} {exercise.title:36} {score} {one['date']}")
        total += points
        worth += most
    return "\n".join([*lines, f"all   {'':36} {_points(total)} of {worth}"])


def _points(value: float) -> str:
    """Points in full hundredths: a sum of such numbers is not always one."""
    return f"{round(value, 2):5g}"


def check_sheet(sheet_id: str) -> int:
    """Run the learner's notebook of a sheet and print each verdict as it comes; 0 where all exercises passed.

    Raises:
        ValueError: there is no such sheet, or the notebook cannot be read.
        FileNotFoundError: there is no such notebook.
    """
    import nbformat

    from qcourse.checks.judge import PASSED
    from qcourse.checks.registry import load_sheet

    sheet = load_sheet(sheet_id)
    path = find(f"exercises/{sheet.id}_*.ipynb")
    try:
        notebook = nbformat.read(path, as_version=4)
    except (
        ValueError,
        AttributeError,
        nbformat.ValidationError,
    ) as error:  # no JSON, or JSON that is no notebook
        raise ValueError(f"{path} is not a notebook that can be read.") from error
    print(path, flush=True)
    passed = set()
    for words in run_cells(notebook, path.parent):
        print(words, flush=True)
        passed |= {
            exercise.id
            for exercise in sheet.exercises
            if words.startswith(f"{exercise.id} {PASSED}")
        }
    print(f"{len(passed)} of {len(sheet.exercises)} exercises passed.")
    return int(len(passed) < len(sheet.exercises))


def run_cells(notebook: "NotebookNode", folder: Path) -> Iterator[str]:
    """Run the code cells one after the other, the broken ones too; what each has to say, if anything."""
    from nbclient import NotebookClient
    from nbclient.exceptions import DeadKernelError

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT_S,
        interrupt_on_timeout=True,
        allow_errors=True,
        resources={"metadata": {"path": str(folder)}},
        extra_arguments=[
            "--IPKernelApp.log_level=ERROR"
        ],  # else a kernel warns that its loopback is not encrypted
    )
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, index)
            except DeadKernelError:
                yield f"cell {index + 1}: Python itself ended here, so the cells below were not run"
                return
            yield from _words(index, cell)


def _words(index: int, cell: "NotebookNode") -> Iterator[str]:
    """The verdicts among a cell's outputs, and its error."""
    for output in cell.get("outputs", []):
        if output.output_type == "error" and output.ename == "KeyboardInterrupt":
            yield f"cell {index + 1}: stopped after {CELL_TIMEOUT_S} s"
        elif output.output_type == "error":
            yield f"cell {index + 1}: {output.ename}: {output.evalue}"
        elif output.output_type == "execute_result" and "check(" in cell.source:
            yield output.data.get("text/plain", "")


def extra_with(package: str | None, command: str) -> str:
    """Return the extra of pyproject.toml that brings a package which a command misses.

    >>> extra_with("distributed.security", "grade"), extra_with("nbgrader", "grade"), extra_with("nbformat", "check")
    ('cluster', 'grading', 'lab')
    """
    if (package or "").split(".")[0] in OF_CLUSTER:
        return "cluster"
    return "grading" if command in COMMANDS else "lab"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="qcourse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    lab = commands.add_parser(
        "lab", help="open the lessons in JupyterLab; what is not named here is passed on to it"
    )
    lab.add_argument(
        "--port", type=int, default=0, help="the port to use (default: a free one from 8888 up)"
    )
    lab.add_argument("--no-browser", action="store_true", help="only print the address")
    check = commands.add_parser(
        "check", help="progress over all sheets, or one sheet run and checked"
    )
    check.add_argument("sheet", nargs="?", help="the number of a sheet, such as 01")
    add_commands(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options, more = parser().parse_known_args(arguments)
    if more and options.command != "lab":
        parser().error(f"unknown arguments: {' '.join(more)}")
    try:
        if options.command == "lab":
            root = find(FIRST_LESSON).parent.parent
            return serve(root, port=options.port, browser=not options.no_browser, more=tuple(more))
        if options.command in COMMANDS:
            return COMMANDS[options.command](options)
        if options.sheet:
            return check_sheet(options.sheet)
        print(progress_table())
    except KeyboardInterrupt:
        if options.command == "grade":
            print(
                "Stopped. What was graded is kept; the same command goes on from there.",
                file=sys.stderr,
            )
        return 130
    except ImportError as error:
        extra = extra_with(error.name, options.command)
        print(
            f"{error.name} is missing: install the course with pip install 'qcourse[{extra}]'.",
            file=sys.stderr,
        )
        return 2
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
