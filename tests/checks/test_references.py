"""Right answers in every style pass: a loop, NumPy, torch, and the package itself, which the references never use."""

import ast
import inspect
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from torch import Tensor

import qcourse
from qcourse.checks.answers import capture
from qcourse.checks.judge import judge
from qcourse.checks.registry import find_exercise, load_sheet, sheet_ids
from qcourse.cost.memory import bytes_per_parameter
from qcourse.methods.calibration import Calibrator, MinMax, MovingAverage, Percentile, Rule
from qcourse.numerics.metrics import code_entropy

IDS = [exercise.id for sheet_id in sheet_ids() for exercise in load_sheet(sheet_id).exercises]


def scale_and_zero(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    q = qcourse.quantize(x, bits, symmetric=False)
    return q.scale, q.zero_point


def codes_and_scales(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    q = qcourse.quantize(w, bits, granularity=qcourse.PerGroup(group_size))
    return q.codes, q.scale


def range_of(batches: tuple[Tensor, ...], rule: Rule, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    calibrator = Calibrator(qcourse.IntQuantizer(8, symmetric=symmetric), rule)
    for x in batches:
        calibrator.observe(x)
    return calibrator.range()


def best_of_package(x: Tensor, clips: tuple[float, ...], bits: int) -> tuple[float, float]:
    qmax = 2 ** (bits - 1) - 1
    errors = [
        torch.mean((x - qcourse.fake_quantize(x, bits, scale=torch.tensor(clip / qmax))) ** 2).item() for clip in clips
    ]
    return min(zip(clips, errors, strict=True), key=lambda found: found[1])


THE_PACKAGE = {
    "01.1": lambda x, bits: qcourse.quantize(x, bits).scale,
    "01.2": lambda x, scale, bits: qcourse.quantize(x, bits, scale=scale).codes,
    "01.3": scale_and_zero,
    "01.4": lambda x, bits: qcourse.fake_quantize(x, bits, symmetric=False),
    "01.5": code_entropy,
    "02.1": lambda w, bits: qcourse.quantize(w, bits, granularity=qcourse.PerChannel(0)).scale,
    "02.2": codes_and_scales,
    "02.3": lambda codes: qcourse.pack(codes, 4),
    "02.4": lambda packed: qcourse.unpack(packed, 4, 2 * len(packed)),
    "02.5": lambda bits, group_size, scale_bytes, symmetric: (
        8 * bytes_per_parameter(bits, group_size, scale_bytes=scale_bytes, zero_bytes=0 if symmetric else bits / 8)
    ),
    "04.1": lambda batches: range_of(batches, MinMax()),
    "04.3": best_of_package,
    "04.4": lambda batches, momentum: range_of(tuple(x.abs() for x in batches), MovingAverage(momentum))[1],
}
WITHIN_A_BIN = {"04.2"}  # the package keeps a histogram, so its percentile has a test of its own


def lesson_functions(name: str) -> dict[str, Callable]:
    """The functions that a lesson defines, as a learner would copy them."""
    lesson = nbformat.read(Path(__file__).parents[2] / "notebooks" / f"{name}.ipynb", as_version=4)
    statements = [part for cell in lesson.cells if cell.cell_type == "code" for part in ast.parse(cell.source).body]
    names = {"torch": torch}
    for definition in statements:
        if isinstance(definition, ast.FunctionDef):
            exec(ast.unparse(definition), names)
    return names


THE_LESSON = {"01.1": "amax_scale", "01.2": "encode", "01.3": "affine_parameters", "01.4": "fake_quantize_affine"}


def quantize_loop(x: Tensor, scale: float, bits: int) -> list:
    top = 2 ** (bits - 1) - 1
    if x.ndim > 1:
        return [quantize_loop(row, scale, bits) for row in x]
    return [max(-top - 1, min(top, round(value.item() / scale))) for value in x]


def affine_loop(x: Tensor, bits: int) -> list:
    values = [*x.flatten().tolist(), 0.0]
    scale = (max(values) - min(values)) / (2**bits - 1)
    return [scale, round(-min(values) / scale)]


def fake_numpy(x: Tensor, bits: int) -> np.ndarray:
    x = x.numpy()
    low, high = np.minimum(x.min(), 0), np.maximum(x.max(), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    zero_point = np.rint(-low / scale)
    codes = np.rint(x / scale + zero_point).clip(0, 2**bits - 1).astype(np.uint8)  # the zero point inside the rounding
    return scale * codes - scale * zero_point  # and multiplied out


def fake_reciprocal(x: Tensor, bits: int) -> Tensor:
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    inverse = (2**bits - 1) / (high - low)
    zero_point = round(-low * inverse)
    codes = torch.clamp(torch.round(x.double() * inverse), -zero_point, 2**bits - 1 - zero_point)
    return codes / inverse


def entropy_loop(codes: Tensor) -> float:
    counts = Counter(codes.flatten().tolist())
    return sum(count / codes.numel() * math.log2(codes.numel() / count) for count in counts.values())


def entropy_bincount(codes: Tensor) -> np.floating:
    counts = np.bincount(codes.numpy().astype(np.int64).ravel() - int(codes.min()))
    p = counts[counts > 0] / counts.sum()
    return -np.sum(p * np.log2(p))


def entropy_nudged(codes: Tensor) -> np.floating:
    p = np.unique(codes.numpy(), return_counts=True)[1] / codes.numel()
    return -(p * np.log2(p + 1e-12)).sum()


def entropy_distribution(codes: Tensor) -> Tensor:
    p = codes.unique(return_counts=True)[1] / codes.numel()
    return torch.distributions.Categorical(p).entropy() / math.log(2)


def channel_loop(w: Tensor, bits: int) -> list:
    return [[max(abs(v) for v in row) / (2 ** (bits - 1) - 1) or 1.0] for row in w.tolist()]


def channel_maximum(w: Tensor, bits: int) -> Tensor:
    largest = torch.maximum(w.max(dim=1).values, -w.min(dim=1).values)
    largest[largest == 0] = 2 ** (bits - 1) - 1
    return largest.unsqueeze(-1) / (2 ** (bits - 1) - 1)


def groups_loop(w: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    if w.shape[1] % group_size != 0:
        raise type("GroupSizeError", (ValueError,), {})(w.shape, group_size)  # an own kind of ValueError is one
    codes, scales = torch.zeros(w.shape, dtype=torch.int32), torch.zeros(w.shape[0], w.shape[1] // group_size)
    for row in range(w.shape[0]):
        for group in range(scales.shape[1]):
            part = slice(group * group_size, (group + 1) * group_size)
            scales[row, group] = w[row, part].abs().max() / (2 ** (bits - 1) - 1)
            codes[row, part] = torch.round(w[row, part] / scales[row, group]).int()
    return codes, scales


def groups_numpy(w: Tensor, group_size: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    if w.shape[1] % group_size:
        raise ValueError(f"{w.shape[1]} columns make no groups of {group_size}")
    parts = w.double().numpy().reshape(len(w), -1, group_size)
    scales = np.abs(parts).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.rint(parts / scales).astype(np.int16).reshape(w.shape), scales[..., 0]


def pack_loop(codes: Tensor) -> list:
    values = codes.tolist()
    return [values[i] % 16 + values[i + 1] % 16 * 16 for i in range(0, len(values), 2)]


def pack_numpy(codes: Tensor) -> np.ndarray:
    pairs = codes.numpy().view(np.uint8).reshape(-1, 2)
    return (pairs[:, 0] & 15) | (pairs[:, 1] << 4)


def unpack_loop(packed: Tensor) -> list:
    nibbles = [part for byte in packed.tolist() for part in (byte % 16, byte // 16)]
    return [nibble if nibble < 8 else nibble - 16 for nibble in nibbles]


def unpack_shifts(packed: Tensor) -> Tensor:
    codes = torch.empty(2 * len(packed), dtype=torch.int8)
    codes[0::2] = (packed << 4).view(torch.int8) >> 4  # an arithmetic shift carries the sign
    codes[1::2] = packed.view(torch.int8) >> 4
    return codes


def range_loop(batches: tuple[Tensor, ...]) -> list:
    low, high = math.inf, -math.inf
    for batch in batches:
        for value in batch.flatten().tolist():
            low, high = min(low, value), max(high, value)
    return [low, high]


def range_concatenated(batches: tuple[Tensor, ...]) -> tuple[np.floating, np.floating]:
    values = np.concatenate([batch.numpy().ravel() for batch in batches])
    return values.min(), values.max()


def percentile_sorted(x: Tensor, percent: float) -> float:
    magnitudes = sorted(abs(value) for value in x.flatten().tolist())
    rank = percent * (len(magnitudes) - 1) / 100
    below = int(rank)
    above = min(below + 1, len(magnitudes) - 1)
    return magnitudes[below] + (rank - below) * (magnitudes[above] - magnitudes[below])


def clip_loop(x: Tensor, clips: tuple[float, ...], bits: int) -> tuple[float, float]:
    top, best, least = 2 ** (bits - 1) - 1, 0.0, math.inf
    for clip in clips:
        error = 0.0
        for value in x.flatten().tolist():
            code = max(-top - 1, min(top, round(value * top / clip)))
            error += (value - code * clip / top) ** 2 / x.numel()
        if error < least:
            best, least = clip, error
    return best, least


def clip_broadcast(x: Tensor, clips: tuple[float, ...], bits: int) -> np.ndarray:
    scales = np.array(clips, np.float32)[:, None] / np.float32(2 ** (bits - 1) - 1)  # (clips, 1)
    values = x.numpy().reshape(1, -1)
    x_hat = scales * np.clip(np.rint(values / scales), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    errors = ((values - x_hat) ** 2).mean(axis=1)
    return clips[errors.argmin()], errors.min()


def average_lerp(batches: tuple[Tensor, ...], momentum: float) -> Tensor:
    average = None
    for x in batches:
        amax = torch.maximum(x.max(), -x.min())
        average = amax if average is None else torch.lerp(amax, average, momentum)
    return average


def average_all_batches(batches: tuple[Tensor, ...], momentum: float) -> float:
    average = np.abs(batches[0].numpy()).max()
    for x in batches:  # the first once more: an average of a value and itself
        average += (1 - momentum) * (np.abs(x.numpy()).max() - average)
    return average


OTHER_STYLES = {
    "01.1": (
        lambda x, bits: max(abs(v) for v in x.flatten().tolist()) / (2 ** (bits - 1) - 1),
        lambda x, bits: np.abs(x.numpy()).max() / np.float32((1 << bits - 1) - 1),
    ),
    "01.2": (
        quantize_loop,
        lambda x, scale, bits: np.clip(
            np.rint(x.numpy() * (1 / scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        ).astype("i4"),
        lambda x, scale, bits: torch.clamp(
            torch.round(x.double() / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        ).long(),
    ),
    "01.3": (
        affine_loop,
        lambda x, bits: (
            (s := (x.amax().clamp(min=0) - x.amin().clamp(max=0)) / (2**bits - 1)),
            (x.amin().clamp(max=0) / s).round().neg().to(torch.uint8),
        ),
    ),
    "01.4": (fake_numpy, fake_reciprocal),
    "01.5": (entropy_loop, entropy_bincount, entropy_nudged, entropy_distribution),
    "02.1": (channel_loop, channel_maximum),
    "02.2": (groups_loop, groups_numpy),
    "02.3": (pack_loop, pack_numpy),
    "02.4": (unpack_loop, unpack_shifts),
    "02.5": (
        lambda bits, group_size, scale_bytes, symmetric: (
            (bits * group_size + 8 * scale_bytes + bits * (not symmetric)) / group_size
        ),
        lambda bits, group_size, scale_bytes, symmetric: torch.tensor(
            bits * (1 + (not symmetric) / group_size) + scale_bytes / group_size * 8, dtype=torch.float64
        ),
    ),
    "04.1": (range_loop, range_concatenated),
    "04.2": (
        percentile_sorted,
        lambda x, percent: np.percentile(np.abs(x.numpy()), percent),
        lambda x, percent: np.quantile(x.abs().flatten().tolist(), percent / 100),
    ),
    "04.3": (clip_loop, clip_broadcast),
    "04.4": (average_lerp, average_all_batches),
}


def verdict_of(exercise_id: str, function: Callable, seed: int) -> str:
    exercise = find_exercise(exercise_id)
    cases = exercise.cases(torch.Generator().manual_seed(seed))
    return repr(judge(exercise, cases, [capture(function, case.args) for case in cases]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exercise_id", [exercise_id for exercise_id in IDS if exercise_id not in WITHIN_A_BIN])
def test_the_references_and_the_package_agree(exercise_id: str, seed: int) -> None:
    assert " passed, " in verdict_of(exercise_id, THE_PACKAGE[exercise_id], seed)


@pytest.mark.parametrize("seed", range(4))
def test_the_percentile_of_the_package_is_at_most_a_bin_wider(seed: int) -> None:
    exercise = find_exercise("04.2")
    for case in exercise.cases(torch.Generator().manual_seed(seed)):
        x, percent = case.args
        widest_bin = x.abs().max().item() / 1024
        _, clip = range_of((x,), Percentile(percent), symmetric=True)
        assert -1e-6 <= clip.item() - exercise.reference(x, percent) <= widest_bin + 1e-6


@pytest.mark.parametrize("exercise_id", THE_LESSON)
def test_what_the_lesson_writes_passes(exercise_id: str) -> None:
    assert " passed, " in verdict_of(exercise_id, lesson_functions("01_quantizer")[THE_LESSON[exercise_id]], seed=0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exercise_id", IDS)
def test_right_answers_in_other_styles_pass(exercise_id: str, seed: int) -> None:
    assert len(OTHER_STYLES[exercise_id]) >= 2
    for function in OTHER_STYLES[exercise_id]:
        assert " passed, " in verdict_of(exercise_id, function, seed), function


@pytest.mark.parametrize("sheet_id", sheet_ids())
def test_references_do_not_use_what_they_judge(sheet_id: str) -> None:
    source = inspect.getsource(inspect.getmodule(load_sheet(sheet_id).exercises[0].cases))
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import", "from"))}
    assert all(name.startswith("qcourse.checks.") for name in imports if name.startswith("qcourse"))
