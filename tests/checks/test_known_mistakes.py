"""Mistakes as people write them, in torch and float32, get the name that the bank has for them, whatever the seed.

They stand in answers_NN.py beside this file, as MISTAKES: (exercise id, the mistake's name, the function). The name is
"" where the bank has none, to keep it short: then the answer is refused all the same.
"""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from drawing import verdict_of
from torch import Tensor

from qcourse.checks.registry import sheet_ids

WRITTEN = [mistake for sheet_id in sheet_ids() for mistake in import_module(f"answers_{sheet_id}").MISTAKES]


@pytest.mark.parametrize(("exercise_id", "name", "function"), WRITTEN)
def test_the_mistake_is_named(exercise_id: str, name: str, function: Callable) -> None:
    for seed in range(10):
        verdict = verdict_of(exercise_id, function, seed)
        assert (verdict.status, verdict.mistake) == ("not yet", name), f"seed {seed}: {verdict}"


def test_packed_codes_must_be_bytes() -> None:
    def pack_wide(codes: Tensor) -> Tensor:
        nibbles = codes.long() & 15
        return nibbles[0::2] | nibbles[1::2] << 4

    assert verdict_of("02.3", pack_wide, 0).lines[1:] == [
        "pack_int4(torch.tensor([-6, -2, 0, 7], dtype=torch.int8)) returned int64: 8 bytes a value; expected uint8"
    ]
    assert verdict_of("02.3", lambda codes: pack_wide(codes).to(torch.uint8), 0).status == "passed"
    assert verdict_of("02.3", lambda codes: pack_wide(codes).tolist(), 0).status == "passed"
