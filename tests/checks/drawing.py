"""The cases of an exercise by seed, drawn once for all tests, and the verdict on a function."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from qcourse.checks.answers import capture
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.judge import Verdict, judge
from qcourse.checks.registry import find_exercise, load_sheet, sheet_ids

EXERCISES = [exercise for sheet_id in sheet_ids() for exercise in load_sheet(sheet_id).exercises]
SEEDS = range(20)


@cache
def drawn(exercise_id: str, seed: int) -> tuple[Case, ...]:
    """Return all cases of an exercise, hand-made ones first; nothing may write into them."""
    return tuple(find_exercise(exercise_id).cases(torch.Generator().manual_seed(seed)))


@cache
def expected(exercise_id: str, seed: int) -> tuple[Any, ...]:
    """Return the reference's answer to each case."""
    reference = find_exercise(exercise_id).reference
    return tuple(capture(reference, case.args) for case in drawn(exercise_id, seed))


def verdict_of(exercise: Exercise | str, function: Callable, seed: int) -> Verdict:
    """Return the judge's verdict on a function, which gets copies of the cases."""
    exercise = find_exercise(exercise) if isinstance(exercise, str) else exercise
    cases = drawn(exercise.id, seed)
    return judge(exercise, cases, [capture(function, case.args) for case in cases])
