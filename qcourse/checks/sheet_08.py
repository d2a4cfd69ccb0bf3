"""Sheet 08, smoothing and rotation: cases, references, tolerances, points and known mistakes.

The integers of 08.1 are so many and so large that neither 8 nor 16 bits nor a float32 hold their sums, and some minus
their zero point leave int8. Rotations and Cayley steps are
sums of products that may nearly cancel, so their tolerance is what float32 loses there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, uniform, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

CANCELLING = (
    1e-3  # of a hundredth of the largest value, where that is more than of the value itself
)


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _rotation(generator: Generator, n: int) -> Tensor:
    """A random orthogonal matrix, not symmetric."""
    return torch.linalg.qr(_normal(generator, n, n).double()).Q.float()


# 08.1 -------------------------------------------------------------------------------------------------------------


def _product_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[3, -4]], 1, [[2, 5], [-1, 0]], 2),
        ([[100, -100, 50], [7, 90, -3]], 30, [[100, 60, 80], [20, -30, 110]], -5),
    ]
    drawn = [
        (
            whole(generator, low, 127, tokens, k),
            int(whole(generator, 1, 40)),
            whole(generator, low, 127, 2, k),
            z_w,
        )
        for tokens, k, z_w, low in (
            (2, 5, 7, -60),
            (3, 40, -21, -60),
            (2, 400, 30, -60),
            (5, 5000, -30, 80),
        )
    ]  # the last ones reach 2^25, where float32 has every fourth whole number
    return make_cases(by_hand, drawn, torch.int8)


def _i64(codes: Any) -> np.ndarray:
    return np.asarray(codes).astype(np.int64)


def _terms(
    q_x: Any, z_x: int, q_w: Any, z_w: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The four sums of the lesson, with the signs that they have."""
    x, w = _i64(q_x), _i64(q_w)
    return (
        x @ w.T,
        -z_x * w.sum(axis=1)[None],
        -z_w * x.sum(axis=1)[:, None],
        x.shape[1] * z_x * z_w,
    )


def _centred(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    return (_i64(q_x) - z_x) @ (_i64(q_w) - z_w).T


def _without_constant(*args: Any) -> np.ndarray:
    product, of_w, of_x, _ = _terms(*args)
    return product + of_w + of_x


def _exchanged(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    """Each zero point meets the sum of its own codes."""
    x, w = _i64(q_x), _i64(q_w)
    own = -z_x * x.sum(axis=1)[:, None] - z_w * w.sum(axis=1)[None]
    return x @ w.T + own + x.shape[1] * z_x * z_w


def _wrapped_before(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    x, w = ((_i64(codes) - zero).astype(np.int8) for codes, zero in ((q_x, z_x), (q_w, z_w)))
    return _i64(x) @ _i64(w).T


def _wrapped(kind: type) -> Callable[..., np.ndarray]:
    return lambda *args: _centred(*args).astype(kind).astype(np.int64)


PRODUCT = Exercise(
    id="08.1",
    title="A product of codes",
    function="integer_product",
    points=2,
    cases=_product_cases,
    reference=_centred,
    mistakes=(
        Mistake(
            "the zero points are ignored",
            lambda *args: _terms(*args)[0],
            "Which float does the code z_x stand for, and what does it add to your sum?",
        ),
        Mistake(
            "K z_x z_w is missing",
            _without_constant,
            "Multiply (q_x - z_x)(q_w - z_w) out: what does the last of its four terms sum up to over K?",
        ),
        Mistake(
            "each zero point meets the sum of its own codes",
            _exchanged,
            "In (q_x - z_x)(q_w - z_w), by which of the codes is z_x multiplied?",
        ),
        Mistake(
            "the zero points are subtracted in int8",
            _wrapped_before,
            "What is -100 - 30 among int8 numbers? Look at the dtype of what you multiply, and since when it has it.",
        ),
        *(
            Mistake(
                "the sums are kept in too few bits",
                _wrapped(kind),
                "100 times 100 is 10,000: what is the largest number that the dtype of your sums holds?",
            )
            for kind in (np.int8, np.int16)
        ),
    ),
)


# 08.2 -------------------------------------------------------------------------------------------------------------


def _smooth_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[4.0, -0.5], [-16.0, 1.0]], [[0.5, -0.25], [-1.0, 4.0]], 0.5),
        ([[2.0, -9.0, 1.0]], [[1.0, -0.25, -3.0], [-2.0, 0.125, 1.0]], 0.75),
    ]
    drawn = []
    for alpha, outputs in ((0.3, 3), (0.6, 4), (0.9, 2)):
        x, w = _normal(generator, 5, 4), _normal(generator, outputs, 4)
        x[:, 1] = uniform(generator, -20, -5, 5)  # loud, and negative
        w[:, 2] = -w[:, 2].abs() - 0.1
        drawn.append((x, w, alpha))
    return make_cases(by_hand, drawn)


def _s(x_range: np.ndarray, w_range: np.ndarray, alpha: float) -> np.ndarray:
    return x_range**alpha / w_range ** (1 - alpha)


def _amax(x: Any) -> np.ndarray:
    return np.abs(f64(x)).max(axis=0)


def _smoothed(
    scale: Callable[[Any, Any, float], Any],
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """x / s and w s with such a scale."""

    def smoothed(x: Any, w: Any, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        s = scale(x, w, alpha)
        return f64(x) / s, f64(w) * s

    return smoothed


def _right_s(x: Any, w: Any, alpha: float) -> np.ndarray:
    return _s(_amax(x), _amax(w), alpha)


def _signed_s(x: Any, w: Any, alpha: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN where all of a channel is negative
        return _s(f64(x).max(axis=0), f64(w).max(axis=0), alpha)


SMOOTH = Exercise(
    id="08.2",
    title="Smooth a layer",
    function="smooth",
    points=1,
    cases=_smooth_cases,
    reference=_smoothed(_right_s),
    mistakes=(
        Mistake(
            "alpha and 1 - alpha are swapped",
            _smoothed(lambda x, w, alpha: _s(_amax(x), _amax(w), 1 - alpha)),
            "At alpha = 1 every channel of x should reach the same. Does it, or is it w that does?",
        ),
        Mistake(
            "the largest value, not the largest magnitude",
            _smoothed(_signed_s),
            "How loud is a channel with the values (4, -16)? Does your maximum know?",
        ),
        Mistake(
            "x is multiplied and w divided",
            lambda x, w, alpha: (f64(x) * _right_s(x, w, alpha), f64(w) / _right_s(x, w, alpha)),
            "The loudest channel of x has the largest s: is it to become louder?",
        ),
        Mistake(
            "the mean of |x|, not its largest value",
            _smoothed(lambda x, w, alpha: _s(np.abs(f64(x)).mean(axis=0), _amax(w), alpha)),
            "AWQ takes the mean. What sets the step of the grid that x is to fit on?",
        ),
        Mistake(
            "one range for the whole weight",
            _smoothed(
                lambda x, w, alpha: _s(_amax(x), np.abs(f64(w)).max(keepdims=True)[0], alpha)
            ),
            "Each channel of x has a column of w that it meets: how large is that one?",
        ),
    ),
)


# 08.3 -------------------------------------------------------------------------------------------------------------


def _hadamard_cases(generator: Generator) -> list[Case]:
    by_hand = [[[8.0, 0.0]], [[0.0, 0.0, 4.0, 0.0], [1.0, 2.0, 3.0, 6.0]], [[-3.0], [2.0]]]
    drawn = [_normal(generator, tokens, n) * 3 for tokens, n in ((3, 8), (2, 16), (2, 64))]
    return make_cases(by_hand, drawn)


def _transformed(
    two: list[list[float]], norm: Callable[[int], float]
) -> Callable[[Any], np.ndarray]:
    """x times the Kronecker power of a 2 x 2 matrix, divided by norm(n)."""

    def transformed(x: Any) -> np.ndarray:
        h, n = np.ones((1, 1)), np.shape(x)[-1]
        while len(h) < n:
            h = np.kron(np.array(two), h)
        return f64(x) @ h / norm(n)

    return transformed


def _one_round(x: Any) -> np.ndarray:
    left, right = np.split(f64(x), 2, axis=-1)
    return np.concatenate([left + right, left - right], axis=-1) / np.sqrt(2)


SYLVESTER = [[1.0, 1.0], [1.0, -1.0]]

TRANSFORM = Exercise(
    id="08.3",
    title="The Hadamard transform",
    function="hadamard_transform",
    points=2,
    cases=_hadamard_cases,
    reference=_transformed(SYLVESTER, np.sqrt),
    tolerance=CANCELLING,
    mistakes=(
        Mistake(
            "not normalised",
            _transformed(SYLVESTER, lambda n: 1),
            "A rotation keeps the length of a vector: how long is (8, 0), and how long is what you make of it?",
        ),
        Mistake(
            "divided by n, not by its root",
            _transformed(SYLVESTER, lambda n: n),
            "Transform (1, 0, 0, 0) and take the length of the result. Which factor is missing?",
        ),
        Mistake(
            "a single round of sums and differences",
            _one_round,
            "The 1 of (1, 0, 0, 0) has to arrive in every channel. In how many did it?",
        ),
        Mistake(
            "the minus sign in another corner",
            _transformed([[1.0, 1.0], [-1.0, 1.0]], np.sqrt),
            "Which of the two is subtracted from the other? Try (8, 0), then (0, 8).",
        ),
    ),
)


# 08.4 -------------------------------------------------------------------------------------------------------------


def _fuse_cases(generator: Generator) -> list[Case]:
    half = 0.5**0.5
    by_hand = [
        (
            [2.0, 0.5],
            [[1.0, 2.0], [-2.0, 1.0]],
            [[0.4, 1.0], [-1.0, 2.0]],
            [[0.6, 0.8], [-0.8, 0.6]],
        )
    ]
    by_hand.append(
        (
            [1.5, -1.0],
            [[1.0, 2.0], [0.5, 3.0]],
            [[1.0, -2.0], [3.0, 1.0]],
            [[half, half], [-half, half]],
        )
    )
    drawn = []
    for n in (3, 4, 8):
        gain = uniform(generator, 0.3, 2, n)
        drawn.append(
            (gain, _normal(generator, n, n), _normal(generator, n, n), _rotation(generator, n))
        )
    return make_cases(by_hand, drawn)


def _fused(
    reader: Callable[..., np.ndarray] = lambda w, gain, q: w * gain @ q,
    writer: Callable[..., np.ndarray] = lambda w, q: q.T @ w,
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def fused(gain: Any, w_in: Any, w_out: Any, q: Any) -> tuple[np.ndarray, np.ndarray]:
        return reader(f64(w_in), f64(gain), f64(q)), writer(f64(w_out), f64(q))

    return fused


FUSE = Exercise(
    id="08.4",
    title="A rotation, fused",
    function="fuse",
    points=3,
    cases=_fuse_cases,
    reference=_fused(),
    tolerance=CANCELLING,
    mistakes=(
        Mistake(
            "the gain on the rows of w_in",
            _fused(reader=lambda w, gain, q: w * gain[:, None] @ q),
            "gain has a number for each channel of the stream. Which axis of w_in (out, hidden) are those?",
        ),
        Mistake(
            "the writer by Q, not by its transpose",
            _fused(writer=lambda w, q: q @ w),
            "What is added should be (h w_out^T) Q. Transpose that product: what stands before w_out?",
        ),
        Mistake(
            "the writer rotated on the side of its input",
            _fused(writer=lambda w, q: w @ q),
            "Which axis of w_out (out, in) touches the stream: its inputs, or its outputs?",
        ),
        Mistake(
            "the gain after the rotation",
            _fused(reader=lambda w, gain, q: w @ q * gain),
            "gain[j] belongs to channel j of the stream as it was. Where is channel j after the rotation?",
        ),
        Mistake(
            "the gain is left out",
            _fused(reader=lambda w, gain, q: w @ q),
            "The new norm has no gain. Who multiplies by it now?",
        ),
    ),
)


# 08.5 -------------------------------------------------------------------------------------------------------------


def _cayley_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1.0, 2.0], [-3.0, 0.5]], [[0.6, 0.8], [-0.8, 0.6]], 0.25),
    ]
    drawn = [
        (_normal(generator, n, n), _rotation(generator, n), lr)
        for n, lr in ((3, 0.5), (4, 0.3), (6, 0.2))
    ]
    return make_cases(by_hand, drawn)


def _cayley(
    g: Any, r: Any, lr: float, *, skew: bool = True, sign: float = 1.0, part: float = 0.5
) -> np.ndarray:
    g, r = f64(g), f64(r)
    a = sign * lr * part * (g @ r.T - (r @ g.T if skew else 0))
    eye = np.eye(len(r))
    return np.linalg.solve(eye + a, (eye - a) @ r)


def _straight(g: Any, r: Any, lr: float) -> np.ndarray:
    return f64(r) - lr * f64(g)


def _tangent(g: Any, r: Any, lr: float) -> np.ndarray:
    g, r = f64(g), f64(r)
    return r - lr * (g @ r.T - r @ g.T) @ r


CAYLEY = Exercise(
    id="08.5",
    title="A step among rotations",
    function="cayley_step",
    points=3,
    cases=_cayley_cases,
    reference=_cayley,
    tolerance=CANCELLING,
    mistakes=(
        Mistake(
            "a plain step along the gradient",
            _straight,
            "Multiply your result by its own transpose. Is that the identity?",
        ),
        Mistake(
            "a step along A, without the transform",
            _tangent,
            "For a small step it is nearly a rotation, and after a thousand of them? What makes it one exactly?",
        ),
        Mistake(
            "A is not skew",
            lambda g, r, lr: _cayley(g, r, lr, skew=False),
            "What is A + A^T? The transform is orthogonal only if that is 0.",
        ),
        Mistake(
            "uphill",
            lambda g, r, lr: _cayley(g, r, lr, sign=-1),
            "For a very small lr the loss changes by the sum of G times the change of R. Which sign has it for you?",
        ),
        Mistake(
            "A whole where half is meant",
            lambda g, r, lr: _cayley(g, r, lr, part=1),
            "(I + B)^-1 (I - B) is about I - 2 B when B is small. By how much should R turn?",
        ),
    ),
)


SHEET = Sheet("08", "Smoothing and rotation", (PRODUCT, SMOOTH, TRANSFORM, FUSE, CAYLEY))
