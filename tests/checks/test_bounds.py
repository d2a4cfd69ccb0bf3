"""Reading, comparing and showing any answer takes little time and memory."""

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawing import EXERCISES, drawn, expected

from qcourse.checks.answers import MOST, UnreadableError, capture, plain
from qcourse.checks.compare import difference
from qcourse.checks.exercise import Exercise
from qcourse.checks.judge import judge
from qcourse.checks.registry import find_exercise
from qcourse.checks.words import is_small, show

EXERCISE = find_exercise("02.2")  # a tuple of two arrays, or a refusal
LONGEST_S = 5.0  # processor time with type checks; walking through an answer takes far longer
LARGEST_BYTES = 5_000_000


def nested(depth: int) -> list:
    return [] if depth == 0 else [nested(depth - 1)]


def shared(depth: int) -> list:
    """Return 10^depth values in little memory: ten times the same list, and so on."""
    return [0.0] * 10 if depth == 1 else [shared(depth - 1)] * 10


HUGE: dict[str, Callable[[], Any]] = {
    "rows without values": lambda: torch.empty(20_000_000, 0),
    "an array of 8 MB": lambda: np.zeros(1_000_000),
    "one value, seen often": lambda: torch.zeros(1).expand(10**12),
    "a tuple of 99,000 values": lambda: tuple(range(99_000)),
    "two tuples of 99,000 values": lambda: (tuple(range(99_000)), tuple(range(99_000))),
    "rows in tuples": lambda: tuple((1, 2, 3) for _ in range(33_000)),
    "empty tuples": lambda: ((),) * 99_000,
    "as many values as are read": lambda: (tuple(range(1990)),),
    "lists within lists": lambda: nested(900),
    "a list of one list": lambda: shared(18),
    "a long text": lambda: "x" * 10_000_000,
    "long texts": lambda: ("x" * 1_000_000,) * 20,
    "a long text as one of two values": lambda: (np.zeros((2, 4)), "x" * 1_000_000),
    "many axes": lambda: np.zeros((1,) * 32 + (0,) * 32),
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_is_judged_at_once(name: str) -> None:
    answer = HUGE[name]()
    cases = drawn("02.2", 0)[:1]
    capture(lambda: answer, ())  # imports what the first failure of all imports
    tracemalloc.start()
    start_s = time.process_time()
    verdict = judge(EXERCISE, cases, [answer for _ in cases])
    took_s = time.process_time() - start_s
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (verdict.status, verdict.points, verdict.cases_right) == ("not yet", 0, 0)
    assert took_s < LONGEST_S
    assert most_bytes < LARGEST_BYTES
    assert len(repr(verdict)) < 5000


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_answer_is_compared_and_shown_at_once(name: str) -> None:
    answer = HUGE[name]()
    answer = answer.numpy() if isinstance(answer, torch.Tensor) else answer
    start_s = time.process_time()
    refused_by_plain = ("lists within lists", "a list of one list")
    if name not in refused_by_plain:
        for right in (np.zeros(3), (np.zeros(3), 1.0), 1.0, "text"):
            assert difference(answer, right, 1e-5) is not None
        assert len(show(answer)) < 10_000
    assert time.process_time() - start_s < LONGEST_S


def test_what_is_too_large_is_said() -> None:
    with pytest.raises(UnreadableError, match="more than 2,000 values in lists"):
        plain([0] * 2001)
    with pytest.raises(UnreadableError, match="more than 100,000 values in arrays"):
        plain((np.zeros(60_000), torch.zeros(60_000)))
    with pytest.raises(UnreadableError, match="more than 16 lists within lists"):
        plain(nested(17))
    assert len(plain([0] * 2000)) == 2000
    assert plain(np.zeros(100_000)).size == 100_000


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_every_right_answer_may_come_in_lists(exercise: Exercise) -> None:
    for right in expected(exercise.id, 0):
        parts = right if isinstance(right, tuple) else (right,)
        assert 4 * sum(map(np.size, parts)) < MOST["lists"]


def test_small_is_what_is_written_out() -> None:
    assert is_small(tuple(range(24)))
    assert not is_small(tuple(range(25)))
    assert is_small(np.zeros((2, 12)))
    assert not is_small(np.zeros((25, 0)))
    assert not is_small(((),) * 25)
    assert show(np.zeros((2, 0))) == "[[], []]"
    assert show(()) == "()"
    assert show("x" * 101) == repr("x" * 100) + " and 1 characters more"
