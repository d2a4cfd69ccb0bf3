"""Sheet 03, measuring a model: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import math

import numpy as np
import torch
from torch import Tensor

from qcourse.models.evaluate import perplexity
from qcourse.models.standard_error import Samples, paired_difference, ratio_estimate

# Right answers.


class Result:
    """What `paired_difference` compares: a result with samples."""

    def __init__(self, nll: Tensor) -> None:
        self.samples = Samples("windows", torch.ones(len(nll)), {"nll": nll})


def bits_of_package(logits: Tensor, targets: Tensor, text: str) -> float:
    ids = torch.cat([targets.new_zeros(1), targets])
    found = perplexity(lambda batch: logits[None], ids, context=len(targets))
    return found.bits_per_byte(len(text.encode()))


def error_of_package(totals: Tensor, tokens: Tensor) -> tuple[float, float]:
    found = ratio_estimate(totals, tokens.float())
    return found.mean, found.error


def verdicts_of_package(nll: Tensor) -> list[list[int]]:
    rows = []
    for ours in nll:
        row = []
        for theirs in nll:
            found = paired_difference(Result(ours), Result(theirs))
            row.append(-int(math.copysign(1, found.mean)) * found.exceeds_noise())
        rows.append(row)
    return rows


def once_of_package(nll: Tensor, starts: Tensor) -> tuple[int, float]:
    new = torch.cat([torch.tensor([nll.shape[1]]), starts.diff()])
    totals = torch.stack([row[-count:].sum() for row, count in zip(nll, new, strict=True)])
    return int(new.sum()), ratio_estimate(totals, new.float()).exponential().mean


def bits_loop(logits: Tensor, targets: Tensor, text: str) -> float:
    bits = 0.0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        bits += math.log2(sum(math.exp(value - row[target]) for value in row))
    return bits / len(text.encode("utf-8"))


def bits_by_cross_entropy(logits: Tensor, targets: Tensor, text: str) -> Tensor:
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return loss / len(bytes(text, "utf-8")) / torch.log(torch.tensor(2.0))


def error_numpy(totals: Tensor, tokens: Tensor) -> tuple[np.floating, np.floating]:
    t = totals.numpy().astype(np.float64)
    n = tokens.numpy()
    mean = np.average(t / n, weights=n)
    return mean, np.std(t - n * mean, ddof=1) * np.sqrt(len(n)) / n.sum()


def error_loop(totals: Tensor, tokens: Tensor) -> list[float]:
    n = tokens.tolist()
    t = totals.tolist()
    mean = sum(t) / sum(n)
    squares = sum((total - count * mean) ** 2 for total, count in zip(t, n, strict=True))
    return [mean, (squares * len(n) / (len(n) - 1)) ** 0.5 / sum(n)]


def verdicts_loop(nll: Tensor) -> Tensor:
    models, windows = nll.shape
    found = torch.zeros(models, models, dtype=torch.int64)
    for i in range(models):
        for j in range(models):
            difference = nll[i] - nll[j]
            error = difference.std() / windows**0.5
            if difference.mean() < -2 * error:
                found[i, j] = 1
            elif difference.mean() > 2 * error:
                found[i, j] = -1
    return found


def verdicts_numpy(nll: Tensor) -> np.ndarray:
    x = nll.numpy()
    d = x[None] - x[:, None]
    error = d.std(axis=-1, ddof=1) / np.sqrt(x.shape[1])
    return np.where(abs(d.mean(-1)) > 2 * error, np.sign(d.mean(-1)), 0).astype(np.int8)


def once_in_a_dict(nll: Tensor, starts: Tensor) -> tuple[int, float]:
    losses: dict[int, float] = {}
    for start, row in zip(starts.tolist(), nll.tolist(), strict=True):
        for i, loss in enumerate(row):
            losses.setdefault(start + i, loss)
    return len(losses), math.exp(sum(losses.values()) / len(losses))


def once_backwards(nll: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Write the latest windows first, so that earlier ones win."""
    line = torch.full((int(starts[-1] - starts[0]) + nll.shape[1],), torch.nan)
    for start, row in zip((starts - starts[0]).flip(0).tolist(), nll.flip(0), strict=True):
        line[start : start + len(row)] = row
    return torch.tensor(len(line)), line.mean().exp()


THE_PACKAGE = {
    "03.1": bits_of_package,
    "03.2": error_of_package,
    "03.3": verdicts_of_package,
    "03.4": once_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "03.1": (bits_loop, bits_by_cross_entropy),
    "03.2": (error_numpy, lambda totals, tokens: tuple(error_loop(totals, tokens))),
    "03.3": (verdicts_loop, verdicts_numpy),
    "03.4": (once_in_a_dict, once_backwards),
}


# Mistakes.


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


def windows_alike(totals: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    means = totals / tokens
    return means.mean(), means.std() / len(means) ** 0.5


def error_alike(totals: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return totals.sum() / tokens.sum(), (totals / tokens).std() / len(totals) ** 0.5


def error_by_count(totals: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    mean = totals.sum() / tokens.sum()
    return mean, (totals - tokens * mean).square().sum().sqrt() / tokens.sum()


def verdicts_unpaired(nll: Tensor) -> Tensor:
    variance = nll.var(dim=1) / nll.shape[1]
    means = nll.mean(dim=1)
    d = means[None] - means[:, None]
    return (d.sign() * (d.abs() > 2 * (variance[None] + variance[:, None]).sqrt())).int()


def verdicts_by_mean(nll: Tensor) -> Tensor:
    means = nll.mean(dim=1)
    return (means[None] - means[:, None]).sign().int()


def verdicts_by_numpy_std(nll: Tensor) -> np.ndarray:
    x = nll.double().numpy()
    d = x[None] - x[:, None]
    error = d.std(axis=-1) / np.sqrt(x.shape[1])
    return np.where(abs(d.mean(-1)) > 2 * error, np.sign(d.mean(-1)), 0).astype(int)


def once_last_wins(nll: Tensor, starts: Tensor) -> tuple[int, float]:
    losses = {}
    for start, row in zip(starts.tolist(), nll.tolist(), strict=True):
        for i, loss in enumerate(row):
            losses[start + i] = loss
    return len(losses), math.exp(sum(losses.values()) / len(losses))


def once_by_one_stride(nll: Tensor, starts: Tensor) -> tuple[int, Tensor]:
    stride = int(starts[1] - starts[0])
    once = torch.cat([nll[0], nll[1:, -stride:].flatten()])
    return len(once), once.mean().exp()


MISTAKES = [
    (
        "03.1",
        "characters, not bytes",
        lambda logits, targets, text: nats(logits, targets) / math.log(2) / len(text),
    ),
    (
        "03.1",
        "nats, not bits",
        lambda logits, targets, text: nats(logits, targets) / len(text.encode()),
    ),
    (
        "03.1",
        "the perplexity",
        lambda logits, targets, text: (nats(logits, targets) / len(targets)).exp(),
    ),
    ("03.2", "every window counts the same", windows_alike),
    ("03.2", "every window counts the same in the error", error_alike),
    ("03.2", "divided by K, not by K - 1", error_by_count),
    ("03.3", "the errors of the two models, not of their difference", verdicts_unpaired),
    ("03.3", "any difference counts", verdicts_by_mean),
    ("03.3", "divided by K, not by K - 1", verdicts_by_numpy_std),
    ("03.4", "tokens counted twice", lambda nll, starts: (nll.numel(), nll.mean().exp())),
    ("03.4", "the prediction with the least context", once_last_wins),
    ("03.4", "one stride for all windows", once_by_one_stride),
]
