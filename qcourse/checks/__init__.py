"""Floor 4: exercises, checked. One file a sheet holds cases, references, tolerances, points and known mistakes.

`check` is what a learner calls. It draws the cases, calls the function on copies of them (`answers.py`), has the
answers judged (`judge.py`) and keeps the best result (`progress.py`). A grader goes the same way with another seed and
the function in another process.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcourse.checks.judge import Verdict

SEED = 0  # of the random cases of a self-check: the same at every run


def check(exercise_id: Any, function: Any) -> "Verdict":
    """Try a function on the cases of an exercise; the verdict shows itself as a cell's last line.

    Args:
        exercise_id: "01.2".
        function: the learner's own. Whatever it does, the verdict says so: no error of it comes out of here.

    Raises:
        TypeError: exercise_id is no string, or function is no function.
        ValueError: there is no such exercise.

    >>> check("01.1", lambda x, bits: x.abs().max() / (2 ** (bits - 1) - 1))
    01.1 passed, 1 of 1 point
    """
    import torch  # here, because a grader that only asks which sheets there are must not wait for it

    from qcourse.checks.answers import capture
    from qcourse.checks.judge import judge
    from qcourse.checks.progress import record
    from qcourse.checks.registry import find_exercise

    exercise = find_exercise(exercise_id)
    if not callable(function):
        raise TypeError(
            f"function={function!r} must be your function {exercise.function}: its name, not called"
        )
    cases = exercise.cases(torch.Generator().manual_seed(SEED))
    verdict = judge(exercise, cases, [capture(function, case.args) for case in cases])
    record(verdict)
    return verdict
