"""The sheets: stubs say "not written yet", solutions pass, cards are true, exercises/ is current.

Tests make sheets from solutions/, so that a learner's answers in exercises/ change no test. One
test compares exercises/ with them; only CI is strict about it.
"""

import doctest
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import make_exercises
import nbformat
import pytest
import torch

from qcourse.checks.answers import capture
from qcourse.checks.exercise import Exercise
from qcourse.checks.judge import Verdict, judge
from qcourse.checks.registry import load_sheet, sheet_ids

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = [exercise for sheet_id in sheet_ids() for exercise in load_sheet(sheet_id).exercises]
# as a notebook's file has it
STUB = r"raise NotImplementedError(\"not written yet\")"
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)


@cache
def notebook(folder: str, sheet_id: str) -> nbformat.NotebookNode:
    """A solution, or the sheet that is made from it; read only."""
    (path,) = (ROOT / "solutions").glob(f"{sheet_id}_*.ipynb")
    text = path.read_text(encoding="utf-8")
    if folder == "exercises":
        text = make_exercises.make_exercise(text)
    return nbformat.reads(text, as_version=4)


def cell(folder: str, exercise: Exercise, kind: str) -> nbformat.NotebookNode:
    """The card, solution or check cell of an exercise."""
    sheet_id, number = exercise.id.split(".")
    wanted = f"{sheet_id}-{number}-{kind}"
    return next(one for one in notebook(folder, sheet_id).cells if one.id == wanted)


def names(folder: str, sheet_id: str) -> dict[str, Any]:
    """What the code of a sheet defines, without its checks.

    Triton is hidden: it reads TRITON_INTERPRET only once, and other tests compile. Kernels run on
    the course's stand-in here, and in the interpreter when solutions are executed as notebooks.
    """
    sources = [one.source for one in notebook(folder, sheet_id).cells if one.cell_type == "code"]
    defined: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        # a sheet may set it; the patch restores it
        patch.setenv("TRITON_INTERPRET", "")
        patch.setitem(sys.modules, "triton", None)
        for source in sources:
            if not source.startswith("check("):
                exec(source, defined)
    return defined


def verdict(folder: str, exercise: Exercise, seed: int) -> Verdict:
    function = names(folder, exercise.id[:2])[exercise.function]
    cases = exercise.cases(torch.Generator().manual_seed(seed))
    return judge(exercise, cases, [capture(function, case.args) for case in cases])


@each_exercise
def test_the_stub_is_not_written_yet(exercise: Exercise) -> None:
    assert repr(verdict("exercises", exercise, 0)) == f"{exercise.id} not written yet"


@pytest.mark.parametrize("seed", range(4))
@each_exercise
def test_the_solution_passes(exercise: Exercise, seed: int) -> None:
    passed = f"{exercise.id} passed, {exercise.points} of "
    assert repr(verdict("solutions", exercise, seed)).startswith(passed)


@each_exercise
def test_the_worked_example_is_true(exercise: Exercise) -> None:
    defined = names("solutions", exercise.id[:2])
    docstring = defined[exercise.function].__doc__
    parser = doctest.DocTestParser()
    example = parser.get_doctest(docstring, defined, exercise.id, None, None)
    assert len(example.examples) >= 1
    assert doctest.DocTestRunner().run(example).failed == 0


@each_exercise
def test_the_card_says_what_the_check_does(exercise: Exercise) -> None:
    card = cell("solutions", exercise, "card").source
    assert card.startswith(f"### {exercise.id} {exercise.title}\n")
    header = re.search(r"\*Difficulty ([1-5]) of 5 · \d+ minutes · (\d+) points?\*", card)
    assert int(header[2]) == exercise.points
    assert f"`{exercise.function}(" in card
    assert "**Example.**" in card
    hint = r"<details><summary>Hint (\d)</summary>\n\n(.+?)\n\n</details>"
    hints = re.findall(hint, card, re.DOTALL)
    assert [int(number) for number, _ in hints] == [*range(1, len(hints) + 1)]
    assert len(hints) >= 2
    assert all("?" in hint for _, hint in hints)


@each_exercise
def test_cells_are_marked_for_grading(exercise: Exercise) -> None:
    check = cell("exercises", exercise, "check")
    solution = cell("exercises", exercise, "solution")
    assert check.source == f'check("{exercise.id}", {exercise.function})'
    marks = check.metadata.nbgrader
    assert (marks.grade, marks.locked, marks.solution) == (True, True, False)
    assert marks.points == exercise.points
    assert check.metadata.editable is False
    marks = solution.metadata.nbgrader
    assert (marks.grade, marks.locked, marks.solution) == (False, False, True)
    assert marks.grade_id == solution.id
    assert marks.schema_version == 3


@pytest.mark.parametrize("folder", ["solutions", "exercises"])
def test_sheets_and_checks_are_the_same_exercises(folder: str) -> None:
    assert sorted(path.name[:2] for path in (ROOT / "solutions").glob("*.ipynb")) == sheet_ids()
    for sheet_id in sheet_ids():
        sources = [one.source for one in notebook(folder, sheet_id).cells]
        checks = [source for source in sources if source.startswith("check(")]
        exercises = load_sheet(sheet_id).exercises
        assert checks == [f'check("{exercise.id}", {exercise.function})' for exercise in exercises]


@each_exercise
def test_solutions_ship_executed(exercise: Exercise) -> None:
    (output,) = cell("solutions", exercise, "check").outputs
    assert output.data["text/plain"].startswith(f"{exercise.id} passed")


def test_exercises_hold_no_solution_and_no_output() -> None:
    for sheet_id in sheet_ids():
        sheet = notebook("exercises", sheet_id)
        assert "SOLUTION" not in nbformat.writes(sheet)
        for one in sheet.cells:
            assert not one.get("outputs")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the solutions, and the sheets made from them, to spoil."""
    shutil.copytree(ROOT / "solutions", tmp_path / "solutions", ignore=shutil.ignore_patterns(".*"))
    make_exercises.write(tmp_path / "solutions", tmp_path / "exercises")
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def sheets(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "exercises").glob("*.ipynb")}


def test_exercises_are_what_solutions_make() -> None:
    assert make_exercises.main(["--check"], ROOT) == 0


def test_writing_again_changes_nothing(copy: Path) -> None:
    before = sheets(copy)
    assert make_exercises.main([], copy) == 0
    assert sheets(copy) == before


def test_drift_is_named_and_mended(copy: Path, capsys: pytest.CaptureFixture) -> None:
    before = sheets(copy)
    edited, gone = sorted(before)[:2]
    path = copy / "exercises" / edited
    replace(path, "Hint 1", "Hint one")
    (copy / "exercises" / gone).unlink()
    shutil.copy(path, copy / "exercises" / "99_left_over.ipynb")
    assert make_exercises.main(["--check"], copy) == 1
    assert f"{edited}, {gone}, 99_left_over.ipynb" in capsys.readouterr().err
    assert make_exercises.main([], copy) == 0
    assert sheets(copy) == before


def test_a_changed_solution_is_drift(copy: Path) -> None:
    path = sorted((copy / "solutions").glob("*.ipynb"))[0]
    replace(path, "**Example.**", "**An example.**")
    assert make_exercises.differing(copy / "solutions", copy / "exercises") == [path.name]


def answer(copy: Path, words: str) -> Path:
    """Write an answer into the first sheet, in place of its first stub."""
    path = sorted((copy / "exercises").glob("*.ipynb"))[0]
    replace(path, STUB, words)
    return path


# the stub may remain below an answer
@pytest.mark.parametrize("words", ["return 1", rf"return 1\n    {STUB}"])
def test_answers_are_never_written_over(
    copy: Path, capsys: pytest.CaptureFixture, words: str
) -> None:
    path = answer(copy, words)
    answered = path.read_bytes()
    assert make_exercises.main([], copy) == 1
    assert path.name in capsys.readouterr().err
    assert path.read_bytes() == answered


def test_answers_are_a_learner_s_own_business_and_drift_in_ci(
    copy: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = answer(copy, "return 1")
    monkeypatch.delenv("CI", raising=False)
    assert make_exercises.main(["--check"], copy) == 0
    assert capsys.readouterr().out.endswith(f"Skipped, because they hold answers: {path.name}.\n")
    monkeypatch.setenv("CI", "true")
    assert make_exercises.main(["--check"], copy) == 1
    assert path.name in capsys.readouterr().err


def test_a_sheet_without_answers_is_drift_for_a_learner_too(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    answer(copy, "return 1")
    untouched = sorted((copy / "exercises").glob("*.ipynb"))[1]
    untouched.unlink()
    assert make_exercises.main(["--check"], copy) == 1


def test_a_solution_that_does_not_end_is_refused(copy: Path) -> None:
    path = sorted((copy / "solutions").glob("*.ipynb"))[0]
    replace(path, "### END SOLUTION", "")
    with pytest.raises(RuntimeError, match="end solution"):
        make_exercises.main(["--check"], copy)
