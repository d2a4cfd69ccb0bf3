"""What an answer earns: one rule for the learner's own check and for the grader.

Anyone can read the hand-made cases in the source, so they earn nothing. Points come from the drawn
cases, and only an answer that is right in every case earns more than half of them.
"""

from collections.abc import Sequence
from typing import Any

from qcourse.checks.compare import difference
from qcourse.checks.exercise import Case


def earned(
    points: int, cases: Sequence[Case], expected: Sequence[Any], right: Sequence[bool]
) -> float:
    """Return all points if every case is right, else points / 2 * (share of drawn cases right).

    The result is cut to full hundredths. An answer that is the same for all arguments earns 0: two
    right drawn cases must expect different answers. All refusals count as one answer.

    >>> cases = [Case((1,), by_hand=True), Case((2,)), Case((3,)), Case((4,))]
    >>> earned(3, cases, [1, 4, 9, 16], [True, True, True, False])
    1.0
    """
    if all(right):
        return points

    # Hand-made cases do not count.
    drawn = [number for number, case in enumerate(cases) if not case.by_hand]
    answers = [expected[number] for number in drawn if right[number]]
    if not _differ(answers):
        return 0

    # Half of the points in hundredths, rounded down.
    hundredths = 50 * points * len(answers) // len(drawn)
    return hundredths / 100


def _differ(answers: Sequence[Any]) -> bool:
    for answer in answers[1:]:
        if difference(answer, answers[0], 0.0, kinds=False) is not None:
            return True
    return False
