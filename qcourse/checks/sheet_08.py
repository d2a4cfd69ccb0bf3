"""Sheet 08, smoothing and rotation: cases, references, tolerances, points and known mistakes.

The integers of 08.1 are so many and so large that their sums overflow 8 and 16 bits and are not
exact in float32. Some codes minus their zero point leave int8. Rotations and Cayley steps are sums
of products that may nearly cancel, so their tolerance is what float32 loses there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, uniform, variants, whole
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

CANCELLING = 1e-3  # the tolerance of a sum that may nearly cancel


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _rotation(generator: Generator, n: int) -> Tensor:
    """Return a random orthogonal matrix, not symmetric."""
    gaussian = _normal(generator, n, n).double()
    return torch.linalg.qr(gaussian).Q.float()


# 08.1 ---------------------------------------------------------------------------------------------


def _product_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # One token, then sums and differences that leave int8.
        ([[3, -4]], 1, [[2, 5], [-1, 0]], 2),
        ([[100, -100, 50], [7, 90, -3]], 30, [[100, 60, 80], [20, -30, 110]], -5),
    ]

    # The sums of the last case reach 2^25, where float32 has every fourth whole number.
    drawn = []
    for tokens, k, z_w, low in (
        (2, 5, 7, -60),
        (3, 40, -21, -60),
        (2, 400, 30, -60),
        (5, 5000, -30, 80),
    ):
        q_x = whole(generator, low, 127, tokens, k)
        z_x = int(whole(generator, 1, 40))
        q_w = whole(generator, low, 127, 2, k)
        drawn.append((q_x, z_x, q_w, z_w))
    return make_cases(by_hand, drawn, torch.int8)


def _i64(codes: Any) -> np.ndarray:
    return np.asarray(codes).astype(np.int64)


def _centered(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    # (q_x - z_x) (q_w - z_w)^T in 64-bit integers
    return (_i64(q_x) - z_x) @ (_i64(q_w) - z_w).T


# Known mistakes.


def _without_zero_points(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    return _i64(q_x) @ _i64(q_w).T


def _without_constant(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    """Add three of the four sums of the lesson."""
    x = _i64(q_x)
    w = _i64(q_w)
    of_w = -z_x * w.sum(axis=1)[None]
    of_x = -z_w * x.sum(axis=1)[:, None]
    return x @ w.T + of_w + of_x


def _exchanged(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    """Multiply each zero point by the sum of its own codes."""
    x = _i64(q_x)
    w = _i64(q_w)
    of_x = -z_x * x.sum(axis=1)[:, None]
    of_w = -z_w * w.sum(axis=1)[None]
    constant = x.shape[1] * z_x * z_w
    return x @ w.T + of_x + of_w + constant


def _wrapped_before(q_x: Any, z_x: int, q_w: Any, z_w: int) -> np.ndarray:
    x = (_i64(q_x) - z_x).astype(np.int8)
    w = (_i64(q_w) - z_w).astype(np.int8)
    return _i64(x) @ _i64(w).T


def _summed_in_int8(*args: Any) -> np.ndarray:
    return _centered(*args).astype(np.int8).astype(np.int64)


def _summed_in_int16(*args: Any) -> np.ndarray:
    return _centered(*args).astype(np.int16).astype(np.int64)


PRODUCT = Exercise(
    id="08.1",
    title="A product of codes",
    function="integer_product",
    points=2,
    cases=_product_cases,
    reference=_centered,
    mistakes=(
        Mistake(
            "the zero points are ignored",
            _without_zero_points,
            "Which float does the code z_x stand for, and what does it add to your sum?",
        ),
        Mistake(
            "K z_x z_w is missing",
            _without_constant,
            "Multiply (q_x - z_x)(q_w - z_w) out: what is the sum over K of the last of its four"
            " terms?",
        ),
        Mistake(
            "each zero point multiplies the sum of its own codes",
            _exchanged,
            "In (q_x - z_x)(q_w - z_w), by which of the codes is z_x multiplied?",
        ),
        Mistake(
            "the zero points are subtracted in int8",
            _wrapped_before,
            "What is -100 - 30 in int8? Check the dtype of the numbers before you subtract.",
        ),
        *variants(
            "the sums are kept in too few bits",
            "100 times 100 is 10,000: what is the largest number that your sums' dtype can hold?",
            _summed_in_int8,
            _summed_in_int16,
        ),
    ),
)


# 08.2 ---------------------------------------------------------------------------------------------


def _smooth_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # An outlier below 0, with alpha = 0.5 and with another alpha.
        ([[4.0, -0.5], [-16.0, 1.0]], [[0.5, -0.25], [-1.0, 4.0]], 0.5),
        ([[2.0, -9.0, 1.0]], [[1.0, -0.25, -3.0], [-2.0, 0.125, 1.0]], 0.75),
    ]
    drawn = []
    for alpha, outputs in ((0.3, 3), (0.6, 4), (0.9, 2)):
        x = _normal(generator, 5, 4)
        w = _normal(generator, outputs, 4)

        # An outlier channel that is negative, and a column of w that is.
        x[:, 1] = uniform(generator, -20, -5, 5)
        w[:, 2] = -w[:, 2].abs() - 0.1
        drawn.append((x, w, alpha))
    return make_cases(by_hand, drawn)


def _amax(x: Any) -> np.ndarray:
    return np.abs(f64(x)).max(axis=0)


def _s(x_range: np.ndarray, w_range: np.ndarray, alpha: float) -> np.ndarray:
    # s = max|x|^alpha / max|w|^(1 - alpha), per channel
    return x_range**alpha / w_range ** (1 - alpha)


def _right_s(x: Any, w: Any, alpha: float) -> np.ndarray:
    return _s(_amax(x), _amax(w), alpha)


# Known mistakes.


def _swapped_s(x: Any, w: Any, alpha: float) -> np.ndarray:
    return _s(_amax(x), _amax(w), 1 - alpha)


def _signed_s(x: Any, w: Any, alpha: float) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # NaN where all of a channel is negative
        return _s(f64(x).max(axis=0), f64(w).max(axis=0), alpha)


def _s_of_mean(x: Any, w: Any, alpha: float) -> np.ndarray:
    return _s(np.abs(f64(x)).mean(axis=0), _amax(w), alpha)


def _s_of_whole_weight(x: Any, w: Any, alpha: float) -> np.ndarray:
    return _s(_amax(x), np.abs(f64(w)).max(keepdims=True)[0], alpha)


def _smoothed(
    scale: Callable[[Any, Any, float], Any],
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Return the function that computes x / s and w s with this scale s."""

    def smoothed(x: Any, w: Any, alpha: float) -> tuple[np.ndarray, np.ndarray]:
        s = scale(x, w, alpha)
        return f64(x) / s, f64(w) * s

    return smoothed


def _roughened(x: Any, w: Any, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    s = _right_s(x, w, alpha)
    return f64(x) * s, f64(w) / s


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
            _smoothed(_swapped_s),
            "At alpha = 1 every channel of x should have the same maximum. Is that so, or does w"
            " have it?",
        ),
        Mistake(
            "the largest value, not the largest magnitude",
            _smoothed(_signed_s),
            "How large is a channel with the values (4, -16)? Does your maximum show it?",
        ),
        Mistake(
            "x is multiplied and w divided",
            _roughened,
            "The largest channel of x has the largest s: should that channel become larger?",
        ),
        Mistake(
            "the mean of |x|, not its largest value",
            _smoothed(_s_of_mean),
            "AWQ takes the mean. What sets the step of the grid that x is quantized on?",
        ),
        Mistake(
            "one range for the whole weight",
            _smoothed(_s_of_whole_weight),
            "Each channel of x is multiplied by one column of w: how large is that column?",
        ),
    ),
)


# 08.3 ---------------------------------------------------------------------------------------------


def _hadamard_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # One round, two rounds, and a size of 1 that needs none.
        [[8.0, 0.0]],
        [[0.0, 0.0, 4.0, 0.0], [1.0, 2.0, 3.0, 6.0]],
        [[-3.0], [2.0]],
    ]
    drawn = [_normal(generator, tokens, n) * 3 for tokens, n in ((3, 8), (2, 16), (2, 64))]
    return make_cases(by_hand, drawn)


def _times_power(x: Any, two: np.ndarray) -> np.ndarray:
    """Return x times the Kronecker power of a 2 x 2 matrix."""
    x = f64(x)
    h = np.ones((1, 1))
    while len(h) < x.shape[-1]:
        # Each Kronecker product doubles the size: H_2n = two x H_n.
        h = np.kron(two, h)
    return x @ h


SYLVESTER = np.array([[1.0, 1.0], [1.0, -1.0]])


def _transformed(x: Any) -> np.ndarray:
    # x H / sqrt(n)
    return _times_power(x, SYLVESTER) / np.sqrt(x.shape[-1])


# Known mistakes.


def _transformed_unscaled(x: Any) -> np.ndarray:
    return _times_power(x, SYLVESTER)


def _transformed_by_n(x: Any) -> np.ndarray:
    return _times_power(x, SYLVESTER) / x.shape[-1]


def _transformed_other_sign(x: Any) -> np.ndarray:
    other = np.array([[1.0, 1.0], [-1.0, 1.0]])
    return _times_power(x, other) / np.sqrt(x.shape[-1])


def _one_round(x: Any) -> np.ndarray:
    # The rounds after the first are missing.
    left, right = np.split(f64(x), 2, axis=-1)
    return np.concatenate([left + right, left - right], axis=-1) / np.sqrt(2)


TRANSFORM = Exercise(
    id="08.3",
    title="The Hadamard transform",
    function="hadamard_transform",
    points=2,
    cases=_hadamard_cases,
    reference=_transformed,
    tolerance=CANCELLING,
    mistakes=(
        Mistake(
            "not normalized",
            _transformed_unscaled,
            "A rotation keeps the length of a vector: how long is (8, 0), and how long is your"
            " result for it?",
        ),
        Mistake(
            "divided by n, not by its root",
            _transformed_by_n,
            "Transform (1, 0, 0, 0) and take the length of the result. Which factor is missing?",
        ),
        Mistake(
            "a single round of sums and differences",
            _one_round,
            "The 1 of (1, 0, 0, 0) has to arrive in every channel. In how many does it arrive?",
        ),
        Mistake(
            "the minus sign in another corner",
            _transformed_other_sign,
            "Which of the two is subtracted from the other? Try (8, 0), then (0, 8).",
        ),
    ),
)


# 08.4 ---------------------------------------------------------------------------------------------


def _fuse_cases(generator: Generator) -> list[Case]:
    half = 0.5**0.5
    w_in = [[1.0, 2.0], [-2.0, 1.0]]
    w_out = [[0.4, 1.0], [-1.0, 2.0]]
    by_hand = [
        # Two gains and two rotations; the second gain is partly negative.
        ([2.0, 0.5], w_in, w_out, [[0.6, 0.8], [-0.8, 0.6]]),
        (
            [1.5, -1.0],
            [[1.0, 2.0], [0.5, 3.0]],
            [[1.0, -2.0], [3.0, 1.0]],
            [[half, half], [-half, half]],
        ),
    ]
    drawn = []
    for n in (3, 4, 8):
        gain = uniform(generator, 0.3, 2, n)
        reader = _normal(generator, n, n)
        writer = _normal(generator, n, n)
        drawn.append((gain, reader, writer, _rotation(generator, n)))
    return make_cases(by_hand, drawn)


# The layer that reads the stream, from w_in, gain and Q. Then the one that writes it, from w_out
# and Q. The first of each is right.


def _reader(w: np.ndarray, gain: np.ndarray, q: np.ndarray) -> np.ndarray:
    # The norm's gain moves into the columns of w_in, before the rotation.
    return w * gain @ q


def _reader_with_rows_scaled(w: np.ndarray, gain: np.ndarray, q: np.ndarray) -> np.ndarray:
    return w * gain[:, None] @ q


def _reader_with_late_gain(w: np.ndarray, gain: np.ndarray, q: np.ndarray) -> np.ndarray:
    return w @ q * gain


def _reader_without_gain(w: np.ndarray, gain: np.ndarray, q: np.ndarray) -> np.ndarray:
    return w @ q


def _writer(w: np.ndarray, q: np.ndarray) -> np.ndarray:
    # The outputs of w_out are rotated.
    return q.T @ w


def _writer_by_q(w: np.ndarray, q: np.ndarray) -> np.ndarray:
    return q @ w


def _writer_on_inputs(w: np.ndarray, q: np.ndarray) -> np.ndarray:
    return w @ q


def _fused(
    reader: Callable[..., np.ndarray] = _reader, writer: Callable[..., np.ndarray] = _writer
) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    def fused(gain: Any, w_in: Any, w_out: Any, q: Any) -> tuple[np.ndarray, np.ndarray]:
        q = f64(q)
        return reader(f64(w_in), f64(gain), q), writer(f64(w_out), q)

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
            _fused(reader=_reader_with_rows_scaled),
            "gain has one number per channel of the stream. Which axis of w_in (out, hidden) are"
            " those channels?",
        ),
        Mistake(
            "the writer by Q, not by its transpose",
            _fused(writer=_writer_by_q),
            "The layer should add (h w_out^T) Q. Transpose that: what stands left of w_out?",
        ),
        Mistake(
            "the writer rotated on the side of its input",
            _fused(writer=_writer_on_inputs),
            "Which axis of w_out (out, in) belongs to the stream: its inputs, or its outputs?",
        ),
        Mistake(
            "the gain after the rotation",
            _fused(reader=_reader_with_late_gain),
            "gain[j] belongs to channel j of the stream before the rotation. Where is channel j"
            " after it?",
        ),
        Mistake(
            "the gain is left out",
            _fused(reader=_reader_without_gain),
            "The new norm has no gain. Which matrix multiplies by it now?",
        ),
    ),
)


# 08.5 ---------------------------------------------------------------------------------------------


def _cayley_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # From the identity, then from another rotation.
        ([[0.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1.0, 2.0], [-3.0, 0.5]], [[0.6, 0.8], [-0.8, 0.6]], 0.25),
    ]
    drawn = []
    for n, lr in ((3, 0.5), (4, 0.3), (6, 0.2)):
        gradient = _normal(generator, n, n)
        drawn.append((gradient, _rotation(generator, n), lr))
    return make_cases(by_hand, drawn)


def _cayley(
    g: Any, r: Any, lr: float, *, skew: bool = True, sign: float = 1.0, part: float = 0.5
) -> np.ndarray:
    """Return (I + B)^-1 (I - B) R with B = lr / 2 * A; the options are ways to go wrong."""
    g = f64(g)
    r = f64(r)

    # A = G R^T - R G^T is skew, which makes the step orthogonal.
    transpose = r @ g.T if skew else 0
    b = sign * lr * part * (g @ r.T - transpose)
    eye = np.eye(len(r))
    return np.linalg.solve(eye + b, (eye - b) @ r)


# Known mistakes, besides the options above.


def _straight(g: Any, r: Any, lr: float) -> np.ndarray:
    return f64(r) - lr * f64(g)


def _tangent(g: Any, r: Any, lr: float) -> np.ndarray:
    g = f64(g)
    r = f64(r)
    a = g @ r.T - r @ g.T
    return r - lr * a @ r


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
            "A small step is nearly a rotation, but what are a thousand of them? What makes a step"
            " exactly a rotation?",
        ),
        Mistake(
            "A is not skew",
            partial(_cayley, skew=False),
            "What is A + A^T? The transform is orthogonal only if that is 0.",
        ),
        Mistake(
            "uphill",
            partial(_cayley, sign=-1.0),
            "For a very small lr the loss changes by the sum of G times the change of R. Which sign"
            " does your change have?",
        ),
        Mistake(
            "A whole where half is meant",
            partial(_cayley, part=1.0),
            "(I + B)^-1 (I - B) is about I - 2 B if B is small. By how much should R turn?",
        ),
    ),
)


SHEET = Sheet("08", "Smoothing and rotation", (PRODUCT, SMOOTH, TRANSFORM, FUSE, CAYLEY))
