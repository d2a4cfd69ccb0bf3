"""Sheet 08, smoothing and rotation: right answers in other styles, and common mistakes.

The answers are loops, NumPy, torch and the package itself; the mistakes are torch in float32.
"""

import math

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn

from qcourse.kernels.int8_matmul import int8_matmul
from qcourse.methods import hadamard, rotation, smoothquant
from qcourse.recipes.rotated_weights import rotated_weights

# Right answers.


def product_of_package(q_x: Tensor, z_x: int, q_w: Tensor, z_w: int) -> Tensor:
    """Compute the sums that the zero points multiply as products with ones."""
    ones_x = torch.ones_like(q_x)
    ones_w = torch.ones_like(q_w)
    of_w = int8_matmul(ones_x, q_w)
    of_x = int8_matmul(q_x, ones_w)
    return int8_matmul(q_x, q_w).long() - z_x * of_w - z_w * of_x + z_x * z_w * q_x.shape[1]


def smooth_of_package(x: Tensor, w: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    w_smoothed, s = smoothquant.smooth(w, x.abs().amax(0), alpha)
    return x / s, w_smoothed


def fuse_of_package(gain: Tensor, w_in: Tensor, w_out: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Use a model of one layer with the parts of a Llama, all with these weights."""

    def linear(w: Tensor) -> nn.Linear:
        layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
        layer.weight = nn.Parameter(w)
        return layer

    norm = nn.RMSNorm(len(gain))
    norm.weight = nn.Parameter(gain)
    attention = nn.ModuleDict(
        {f"{name}_proj": linear(w_in) for name in "qkv"} | {"o_proj": linear(w_out)}
    )
    mlp = nn.ModuleDict(
        {"gate_proj": linear(w_in), "up_proj": linear(w_in), "down_proj": linear(w_out)}
    )
    norms = {"input_layernorm": norm, "post_attention_layernorm": norm}
    layer = nn.ModuleDict({**norms, "self_attn": attention, "mlp": mlp})
    decoder = nn.ModuleDict(
        {"embed_tokens": linear(w_in), "norm": norm, "layers": nn.ModuleList([layer])}
    )
    model = nn.ModuleDict({"model": decoder, "lm_head": linear(w_in)})
    new = rotated_weights(model, lambda w: w @ q, heads=False)
    return new["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.self_attn.o_proj.weight"]


def cayley_of_package(g: Tensor, r: Tensor, lr: float) -> Tensor:
    length = lr * float((g @ r.T - r @ g.T).norm())
    return rotation.cayley_descent(lambda r: (r * g).sum(), r, steps=1, lr=length)[0]


def product_loop(q_x: Tensor, z_x: int, q_w: Tensor, z_w: int) -> list[list[int]]:
    def entry(token: list[int], row: list[int]) -> int:
        return sum((a - z_x) * (b - z_w) for a, b in zip(token, row, strict=True))

    return [[entry(token, row) for row in q_w.tolist()] for token in q_x.tolist()]


def product_terms(q_x: Tensor, z_x: int, q_w: Tensor, z_w: int) -> np.ndarray:
    x = q_x.numpy().astype(np.int32)
    w = q_w.numpy().astype(np.int32)
    return x @ w.T - z_x * w.sum(1) - z_w * x.sum(1, keepdims=True) + x.shape[1] * z_x * z_w


def product_of_doubles(q_x: Tensor, z_x: int, q_w: Tensor, z_w: int) -> Tensor:
    return ((q_x.double() - z_x) @ (q_w.double() - z_w).T).to(torch.int32)


def smooth_loop(x: Tensor, w: Tensor, alpha: float) -> tuple[list, list]:
    s = []
    for of_x, of_w in zip(x.T.tolist(), w.T.tolist(), strict=True):
        s.append(max(map(abs, of_x)) ** alpha * max(map(abs, of_w)) ** (alpha - 1))
    divided = [[v / scale for v, scale in zip(token, s, strict=True)] for token in x.tolist()]
    multiplied = [[v * scale for v, scale in zip(row, s, strict=True)] for row in w.tolist()]
    return divided, multiplied


def smooth_logarithms(x: Tensor, w: Tensor, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    log_x, log_w = (np.log(np.abs(each.numpy()).max(0)) for each in (x, w))
    s = np.exp(alpha * log_x - (1 - alpha) * log_w)
    return x.numpy() @ np.diag(1 / s), w.numpy() @ np.diag(s)


def transform_by_matrix(x: Tensor) -> np.ndarray:
    return x.numpy() @ scipy.linalg.hadamard(x.shape[-1]) / math.sqrt(x.shape[-1])


def transform_in_rounds(x: Tensor) -> Tensor:
    """Combine neighbors first, then pairs of pairs."""
    y = x
    n = x.shape[-1]
    half = 1
    while half < n:
        a, b = y.reshape(len(x), -1, 2, half).unbind(2)
        y = torch.stack([a + b, a - b], dim=2).reshape(x.shape) / 2**0.5
        half *= 2
    return y


def transform_by_bits(x: Tensor) -> list[list[float]]:
    """H[i, j] = (-1)^(bits that i and j have in common)."""
    n = x.shape[-1]

    def entry(token: list[float], j: int) -> float:
        signed = [v * (-1) ** (i & j).bit_count() for i, v in enumerate(token)]
        return sum(signed) / math.sqrt(n)

    return [[entry(token, j) for j in range(n)] for token in x.tolist()]


def fuse_diagonal(gain: Tensor, w_in: Tensor, w_out: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return w_in @ torch.diag(gain) @ q, (w_out.T @ q).T


def fuse_einsum(
    gain: Tensor, w_in: Tensor, w_out: Tensor, q: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    g, a, b, q = (each.double().numpy() for each in (gain, w_in, w_out, q))
    return np.einsum("oi,i,ij->oj", a, g, q), np.einsum("ij,ik->jk", q, b)


def cayley_inverse(g: Tensor, r: Tensor, lr: float) -> np.ndarray:
    g = g.double().numpy()
    r = r.double().numpy()
    a = lr * (g @ r.T - r @ g.T)
    return np.linalg.inv(np.eye(len(r)) + a / 2) @ (np.eye(len(r)) - a / 2) @ r


def cayley_iterated(g: Tensor, r: Tensor, lr: float) -> Tensor:
    """Iterate y = r - A (r + y) / 2 as SpinQuant does; it converges for small steps."""
    a = lr * (g @ r.T - r @ g.T).double()
    y = r.double()
    size = max(1.0, float(a.norm()))
    for _ in range(2000):
        y = y + 0.5 / size**2 * (r - a @ (r + y) / 2 - y)
    return y


THE_PACKAGE = {
    "08.1": product_of_package,
    "08.2": smooth_of_package,
    "08.3": hadamard.hadamard_transform,
    "08.4": fuse_of_package,
    "08.5": cayley_of_package,
}
THE_LESSON = {"08.3": "butterfly"}
OTHER_STYLES = {
    "08.1": (product_loop, product_terms, product_of_doubles),
    "08.2": (smooth_loop, smooth_logarithms),
    "08.3": (transform_by_matrix, transform_in_rounds, transform_by_bits),
    "08.4": (fuse_diagonal, fuse_einsum),
    "08.5": (cayley_inverse, cayley_iterated),
}


# Mistakes.


def product_by(correction: object, dtype: torch.dtype = torch.int64) -> object:
    def product(q_x: Tensor, z_x: int, q_w: Tensor, z_w: int) -> Tensor:
        x = q_x.to(dtype)
        w = q_w.to(dtype)
        return x @ w.T + correction(x, z_x, w, z_w)

    return product


def smooth_by(s: object) -> object:
    def smoothed(x: Tensor, w: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        scale = s(x, w, alpha)
        return x / scale, w * scale

    return smoothed


def right_s(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    return x.abs().amax(0).pow(alpha) / w.abs().amax(0).pow(1 - alpha)


def transform_rounds(divisor: float) -> object:
    def transform(x: Tensor) -> Tensor:
        if x.shape[-1] == 1:
            return x
        a, b = x.chunk(2, dim=-1)
        return torch.cat([transform(a + b), transform(a - b)], dim=-1) / divisor

    return transform


def transform_other_corner(x: Tensor) -> Tensor:
    """Take the differences the wrong way round."""
    if x.shape[-1] == 1:
        return x
    a, b = x.chunk(2, dim=-1)
    halves = [transform_other_corner(a - b), transform_other_corner(a + b)]
    return torch.cat(halves, dim=-1) / 2**0.5


def transform_once(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a + b, a - b], dim=-1) / math.sqrt(2)


def cayley_by(a: object) -> object:
    def step(g: Tensor, r: Tensor, lr: float) -> Tensor:
        eye = torch.eye(len(r))
        return torch.linalg.inv(eye + a(g, r, lr) / 2) @ (eye - a(g, r, lr) / 2) @ r

    return step


NOTHING = "the zero points are ignored"
IN_INT8 = "the zero points are subtracted in int8"
MISTAKES = [
    ("08.1", NOTHING, product_by(lambda x, z_x, w, z_w: 0)),
    ("08.1", NOTHING, lambda q_x, z_x, q_w, z_w: int8_matmul(q_x, q_w)),
    (
        "08.1",
        "K z_x z_w is missing",
        product_by(lambda x, z_x, w, z_w: -z_x * w.sum(1) - z_w * x.sum(1, keepdim=True)),
    ),
    (
        "08.1",
        "each zero point multiplies the sum of its own codes",
        product_by(
            lambda x, z_x, w, z_w: (
                -z_w * w.sum(1) - z_x * x.sum(1, keepdim=True) + len(x[0]) * z_x * z_w
            )
        ),
    ),
    ("08.1", IN_INT8, lambda q_x, z_x, q_w, z_w: (q_x - z_x).int() @ (q_w - z_w).int().T),
    ("08.1", IN_INT8, lambda q_x, z_x, q_w, z_w: int8_matmul(q_x - z_x, q_w - z_w)),
    (
        "08.1",
        "the sums are kept in too few bits",
        lambda q_x, z_x, q_w, z_w: (q_x - z_x) @ (q_w - z_w).T,
    ),
    (
        "08.1",
        "the sums are kept in too few bits",
        lambda q_x, z_x, q_w, z_w: (q_x.to(torch.int16) - z_x) @ (q_w.to(torch.int16) - z_w).T,
    ),
    (
        "08.2",
        "alpha and 1 - alpha are swapped",
        smooth_by(lambda x, w, alpha: x.abs().amax(0) ** (1 - alpha) / w.abs().amax(0) ** alpha),
    ),
    (
        "08.2",
        "the largest value, not the largest magnitude",
        smooth_by(lambda x, w, alpha: x.amax(0) ** alpha / w.amax(0) ** (1 - alpha)),
    ),
    (
        "08.2",
        "x is multiplied and w divided",
        lambda x, w, alpha: (x * right_s(x, w, alpha), w / right_s(x, w, alpha)),
    ),
    (
        "08.2",
        "the mean of |x|, not its largest value",
        smooth_by(lambda x, w, alpha: x.abs().mean(0) ** alpha / w.abs().amax(0) ** (1 - alpha)),
    ),
    (
        "08.2",
        "one range for the whole weight",
        smooth_by(lambda x, w, alpha: x.abs().amax(0) ** alpha / w.abs().max() ** (1 - alpha)),
    ),
    ("08.3", "not normalized", transform_rounds(1)),
    ("08.3", "divided by n, not by its root", transform_rounds(2)),
    ("08.3", "a single round of sums and differences", transform_once),
    ("08.3", "the minus sign in another corner", transform_other_corner),
    (
        "08.4",
        "the gain on the rows of w_in",
        lambda gain, w_in, w_out, q: (gain[:, None] * w_in @ q, q.T @ w_out),
    ),
    (
        "08.4",
        "the writer by Q, not by its transpose",
        lambda gain, w_in, w_out, q: (w_in * gain @ q, q @ w_out),
    ),
    (
        "08.4",
        "the writer rotated on the side of its input",
        lambda gain, w_in, w_out, q: (w_in * gain @ q, w_out @ q),
    ),
    (
        "08.4",
        "the gain after the rotation",
        lambda gain, w_in, w_out, q: (w_in @ q * gain, q.T @ w_out),
    ),
    ("08.4", "the gain is left out", lambda gain, w_in, w_out, q: (w_in @ q, q.T @ w_out)),
    ("08.5", "a plain step along the gradient", lambda g, r, lr: r - lr * g),
    (
        "08.5",
        "a step along A, without the transform",
        lambda g, r, lr: r - lr * (g @ r.T - r @ g.T) @ r,
    ),
    ("08.5", "A is not skew", cayley_by(lambda g, r, lr: lr * g @ r.T)),
    ("08.5", "uphill", cayley_by(lambda g, r, lr: lr * (r @ g.T - g @ r.T))),
    (
        "08.5",
        "A whole where half is meant",
        cayley_by(lambda g, r, lr: 2 * lr * (g @ r.T - r @ g.T)),
    ),
]
