"""Right answers in every style pass: a loop, NumPy, torch, and the package.

The references never use the package. The answers to a sheet are in the answers_NN.py beside this
file: THE_PACKAGE (one by qcourse for each exercise), THE_LESSON (names of functions that the lesson
defines and that solve an exercise) and OTHER_STYLES.
"""

import ast
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
import torch
from drawing import drawn, verdict_of

from qcourse.checks.registry import find_exercise, load_sheet, sheet_ids
from qcourse.methods.calibration import Calibrator, Percentile
from qcourse.numerics.affine import IntQuantizer


def answers_to(exercise_id: str) -> ModuleType:
    """Return the answers to a sheet, by its id or that of one of its exercises."""
    return import_module(f"answers_{exercise_id[:2]}")


NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
IDS = [exercise.id for sheet_id in sheet_ids() for exercise in load_sheet(sheet_id).exercises]
WITHIN_A_BIN = {"05.2"}  # the package keeps a histogram, so its percentile has a test of its own
IN_LESSONS = [
    (exercise_id, name)
    for sheet in sheet_ids()
    for exercise_id, name in answers_to(sheet).THE_LESSON.items()
]


def lesson_functions(sheet_id: str) -> dict[str, Callable]:
    """Return the functions that a lesson defines, as a learner would copy them."""
    (path,) = NOTEBOOKS.glob(f"{sheet_id}_*.ipynb")
    lesson = nbformat.read(path, as_version=4)
    statements = [
        part
        for cell in lesson.cells
        if cell.cell_type == "code"
        for part in ast.parse(cell.source).body
    ]
    names = {"torch": torch}
    for definition in statements:
        if isinstance(definition, ast.FunctionDef):
            exec(ast.unparse(definition), names)
    return names


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "exercise_id", [exercise_id for exercise_id in IDS if exercise_id not in WITHIN_A_BIN]
)
def test_the_references_and_the_package_agree(exercise_id: str, seed: int) -> None:
    verdict = verdict_of(exercise_id, answers_to(exercise_id).THE_PACKAGE[exercise_id], seed)
    assert verdict.status == "passed", repr(verdict)


@pytest.mark.parametrize("seed", range(4))
def test_the_percentile_of_the_package_is_at_most_a_bin_wider(seed: int) -> None:
    exercise = find_exercise("05.2")
    for case in drawn("05.2", seed):
        x, percent = case.args
        widest_bin = x.abs().max().item() / 1024
        calibrator = Calibrator(IntQuantizer(8), Percentile(percent))
        calibrator.observe(x)
        _, clip = calibrator.range()
        assert -1e-6 <= clip.item() - exercise.reference(x, percent) <= widest_bin + 1e-6


@pytest.mark.parametrize(("exercise_id", "name"), IN_LESSONS)
def test_what_the_lesson_writes_passes(exercise_id: str, name: str) -> None:
    verdict = verdict_of(exercise_id, lesson_functions(exercise_id[:2])[name], seed=0)
    assert verdict.status == "passed", repr(verdict)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exercise_id", IDS)
def test_right_answers_in_other_styles_pass(exercise_id: str, seed: int) -> None:
    styles = answers_to(exercise_id).OTHER_STYLES[exercise_id]
    assert len(styles) >= 2
    for function in styles:
        verdict = verdict_of(exercise_id, function, seed)
        assert verdict.status == "passed", f"{function}: {verdict}"


@pytest.mark.parametrize("sheet_id", sheet_ids())
def test_references_do_not_use_what_they_judge(sheet_id: str) -> None:
    source = inspect.getsource(inspect.getmodule(load_sheet(sheet_id).exercises[0].cases))
    imports = {
        line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))
    }
    assert all(name.startswith("qcourse.checks.") for name in imports if name.startswith("qcourse"))
