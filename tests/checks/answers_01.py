"""Sheet 01, the quantizer: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

import qcourse
from qcourse.numerics.metrics import code_entropy

# Right answers.


def scale_and_zero(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    q = qcourse.quantize(x, bits, symmetric=False)
    return q.scale, q.zero_point


def quantize_loop(x: Tensor, scale: float, bits: int) -> list:
    top = 2 ** (bits - 1) - 1
    if x.ndim > 1:
        return [quantize_loop(row, scale, bits) for row in x]
    return [max(-top - 1, min(top, round(value.item() / scale))) for value in x]


def quantize_reciprocal(x: Tensor, scale: float, bits: int) -> np.ndarray:
    steps = np.rint(x.numpy() * (1 / scale))
    return np.clip(steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype("i4")


def quantize_in_doubles(x: Tensor, scale: float, bits: int) -> Tensor:
    steps = torch.round(x.double() / scale)
    return torch.clamp(steps, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).long()


def affine_loop(x: Tensor, bits: int) -> list:
    values = [*x.flatten().tolist(), 0.0]
    scale = (max(values) - min(values)) / (2**bits - 1)
    return [scale, round(-min(values) / scale)]


def affine_in_uint8(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low = x.amin().clamp(max=0)
    scale = (x.amax().clamp(min=0) - low) / (2**bits - 1)
    return scale, (low / scale).round().neg().to(torch.uint8)


def fake_numpy(x: Tensor, bits: int) -> np.ndarray:
    x = x.numpy()
    low = np.minimum(x.min(), 0)
    high = np.maximum(x.max(), 0)
    scale = (high - low) / np.float32(2**bits - 1)
    zero_point = np.rint(-low / scale)

    # The zero point is inside the rounding, and the product is multiplied out.
    codes = np.rint(x / scale + zero_point).clip(0, 2**bits - 1).astype(np.uint8)
    return scale * codes - scale * zero_point


def fake_reciprocal(x: Tensor, bits: int) -> Tensor:
    low = min(x.min().item(), 0.0)
    high = max(x.max().item(), 0.0)
    inverse = (2**bits - 1) / (high - low)
    zero_point = round(-low * inverse)
    codes = torch.clamp(torch.round(x.double() * inverse), -zero_point, 2**bits - 1 - zero_point)
    return codes / inverse


def entropy_loop(codes: Tensor) -> float:
    counts = Counter(codes.flatten().tolist())
    total = codes.numel()
    return sum(count / total * math.log2(total / count) for count in counts.values())


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


THE_PACKAGE = {
    "01.1": lambda x, bits: qcourse.quantize(x, bits).scale,
    "01.2": lambda x, scale, bits: qcourse.quantize(x, bits, scale=scale).codes,
    "01.3": scale_and_zero,
    "01.4": lambda x, bits: qcourse.fake_quantize(x, bits, symmetric=False),
    "01.5": code_entropy,
}
THE_LESSON = {
    "01.1": "amax_scale",
    "01.2": "encode",
    "01.3": "affine_parameters",
    "01.4": "fake_quantize_affine",
}
OTHER_STYLES = {
    "01.1": (
        lambda x, bits: max(abs(v) for v in x.flatten().tolist()) / (2 ** (bits - 1) - 1),
        lambda x, bits: np.abs(x.numpy()).max() / np.float32((1 << bits - 1) - 1),
    ),
    "01.2": (quantize_loop, quantize_reciprocal, quantize_in_doubles),
    "01.3": (affine_loop, affine_in_uint8),
    "01.4": (fake_numpy, fake_reciprocal),
    "01.5": (entropy_loop, entropy_bincount, entropy_nudged, entropy_distribution),
}


# Mistakes.


def grid(x: Tensor, bits: int, *, widened: bool = True) -> tuple[Tensor, Tensor]:
    low, high = (x.min().clamp(max=0), x.max().clamp(min=0)) if widened else (x.min(), x.max())
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale).int()


def clamped_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    scale, zero_point = grid(x, bits, widened=False)
    return scale, zero_point.clamp(0, 2**bits - 1)


def there_and_back(
    x: Tensor, bits: int, scale: Tensor, zero_point: Tensor, rounding: object = torch.round
) -> Tensor:
    return scale * ((rounding(x / scale) + zero_point).clamp(0, 2**bits - 1) - zero_point)


def clamped(codes: Tensor, bits: int) -> Tensor:
    return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def saturated_late(x: Tensor, scale: float, bits: int) -> Tensor:
    wrapped = torch.round(x / scale).to(torch.int16).to(torch.int8)
    return clamped(wrapped, bits)


TRUNCATED = "truncated or floored instead of rounded"
LATE = "not saturated, or only after the cast to int8"
ENDS = "qmin or qmax is off by one"
NOT_WIDENED = "the range was not widened to hold 0"
ROUNDING = "floored, or halves rounded up"
MISTAKES = [
    (
        "01.2",
        TRUNCATED,
        lambda x, s, bits: clamped(torch.floor(x / s), bits).to(torch.int8),
    ),
    ("01.2", TRUNCATED, lambda x, s, bits: clamped(x / s, bits).to(torch.int8)),
    ("01.2", TRUNCATED, lambda x, s, bits: (x / s).to(torch.int16).to(torch.int8)),
    ("01.2", TRUNCATED, lambda x, s, bits: (x // s).int()),
    ("01.2", LATE, saturated_late),
    ("01.2", LATE, lambda x, s, bits: torch.round(x / s).int()),
    (
        "01.2",
        ENDS,
        lambda x, s, bits: torch.round(x / s).clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1).int(),
    ),
    (
        "01.2",
        ENDS,
        lambda x, s, bits: torch.round(x / s).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1)).int(),
    ),
    ("01.3", NOT_WIDENED, lambda x, bits: grid(x, bits, widened=False)),
    ("01.3", NOT_WIDENED, clamped_grid),
    ("01.4", NOT_WIDENED, lambda x, bits: there_and_back(x, bits, *clamped_grid(x, bits))),
    ("01.4", ROUNDING, lambda x, bits: there_and_back(x, bits, *grid(x, bits), torch.floor)),
    (
        "01.4",
        ROUNDING,
        lambda x, bits: there_and_back(x, bits, *grid(x, bits), lambda v: torch.floor(v + 0.5)),
    ),
]
