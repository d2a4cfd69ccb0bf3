"""Sheet 14, sparsity and distillation: right answers in other styles, and common mistakes."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcourse.cost.memory import sparse_bytes_per_parameter
from qcourse.methods import distillation, sparsity
from qcourse.methods.sparse_storage import compress_sparse
from qcourse.recipes.prune import hold_zeros

TWO_OF_FOUR = sparsity.NM(2, 4)


def mask_of(score: Tensor) -> Tensor:
    return TWO_OF_FOUR.mask(score)


# Right answers.


def bits_of_package(bits: int, keep: int, m: int, group_size: int) -> float:
    return 8 * sparse_bytes_per_parameter(bits, keep, m, group_size)


def loss_of_package(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    options = {"temperature": temperature, "alpha": alpha}
    return distillation.distillation_loss(student, teacher, targets, **options)


def stored_by_package(w: Tensor) -> tuple[Tensor, Tensor]:
    pruned = sparsity.magnitude(w, TWO_OF_FOUR)
    small = compress_sparse(pruned.weight, pruned.mask, TWO_OF_FOUR)
    return small.values, small.where()


def healed_by_package(w: Tensor, x: Tensor, rate: float, steps: int) -> Tensor:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    pruned = sparsity.magnitude(w, TWO_OF_FOUR)
    layer.weight = nn.Parameter(pruned.weight)
    student = hold_zeros(nn.Sequential(layer), {"0": pruned.mask})
    optimizer = torch.optim.SGD(student.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        ((student(x) - x @ w.T) ** 2).sum().div(2 * len(x)).backward()
        optimizer.step()
    return student[0].weight.detach()


def bits_counted(bits: int, keep: int, m: int, group_size: int) -> float:
    position = 0
    while 2**position < m:
        position += 1
    run = keep * bits + keep * position
    return run / m + 16 / group_size


def stored_by_sorting(w: Tensor) -> tuple[Tensor, Tensor]:
    runs = w.reshape(len(w), -1, 4)
    places = runs.abs().argsort(dim=2)[:, :, 2:].sort(dim=2).values
    return runs.gather(2, places).flatten(1), places.flatten(1)


def stored_loop(w: Tensor) -> tuple[list, np.ndarray]:
    values = []
    places = []
    for row in w.tolist():
        values.append([])
        places.append([])
        for start in range(0, len(row), 4):
            run = row[start : start + 4]
            best = sorted(range(4), key=lambda i, run=run: -abs(run[i]))[:2]
            values[-1] += [run[i] for i in sorted(best)]
            places[-1] += sorted(best)
    return values, np.array(places, dtype=np.uint8)


def wanda_loop(w: Tensor, x: Tensor) -> Tensor:
    pruned = w.clone()
    for row in pruned:
        for start in range(0, len(row), 4):
            scores = []
            for j in range(start, start + 4):
                norm = math.hypot(*x[:, j].tolist())
                scores.append(abs(float(row[j])) * norm)
            for place in np.argsort(scores)[:2]:
                row[start + place] = 0
    return pruned


def wanda_squared_both(w: Tensor, x: Tensor) -> np.ndarray:
    # squares have the order of their roots
    score = w.numpy() ** 2 * (x.numpy() ** 2).mean(axis=0)
    score = score.reshape(len(w), -1, 4)
    third = np.sort(score, axis=2)[:, :, 1:2]
    return w.numpy() * (score > third).reshape(w.shape)


def loss_by_functions(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    p = F.softmax(teacher / temperature, -1)
    log_q = F.log_softmax(student / temperature, -1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, targets)


def loss_loop(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> float:
    total = 0.0
    for s, t, y in zip(student.double(), teacher.double(), targets.tolist(), strict=True):
        p = (t / temperature).softmax(0).tolist()
        q = (s / temperature).softmax(0).tolist()
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total -= (1 - alpha) * math.log(s.softmax(0)[y])
        total += alpha * temperature**2 * kl
    return total / len(student)


def heal_by_moment(w: Tensor, x: Tensor, rate: float, steps: int) -> Tensor:
    h = x.T @ x / len(x)
    mask = mask_of(w.abs())
    w_hat = w * mask
    for _ in range(steps):
        w_hat = w_hat - rate * mask * ((w_hat - w) @ h)
    return w_hat


def heal_a_row_at_a_time(w: Tensor, x: Tensor, rate: float, steps: int) -> np.ndarray:
    rows = []
    for row in w.double().numpy():
        order = np.argsort(-np.abs(row).reshape(-1, 4), axis=1)[:, :2]
        kept = (order + np.arange(0, len(row), 4)[:, None]).ravel()
        every = x.double().numpy()
        inputs = every[:, kept]
        left = row[kept].copy()
        for _ in range(steps):
            left -= rate * inputs.T @ (inputs @ left - every @ row) / len(x)
        rows.append(np.zeros(len(row)))
        rows[-1][kept] = left
    return np.array(rows)


THE_PACKAGE = {
    "14.1": bits_of_package,
    "14.2": stored_by_package,
    "14.3": lambda w, x: sparsity.wanda(w, x.T @ x, TWO_OF_FOUR).weight,
    "14.4": loss_of_package,
    "14.5": healed_by_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "14.1": (
        bits_counted,
        lambda bits, keep, m, group: 16 / group + keep * (bits + math.ceil(math.log2(m))) / m,
    ),
    "14.2": (stored_by_sorting, stored_loop),
    "14.3": (wanda_loop, wanda_squared_both),
    "14.4": (loss_by_functions, loss_loop),
    "14.5": (heal_by_moment, heal_a_row_at_a_time),
}


# Mistakes.


def stored_by_topk(w: Tensor) -> tuple[Tensor, Tensor]:
    runs = w.unflatten(1, (-1, 4))
    places = runs.abs().topk(2, dim=2).indices
    return runs.gather(2, places).flatten(1), places.flatten(1)


def stored_with_columns(w: Tensor) -> tuple[Tensor, Tensor]:
    mask = mask_of(w.abs())
    return w[mask].view(len(w), -1), mask.nonzero()[:, 1].view(len(w), -1)


def stored_signed(w: Tensor) -> tuple[Tensor, Tensor]:
    mask = mask_of(w)
    return w[mask].view(len(w), -1), mask.nonzero()[:, 1].view(len(w), -1) % 4


def stored_half_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    columns = w.abs().topk(w.shape[1] // 2).indices.sort().values
    return w.gather(1, columns), columns % 4


def wanda_down_the_outputs(w: Tensor, x: Tensor) -> Tensor:
    score = (w.abs() * x.norm(dim=0)).view(-1, 4, w.shape[1])
    kept = score.topk(2, dim=1).indices
    return w * torch.zeros_like(score).scatter(1, kept, 1.0).view(w.shape)


def loss_by_pytorch_mean(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    soft = nn.KLDivLoss(reduction="none")(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    )
    return (1 - alpha) * F.cross_entropy(student, targets) + alpha * temperature**2 * soft.mean()


def loss_turned(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    p = F.softmax(student / temperature, -1)
    log_q = F.log_softmax(teacher / temperature, -1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, targets)


def loss_no_square(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    p = (teacher / temperature).softmax(-1)
    q = (student / temperature).softmax(-1)
    soft = (p * (p / q).log()).sum(-1).mean()
    return (1 - alpha) * F.cross_entropy(student, targets) + alpha * soft


def loss_all_softened(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float, alpha: float
) -> Tensor:
    student = student / temperature
    teacher = teacher / temperature
    soft = F.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return (1 - alpha) * F.cross_entropy(student, targets) + alpha * temperature**2 * soft


class StraightThrough(torch.autograd.Function):
    """Masks in the forward pass, with a gradient for all weights."""

    @staticmethod
    def forward(ctx: object, w: Tensor) -> Tensor:
        return w * mask_of(w.abs())

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


def heal_straight_through(w: Tensor, x: Tensor, rate: float, steps: int) -> Tensor:
    student = w.clone().requires_grad_()
    for _ in range(steps):
        loss = ((x @ StraightThrough.apply(student).T - x @ w.T) ** 2).sum() / (2 * len(x))
        (gradient,) = torch.autograd.grad(loss, student)
        student = (student - rate * gradient).detach().requires_grad_()
    return StraightThrough.apply(student).detach()


def heal_and_prune_again(w: Tensor, x: Tensor, rate: float, steps: int) -> Tensor:
    w_hat = w * mask_of(w.abs())
    for _ in range(steps):
        w_hat = w_hat - rate * (x @ w_hat.T - x @ w.T).T @ x / len(x)
        w_hat = w_hat * mask_of(w_hat.abs())
    return w_hat


def heal_everything(w: Tensor, x: Tensor, rate: float, steps: int) -> Tensor:
    w_hat = w.where(mask_of(w.abs()), 0.0)
    for _ in range(steps):
        w_hat -= rate * (x @ (w_hat - w).T).T @ x / len(x)
    return w_hat


MISTAKES = [
    (
        "14.1",
        "the positions are forgotten",
        lambda bits, keep, m, group: bits * keep / m + 16 / group,
    ),
    (
        "14.1",
        "a fraction of a bit",
        lambda bits, keep, m, group: (bits + math.log2(m)) * keep / m + 16 / group,
    ),
    ("14.2", "in the order of size", stored_by_topk),
    ("14.2", "positions in the row, not in the run", stored_with_columns),
    ("14.2", "positions counted from 1", lambda w: (stored_loop(w)[0], stored_loop(w)[1] + 1)),
    ("14.2", "the largest values, not magnitudes", stored_signed),
    ("14.2", "the larger half of a row", stored_half_rows),
    (
        "14.3",
        "the inputs are ignored",
        lambda w, x: sparsity.magnitude(w, TWO_OF_FOUR).weight,
    ),
    ("14.3", "the norm is squared", lambda w, x: w * mask_of(w.abs() * (x.T @ x).diagonal())),
    ("14.3", "the sign decides", lambda w, x: w * mask_of(w * x.norm(dim=0))),
    ("14.3", "runs along the outputs", wanda_down_the_outputs),
    ("14.4", "KL averaged over the vocabulary too", loss_by_pytorch_mean),
    ("14.4", "KL the wrong way round", loss_turned),
    ("14.4", "T^2 is forgotten", loss_no_square),
    ("14.4", "the text is softened as well", loss_all_softened),
    (
        "14.4",
        "alpha the wrong way round",
        lambda s, t, y, T, a: loss_by_functions(s, t, y, T, 1 - a),
    ),
    ("14.5", "the mask is chosen anew at each step", heal_straight_through),
    ("14.5", "the mask is chosen anew at each step", heal_and_prune_again),
    ("14.5", "the zeros fill up again", heal_everything),
]
