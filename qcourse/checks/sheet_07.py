"""Sheet 07, AWQ: cases, references, tolerances, points and known mistakes.

A choice that depends on the last digits would separate right answers from one another. So cases are
drawn until, by a margin, the best candidate is best, the largest channels are largest, and no
weight is half-way between two codes. Then float32 and float64, in any order of operations, choose
alike. A wrong rule often picks the right one of few candidates, so cases are also drawn until no
mistake chooses as the reference does.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, qmax, telling, uniform, variants
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

MARGIN = 1.01  # the least ratio of the second best to the best
APART = 3e-3  # the least absolute difference of answers that must be told apart
HALF_WAY = 1e-3  # steps: the least distance of a weight from half-way between two codes


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _magnitude(x: Any) -> np.ndarray:
    """Return mean|x| of each input, (in,)."""
    return np.abs(f64(x)).mean(axis=0)


def _apart(values: np.ndarray) -> bool:
    """Return whether the smallest of the values (..., candidates) is so by a margin."""
    ordered = np.sort(values, axis=-1)
    best = ordered[..., 0]
    second = ordered[..., 1]
    return bool((second > MARGIN * best).all())


def _clear(steps: np.ndarray) -> bool:
    """Return whether no weight, counted in steps, is near half-way between two codes."""
    return bool((np.abs(steps % 1 - 0.5) > HALF_WAY).all())


# 07.1 ---------------------------------------------------------------------------------------------

# How salient each input is, from w, w_hat and x.
Ranking = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _salience(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _magnitude(x)


# Rankings that are known mistakes, or that a case must tell from the right one.


def _smallest_first(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return -_magnitude(x)


def _weight_norm(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.linalg.norm(w, axis=0)


def _signed_mean(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return x.mean(axis=0)


def _largest(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.abs(x).max(axis=0)


def _mean_square(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.square(x).mean(axis=0)


def _absolute_mean(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.abs(x.mean(axis=0))


def _median(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.median(np.abs(x), axis=0)


def _output_change(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _magnitude(x) * np.linalg.norm(w - w_hat, axis=0)


# The wrong rankings that are known mistakes, and others that a case must tell from the right one.
NAMED: tuple[Ranking, ...] = (_weight_norm, _signed_mean, _largest, _mean_square)
UNNAMED: tuple[Ranking, ...] = (_absolute_mean, _median, _output_change)


def _channels(ranking: Ranking, w: Any, w_hat: Any, x: Any, count: int) -> frozenset[int]:
    """Return the `count` inputs that rank first."""
    order = np.argsort(-ranking(f64(w), f64(w_hat), f64(x)))
    return frozenset(order[:count].tolist())


def _salient_case(
    generator: Generator, inputs: int, count: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Draw activations with a mean in some channels, until only the right ranking is right.

    The largest channels are so by a margin.
    """
    while True:
        x = _normal(generator, 5, inputs) * uniform(generator, 0.5, 4, inputs)

        # A mean in each channel separates mean|x| from |mean x|.
        x += uniform(generator, -3, 3, inputs)
        w = _normal(generator, 3, inputs) * uniform(generator, 0.5, 2, inputs)
        w_hat = w + uniform(generator, -0.2, 0.2, 3, inputs)
        right = _channels(_salience, w, w_hat, x, count)
        wrong = [_channels(ranking, w, w_hat, x, count) for ranking in (*NAMED, *UNNAMED)]
        descending = np.sort(_magnitude(x))[::-1]
        by_a_margin = descending[count - 1] > MARGIN * descending[count]
        if by_a_margin and right not in wrong:
            return w, w_hat, x, count


def _salient_drawn(generator: Generator) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Draw until the known mistakes are told from one another as well."""
    while True:
        drawn = []
        for inputs, count in ((6, 1), (8, 2), (12, 3)):
            drawn.append(_salient_case(generator, inputs, count))
        chosen = [tuple(_channels(ranking, *case) for case in drawn) for ranking in NAMED]
        if all(one != other for one, other in combinations(chosen, 2)):
            return drawn


def _salient_cases(generator: Generator) -> list[Case]:
    w = [[0.31, -0.84, 0.12, 0.47], [-0.22, 0.66, 0.38, -0.09]]
    w_hat = [[0.3, -0.8, 0.1, 0.5], [-0.2, 0.7, 0.4, -0.1]]
    by_hand = [
        # The largest channel changes its sign.
        (w, w_hat, [[1.0, 0.1, -6.0, 2.0], [-1.0, 0.2, 5.0, 1.0], [0.5, -0.1, -4.0, 1.5]], 1),
        # One of two channels has a mean near 0.
        (w, w_hat, [[0.2, 3.0, -1.0, 2.5], [0.1, -3.5, -1.0, 2.0], [0.3, 0.0, -1.0, 4.5]], 2),
    ]
    return make_cases(by_hand, [*_salient_drawn(generator), *_none_and_all(generator)])


def _none_and_all(generator: Generator) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Draw a case that keeps no channel, and one that keeps every channel."""
    cases = []
    for inputs, count in ((5, 0), (4, 4)):
        w = _normal(generator, 3, inputs)
        w_hat = w + uniform(generator, -0.2, 0.2, 3, inputs)
        x = _normal(generator, 4, inputs)
        cases.append((w, w_hat, x, count))
    return cases


def _kept(ranking: Ranking) -> Callable[..., np.ndarray]:
    """Return w_hat with the columns of w that rank first."""

    def keep(w: Any, w_hat: Any, x: Any, count: int) -> np.ndarray:
        chosen = list(_channels(ranking, w, w_hat, x, count))

        # The chosen columns keep their original weights.
        mixed = f64(w_hat).copy()
        mixed[:, chosen] = f64(w)[:, chosen]
        return mixed

    return keep


KEEP = Exercise(
    id="07.1",
    title="Keep the salient channels",
    function="keep_salient",
    points=1,
    cases=_salient_cases,
    reference=_kept(_salience),
    mistakes=(
        Mistake(
            "salience by the norm of the weights",
            _kept(_weight_norm),
            "The error of a weight is about half a step, for a large weight and a small one: what"
            " is it multiplied by?",
        ),
        Mistake(
            "the mean of x, not of |x|",
            _kept(_signed_mean),
            "What is the mean of a channel that swings between -6 and 6, and is the channel small?",
        ),
        Mistake(
            "the largest |x|, not the mean",
            _kept(_largest),
            "A channel is large for one token only: is it large on average?",
        ),
        Mistake(
            "the mean of squares, not of |x|",
            _kept(_mean_square),
            "Of (4, 0, 0, 0) and (2, 2, 1, 2), which has the larger mean, and which the larger mean"
            " of squares?",
        ),
        Mistake(
            "the smallest channels",
            _kept(_smallest_first),
            "Sorting begins at the smallest: at which end of your ranking are the largest?",
        ),
    ),
)


# 07.2 ---------------------------------------------------------------------------------------------


def _fold_cases(generator: Generator) -> list[Case]:
    by_hand = [
        # A larger, a smaller and an unchanged channel; then more outputs than inputs.
        ([1.0, 0.5, 2.0], [0.2, -0.1, 0.4], [[0.3, -0.2, 0.1], [0.5, 0.4, -0.6]], [1.0, 4.0, 0.5]),
        ([0.8, 1.2], [0.0, 0.3], [[0.7, -0.13], [0.33, 0.18], [0.2, 0.4]], [2.0, 2.0]),
    ]
    drawn = []
    for outputs, inputs in ((3, 3), (2, 5), (6, 4)):
        gain = uniform(generator, 0.3, 2, inputs)
        shift = uniform(generator, -1, 1, inputs)
        w = _normal(generator, outputs, inputs)
        s = uniform(generator, 0.2, 5, inputs)
        drawn.append((gain, shift, w, s))
    return make_cases(by_hand, drawn)


def _folded(gain_power: int, shift_power: int, w_power: int) -> Callable[..., Any]:
    """Return the function that multiplies gain, shift and w by these powers of s."""

    def fold(gain: Any, shift: Any, w: Any, s: Any) -> tuple[np.ndarray, ...]:
        s = f64(s)

        # The right powers are -1, -1 and 1: x / s meets w s, and the output stays the same.
        return f64(gain) * s**gain_power, f64(shift) * s**shift_power, f64(w) * s**w_power

    return fold


FOLD = Exercise(
    id="07.2",
    title="The scale, folded",
    function="fold",
    points=2,
    cases=_fold_cases,
    reference=_folded(-1, -1, 1),
    mistakes=(
        Mistake(
            "the shift is forgotten",
            _folded(-1, 0, 1),
            "A LayerNorm's output is gain times something, plus the shift: how much of it did you"
            " divide?",
        ),
        Mistake(
            "the scale is not folded back",
            _folded(0, 0, 1),
            "The weight is s times as large now: what keeps the layer's output the same as before?",
        ),
        Mistake(
            "the gain is multiplied, not divided",
            _folded(1, 1, 1),
            "Put in s = 2: by how much did the output grow?",
        ),
        Mistake(
            "divided on both sides",
            _folded(-1, -1, -1),
            "Put in s = 2: is the output the same as before, or a quarter of it?",
        ),
        Mistake(
            "the wrong way round",
            _folded(1, 1, -1),
            "The output is the same, but which of the two should become larger before rounding: w,"
            " or x?",
        ),
    ),
)


# 07.3 ---------------------------------------------------------------------------------------------


def _gram_cases(generator: Generator) -> list[Case]:
    # Two tokens by hand.
    x = f64([[1.0, 2.0], [0.0, 2.0]])
    by_hand = [([[0.6, -0.2]], [[0.5, -0.3]], x.T @ x)]
    drawn = []
    for tokens, outputs, inputs in ((6, 2, 4), (8, 5, 3), (40, 4, 6)):
        w = _normal(generator, outputs, inputs)

        # A common mean makes the inputs correlated.
        noise = _normal(generator, tokens, inputs)
        x = f64(noise + uniform(generator, -2, 2, inputs))
        w_hat = w + uniform(generator, -0.2, 0.2, outputs, inputs)
        drawn.append((w, w_hat, x.T @ x))
    return make_cases(by_hand, drawn, torch.float32)


def _lost(d: np.ndarray, gram: np.ndarray) -> float:
    """Return ||x d^T||^2 = trace(d G d^T) with the Gram matrix G = x^T x."""
    return np.trace(d @ gram @ d.T)


def _output_error(w: Any, w_hat: Any, gram: Any) -> float:
    w = f64(w)
    gram = f64(gram)

    # sqrt(||x (w - w_hat)^T||^2 / ||x w^T||^2)
    lost = _lost(w - f64(w_hat), gram)
    return np.sqrt(lost / _lost(w, gram))


# Known mistakes.


def _error_squared(w: Any, w_hat: Any, gram: Any) -> float:
    return _output_error(w, w_hat, gram) ** 2


def _error_of_diagonal(w: Any, w_hat: Any, gram: Any) -> float:
    diagonal = np.diag(np.diag(f64(gram)))
    return _output_error(w, w_hat, diagonal)


def _error_of_weights(w: Any, w_hat: Any, gram: Any) -> float:
    return _output_error(w, w_hat, np.eye(len(gram)))


def _error_of_outputs_summed(w: Any, w_hat: Any, gram: Any) -> float:
    """Sum all entries of D G D^T, although only the diagonal belongs to one output each."""
    w = f64(w)
    d = w - f64(w_hat)
    gram = f64(gram)
    lost = (d @ gram @ d.T).sum()
    return np.sqrt(lost / (w @ gram @ w.T).sum())


def _error_absolute(w: Any, w_hat: Any, gram: Any) -> float:
    d = f64(w) - f64(w_hat)
    return np.sqrt(_lost(d, f64(gram)))


def _error_over_weights(w: Any, w_hat: Any, gram: Any) -> float:
    return float(_error_absolute(w, w_hat, gram) / np.linalg.norm(f64(w)))


GRAM = Exercise(
    id="07.3",
    title="The output's error by the Gram matrix",
    function="output_error",
    points=2,
    cases=_gram_cases,
    reference=_output_error,
    tolerance=1e-4,  # sums of float32 that partly cancel
    mistakes=(
        Mistake(
            "without the root",
            _error_squared,
            "The trace is a sum of SQUARES: if every error doubles, by how much does your answer"
            " grow?",
        ),
        Mistake(
            "only the diagonal of the Gram matrix",
            _error_of_diagonal,
            "Two inputs always rise together: do their errors add up? Which entry of the matrix"
            " shows it?",
        ),
        Mistake(
            "the error of the weights",
            _error_of_weights,
            "Change the Gram matrix and keep both weights: should the error of the outputs stay the"
            " same?",
        ),
        Mistake(
            "all entries instead of the trace",
            _error_of_outputs_summed,
            "Entry (o, p) of D H D^T multiplies the errors of two outputs: which entries are"
            " squares of one?",
        ),
        *variants(
            "not relative to the outputs",
            "If all x were ten times as large, the outputs and their errors would be too: should"
            " the answer change?",
            _error_absolute,
            _error_over_weights,
        ),
    ),
)


# 07.4 ---------------------------------------------------------------------------------------------

ALPHAS = 0.0, 0.25, 0.5, 0.75, 1.0  # the candidates of the drawn cases


def _steps(w: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return w in steps of its row, and the step of each row (out, 1)."""
    step = np.abs(f64(w)).max(axis=1, keepdims=True) / qmax(bits)
    return f64(w) / step, step


def _to_nearest(w: Any, bits: int) -> np.ndarray:
    steps, step = _steps(w, bits)
    return np.rint(steps) * step


def _relative(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> float:
    """Return ||x (w - w_hat)^T|| / ||x w^T||."""
    error = np.linalg.norm(x @ (w - w_hat).T)
    return float(error / np.linalg.norm(x @ w.T))


def _of_weights(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(w - w_hat) / np.linalg.norm(w))


# w_hat as people compute it, from w, x, alpha and bits.


def _awq(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    s = _magnitude(x) ** alpha
    return _to_nearest(w * s, bits) / s


# Known mistakes.


def _not_divided(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    s = _magnitude(x) ** alpha
    return _to_nearest(w * s, bits)


def _divided_twice(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    s = _magnitude(x) ** alpha
    return _to_nearest(w / s, bits) / s


def _by_mean(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    s = np.abs(x.mean(axis=0)) ** alpha
    return _to_nearest(w * s, bits) / s


def _alpha_turned(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    return _awq(w, x, 1 - alpha, bits)


def _alpha_negative(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    return _awq(w, x, -alpha, bits)


def _search(
    w_hat_at: Callable[[np.ndarray, np.ndarray, float, int], np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float] = _relative,
) -> Callable[..., tuple[float, float]]:
    """Return a search for the alpha with the smallest error, and that error."""

    def search(w: Any, x: Any, alphas: Sequence[float], bits: int) -> tuple[float, float]:
        w = f64(w)
        x = f64(x)
        errors = [measure(w, w_hat_at(w, x, alpha, bits), x) for alpha in alphas]
        best = int(np.argmin(errors))
        return alphas[best], errors[best]

    return search


_search_by_weights = _search(_awq, _of_weights)


def _search_on_weights(w: Any, x: Any, alphas: Sequence[float], bits: int) -> tuple[float, float]:
    """Return the alpha that is best for the weights, with the output error it gives."""
    w = f64(w)
    x = f64(x)
    alpha, _ = _search_by_weights(w, x, alphas, bits)
    return alpha, _relative(w, _awq(w, x, alpha, bits), x)


def _alpha_case(generator: Generator, bits: int, outlier: int) -> tuple[Tensor, Tensor]:
    """Draw an outlier channel until alpha = 0.25 or 0.75 is best by a margin.

    Another alpha is best for the weights.
    """
    while True:
        w = _normal(generator, 4, 6)
        x = _normal(generator, 8, 6) * uniform(generator, 0.3, 2, 6)

        # One channel is an outlier in every token.
        x[:, outlier] *= 12
        w_64 = f64(w)
        x_64 = f64(x)
        errors = [_relative(w_64, _awq(w_64, x_64, alpha, bits), x_64) for alpha in ALPHAS]
        best = ALPHAS[int(np.argmin(errors))]
        best_for_weights, _ = _search_on_weights(w, x, ALPHAS, bits)
        suits = best in (0.25, 0.75) and best != best_for_weights
        if not suits or not _apart(np.array(errors)) or not _scaled_clear(w_64, x_64, bits):
            continue
        if telling(SEARCH, (w, x, ALPHAS, bits), apart=APART, pairs=False):
            return w, x


def _scaled_clear(w: np.ndarray, x: np.ndarray, bits: int) -> bool:
    """Return whether no scaled weight is near half-way between two codes, for any alpha."""
    for alpha in ALPHAS:
        steps, _ = _steps(w * _magnitude(x) ** alpha, bits)
        if not _clear(steps):
            return False
    return True


def _alpha_cases(generator: Generator) -> list[Case]:
    w = [[0.7, -0.13, 0.33, 0.18]]
    by_hand = [
        # The example of the lesson, with a constant outlier channel.
        (w, [[1.5, 16.0, 1.0, -0.5], [-0.5, 16.0, 1.0, 1.5]], (0.0, 0.5, 1.0), 4),
        # An outlier of both signs; alpha = 0, which does no harm, is not a candidate.
        (w, [[1.5, 1.0, 20.0, -0.5], [-0.5, 1.0, -12.0, 1.5]], (0.25, 0.5, 1.0), 3),
    ]
    drawn = []
    for bits, outlier in ((4, 1), (3, 4), (3, 0), (5, 2)):
        w_drawn, x_drawn = _alpha_case(generator, bits, outlier)
        drawn.append((w_drawn, x_drawn, ALPHAS, bits))
    return make_cases(by_hand, drawn)


SEARCH = Exercise(
    id="07.4",
    title="The search for alpha",
    function="best_alpha",
    points=3,
    cases=_alpha_cases,
    reference=_search(_awq),
    tolerance=1e-3,  # a small error is the difference of two large numbers in float32
    mistakes=(
        *variants(
            "searched on the weights, not on the outputs",
            "A weight that is multiplied by x = 16 may not move as far as one multiplied by 1:"
            " where does x enter?",
            _search_on_weights,
            _search_by_weights,
        ),
        Mistake(
            "w_hat is not divided by s",
            _search(_not_divided),
            "You rounded w s: what stands for w itself, if x is not divided?",
        ),
        Mistake(
            "divided by s on both sides",
            _search(_divided_twice),
            "Without rounding, w_hat must equal w: does it, for s = 2?",
        ),
        Mistake(
            "the mean of x, not of |x|",
            _search(_by_mean),
            "What is the mean of a channel that swings between -16 and 16, and which scale does it"
            " get?",
        ),
        *variants(
            "alpha the wrong way round",
            "At alpha = 0 nothing is scaled. A larger alpha makes the columns of outlier channels"
            " larger: does yours?",
            _search(_alpha_turned),
            _search(_alpha_negative),
        ),
    ),
)


# 07.5 ---------------------------------------------------------------------------------------------

SHARES = 1.0, 0.85, 0.7, 0.55


# Losses of the errors of the outputs (tokens, out, groups). The sum of squares is right.


def _sum_of_squares(y: np.ndarray) -> np.ndarray:
    return np.square(y).sum(axis=0)


def _sum_of_magnitudes(y: np.ndarray) -> np.ndarray:
    return np.abs(y).sum(axis=0)


def _largest_magnitude(y: np.ndarray) -> np.ndarray:
    return np.abs(y).max(axis=0)


def _group_losses(
    w: Any,
    x: Any,
    group_size: int,
    shares: Sequence[float],
    bits: int,
    *,
    below: float = 1,
    above: float = 0,
    clip: bool = False,
    of_tokens: Callable[[np.ndarray], np.ndarray] = _sum_of_squares,
) -> np.ndarray:
    """Return ||x_g d^T||^2 for each row, group and share: (out, groups, shares).

    Args:
        below, above: how many codes there are below -qmax and above qmax.
        clip: compare with the clipped weights.
        of_tokens: the loss, from the errors of the outputs (tokens, out, groups).
    """
    groups = f64(w).reshape(len(w), -1, group_size)  # (out, groups, size)
    parts = f64(x).reshape(len(x), -1, group_size)  # (tokens, groups, size)
    losses = []
    for share in shares:
        # The clip is a share of the group's amax, and qmax stands for it.
        end = share * np.abs(groups).max(axis=2, keepdims=True)
        scale = end / qmax(bits)
        codes = np.clip(np.rint(groups / scale), -qmax(bits) - below, qmax(bits) + above)
        target = np.clip(groups, -end, end) if clip else groups
        d = target - scale * codes
        errors = np.einsum("tgi,ogi->tog", parts, d)
        losses.append(of_tokens(errors))
    return np.stack(losses, axis=2)


def _shares(losses: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Return a search for the share with the smallest loss in each row and group."""

    def best(w: Any, x: Any, group_size: int, shares: Sequence[float], bits: int) -> np.ndarray:
        chosen = losses(w, x, group_size, shares, bits).argmin(axis=2)
        return np.array(shares)[chosen]

    return best


# Known mistakes.


def _losses_unsaturated(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, below=np.inf, above=np.inf)


def _losses_of_clipped(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, clip=True)


def _losses_of_weights(w: Any, x: Any, *arguments: Any) -> np.ndarray:
    """Give each input a token of its own, all of the same size."""
    return _group_losses(w, np.eye(len(w[0])), *arguments)


def _losses_absolute(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, of_tokens=_sum_of_magnitudes)


def _losses_largest(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, of_tokens=_largest_magnitude)


def _losses_of_all(*arguments: Any) -> np.ndarray:
    losses = _group_losses(*arguments)
    total = losses.sum(axis=(0, 1), keepdims=True)
    return np.broadcast_to(total, losses.shape)


def _clip_row(generator: Generator, x: Tensor, group_size: int, bits: int) -> Tensor:
    """Draw one row (1, in) until each of its groups has a best share by a margin."""
    while True:
        w = _normal(generator, 1, x.shape[1]) * uniform(generator, 0.3, 2)
        losses = _group_losses(w, x, group_size, SHARES, bits)
        groups = f64(w).reshape(1, -1, group_size)
        amax = np.abs(groups).max(axis=2, keepdims=True)
        scales = [share * amax / qmax(bits) for share in SHARES]
        if _apart(losses) and all(_clear(groups / scale) for scale in scales):
            return w


def _clip_case(
    generator: Generator, outputs: int, groups: int, group_size: int, bits: int
) -> tuple[Any, ...]:
    """Draw until every mistake chooses another share somewhere."""
    inputs = groups * group_size
    while True:
        x = _normal(generator, 6, inputs) * uniform(generator, 0.2, 3, inputs)
        rows = [_clip_row(generator, x, group_size, bits) for _ in range(outputs)]
        args = (torch.cat(rows), x, group_size, SHARES, bits)
        if telling(CLIP, args, apart=APART, pairs=False):
            return args


def _clip_cases(generator: Generator) -> list[Case]:
    w = [[0.9, 0.31, -0.28, 0.33]]
    by_hand = [
        # The small weights meet the large inputs, then the large weight does.
        (w, [[0.1, 4.0, 0.2, 0.1], [0.1, 0.3, 4.0, 0.2], [0.2, 0.1, 0.3, 4.0]], 4, (1.0, 0.5), 2),
        (w, [[9.0, 0.1, 0.2, 0.1], [9.0, -0.1, 0.2, 0.1], [9.0, 0.1, -0.3, 0.2]], 4, (1.0, 0.5), 2),
        # Both ends of the grid have a code.
        ([[-0.9, 0.31, -0.28, 0.33]], [[4.0, 1.0, -1.0, 1.0]], 4, (1.0, 0.5), 2),
    ]
    shapes = ((2, 2, 4, 3), (3, 2, 6, 3), (4, 3, 8, 4))
    drawn = [_clip_case(generator, *shape) for shape in shapes]
    return make_cases(by_hand, drawn)


CLIP = Exercise(
    id="07.5",
    title="A clip for each group",
    function="best_shares",
    points=3,
    cases=_clip_cases,
    reference=_shares(_group_losses),
    mistakes=(
        Mistake(
            "the codes are not saturated",
            _shares(_losses_unsaturated),
            "The step is that of half the range, but there is no last code: what was clipped?",
        ),
        Mistake(
            "chosen by the weights, not by the outputs",
            _shares(_losses_of_weights),
            "Is a clipped weight that is multiplied by x = 9 as bad as one multiplied by 0.1?",
        ),
        Mistake(
            "one share for all groups",
            _shares(_losses_of_all),
            "Each group of each row has its own scale: over what do you sum before you look for"
            " the smallest loss?",
        ),
        *variants(
            "not the sum of squares",
            "The squared length is a sum over the tokens: of which quantity?",
            _shares(_losses_absolute),
            _shares(_losses_largest),
        ),
        Mistake(
            "compared with the clipped weights",
            _shares(_losses_of_clipped),
            "Clipping the largest weight causes an error too. What was that weight before?",
        ),
    ),
)


SHEET = Sheet("07", "AWQ", (KEEP, FOLD, GRAM, SEARCH, CLIP))
