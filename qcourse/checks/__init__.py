"""Exercises and their checks: one file per sheet holds cases, references and known mistakes.

A learner calls `check`. It draws the cases, calls the function on copies of them (`answers.py`),
judges the answers (`judge.py`) and keeps the best result (`progress.py`). A grader does the same
with another seed and the function in another process.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcourse.checks.judge import Verdict

SEED = 0  # of the random cases of a self-check, the same in every run


def check(exercise_id: Any, function: Any) -> "Verdict":
    """Return the verdict on a function, tried on the cases of an exercise such as "01.2".

    An error in the function is part of the verdict and is not raised.

    Raises:
        TypeError: exercise_id is not a string, or function is not a function.
        ValueError: there is no such exercise.

    >>> check("01.1", lambda x, bits: x.abs().max() / (2 ** (bits - 1) - 1))
    01.1 passed, 1 of 1 point
    """
    # Imported here because a grader that only lists the sheets must not wait for torch.
    import torch

    from qcourse.checks.answers import capture
    from qcourse.checks.judge import judge
    from qcourse.checks.progress import record
    from qcourse.checks.registry import find_exercise

    exercise = find_exercise(exercise_id)
    if not callable(function):
        raise TypeError(
            f"function={function!r} must be your function {exercise.function}: its name, not called"
        )
    generator = torch.Generator().manual_seed(SEED)
    cases = exercise.cases(generator)
    answers = [capture(function, case.args) for case in cases]
    verdict = judge(exercise, cases, answers)
    record(verdict)
    return verdict
