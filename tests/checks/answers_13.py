"""Sheet 13, quantization-aware training: right answers in other styles, and common mistakes."""

import math

import numpy as np
import torch
from torch import Tensor

import qcourse
from qcourse.methods.qat import lsq, straight_through
from qcourse.methods.ternary import TernaryQuantizer
from qcourse.methods.ternary import pack_trits as pack_trits_of_package

# Right answers.


def gradient_of_package(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    q = qcourse.quantize(x, bits, scale=scale)
    leaf = x.clone().requires_grad_()
    straight_through(leaf, qcourse.IntQuantizer(bits), q.parameters).backward(grad)
    return leaf.grad


def gradient_of_torch(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    ends = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    torch.fake_quantize_per_tensor_affine(leaf, scale, 0, *ends).backward(grad)
    return leaf.grad


def gradient_loop(x: Tensor, scale: float, bits: int, grad: Tensor) -> list[float]:
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    passed = []
    for value, g in zip(x.tolist(), grad.tolist(), strict=True):
        passed.append(g if round(value / scale) in codes else 0.0)
    return passed


def slope_of_package(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    grid = qcourse.IntQuantizer(bits)
    s = torch.tensor(scale, requires_grad=True)
    lsq(x, s, grid).backward(grad)
    return s.grad * math.sqrt(grid.qmax * x.numel())


def slope_by_autograd(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    s = torch.tensor(scale, requires_grad=True)
    steps = torch.clamp(x / s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    (s * (steps + (steps.round() - steps).detach())).backward(grad)
    return s.grad


def slope_loop(x: Tensor, scale: float, bits: int, grad: Tensor) -> float:
    qmin = -(2 ** (bits - 1))
    qmax = 2 ** (bits - 1) - 1
    total = 0.0
    for value, g in zip(x.tolist(), grad.tolist(), strict=True):
        v = value / scale
        if v < qmin:
            total += g * qmin
        elif v > qmax:
            total += g * qmax
        else:
            total += g * (round(v) - v)
    return total


def slope_by_codes(x: Tensor, scale: float, bits: int, grad: Tensor) -> np.ndarray:
    """Treat values that round to a code of the grid as inside."""
    v = x.numpy() / scale
    code = np.round(v)
    qmin = -(2 ** (bits - 1))
    qmax = 2 ** (bits - 1) - 1
    return grad.numpy() @ np.select([code < qmin, code > qmax], [qmin, qmax], code - v)


def step_by_autograd(scale: Tensor, grad: Tensor, rate: float) -> Tensor:
    log_scale = scale.log().requires_grad_()
    optimizer = torch.optim.SGD([log_scale], lr=rate)
    log_scale.exp().backward(grad)
    optimizer.step()
    return log_scale.detach().exp()


def step_loop(scale: Tensor, grad: Tensor, rate: float) -> list[float]:
    pairs = zip(scale.tolist(), grad.tolist(), strict=True)
    return [math.exp(math.log(s) - rate * g * s) for s, g in pairs]


def ternary_of_package(w: Tensor) -> tuple[Tensor, Tensor]:
    q = TernaryQuantizer()(w)
    return q.codes, q.scale


def ternary_where(w: Tensor) -> tuple[Tensor, float]:
    scale = w.abs().sum().item() / w.numel()
    return torch.where(w.abs() > scale / 2, w.sign(), 0).to(torch.int8), scale


def ternary_numpy(w: Tensor) -> tuple[np.ndarray, np.floating]:
    scale = np.abs(w.numpy()).mean()
    return (w.numpy() > scale / 2).astype(int) - (w.numpy() < -scale / 2), scale


def trits_loop(codes: Tensor) -> Tensor:
    packed = [0] * math.ceil(len(codes) / 5)
    for i, code in enumerate(codes.tolist()):
        packed[i // 5] += (code + 1) * 3 ** (i % 5)
    return torch.tensor(packed, dtype=torch.uint8)


def trits_by_horner(codes: Tensor) -> np.ndarray:
    digits = np.zeros(-(-len(codes) // 5) * 5, np.uint8)
    digits[: len(codes)] = codes.numpy() + 1
    packed = np.zeros(len(digits) // 5, np.uint8)
    for place in (4, 3, 2, 1, 0):
        packed = packed * np.uint8(3) + digits[place::5]
    return packed


THE_PACKAGE = {
    "13.1": gradient_of_package,
    "13.2": slope_of_package,
    "13.3": step_by_autograd,
    "13.4": ternary_of_package,
    "13.5": pack_trits_of_package,
}
THE_LESSON: dict[str, str] = {}
OTHER_STYLES = {
    "13.1": (gradient_of_torch, gradient_loop),
    "13.2": (slope_by_autograd, slope_loop, slope_by_codes),
    "13.3": (
        step_loop,
        lambda scale, grad, rate: scale.numpy() * np.exp(-rate * scale.numpy() * grad.numpy()),
    ),
    "13.4": (ternary_where, ternary_numpy),
    "13.5": (trits_loop, trits_by_horner),
}

# Mistakes.


def gradient_of_rounding(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    steps = (leaf / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    (steps * scale).backward(grad)
    return leaf.grad


def gradient_strict(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    codes = torch.round(x / scale)
    return torch.where((codes > -(2 ** (bits - 1))) & (codes < 2 ** (bits - 1) - 1), grad, 0.0)


def gradient_clamped_first(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (leaf / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).backward(grad * scale)
    return leaf.grad


def gradient_of_codes(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    return gradient_of_torch(x, scale, bits, grad) / scale


def slope_detached(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    s = torch.tensor(scale, requires_grad=True)
    codes = torch.clamp(x / s, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round().detach()
    (s * codes).backward(grad)
    return s.grad


def slope_unclipped(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    v = x / scale
    return (grad * (v.round() - v)).sum()


def slope_saturated(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    v = x / scale
    return (grad * (v.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - v)).sum()


def slope_masked(x: Tensor, scale: float, bits: int, grad: Tensor) -> Tensor:
    v = x / scale
    inside = (v >= -(2 ** (bits - 1))) & (v <= 2 ** (bits - 1) - 1)
    return ((v.round() - v) * inside * grad).sum()


def ternary_unsaturated(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().mean()
    return (w / scale).round(), scale


def ternary_amax(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().max()
    return (w / scale).round(), scale


def ternary_signed(w: Tensor) -> tuple[Tensor, Tensor]:
    return (w / w.mean()).round().clamp(-1, 1), w.mean()


def ternary_truncated(w: Tensor) -> tuple[Tensor, Tensor]:
    scale = w.abs().mean()
    return (w / scale).trunc().clamp(-1, 1), scale


def trits_big_endian(codes: Tensor) -> Tensor:
    digits = torch.nn.functional.pad(codes + 1, (0, -len(codes) % 5)).reshape(-1, 5).long()
    return (digits * torch.tensor([81, 27, 9, 3, 1])).sum(1).to(torch.uint8)


def trits_padded_by_codes(codes: Tensor) -> Tensor:
    digits = torch.nn.functional.pad(codes, (0, -len(codes) % 5)).reshape(-1, 5).long() + 1
    return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(1).to(torch.uint8)


def trits_cut(codes: Tensor) -> Tensor:
    return trits_loop(codes[: len(codes) // 5 * 5])


MISTAKES = [
    ("13.1", "the gradient of rounding is left at zero", gradient_of_rounding),
    (
        "13.1",
        "the gradient passes beyond the ends as well",
        lambda x, scale, bits, grad: grad.clone(),
    ),
    ("13.1", "nothing passes at the ends themselves", gradient_strict),
    ("13.1", "x is compared with the ends, not its code", gradient_clamped_first),
    ("13.1", "the scale is left in the gradient", gradient_of_codes),
    ("13.2", "the codes alone", slope_detached),
    ("13.2", "clipped values have no slope", slope_masked),
    ("13.2", "beyond the ends as inside", slope_unclipped),
    ("13.2", "beyond the ends as inside", slope_saturated),
    ("13.2", "the mean for the sum", lambda x, *rest: slope_of_package(x, *rest) / x.numel()),
    (
        "13.3",
        "a step on the scale, not on its logarithm",
        lambda scale, grad, rate: scale - rate * grad,
    ),
    ("13.3", "", lambda scale, grad, rate: (scale - rate * grad).clamp(min=1e-8)),
    (
        "13.3",
        "the slope by s for the slope by log s",
        lambda scale, grad, rate: (scale.log() - rate * grad).exp(),
    ),
    ("13.3", "uphill", lambda scale, grad, rate: step_by_autograd(scale, -grad, rate)),
    (
        "13.3",
        "the logarithm is returned",
        lambda scale, grad, rate: scale.log() - rate * scale * grad,
    ),
    ("13.4", "the codes are not saturated", ternary_unsaturated),
    ("13.4", "the largest magnitude for the mean", ternary_amax),
    ("13.4", "the mean of w, not of |w|", ternary_signed),
    ("13.4", "the edge at the scale, not at half of it", ternary_truncated),
    ("13.4", "two levels", lambda w: (w.sign(), w.abs().mean())),
    ("13.5", "the first digit is the highest", trits_big_endian),
    ("13.5", "the last byte is filled up with zeros", trits_padded_by_codes),
    ("13.5", "the rest is dropped", trits_cut),
    ("13.5", "two bits per code", lambda codes: qcourse.pack(codes + 1, 2)),
]
