"""Mistakes as people write them, in torch and float32, get the name that the bank has for them, whatever the seed.

They stand in answers_NN.py beside this file, as MISTAKES: (exercise id, the mistake's name, the function). The name is
"" where the bank has none, to keep it short: then the answer is refused all the same.
"""

from copy import deepcopy
from functools import cache
from importlib import import_module

import pytest
import torch
from torch import Tensor

from qcourse.checks.answers import capture
from qcourse.checks.exercise import Case
from qcourse.checks.judge import Verdict, judge
from qcourse.checks.registry import find_exercise, sheet_ids


@cache
def drawn(exercise_id: str, seed: int) -> list[Case]:
    """The cases of a seed: some sheets draw many before one tells all mistakes apart."""
    return find_exercise(exercise_id).cases(torch.Generator().manual_seed(seed))


def verdict_of(exercise_id: str, function: object, seed: int) -> Verdict:
    cases = deepcopy(drawn(exercise_id, seed))  # a function may write into what it is given
    return judge(find_exercise(exercise_id), cases, [capture(function, case.args) for case in cases])


WRITTEN = [mistake for sheet_id in sheet_ids() for mistake in import_module(f"answers_{sheet_id}").MISTAKES]


@pytest.mark.parametrize(("exercise_id", "name", "function"), WRITTEN)
def test_the_mistake_is_named(exercise_id: str, name: str, function: object) -> None:
    for seed in range(10):
        verdict = verdict_of(exercise_id, function, seed)
        assert (verdict.points, verdict.mistake) == (0, name), f"seed {seed}: {verdict}"


def test_packed_codes_must_be_bytes() -> None:
    def pack_wide(codes: Tensor) -> Tensor:
        nibbles = codes.long() & 15
        return nibbles[0::2] | nibbles[1::2] << 4

    assert verdict_of("02.3", pack_wide, 0).lines[1:] == [
        "pack_int4(torch.tensor([-6, -2, 0, 7], dtype=torch.int8)) returned int64: 8 bytes a value; expected uint8"
    ]
    assert verdict_of("02.3", lambda codes: pack_wide(codes).to(torch.uint8), 0).status == "passed"
    assert verdict_of("02.3", lambda codes: pack_wide(codes).tolist(), 0).status == "passed"
