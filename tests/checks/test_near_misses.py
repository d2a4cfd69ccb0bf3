"""Wrong answers that once passed fail for every seed."""

from collections.abc import Callable

import pytest
from drawing import SEEDS, drawn, expected
from near_misses import NEAR_MISSES

from qcourse.checks.answers import capture
from qcourse.checks.compare import difference
from qcourse.checks.registry import find_exercise


@pytest.mark.parametrize(("exercise_id", "what", "function"), NEAR_MISSES)
def test_it_fails(exercise_id: str, what: str, function: Callable) -> None:
    tolerance = find_exercise(exercise_id).tolerance
    for seed in SEEDS:
        pairs = [*zip(drawn(exercise_id, seed), expected(exercise_id, seed), strict=True)]

        # The cases that tell are near the end.
        wrong = (
            difference(capture(function, case.args), right, tolerance)
            for case, right in reversed(pairs)
        )
        assert any(found is not None for found in wrong), f"seed {seed}: {what} passes"
