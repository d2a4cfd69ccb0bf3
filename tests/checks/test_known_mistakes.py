"""Mistakes as people write them, in torch and float32, get their known name for every seed.

They are MISTAKES in the answers_NN.py beside this file: (exercise id, the mistake's name, the
function). The name is "" if the sheet has none, to keep it short; the answer is still wrong.
"""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from drawing import verdict_of
from torch import Tensor

from qcourse.checks.registry import sheet_ids

WRITTEN = [
    mistake for sheet_id in sheet_ids() for mistake in import_module(f"answers_{sheet_id}").MISTAKES
]


@pytest.mark.parametrize(("exercise_id", "name", "function"), WRITTEN)
def test_the_mistake_is_named(exercise_id: str, name: str, function: Callable) -> None:
    for seed in range(10):
        verdict = verdict_of(exercise_id, function, seed)
        assert (verdict.status, verdict.mistake) == ("not yet", name), f"seed {seed}: {verdict}"


def test_a_dtype_is_no_mistake_of_another_name() -> None:
    def quantize_groups(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
        if w.shape[1] % group_size:
            raise ValueError(f"group_size={group_size} does not divide {w.shape[1]}")
        qmax = 2 ** (bits - 1) - 1
        groups = w.unflatten(1, (-1, group_size))
        scales = groups.abs().amax(dim=2) / qmax
        return torch.round(groups / scales[..., None]).flatten(1), scales

    verdict = verdict_of("02.2", quantize_groups, 0)
    assert (verdict.status, verdict.mistake) == ("not yet", "")
    assert verdict.reason.endswith(
        "returned [[7.0, -3.0, 7.0, 1.0], [-7.0, 3.0, 7.0, 1.0]] (float32) as value 1 of 2"
    )
    assert verdict.expected == "an integer dtype"

    def quantize_groups_to_int(*args: object) -> tuple[Tensor, Tensor]:
        codes, scales = quantize_groups(*args)
        return codes.int(), scales

    assert verdict_of("02.2", quantize_groups_to_int, 0).points == 3


def test_packed_codes_must_be_bytes() -> None:
    def pack_wide(codes: Tensor) -> Tensor:
        nibbles = codes.long() & 15
        return nibbles[0::2] | nibbles[1::2] << 4

    assert verdict_of("02.3", pack_wide, 0).lines[1:] == [
        "pack_int4(torch.tensor([-6, -2, 0, 7], dtype=torch.int8)) returned int64:"
        " 8 bytes per value; expected uint8"
    ]
    assert verdict_of("02.3", lambda codes: pack_wide(codes).to(torch.uint8), 0).status == "passed"
    assert verdict_of("02.3", lambda codes: pack_wide(codes).tolist(), 0).status == "passed"
