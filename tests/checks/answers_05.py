"""Sheet 05, calibration: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import math

import numpy as np
import torch
from torch import Tensor

import qcourse
from qcourse.methods.calibration import Calibrator, MinMax, MovingAverage, Rule

# Right answers.


def range_of(
    batches: tuple[Tensor, ...], rule: Rule, *, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    calibrator = Calibrator(qcourse.IntQuantizer(8, symmetric=symmetric), rule)
    for x in batches:
        calibrator.observe(x)
    return calibrator.range()


def best_of_package(x: Tensor, clips: tuple[float, ...], bits: int) -> tuple[float, float]:
    qmax = 2 ** (bits - 1) - 1
    errors = []
    for clip in clips:
        x_hat = qcourse.fake_quantize(x, bits, scale=torch.tensor(clip / qmax))
        errors.append(torch.mean((x - x_hat) ** 2).item())
    return min(zip(clips, errors, strict=True), key=lambda found: found[1])


def range_loop(batches: tuple[Tensor, ...]) -> list:
    low = math.inf
    high = -math.inf
    for batch in batches:
        for value in batch.flatten().tolist():
            low = min(low, value)
            high = max(high, value)
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
    top = 2 ** (bits - 1) - 1
    best = 0.0
    least = math.inf
    for clip in clips:
        error = 0.0
        for value in x.flatten().tolist():
            code = max(-top - 1, min(top, round(value * top / clip)))
            error += (value - code * clip / top) ** 2 / x.numel()
        if error < least:
            best = clip
            least = error
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


THE_PACKAGE = {
    "05.1": lambda batches: range_of(batches, MinMax()),
    "05.3": best_of_package,
    "05.4": lambda batches, momentum: range_of(
        tuple(x.abs() for x in batches), MovingAverage(momentum)
    )[1],
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "05.1": (range_loop, range_concatenated),
    "05.2": (
        percentile_sorted,
        lambda x, percent: np.percentile(np.abs(x.numpy()), percent),
        lambda x, percent: np.quantile(x.abs().flatten().tolist(), percent / 100),
    ),
    "05.3": (clip_loop, clip_broadcast),
    "05.4": (average_lerp, average_all_batches),
}


# Mistakes.


def range_from_zero(batches: tuple[Tensor, ...]) -> tuple[float, float]:
    low = high = 0.0
    for x in batches:
        low = min(low, x.min().item())
        high = max(high, x.max().item())
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


MISTAKES = [
    ("05.1", "starts from 0", range_from_zero),
    ("05.1", "the last batch only", lambda batches: [(x.min(), x.max()) for x in batches][-1]),
    (
        "05.2",
        "the percentile of x, not of |x|",
        lambda x, percent: torch.quantile(x, percent / 100),
    ),
    (
        "05.2",
        "a fraction where percent are wanted",
        lambda x, percent: np.percentile(x.abs().numpy(), percent / 100),
    ),
    ("05.2", "a whole rank where the percentile lies between two", kth_magnitude),
    ("05.3", "the codes are not saturated", clip_by(error_never_saturated)),
    ("05.3", "compared with the clipped x, not with x", clip_by(error_of_clipped)),
    ("05.3", "the lowest code is never used", clip_by(error_clamped_first)),
    ("05.4", "starts from 0", average_from_zero),
    ("05.4", "the momentum the wrong way round", average_turned),
]
