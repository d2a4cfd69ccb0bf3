"""What an answer earns: one rule, for the learner's own check and for the grader.

The idea: hand-made cases stand in the source, so a table of their answers is no solution. They explain, and earn
nothing. Points come from the drawn cases, and only the whole answer earns more than half of them.
"""

from collections.abc import Sequence
from typing import Any

from qcourse.checks.compare import difference
from qcourse.checks.exercise import Case


def earned(
    points: int, cases: Sequence[Case], expected: Sequence[Any], right: Sequence[bool]
) -> float:
    """All points where every case is right; else points / 2 * (drawn cases right / drawn cases), in full hundredths.

    An answer that is the same whatever the arguments earns nothing: two of the drawn cases that are right must have
    different answers. All refusals count as one answer.

    Args:
        points: what the exercise is worth.
        cases, expected, right: each case, what was expected of it, and whether that came.

    >>> cases = [Case((1,), by_hand=True), Case((2,)), Case((3,)), Case((4,))]
    >>> earned(3, cases, [1, 4, 9, 16], [True, True, True, False])
    1.0
    >>> earned(3, cases, [1, 4, 9, 16], [True, False, False, False])
    0
    """
    if all(right):
        return points
    drawn = [number for number, case in enumerate(cases) if not case.by_hand]
    answers = [expected[number] for number in drawn if right[number]]
    if not _differ(answers):
        return 0
    return 50 * points * len(answers) // len(drawn) / 100


def _differ(answers: Sequence[Any]) -> bool:
    return any(
        difference(answer, answers[0], 0.0, kinds=False) is not None for answer in answers[1:]
    )
