"""The rules for every notebook: size, order of execution, short cells, clean outputs.

nbval runs all cells again and compares their outputs. These tests read the shipped files, and run
the exercise sheets without any answer. A sheet that holds answers belongs to the learner and is
skipped, except in CI.
"""

import re
import statistics
from pathlib import Path

import nbformat
import pytest
from make_exercises import is_learners
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from run_notebooks import KERNEL, execute, run

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTIONS = sorted((ROOT / "solutions").glob("*.ipynb"))
SHEETS = [path for path in sorted((ROOT / "exercises").glob("*.ipynb")) if not is_learners(path)]
MAX_BYTES = 400_000
MAX_LINES = 30
MAX_MEDIAN_LINES = 8
CHECK = re.compile(r"^check\(", re.MULTILINE)
UNWANTED = re.compile(r"/home/|/root/|/Users/|/tmp/|[A-Z]:\\|\w*Warning\b")


def name(path: Path) -> str:
    """How the tests of a notebook are called."""
    return f"{path.parent.name}/{path.stem}"


def cells(path: Path, kind: str) -> list[nbformat.NotebookNode]:
    """The cells of one kind: code or markdown."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def text_of(cell: nbformat.NotebookNode) -> str:
    """What a cell shows in words: printed text, results as text or HTML; no pictures or widgets."""
    kinds = ("text/plain", "text/html", "text/markdown")
    shown = [output.get("text", "") for output in cell.outputs]
    for output in cell.outputs:
        if "data" in output:
            shown += ["".join(output.data.get(kind, "")) for kind in kinds]
    return "\n".join(shown)


def check_form(path: Path) -> None:
    """Assert that a notebook is small and valid, with cell ids, for the usual kernel."""
    # as the file is; repairs would be warnings
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec == KERNEL
    assert path.stat().st_size < MAX_BYTES


def check_execution(path: Path) -> None:
    """Assert that all code cells ran in order and show no error, path or warning."""
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for number, cell in enumerate(code, start=1):
        kinds = {output.get("name", output.output_type) for output in cell.outputs}
        assert not kinds & {"error", "stderr"}, f"code cell {number} shows {kinds}"
        found = UNWANTED.search(text_of(cell))
        assert not found, f"code cell {number} shows {found[0]!r}"


def check_lengths(path: Path) -> None:
    """Assert that cells are short enough to be read at one go."""
    lengths = [len(cell.source.splitlines()) for cell in cells(path, "code")]
    assert max(lengths) <= MAX_LINES
    assert statistics.median(lengths) <= MAX_MEDIAN_LINES


def check_frame(path: Path) -> None:
    """Assert that a lesson says what it is for at the top and where it comes from at the end."""
    words = cells(path, "markdown")
    assert "You will be able to" in words[0].source
    assert "Sources" in words[-1].source


@pytest.mark.parametrize("path", [*LESSONS, *SOLUTIONS, *SHEETS], ids=name)
def test_form(path: Path) -> None:
    check_form(path)


@pytest.mark.parametrize("path", [*LESSONS, *SOLUTIONS], ids=name)
def test_executed(path: Path) -> None:
    check_execution(path)


@pytest.mark.parametrize("path", [*LESSONS, *SOLUTIONS], ids=name)
def test_short_cells(path: Path) -> None:
    check_lengths(path)


@pytest.mark.parametrize("path", LESSONS, ids=name)
def test_header_and_footer(path: Path) -> None:
    check_frame(path)


@pytest.fixture(scope="module")
def executed_sheets(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, list[nbformat.NotebookNode]]:
    """The code cells of each sheet, run in one kernel that forgets all names between sheets.

    A kernel for each would import torch again and again.
    """
    parts = {name(path): [new_code_cell("%reset -f"), *cells(path, "code")] for path in SHEETS}
    together = tmp_path_factory.mktemp("sheets") / "all_sheets.ipynb"
    every = [new_code_cell(cell.source) for part in parts.values() for cell in part]
    nbformat.write(new_notebook(cells=every, metadata={"kernelspec": KERNEL}), together)
    try:
        done = iter(execute(together).cells)
    except RuntimeError as error:
        # counted among all cells of all sheets
        number = int(re.search(r"cell (\d+)", str(error))[1])
        sheet = [sheet for sheet, part in parts.items() for _ in part][number - 1]
        raise RuntimeError(f"{sheet}: {error}") from error
    return {sheet: [next(done) for _ in part] for sheet, part in parts.items()}


@pytest.mark.parametrize("path", SHEETS, ids=name)
def test_a_fresh_sheet_runs_and_says_what_is_not_written_yet(
    path: Path, executed_sheets: dict[str, list[nbformat.NotebookNode]]
) -> None:
    assert not any(cell.outputs for cell in cells(path, "code")), "a sheet ships without outputs"
    checks = [cell for cell in executed_sheets[name(path)] if CHECK.search(cell.source)]
    assert len(checks) == sum(bool(CHECK.search(cell.source)) for cell in cells(path, "code")) > 0
    for cell in checks:
        assert "not written yet" in text_of(cell), cell.source


def test_the_first_lessons_and_sheets_are_here() -> None:
    assert {path.stem[:2] for path in LESSONS} >= {"00", "01", "02"}
    assert {path.stem[:2] for path in SOLUTIONS} >= {"01", "02"}


# --- the rules can fail ---------------------------------------------------------------------------


def lesson(
    *,
    source: str = "1 + 1",
    count: int = 1,
    output: dict | None = None,
    header: str = "You will be able to",
):
    """A small lesson that keeps every rule unless told otherwise."""
    outputs = [output] if output else []
    code = new_code_cell(source, execution_count=count, outputs=outputs)
    return new_notebook(
        cells=[new_markdown_cell(header), code, new_markdown_cell("Sources")],
        metadata={"kernelspec": KERNEL},
    )


def check_all(notebook: nbformat.NotebookNode, folder: Path) -> None:
    """Write a notebook and check every rule for lessons."""
    path = folder / "lesson.ipynb"
    nbformat.write(notebook, path)
    for check in (check_form, check_execution, check_lengths, check_frame):
        check(path)


def test_a_good_lesson_passes(tmp_path: Path) -> None:
    check_all(lesson(output=new_output("stream", text="2")), tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        lesson(source="x\n" * 31),
        lesson(source="x\n" * 9),
        lesson(count=2),
        lesson(header="Welcome"),
        lesson(output=new_output("error", ename="ValueError", evalue="", traceback=[])),
        lesson(output=new_output("stream", name="stderr", text="careful")),
        lesson(output=new_output("stream", text="see /home/me/x.py")),
        lesson(output=new_output("display_data", {"text/plain": "UserWarning: careful"})),
        lesson(output=new_output("display_data", {"image/png": "A" * MAX_BYTES})),
    ],
)
def test_a_bad_lesson_is_refused(bad: nbformat.NotebookNode, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_all(bad, tmp_path)


def test_a_failing_cell_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.ipynb"
    nbformat.write(lesson(source="1 / 0"), path)
    message = r"^broken\.ipynb, cell 2: ZeroDivisionError: division by zero$"
    with pytest.raises(RuntimeError, match=message):
        execute(path)


def test_what_is_printed_at_once_is_one_output(tmp_path: Path) -> None:
    path = tmp_path / "printing.ipynb"
    lines = ["import time", "for number in range(3):"]
    lines += ["    print(number, flush=True)", "    time.sleep(0.3)"]
    source = "\n".join(lines)
    nbformat.write(lesson(source=source), path)
    (output,) = execute(path).cells[1].outputs
    assert output.text == "0\n1\n2\n"


def test_running_twice_gives_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "slider.ipynb"
    source = "import ipywidgets\nipywidgets.VBox([ipywidgets.IntSlider(value=4)])"
    nbformat.write(lesson(source=source), path)
    run(path)
    first = path.read_bytes()
    # the widget's state is there for a reader without a kernel
    assert b"IntSliderModel" in first
    run(path)
    assert path.read_bytes() == first
