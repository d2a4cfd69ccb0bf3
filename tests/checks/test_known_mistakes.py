"""Mistakes as people write them, in torch and float32, get the name that the bank has for them, whatever the seed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from qcourse.checks.answers import capture
from qcourse.checks.judge import Verdict, judge
from qcourse.checks.registry import find_exercise


def verdict_of(exercise_id: str, function: object, seed: int) -> Verdict:
    exercise = find_exercise(exercise_id)
    cases = exercise.cases(torch.Generator().manual_seed(seed))
    return judge(exercise, cases, [capture(function, case.args) for case in cases])


def grid(x: Tensor, bits: int, *, widened: bool = True) -> tuple[Tensor, Tensor]:
    low, high = (x.min().clamp(max=0), x.max().clamp(min=0)) if widened else (x.min(), x.max())
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale).int()


def clamped_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale, zero_point = grid(x, bits, widened=False)
    return scale, zero_point.clamp(0, 2**bits - 1)


def there_and_back(x: Tensor, bits: int, scale: Tensor, zero_point: Tensor, rounding: object = torch.round) -> Tensor:
    return scale * ((rounding(x / scale) + zero_point).clamp(0, 2**bits - 1) - zero_point)


def saturated_late(x: Tensor, scale: float, bits: int) -> Tensor:
    return torch.round(x / scale).to(torch.int16).to(torch.int8).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def row_scales(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    if w.shape[1] % group_size:
        raise ValueError("group_size must divide the row")
    scales = w.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(w / scales).to(torch.int8), scales


def groups_numpy(w: Tensor, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    parts = w.numpy().reshape(len(w), -1, group_size)  # refuses with a ValueError of NumPy's own
    scales = np.abs(parts).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(parts / scales).astype(np.int8).reshape(w.shape), scales[..., 0]


def groups_torch(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    parts = w.reshape(len(w), -1, group_size)  # refuses with torch's RuntimeError
    scales = parts.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.round(parts / scales).to(torch.int8).reshape(w.shape), scales[..., 0]


def range_from_zero(batches: tuple[Tensor, ...]) -> tuple[float, float]:
    low = high = 0.0
    for x in batches:
        low, high = min(low, x.min().item()), max(high, x.max().item())
    return low, high


def kth_magnitude(x: Tensor, percent: float) -> Tensor:
    return x.abs().flatten().kthvalue(max(1, int(x.numel() * percent / 100))).values


def clip_by(error: object) -> object:
    def best(x: Tensor, clips: tuple[float, ...], bits: int) -> tuple[float, Tensor]:
        errors = torch.stack([error(x, clip, 2 ** (bits - 1) - 1) for clip in clips])
        return clips[int(errors.argmin())], errors.min()

    return best


def error_never_saturated(x: Tensor, clip: float, qmax: int) -> Tensor:
    scale = clip / qmax
    return torch.nn.functional.mse_loss(torch.round(x / scale) * scale, x)


def error_of_clipped(x: Tensor, clip: float, qmax: int) -> Tensor:
    x = x.clamp(-clip, clip)
    return (x - torch.round(x / (clip / qmax)) * (clip / qmax)).pow(2).mean()


def error_clamped_first(x: Tensor, clip: float, qmax: int) -> Tensor:
    scale = clip / qmax
    return (x - torch.round(x.clamp(-clip, clip) / scale) * scale).pow(2).mean()


def average_from_zero(batches: tuple[Tensor, ...], momentum: float) -> Tensor:
    average = torch.zeros(())
    for x in batches:
        average = average * momentum + x.abs().max() * (1 - momentum)
    return average


def average_turned(batches: tuple[Tensor, ...], momentum: float) -> Tensor:
    average = batches[0].abs().max()
    for x in batches[1:]:
        average += momentum * (x.abs().max() - average)
    return average


CUT = "cut off or floored instead of rounded"
LATE = "not saturated, or only after the cast to int8"
ENDS = "qmin or qmax is off by one"
NOT_WIDENED = "the range was not widened to hold 0"
ROUNDING = "floored, or halves rounded up"
REFUSAL = "the refusal is left to reshape, or does not name the numbers"
WRITTEN = [
    ("01.2", CUT, lambda x, s, bits: torch.floor(x / s).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)),
    ("01.2", CUT, lambda x, s, bits: (x / s).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)),
    ("01.2", CUT, lambda x, s, bits: (x / s).to(torch.int16).to(torch.int8)),
    ("01.2", CUT, lambda x, s, bits: (x // s).int()),
    ("01.2", LATE, saturated_late),
    ("01.2", LATE, lambda x, s, bits: torch.round(x / s).int()),
    ("01.2", ENDS, lambda x, s, bits: torch.round(x / s).clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1).int()),
    ("01.2", ENDS, lambda x, s, bits: torch.round(x / s).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1)).int()),
    ("01.3", NOT_WIDENED, lambda x, bits: grid(x, bits, widened=False)),
    ("01.3", NOT_WIDENED, clamped_grid),
    ("01.4", NOT_WIDENED, lambda x, bits: there_and_back(x, bits, *clamped_grid(x, bits))),
    ("01.4", ROUNDING, lambda x, bits: there_and_back(x, bits, *grid(x, bits), torch.floor)),
    ("01.4", ROUNDING, lambda x, bits: there_and_back(x, bits, *grid(x, bits), lambda v: torch.floor(v + 0.5))),
    ("02.2", "one scale a row instead of a group", row_scales),
    ("02.2", REFUSAL, groups_numpy),
    ("02.2", REFUSAL, groups_torch),
    ("04.1", "starts from 0", range_from_zero),
    ("04.1", "the last batch only", lambda batches: [(x.min(), x.max()) for x in batches][-1]),
    ("04.2", "the percentile of x, not of |x|", lambda x, percent: torch.quantile(x, percent / 100)),
    ("04.2", "a fraction where percent are wanted", lambda x, percent: np.percentile(x.abs().numpy(), percent / 100)),
    ("04.2", "a whole rank where the percentile lies between two", kth_magnitude),
    ("04.3", "the codes are not saturated", clip_by(error_never_saturated)),
    ("04.3", "compared with the clipped x, not with x", clip_by(error_of_clipped)),
    ("04.3", "the lowest code is never used", clip_by(error_clamped_first)),
    ("04.4", "starts from 0", average_from_zero),
    ("04.4", "the momentum the wrong way round", average_turned),
]


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
