"""Sheet 06, GPTQ: right answers in other styles, and mistakes as people write them.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import qcourse
from qcourse.methods.gptq import gptq
from qcourse.methods.inverse_factor import inverse_factor
from qcourse.methods.second_moment import SecondMoment
from qcourse.numerics.quantized import Parameters

# Right answers.


def damped_by_package(x: Tensor, damp: float) -> Tensor:
    factor = inverse_factor(SecondMoment().add(x.double()), damp=damp, dtype=torch.float64)

    # The package gives a dead input a diagonal of 1, in units of the others' mean.
    if factor.dead.any():
        return damped_loop(x, damp)
    return factor.unit * torch.linalg.inv(factor.upper.T @ factor.upper)


def round_by_package(w: Tensor, hessian: Tensor, i: int) -> Tensor:
    first = [i, *(j for j in range(len(w)) if j != i)]
    reordered = hessian.double()[first][:, first]
    row = inverse_factor(reordered, damp=1e-12, dtype=torch.float64).upper[0]
    step = (w[i].round() - w[i]) / row[0] * row
    return w + step[torch.tensor(first).argsort()]


class OnGivenScales(qcourse.IntQuantizer):
    """An IntQuantizer with given scales, one per row."""

    def fit(self, x: Tensor) -> Parameters:
        return self.from_range(-self.given * self.qmax, self.given * self.qmax)


def codes_by_package(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> Tensor:
    quantizer = OnGivenScales(bits, granularity=qcourse.PerChannel(0))
    object.__setattr__(quantizer, "given", scale)
    return gptq(w.double(), hessian.double(), quantizer, damp=1e-9).quantized.codes


def groups_by_package(
    w: Tensor, hessian: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    quantizer = qcourse.IntQuantizer(bits, granularity=qcourse.PerGroup(group_size))
    q = gptq(w.double(), hessian.double(), quantizer, damp=1e-9).quantized
    return q.codes, q.scale


def damped_loop(x: Tensor, damp: float) -> Tensor:
    h = sum(torch.outer(token, token) for token in x) / x.shape[0]
    mean = sum(h[i, i] for i in range(len(h))) / len(h)
    for i in range(len(h)):
        h[i, i] += damp * mean
    return h


def damped_einsum(x: Tensor, damp: float) -> np.ndarray:
    h = np.einsum("ti,tj->ij", x.numpy(), x.numpy()) / len(x)
    h[np.diag_indices_from(h)] += damp * np.diag(h).mean()
    return h


def round_solve(w: Tensor, hessian: Tensor, i: int) -> Tensor:
    """Set the gradient of the other weights to 0."""
    w = w.clone()
    rest = torch.arange(len(w)) != i
    delta = w[i].round() - w[i]
    w[rest] -= delta * torch.linalg.solve(hessian[rest][:, rest], hessian[rest, i])
    w[i] += delta
    return w


def round_unit_vector(w: Tensor, hessian: Tensor, i: int) -> np.ndarray:
    w = w.numpy()
    unit = np.eye(len(w), dtype=np.float32)[i]
    direction = np.linalg.solve(hessian.numpy(), unit)
    return w - (w[i] - np.rint(w[i])) / direction[i] * direction


def codes_cholesky(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> Tensor:
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    w = w.clone()
    codes = torch.zeros(w.shape, dtype=torch.int32)
    for j in range(w.shape[1]):
        code = clamped(torch.round(w[:, j : j + 1] / scale), bits)
        error = (w[:, j : j + 1] - code * scale) / upper[j, j]
        w[:, j:] -= error @ upper[j : j + 1, j:]
        codes[:, j : j + 1] = code
    return codes


def codes_eliminated(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> np.ndarray:
    """Shrink the inverse by one step of Gaussian elimination per column."""
    w = w.numpy().astype(np.float32)
    inverse = np.linalg.inv(hessian.numpy())
    scale = scale.numpy()[:, 0]
    codes = np.zeros(w.shape, np.int8)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.rint(w[:, j] / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        row = inverse[j] / inverse[j, j]
        w = w + np.outer(scale * codes[:, j] - w[:, j], row)
        inverse = inverse - np.outer(inverse[:, j], row)
    return codes


def codes_row_by_row(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> list:
    top = 2 ** (bits - 1) - 1
    codes = []
    for row, step in zip(w.double(), scale.flatten().tolist(), strict=True):
        left = row.clone()
        taken = []
        for j in range(len(row)):
            taken.append(max(-top - 1, min(top, round(left[0].item() / step))))
            delta = taken[-1] * step - left[0]
            row_of_inverse = torch.linalg.inv(hessian.double()[j:, j:])[0]
            left = (left + delta * row_of_inverse / row_of_inverse[0])[1:]
        codes.append(taken)
    return codes


def groups_cholesky(
    w: Tensor, hessian: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    top = 2 ** (bits - 1) - 1
    w = w.clone()
    codes = torch.zeros_like(w)
    scales = []
    for j in range(w.shape[1]):
        if j % group_size == 0:
            scales.append(w[:, j : j + group_size].abs().amax(dim=1) / top)
        codes[:, j] = (w[:, j] / scales[-1]).round().clamp(-top - 1, top)
        w[:, j:] -= torch.outer((w[:, j] - scales[-1] * codes[:, j]) / upper[j, j], upper[j, j:])
    return codes.long(), torch.stack(scales, dim=1)


def groups_lazy(
    w: Tensor, hessian: Tensor, group_size: int, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """Use groups as blocks: later columns get the errors of a block when it is finished."""
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).numpy()
    w = w.double().numpy().copy()
    top = 2 ** (bits - 1) - 1
    codes = np.zeros(w.shape, int)
    scales = []
    for start in range(0, w.shape[1], group_size):
        stop = start + group_size
        scale = np.abs(w[:, start:stop]).max(axis=1) / top
        errors = np.zeros((len(w), group_size))
        for j in range(start, stop):
            codes[:, j] = np.clip(np.rint(w[:, j] / scale), -top - 1, top)
            errors[:, j - start] = (w[:, j] - scale * codes[:, j]) / upper[j, j]
            w[:, j:stop] -= np.outer(errors[:, j - start], upper[j, j:stop])
        w[:, stop:] -= errors @ upper[start:stop, stop:]
        scales.append(scale)
    return codes, np.stack(scales, axis=1)


THE_PACKAGE = {
    "06.1": damped_by_package,
    "06.2": round_by_package,
    "06.3": codes_by_package,
    "06.4": groups_by_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "06.1": (
        damped_loop,
        damped_einsum,
        lambda x, damp: x.T @ x / len(x) + damp * x.square().mean() * torch.eye(x.shape[1]),
    ),
    "06.2": (round_solve, round_unit_vector),
    "06.3": (codes_cholesky, codes_eliminated, codes_row_by_row),
    "06.4": (groups_cholesky, groups_lazy),
}


# Mistakes.


def damped_by_sum(x: Tensor, damp: float) -> Tensor:
    h = x.T @ x / len(x)
    h.diagonal().add_(damp * h.diagonal().sum())
    return h


def damped_everywhere(x: Tensor, damp: float) -> Tensor:
    h = x.T @ x / len(x)
    return h + damp * h.diagonal().mean()


def step_of_the_source(w: Tensor, hessian: Tensor, i: int) -> Tensor:
    delta = w[i].round() - w[i]
    new = w - delta / hessian[i, i] * hessian[i]
    new[i] = w[i].round()
    return new


def step_undivided(w: Tensor, hessian: Tensor, i: int) -> Tensor:
    return w + (w[i].round() - w[i]) * torch.linalg.inv(hessian)[:, i]


def step_from_the_new_weight(w: Tensor, hessian: Tensor, i: int) -> Tensor:
    """Take the error as w - w_hat and add it."""
    inverse = torch.linalg.inv(hessian)
    new = w.clone()
    new[i] = w[i].round()
    rest = torch.arange(len(w)) != i
    new[rest] += (w[i] - new[i]) / inverse[i, i] * inverse[i, rest]
    return new


def step_with_a_wrong_sign(w: Tensor, hessian: Tensor, i: int) -> Tensor:
    inverse = torch.linalg.inv(hessian)
    return w + (w[i] - w[i].round()) / inverse[i, i] * inverse[i]


def clamped(codes: Tensor, bits: int) -> Tensor:
    return codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def swept(
    upper: Tensor,
    w: Tensor,
    scale: Tensor,
    bits: int,
    *,
    divide: bool = True,
    clamp: Callable = clamped,
) -> Tensor:
    w = w.clone()
    codes = torch.zeros_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = clamp(torch.round(w[:, j] / scale[:, 0]), bits)
        error = w[:, j] - scale[:, 0] * codes[:, j]
        w[:, j:] -= torch.outer(error / upper[j, j] if divide else error, upper[j, j:])
    return codes.int()


def swept_by_error_of(error: Callable) -> Callable:
    """Compute the error from w, the rounded steps, codes and scale in another way."""

    def codes_by(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> Tensor:
        w = w.clone()
        codes = torch.zeros_like(w)
        upper = factor(hessian)
        for j in range(w.shape[1]):
            rounded = torch.round(w[:, j] / scale[:, 0])
            codes[:, j] = clamped(rounded, bits)
            e = error(w[:, j], rounded, codes[:, j], scale[:, 0]) / upper[j, j]
            w[:, j:] -= torch.outer(e, upper[j, j:])
        return codes.int()

    return codes_by


def factor(hessian: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


def swept_by_whole_inverse(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> Tensor:
    return swept(torch.linalg.inv(hessian), w, scale, bits)


def all_columns_every_time(w: Tensor, hessian: Tensor, scale: Tensor, bits: int) -> Tensor:
    inverse = torch.linalg.inv(hessian)
    w = w.clone()
    top = 2 ** (bits - 1) - 1
    for j in range(w.shape[1]):
        w_hat = scale[:, 0] * torch.round(w[:, j] / scale[:, 0]).clamp(-top - 1, top)
        w -= torch.outer((w[:, j] - w_hat) / inverse[j, j], inverse[j])
    return torch.round(w / scale).clamp(-top - 1, top).int()


def groups_by(clamp: Callable, *, early: bool = False, dim: int | None = 1) -> Callable:
    """Sweep in groups.

    Args:
        clamp: another clamp.
        early: take the error before the clamp.
        dim: the axis of amax; None for one scale of the whole group.
    """

    def codes_and_scales(
        w: Tensor, hessian: Tensor, group_size: int, bits: int
    ) -> tuple[Tensor, Tensor]:
        w = w.clone()
        codes = torch.zeros_like(w)
        scales = []
        upper = factor(hessian)
        for j in range(w.shape[1]):
            if j % group_size == 0:
                group = w[:, j : j + group_size].abs()
                amax = group.amax(dim=1) if dim == 1 else group.max().expand(len(w))
                scales.append(amax / (2 ** (bits - 1) - 1))
            rounded = torch.round(w[:, j] / scales[-1])
            codes[:, j] = clamp(rounded, bits)
            e = w[:, j] - scales[-1] * (rounded if early else codes[:, j])
            w[:, j:] -= torch.outer(e / upper[j, j], upper[j, j:])
        return codes.int(), torch.stack(scales, dim=1)

    return codes_and_scales


def groups_static(w: Tensor, hessian: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    top = 2 ** (bits - 1) - 1
    scales = w.unflatten(1, (-1, group_size)).abs().amax(dim=2) / top
    w = w.clone()
    codes = torch.zeros_like(w)
    upper = factor(hessian)
    for j in range(w.shape[1]):
        scale = scales[:, j // group_size]
        codes[:, j] = torch.round(w[:, j] / scale).clamp(-top - 1, top)
        w[:, j:] -= torch.outer((w[:, j] - scale * codes[:, j]) / upper[j, j], upper[j, j:])
    return codes.int(), scales


def groups_block_only(
    w: Tensor, hessian: Tensor, group_size: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Forget the last of the lazy updates, the one for all later columns."""
    top = 2 ** (bits - 1) - 1
    upper = factor(hessian)
    w = w.clone()
    codes = torch.zeros_like(w)
    scales = []
    for start in range(0, w.shape[1], group_size):
        stop = start + group_size
        scales.append(w[:, start:stop].abs().amax(dim=1) / top)
        for j in range(start, stop):
            codes[:, j] = torch.round(w[:, j] / scales[-1]).clamp(-top - 1, top)
            e = (w[:, j] - scales[-1] * codes[:, j]) / upper[j, j]
            w[:, j:stop] -= torch.outer(e, upper[j, j:stop])
    return codes.int(), torch.stack(scales, dim=1)


def groups_nearest(w: Tensor, hessian: Tensor, group_size: int, bits: int) -> tuple[Tensor, Tensor]:
    q = qcourse.quantize(w, bits, granularity=qcourse.PerGroup(group_size))
    return q.codes, q.scale


INSTEAD = "H in place of its inverse"
DONE = "finished columns still take part"
NEAREST = "round-to-nearest (RTN): no weight compensates"
ENDS = "the ends of the grid"
CLAMPS = (
    (ENDS, lambda codes, bits: codes),
    (ENDS, lambda codes, bits: codes.clamp(max=2 ** (bits - 1) - 1)),
    (ENDS, lambda codes, bits: codes.clamp(min=-(2 ** (bits - 1)))),
    (ENDS, lambda codes, bits: codes.clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)),
)
MISTAKES = [
    ("06.1", "damped by the sum of the diagonal, not its mean", damped_by_sum),
    ("06.1", "damped everywhere, not on the diagonal alone", damped_everywhere),
    (
        "06.1",
        "damped by damp itself",
        lambda x, damp: x.T @ x / len(x) + damp * torch.eye(x.shape[1]),
    ),
    ("06.2", INSTEAD, step_of_the_source),
    ("06.2", "not divided by the diagonal", step_undivided),
    ("06.2", "the weights move the wrong way", step_from_the_new_weight),
    ("06.2", "the weights move the wrong way", step_with_a_wrong_sign),
    (
        "06.3",
        INSTEAD,
        lambda w, h, s, bits: swept(torch.linalg.cholesky(h, upper=True), w, s, bits),
    ),
    ("06.3", INSTEAD, lambda w, h, s, bits: swept(h, w, s, bits)),
    ("06.3", DONE, swept_by_whole_inverse),
    ("06.3", DONE, all_columns_every_time),
    (
        "06.3",
        "the error is not divided by the diagonal",
        lambda w, h, s, bits: swept(factor(h), w, s, bits, divide=False),
    ),
    (
        "06.3",
        NEAREST,
        lambda w, h, s, bits: swept(torch.linalg.cholesky(torch.linalg.inv(h)), w, s, bits),
    ),
    *(
        ("06.3", name, lambda w, h, s, bits, clamp=clamp: swept(factor(h), w, s, bits, clamp=clamp))
        for name, clamp in CLAMPS
    ),
    ("06.3", ENDS, swept_by_error_of(lambda w, rounded, codes, scale: w - scale * rounded)),
    ("06.3", "", swept_by_error_of(lambda w, rounded, codes, scale: w / scale - codes)),
    ("06.3", "", swept_by_error_of(lambda w, rounded, codes, scale: w - codes)),
    *(("06.4", name, groups_by(clamp)) for name, clamp in CLAMPS),
    ("06.4", ENDS, groups_by(clamped, early=True)),
    ("06.4", "", groups_by(clamped, dim=None)),
    ("06.4", "scales computed before the sweep", groups_static),
    ("06.4", "errors are compensated within their group alone", groups_block_only),
    ("06.4", "", groups_nearest),
]
