"""Sheet 04, outliers: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import numpy as np
import torch
from torch import Tensor

from qcourse import IntQuantizer, PerChannel, quantize
from qcourse.methods.llm_int8 import llm_int8_matmul
from qcourse.methods.llm_int8 import outlier_columns as outlier_columns_of_package
from qcourse.methods.smoothquant import SmoothQuant, smooth

# Right answers.


def common_of_package(layers: tuple[Tensor, ...], k: int) -> list[int]:
    observe = SmoothQuant(IntQuantizer(8)).observe
    tops = [set(observe(None, x).topk(k).indices.tolist()) for x in layers]
    return sorted(set.intersection(*tops))


def plant_of_package(
    gain: Tensor, w: Tensor, channels: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Smooth with alpha = 1, for activations that are smaller in these channels."""
    x_amax = torch.ones_like(gain)
    x_amax[channels] /= factor
    w_planted, s = smooth(w, x_amax, alpha=1.0)
    return gain / s, w_planted


def columns_loop(x: Tensor, threshold: float) -> list[int]:
    found = []
    for column in range(x.shape[1]):
        for token in range(x.shape[0]):
            if abs(x[token, column].item()) > threshold:
                found.append(column)
                break
    return found


def columns_unique(x: Tensor, threshold: float) -> Tensor:
    return ((x > threshold) | (x < -threshold)).nonzero()[:, 1].unique()


def common_counted(layers: tuple[Tensor, ...], k: int) -> Tensor:
    appearances = torch.zeros(layers[0].shape[1], dtype=torch.int64)
    for x in layers:
        appearances[x.abs().amax(0).topk(k).indices] += 1
    return torch.nonzero(appearances == len(layers)).flatten()


def common_sorted(layers: tuple[Tensor, ...], k: int) -> list[int]:
    channels = set(range(layers[0].shape[1]))
    for x in layers:
        amax = [max(map(abs, column)) for column in x.T.tolist()]
        descending = sorted(range(x.shape[1]), key=amax.__getitem__, reverse=True)
        channels &= set(descending[:k])
    return sorted(channels)


def product_loop(x: Tensor, w: Tensor, threshold: float) -> np.ndarray:
    x = x.double().numpy()
    w = w.double().numpy()
    outliers = {j for j in range(x.shape[1]) if np.abs(x[:, j]).max() > threshold}
    rest = [j for j in range(x.shape[1]) if j not in outliers]
    y = np.zeros((len(x), len(w)))
    for t, token in enumerate(x):
        for o, row in enumerate(w):
            x_step = max([abs(token[j]) for j in rest], default=0) / 127 or 1
            w_step = max([abs(row[j]) for j in rest], default=0) / 127 or 1
            total = sum(round(token[j] / x_step) * round(row[j] / w_step) for j in rest)
            exact = sum(token[j] * row[j] for j in outliers)
            y[t, o] = x_step * w_step * total + exact
    return y


def product_removed(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    rest = (x.abs() <= threshold).all(0)
    if not rest.any():
        return x @ w.T
    q_x, q_w = (quantize(each[:, rest], 8, granularity=PerChannel(0)) for each in (x, w))
    return q_x.dequantize() @ q_w.dequantize().T + x[:, ~rest] @ w[:, ~rest].T


def plant_loop(gain: Tensor, w: Tensor, channels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    gain = gain.clone()
    w = w.clone()
    for j in channels:
        gain[j] *= factor
        w[:, j] /= factor
    return gain, w


def plant_diagonal(
    gain: Tensor, w: Tensor, channels: Tensor, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    by = np.where(np.isin(np.arange(len(gain)), channels), factor, 1.0)
    return np.diag(by) @ gain.numpy(), w.numpy() @ np.diag(1 / by)


THE_PACKAGE = {
    "04.1": lambda x, threshold: outlier_columns_of_package(x, threshold).nonzero().flatten(),
    "04.2": common_of_package,
    "04.3": llm_int8_matmul,
    "04.4": plant_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "04.1": (
        columns_loop,
        columns_unique,
        lambda x, threshold: np.where((abs(x.numpy()) > threshold).any(0))[0],
    ),
    "04.2": (common_counted, common_sorted),
    "04.3": (product_loop, product_removed),
    "04.4": (plant_loop, plant_diagonal),
}


# Mistakes.


def common_by(rank: object) -> object:
    def common(layers: tuple[Tensor, ...], k: int) -> list[int]:
        tops = [set(rank(x).topk(k).indices.tolist()) for x in layers]
        return sorted(set.intersection(*tops))

    return common


def hat(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return scale * torch.round(x / scale)


def product_scaled_first(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    return hat(x)[:, ~outlier] @ hat(w)[:, ~outlier].T + x[:, outlier] @ w[:, outlier].T


def product_twice(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    return hat(x) @ hat(w).T + x[:, outlier] @ w[:, outlier].T


def product_of_values(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = x.abs() > threshold
    return hat(x.masked_fill(outlier, 0)) @ hat(w).T + x.masked_fill(~outlier, 0) @ w.T


def product_dropped(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    return hat(x.masked_fill(outlier, 0)) @ hat(w.masked_fill(outlier, 0)).T


def product_by_column(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    x_hat, w_hat = (hat(each.masked_fill(outlier, 0).T).T for each in (x, w))
    return x_hat @ w_hat.T + x[:, outlier] @ w[:, outlier].T


def product_with_floats(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    return (
        hat(x.masked_fill(outlier, 0)) @ w.masked_fill(outlier, 0).T
        + x[:, outlier] @ w[:, outlier].T
    )


def product_wrapped(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    q_x = quantize(x.masked_fill(outlier, 0), 8, granularity=PerChannel(0))
    q_w = quantize(w.masked_fill(outlier, 0), 8, granularity=PerChannel(0))
    product = (q_x.codes @ q_w.codes.T) * q_x.scale * q_w.scale.T
    return product + x[:, outlier] @ w[:, outlier].T


def product_unguarded(x: Tensor, w: Tensor, threshold: float) -> Tensor:
    outlier = (x.abs() > threshold).any(0)
    y = x[:, outlier] @ w[:, outlier].T
    hats = []
    for rest in (x.masked_fill(outlier, 0), w.masked_fill(outlier, 0)):
        scale = rest.abs().amax(dim=1, keepdim=True) / 127
        hats.append(scale * torch.round(rest / scale))
    return y + hats[0] @ hats[1].T


def plant_twice(gain: Tensor, w: Tensor, channels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    gain = gain.clone()
    w = w.clone()
    gain[channels] *= factor
    w[:, channels] *= factor
    return gain, w


def plant_rows(gain: Tensor, w: Tensor, channels: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    gain = gain.clone()
    w = w.clone()
    gain[channels] *= factor
    w[channels] /= factor
    return gain, w


MISTAKES = [
    (
        "04.1",
        "the threshold counted in standard deviations",
        lambda x, threshold: (x.abs() > threshold * x.std()).any(0).nonzero().flatten(),
    ),
    (
        "04.1",
        "the mean of |x|, not the largest",
        lambda x, threshold: torch.nonzero(x.abs().mean(0) > threshold).flatten(),
    ),
    ("04.1", "x, not |x|", lambda x, threshold: torch.where((x > threshold).any(0))[0]),
    (
        "04.1",
        "tokens, not columns",
        lambda x, threshold: (x.abs() > threshold).any(dim=1).nonzero().flatten(),
    ),
    ("04.1", "", lambda x, threshold: (x.abs().amax(0) >= threshold).nonzero().T[0]),
    ("04.1", "a mask, not the numbers of the columns", outlier_columns_of_package),
    ("04.1", "", lambda x, threshold: (x.abs() > threshold).nonzero()[:, 1]),
    ("04.2", "an average over tokens, not the largest", common_by(lambda x: x.abs().mean(0))),
    ("04.2", "an average over tokens, not the largest", common_by(lambda x: x.norm(dim=0))),
    (
        "04.2",
        "an average over tokens, not the largest",
        common_by(lambda x: x.std(dim=0, correction=0)),
    ),
    ("04.2", "x, not |x|", common_by(lambda x: x.amax(0))),
    (
        "04.2",
        "the largest of all layers together",
        lambda layers, k: torch.cat(layers).abs().amax(0).topk(k).indices.sort().values,
    ),
    ("04.3", "the scales are made with the outliers", product_scaled_first),
    ("04.3", "the outlier columns are counted twice", product_twice),
    ("04.3", "single values, not columns", product_of_values),
    ("04.3", "", product_dropped),
    ("04.3", "a scale for each column, not for each row", product_by_column),
    ("04.3", "", product_with_floats),
    ("04.3", "", product_wrapped),
    ("04.3", "0 / 0 in a row of zeros", product_unguarded),
    ("04.4", "multiplied on both sides", plant_twice),
    ("04.4", "rows of w, not columns", plant_rows),
]
