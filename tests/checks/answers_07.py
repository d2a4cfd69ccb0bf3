"""Sheet 07, AWQ: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import numpy as np
import torch
from torch import Tensor, nn

from qcourse.methods.awq import awq
from qcourse.methods.group_moments import GroupMoments
from qcourse.methods.second_moment import SecondMoment
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.granularity import PerChannel, PerGroup
from qcourse.recipes.block_probe import put
from qcourse.recipes.fold import fold

# Right answers.


def keep_of_package(w: Tensor, w_hat: Tensor, x: Tensor, count: int) -> Tensor:
    salient = SecondMoment().add(x).sum_of_abs.argsort(descending=True)[:count]
    return torch.where(torch.isin(torch.arange(w.shape[1]), salient), w, w_hat)


class Block(nn.Module):
    """A norm and the linear layer that reads it."""

    def __init__(self, gain: Tensor, shift: Tensor, w: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(len(gain))
        self.linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
        put(self.norm, {"weight": gain, "bias": shift})
        put(self.linear, {"weight": w})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class OneBlock(nn.Module):
    """The smallest model that `fold` takes: one block, run on token ids."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, block.linear.in_features)
        self.blocks = nn.ModuleList([block])

    def forward(self, ids: Tensor) -> Tensor:
        return self.blocks[0](self.embedding(ids))


def fold_of_package(gain: Tensor, shift: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    block = Block(gain, shift, w)
    assert fold(OneBlock(block), ["blocks.0.linear"], s) == "blocks.0.norm"

    # `fold` leaves the weight to its caller.
    w_scaled = block.linear.weight.data * s
    return block.norm.weight.data, block.norm.bias.data, w_scaled


def error_of_package(w: Tensor, w_hat: Tensor, gram: Tensor) -> Tensor:
    moment = GroupMoments(gram[None], is_gram=True)
    return (moment.losses(w - w_hat).sum() / moment.losses(w).sum()).sqrt()


def alpha_of_package(
    w: Tensor, x: Tensor, alphas: tuple[float, ...], bits: int
) -> tuple[float, float]:
    curve = awq(w, x, IntQuantizer(bits, granularity=PerChannel(0)), clip=False, grid=4).curve
    errors = {alpha: curve[int(4 * alpha)].item() for alpha in alphas}
    return min(errors.items(), key=lambda found: found[1])


def shares_of_package(
    w: Tensor, x: Tensor, group_size: int, shares: tuple[float, ...], bits: int
) -> Tensor:
    quantizer = IntQuantizer(bits, granularity=PerGroup(group_size))
    blocks = GroupMoments((x.T @ x)[None], is_gram=True).split(w.shape[1] // group_size)
    losses = []
    for share in shares:
        _, w_hat = quantizer.nearest(w, quantizer.fit(share * w))
        losses.append(blocks.losses(w_hat - w))
    return torch.tensor(shares)[torch.stack(losses).argmin(dim=0)]


def keep_loop(w: Tensor, w_hat: Tensor, x: Tensor, count: int) -> list[list[float]]:
    size = [sum(abs(value) for value in column) for column in x.T.tolist()]
    salient = sorted(range(len(size)), key=lambda j: -size[j])[:count]
    mixed = w_hat.tolist()
    for row, row_of_w in zip(mixed, w.tolist(), strict=True):
        for j in salient:
            row[j] = row_of_w[j]
    return mixed


def keep_mask(w: Tensor, w_hat: Tensor, x: Tensor, count: int) -> np.ndarray:
    size = np.linalg.norm(x.numpy(), ord=1, axis=0)
    larger = (size > size[:, None]).sum(axis=1)  # how many channels are larger than each
    return np.where(larger < count, w.numpy(), w_hat.numpy())


def fold_loop(gain: Tensor, shift: Tensor, w: Tensor, s: Tensor) -> list:
    scales = s.tolist()

    def divided(values: list[float]) -> list[float]:
        return [value / scale for value, scale in zip(values, scales, strict=True)]

    def multiplied(values: list[float]) -> list[float]:
        return [value * scale for value, scale in zip(values, scales, strict=True)]

    return [
        divided(gain.tolist()),
        divided(shift.tolist()),
        [multiplied(row) for row in w.tolist()],
    ]


def fold_modules(gain: Tensor, shift: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    norm = nn.LayerNorm(len(gain))
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        norm.weight.copy_(gain).div_(s)
        norm.bias.copy_(shift).div_(s)
        linear.weight.copy_(w).mul_(s[None])
    return norm.weight.data, norm.bias.data, linear.weight.data


def error_einsum(w: Tensor, w_hat: Tensor, gram: Tensor) -> float:
    lost, size = (torch.einsum("oi,ij,oj->", part, gram, part) for part in (w_hat - w, w))
    return (lost / size).item() ** 0.5


def error_root_of_gram(w: Tensor, w_hat: Tensor, gram: Tensor) -> np.floating:
    """Use an x that has this Gram matrix: one token per eigenvector."""
    values, vectors = np.linalg.eigh(gram.double().numpy())
    x = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    lost = np.linalg.norm(x @ (w - w_hat).double().numpy().T)
    return lost / np.linalg.norm(x @ w.double().numpy().T)


def error_by_cholesky(w: Tensor, w_hat: Tensor, gram: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(gram)
    return torch.linalg.norm((w - w_hat) @ lower) / torch.linalg.norm(w @ lower)


def alpha_loop(w: Tensor, x: Tensor, alphas: tuple[float, ...], bits: int) -> tuple[float, float]:
    best = (0.0, float("inf"))
    for alpha in alphas:
        s = [(sum(abs(v) for v in column) / len(column)) ** alpha for column in x.T.tolist()]
        lost = size = 0.0
        for row in w.tolist():
            amax = max(abs(v * scale) for v, scale in zip(row, s, strict=True))
            step = amax / (2 ** (bits - 1) - 1)
            hat = [round(v * scale / step) * step / scale for v, scale in zip(row, s, strict=True)]
            d = [v - v_hat for v, v_hat in zip(row, hat, strict=True)]
            for token in x.tolist():
                lost += sum(v * t for v, t in zip(d, token, strict=True)) ** 2
                size += sum(v * t for v, t in zip(row, token, strict=True)) ** 2
        best = min(best, (alpha, (lost / size) ** 0.5), key=lambda found: found[1])
    return best


def alpha_normalized(
    w: Tensor, x: Tensor, alphas: tuple[float, ...], bits: int
) -> tuple[float, np.floating]:
    """Divide s by a common factor, and x by s instead of w_hat."""
    quantizer = IntQuantizer(bits, granularity=PerChannel(0))
    errors = []
    for alpha in alphas:
        s = x.abs().mean(dim=0).pow(alpha)
        s = s / (s.max() * s.min()).sqrt()
        d = w * s - quantizer(w * s).dequantize()
        lost = ((x / s) @ d.T).square().sum()
        errors.append((lost / (x @ w.T).square().sum()).sqrt().numpy())
    return alphas[int(np.argmin(errors))], min(errors)


def shares_loop(
    w: Tensor, x: Tensor, group_size: int, shares: tuple[float, ...], bits: int
) -> list[list[float]]:
    top = 2 ** (bits - 1) - 1
    chosen = []
    for row in w:
        chosen.append([])
        for start in range(0, len(row), group_size):
            group = row[start : start + group_size]
            part = x[:, start : start + group_size]
            losses = {}
            for share in shares:
                scale = group.abs().max() * share / top
                hat = (group / scale).round().clip(-top - 1, top) * scale
                losses[share] = (part @ (group - hat)).norm().item()
            chosen[-1].append(min(losses, key=losses.__getitem__))
    return chosen


def shares_by_gram(
    w: Tensor, x: Tensor, group_size: int, shares: tuple[float, ...], bits: int
) -> np.ndarray:
    groups = w.numpy().reshape(len(w), -1, group_size)
    parts = x.numpy().reshape(len(x), -1, group_size)
    grams = np.einsum("tgi,tgj->gij", parts, parts)
    best = np.zeros(groups.shape[:2])
    least = np.full(groups.shape[:2], np.inf)
    for share in shares:
        amax = np.abs(groups).max(axis=-1, keepdims=True)
        scale = amax / (2 ** (bits - 1) - 1) * np.float32(share)
        codes = np.clip(np.rint(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        d = groups - scale * codes
        loss = np.einsum("ogi,gij,ogj->og", d, grams, d)
        best = np.where(loss < least, share, best)
        least = np.minimum(loss, least)
    return best


THE_PACKAGE = {
    "07.1": keep_of_package,
    "07.2": fold_of_package,
    "07.3": error_of_package,
    "07.4": alpha_of_package,
    "07.5": shares_of_package,
}
THE_LESSON = {"07.3": "error_by_gram"}
OTHER_STYLES = {
    "07.1": (keep_loop, keep_mask),
    "07.2": (fold_loop, fold_modules),
    "07.3": (error_einsum, error_root_of_gram, error_by_cholesky),
    "07.4": (alpha_loop, alpha_normalized),
    "07.5": (shares_loop, shares_by_gram),
}


# Mistakes.


def keep_by(ranking: object) -> object:
    def keep(w: Tensor, w_hat: Tensor, x: Tensor, count: int) -> Tensor:
        mixed = w_hat.clone()
        for j in ranking(w, x).argsort(descending=True)[:count]:
            mixed[:, j] = w[:, j]
        return mixed

    return keep


def error_of_sum(w: Tensor, w_hat: Tensor, gram: Tensor) -> Tensor:
    d = w - w_hat
    return torch.sqrt((d @ gram @ d.T).sum() / (w @ gram @ w.T).sum())


def alpha_by(hat: object, error: object) -> object:
    def best(w: Tensor, x: Tensor, alphas: tuple[float, ...], bits: int) -> tuple[float, Tensor]:
        def nearest(w: Tensor) -> Tensor:
            scale = w.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            return (w / scale).round() * scale

        errors = torch.stack([error(w, hat(w, x, alpha, nearest), x) for alpha in alphas])
        return alphas[int(errors.argmin())], errors.min()

    return best


def alpha_index(w: Tensor, x: Tensor, alphas: tuple[float, ...], bits: int) -> tuple[int, float]:
    alpha, error = alpha_loop(w, x, alphas, bits)
    return alphas.index(alpha), error


def of_outputs(w: Tensor, w_hat: Tensor, x: Tensor) -> Tensor:
    return (x @ w.T - x @ w_hat.T).norm() / (x @ w.T).norm()


def of_weights(w: Tensor, w_hat: Tensor, x: Tensor) -> Tensor:
    return (w - w_hat).norm() / w.norm()


def size(x: Tensor) -> Tensor:
    return x.abs().mean(0)


def shares_by(loss: object) -> object:
    def best(w: Tensor, x: Tensor, group_size: int, shares: tuple[float, ...], bits: int) -> Tensor:
        groups = w.view(len(w), -1, group_size)
        parts = x.view(len(x), -1, group_size)

        # Each loss is (out, groups).
        losses = [loss(groups, parts, share, 2 ** (bits - 1) - 1) for share in shares]
        return torch.tensor(shares)[torch.stack(losses).argmin(0)]

    return best


def scale_of(groups: Tensor, share: float, qmax: int) -> Tensor:
    return groups.abs().amax(2, keepdim=True) * share / qmax


def loss_of(parts: Tensor, d: Tensor) -> Tensor:
    return (parts[:, None] * d).sum(3).pow(2).sum(0)  # (tokens, out, groups, size) -> (out, groups)


def loss_unsaturated(groups: Tensor, parts: Tensor, share: float, qmax: int) -> Tensor:
    scale = scale_of(groups, share, qmax)
    return loss_of(parts, groups - torch.round(groups / scale) * scale)


def loss_clamped_first(groups: Tensor, parts: Tensor, share: float, qmax: int) -> Tensor:
    scale = scale_of(groups, share, qmax)
    clipped = torch.minimum(torch.maximum(groups, -qmax * scale), qmax * scale)
    return loss_of(parts, groups - torch.round(clipped / scale) * scale)


def loss_absolute(groups: Tensor, parts: Tensor, share: float, qmax: int) -> Tensor:
    scale = scale_of(groups, share, qmax)
    d = groups - torch.round(groups / scale).clamp(-qmax - 1, qmax) * scale
    return (parts[:, None] * d).sum(3).abs().mean(0)


def loss_in_weights(groups: Tensor, parts: Tensor, share: float, qmax: int) -> Tensor:
    scale = scale_of(groups, share, qmax)
    return (groups - (groups / scale).round().clamp(-qmax - 1, qmax) * scale).pow(2).mean(2)


MISTAKES = [
    ("07.1", "salience by the norm of the weights", keep_by(lambda w, x: w.pow(2).sum(0))),
    ("07.1", "the mean of x, not of |x|", keep_by(lambda w, x: x.mean(0))),
    ("07.1", "the smallest channels", keep_by(lambda w, x: -x.abs().mean(0))),
    ("07.1", "the mean of squares, not of |x|", keep_by(lambda w, x: x.pow(2).mean(0).sqrt())),
    ("07.2", "the shift is forgotten", lambda gain, shift, w, s: (gain / s, shift, w * s)),
    (
        "07.2",
        "the gain is multiplied, not divided",
        lambda gain, shift, w, s: (gain * s, shift * s, w * s),
    ),
    ("07.2", "the scale is not folded back", lambda gain, shift, w, s: (gain, shift, w * s)),
    ("07.3", "all entries instead of the trace", error_of_sum),
    ("07.3", "without the root", lambda w, w_hat, gram: error_einsum(w, w_hat, gram) ** 2),
    (
        "07.3",
        "not relative to the outputs",
        lambda w, w_hat, gram: ((w - w_hat) @ gram * (w - w_hat)).sum() ** 0.5,
    ),
    (
        "07.4",
        "searched on the weights, not on the outputs",
        alpha_by(
            lambda w, x, alpha, nearest: nearest(w * size(x) ** alpha) / size(x) ** alpha,
            of_weights,
        ),
    ),
    (
        "07.4",
        "w_hat is not divided by s",
        alpha_by(lambda w, x, alpha, nearest: nearest(w * size(x) ** alpha), of_outputs),
    ),
    (
        "07.4",
        "divided by s on both sides",
        alpha_by(
            lambda w, x, alpha, nearest: nearest(w / size(x) ** alpha) / size(x) ** alpha,
            of_outputs,
        ),
    ),
    (
        "07.4",
        "alpha the wrong way round",
        alpha_by(
            lambda w, x, alpha, nearest: nearest(w / size(x) ** alpha) * size(x) ** alpha,
            of_outputs,
        ),
    ),
    ("07.4", "", alpha_index),
    ("07.5", "not the sum of squares", shares_by(loss_absolute)),
    ("07.5", "the codes are not saturated", shares_by(loss_unsaturated)),
    ("07.5", "", shares_by(loss_clamped_first)),
    ("07.5", "chosen by the weights, not by the outputs", shares_by(loss_in_weights)),
]
