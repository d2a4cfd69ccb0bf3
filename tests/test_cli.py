"""The command `qcourse`, called as a reader does."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from qcourse import check_command, cli, course_files
from qcourse.checks.registry import load_sheet, sheet_ids


@pytest.fixture
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "progress.json"
    monkeypatch.setenv("QCOURSE_PROGRESS", str(path))
    monkeypatch.chdir(tmp_path)
    return path


def write_sheet(folder: Path, *sources: str) -> None:
    notebook = new_notebook(cells=[new_code_cell(source) for source in sources])
    (folder / "exercises").mkdir()
    nbformat.write(notebook, folder / "exercises" / "01_mine.ipynb")


def test_help_needs_no_torch() -> None:
    lines = [
        "import sys",
        "from qcourse.cli import main",
        "try: main(['--help'])",
        "finally: print('torch' in sys.modules)",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "qcourse check 01" in done.stdout
    assert done.stdout.endswith("False\n")


def test_the_table_shows_every_exercise(progress: Path, capsys: pytest.CaptureFixture) -> None:
    earned = {
        "01.2": {"points": 3, "date": "2026-01-31"},
        "01.3": {"points": 0, "date": "2026-02-01"},
    }
    progress.write_text(json.dumps(earned))
    assert cli.main(["check"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sheets = [load_sheet(sheet_id) for sheet_id in sheet_ids()]
    worth = [sum(exercise.points for exercise in sheet.exercises) for sheet in sheets]
    assert lines[0] == ["01", "The", "quantizer", "3", "of", str(worth[0])]
    assert lines[1][-4:] == ["0", "of", "1", "-"]
    assert lines[2][-4:] == ["3", "of", "3", "2026-01-31"]
    assert lines[3][-4:] == ["0", "of", "3", "2026-02-01"]
    assert lines[-1] == ["all", "3", "of", str(sum(worth))]
    assert len(lines) == 1 + sum(1 + len(sheet.exercises) for sheet in sheets)


def test_a_sheet_is_run_past_its_broken_cells(
    progress: Path, capsys: pytest.CaptureFixture
) -> None:
    write_sheet(
        progress.parent,
        "import torch\nfrom qcourse import check",
        "def symmetric_scale(x, bits):\n    return x.abs().max() / (2 ** (bits - 1) - 1)",
        'check("01.1", symmetric_scale)',
        "def quantize(x, scale, bits)\n    return x",
        'check("01.2", quantize)',
        "def code_entropy(codes):\n"
        "    p = torch.unique(codes, return_counts=True)[1] / codes.numel()\n"
        "    return -(p * p.log()).sum()",
        'check("01.5", code_entropy)',
    )
    assert cli.main(["check", "1"]) == 1
    out = capsys.readouterr().out
    assert "01_mine.ipynb\n01.1 passed, 1 of 1 point\ncell 4: SyntaxError: " in out
    assert "cell 5: NameError: name 'quantize' is not defined\n01.5 not yet, 0 of 2 points" in out
    assert "Looks like: the natural logarithm. " in out
    assert out.endswith("1 of 5 exercises passed.\n")
    assert json.loads(progress.read_text())["01.1"]["points"] == 1


def test_a_cell_without_end_and_a_kernel_that_dies(
    progress: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_command, "CELL_TIMEOUT_S", 2)
    write_sheet(progress.parent, "while True: pass", "1 / 0", "import os\nos._exit(1)", "2 / 0")
    assert cli.main(["check", "01"]) == 1
    words = capsys.readouterr().out.splitlines()[1:]
    assert words == [
        "cell 1: stopped after 2 s",
        "cell 2: ZeroDivisionError: division by zero",
        "cell 3: Python itself ended here, so the cells below were not run",
        "0 of 5 exercises passed.",
    ]


def test_a_file_that_is_no_notebook(progress: Path, capsys: pytest.CaptureFixture) -> None:
    path = progress.parent / "exercises" / "01_mine.ipynb"
    path.parent.mkdir()
    for text in ("", "[]", "{}"):
        path.write_text(text)
        assert cli.main(["check", "01"]) == 2
        error = capsys.readouterr().err
        assert error.endswith("01_mine.ipynb is not a notebook that can be read.\n")


def test_an_unknown_sheet(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["check", "77"]) == 2
    assert capsys.readouterr().err.startswith("sheet='77' is unknown; the sheets are 01, 02")


def test_what_is_found_where(progress: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in the repository
    root = Path(cli.__file__).parent.parent
    assert cli.find("pyproject.toml") == root / "pyproject.toml"
    # the current folder comes first
    write_sheet(progress.parent)
    assert cli.find("exercises/01_*.ipynb").name == "01_mine.ipynb"
    # then the folders above it
    monkeypatch.chdir("exercises")
    assert cli.find("exercises/01_*.ipynb").name == "01_mine.ipynb"
    with pytest.raises(FileNotFoundError, match=r"no nothing/\* here"):
        cli.find("nothing/*")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `qcourse lab` would have started JupyterLab with."""
    calls: list[tuple] = []

    def serve(root: Path, **options: object) -> int:
        calls.append((root, options))
        return 0

    monkeypatch.setattr(cli, "serve", serve)
    return calls


def test_lab_passes_on_what_it_does_not_know(served: list[tuple]) -> None:
    assert cli.main(["lab", "--no-browser", "--ip=0.0.0.0", "--port", "9999", "--debug"]) == 0
    assert served[0][1] == {"port": 9999, "browser": False, "more": ("--ip=0.0.0.0", "--debug")}


def test_lab_shows_the_course_around_the_current_folder_else_the_package_s_own(
    served: list[tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cli.main(["lab"])
    (tmp_path / "notebooks" / "deeper").mkdir(parents=True)
    (tmp_path / cli.FIRST_LESSON).touch()
    for folder in (tmp_path, tmp_path / "notebooks" / "deeper"):
        monkeypatch.chdir(folder)
        cli.main(["lab"])
    assert [root for root, _ in served] == [Path(cli.__file__).parent.parent, tmp_path, tmp_path]


def test_lab_without_a_course_is_one_sentence(
    progress: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = progress.parent / "site-packages" / "qcourse"
    monkeypatch.setattr(course_files, "PACKAGE", elsewhere)
    assert cli.main(["lab"]) == 2
    said = capsys.readouterr().err
    assert said == f"There is no {cli.FIRST_LESSON} here; run this in the course's folder.\n"


def test_lab_without_jupyterlab_is_one_sentence(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["lab"]) == 2
    said = capsys.readouterr().err
    assert said == "jupyterlab is missing: install the course with pip install 'qcourse[lab]'.\n"


def test_fetch_and_chat_say_what_they_take(capsys: pytest.CaptureFixture) -> None:
    for arguments, said in (
        (["fetch", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["chat", "--weights", "int5"], "invalid choice: 'int5'"),
        (["chat", "--max-tokens", "0"], "must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert said in capsys.readouterr().err


def test_unknown_arguments(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["check", "01", "--fast"])
    assert "unknown arguments: --fast" in capsys.readouterr().err


def test_a_missing_package_of_the_cluster_names_its_extra(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)

    def grade(options: object) -> int:
        importlib.import_module("distributed")
        return 0

    monkeypatch.setitem(cli.COMMANDS, "grade", grade)
    assert cli.main(["grade", "submitted", "--scheduler", "tls://host:8786"]) == 2
    said = capsys.readouterr().err
    expected = "distributed is missing: install the course with pip install 'qcourse[cluster]'.\n"
    assert said == expected


def test_a_missing_package_is_one_sentence(
    progress: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sheet(progress.parent)
    monkeypatch.setitem(sys.modules, "nbformat", None)
    assert cli.main(["check", "01"]) == 2
    said = capsys.readouterr().err
    assert said == "nbformat is missing: install the course with pip install 'qcourse[lab]'.\n"
