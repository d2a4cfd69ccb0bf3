"""Points: a right answer earns all, a wrong one at most half, a table or a constant nothing."""

from collections.abc import Callable
from typing import Any

import pytest
from drawing import EXERCISES, SEEDS, drawn, expected, verdict_of
from hypothesis import given
from hypothesis import strategies as st

from qcourse.checks.answers import Failure, capture
from qcourse.checks.compare import difference
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.points import earned

each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)


def points(by_hand: str, drawn_cases: str, worth: int = 3, answers: list | None = None) -> float:
    """Return the points, where each letter is a case, "r" for right."""
    cases = [Case((), by_hand=True) for _ in by_hand] + [Case(()) for _ in drawn_cases]
    right = [letter == "r" for letter in by_hand + drawn_cases]
    return earned(worth, cases, answers or [*range(len(cases))], right)


@pytest.mark.parametrize(
    ("by_hand", "drawn_cases", "earns"),
    [
        ("rr", "rrr", 3),
        ("rr", "rrw", 1.0),  # half of 3, times 2 of 3
        ("wr", "rrr", 1.5),  # all drawn cases, and still no more than half
        ("ww", "rrww", 0.75),
        ("", "rrwwwww", 0.42),  # 3/7, rounded down
        ("rr", "www", 0),  # a table of the answers in the source
        ("rr", "rww", 0),  # one case may be luck
        ("wr", "", 0),
    ],
)
def test_half_of_the_points_times_the_share_of_drawn_cases(
    by_hand: str, drawn_cases: str, earns: float
) -> None:
    assert points(by_hand, drawn_cases) == earns


def test_one_answer_for_all_cases_earns_nothing() -> None:
    refusals = [
        Failure(("ValueError",), "2 does not divide 5"),
        Failure(("ValueError",), "4 does not divide 6"),
    ]
    assert points("", "rrww", answers=[0, 0, 1, 2]) == 0
    assert points("", "rrww", answers=[*refusals, 1, 2]) == 0
    assert points("", "rrww", answers=[refusals[0], 1, 2, 3]) == 0.75


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1))
def test_nothing_wrong_earns_more_than_half(worth: int, found: list[tuple[bool, bool]]) -> None:
    cases = [Case((), by_hand=by_hand) for by_hand, _ in found]
    right = [is_right for _, is_right in found]
    result = earned(worth, cases, [*range(len(cases))], right)
    assert result == worth if all(right) else 0 <= result <= worth / 2


@each_exercise
def test_cases_by_hand_come_first_and_do_not_change(exercise: Exercise) -> None:
    one = drawn(exercise.id, 0)
    other = drawn(exercise.id, 1)
    marks = [case.by_hand for case in one]
    assert marks == [case.by_hand for case in other] == sorted(marks, reverse=True)
    assert 0 < sum(marks) <= len(marks) - 2
    hand_made = sum(marks)
    assert repr(one[:hand_made]) == repr(other[:hand_made])
    assert repr(one[hand_made:]) != repr(other[hand_made:])


@each_exercise
def test_each_known_mistake_fails_on_a_drawn_case(exercise: Exercise) -> None:
    for seed in SEEDS:
        pairs = zip(drawn(exercise.id, seed), expected(exercise.id, seed), strict=True)
        cases = [(case, right) for case, right in pairs if not case.by_hand]
        for mistake in exercise.mistakes:
            found = (
                difference(capture(mistake.function, case.args), right, exercise.tolerance)
                for case, right in cases
            )
            assert any(one is not None for one in found), f"seed {seed}: {mistake}"


def always(error: Exception) -> Callable[..., Any]:
    def function(*args: Any) -> Any:
        raise error

    return function


CONSTANTS = {
    "None": lambda *args: None,
    "0": lambda *args: 0,
    "1": lambda *args: 1,
    "True": lambda *args: True,
    "two zeros": lambda *args: (0, 0),
    "its first argument": lambda *args: args[0],
    "a refusal": always(ValueError("shape is invalid")),
    "a refusal with all numbers": always(ValueError(" ".join(map(str, range(100))))),
    "a refusal with few numbers": always(ValueError("4 does not divide 6, nor 2 5")),
}


@each_exercise
def test_constants_earn_nothing(exercise: Exercise) -> None:
    for name, function in CONSTANTS.items():
        assert verdict_of(exercise, function, 7).points == 0, name
