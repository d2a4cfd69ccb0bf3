"""Sheet 07, AWQ: cases, references, tolerances, points and known mistakes.

A choice that hangs on the last digits would tell right answers apart. So cases are drawn until, by a margin, the best
candidate is the best, the loudest channels are the loudest, and no weight lies half-way between two codes: then
float32 and float64, and any order of operations, choose alike. And they are drawn until no mistake chooses as the
reference does, since of few candidates a wrong rule often takes the right one.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, qmax, telling, uniform
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

MARGIN = 1.01  # of the second best and the best
APART = 3e-3  # of answers that are to be told apart, absolute
HALF_WAY = 1e-3  # of a step: how near to a half no weight may be


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _magnitude(x: Any) -> np.ndarray:
    """mean|x| of each input, (in,)."""
    return np.abs(f64(x)).mean(axis=0)


def _apart(values: np.ndarray) -> bool:
    """Whether the least of the values (..., candidates) is the least by a margin."""
    ordered = np.sort(values, axis=-1)
    return bool((ordered[..., 1] > MARGIN * ordered[..., 0]).all())


def _clear(steps: np.ndarray) -> bool:
    """Whether no weight, counted in steps, is near to half-way between two codes."""
    return bool((np.abs(steps % 1 - 0.5) > HALF_WAY).all())


# 07.1 -------------------------------------------------------------------------------------------------------------


Ranking = Callable[
    [np.ndarray, np.ndarray, np.ndarray], np.ndarray
]  # from w, w_hat and x, how salient each input is

NAMED: dict[str, Ranking] = {
    "weights": lambda w, w_hat, x: np.linalg.norm(w, axis=0),
    "mean": lambda w, w_hat, x: x.mean(axis=0),
    "largest": lambda w, w_hat, x: np.abs(x).max(axis=0),
    "squares": lambda w, w_hat, x: np.square(x).mean(axis=0),
}
UNNAMED: tuple[Ranking, ...] = (
    lambda w, w_hat, x: np.abs(x.mean(axis=0)),
    lambda w, w_hat, x: np.median(np.abs(x), axis=0),
    lambda w, w_hat, x: _magnitude(x) * np.linalg.norm(w - w_hat, axis=0),
)


def _channels(ranking: Ranking, w: Any, w_hat: Any, x: Any, count: int) -> frozenset[int]:
    return frozenset(np.argsort(-ranking(f64(w), f64(w_hat), f64(x)))[:count].tolist())


def _salient_case(
    generator: Generator, inputs: int, count: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Activations that lean to one side in some channels, drawn until the loudest are so by a margin, and in no way but
    the right one."""
    while True:
        x = _normal(generator, 5, inputs) * uniform(generator, 0.5, 4, inputs)
        x += uniform(generator, -3, 3, inputs)
        w = _normal(generator, 3, inputs) * uniform(generator, 0.5, 2, inputs)
        w_hat = w + uniform(generator, -0.2, 0.2, 3, inputs)
        right = frozenset(np.argsort(-_magnitude(x))[:count].tolist())
        loudest = np.sort(_magnitude(x))[::-1]
        wrong = (_channels(ranking, w, w_hat, x, count) for ranking in (*NAMED.values(), *UNNAMED))
        if loudest[count - 1] > MARGIN * loudest[count] and right not in wrong:
            return w, w_hat, x, count


def _salient_drawn(generator: Generator) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Drawn until the mistakes that have a name are told from one another as well."""
    while True:
        drawn = [
            _salient_case(generator, inputs, count) for inputs, count in ((6, 1), (8, 2), (12, 3))
        ]
        chosen = [tuple(_channels(ranking, *case) for case in drawn) for ranking in NAMED.values()]
        if all(one != other for one, other in combinations(chosen, 2)):
            return drawn


def _salient_cases(generator: Generator) -> list[Case]:
    w = [[0.31, -0.84, 0.12, 0.47], [-0.22, 0.66, 0.38, -0.09]]
    w_hat = [[0.3, -0.8, 0.1, 0.5], [-0.2, 0.7, 0.4, -0.1]]
    by_hand = [
        (w, w_hat, [[1.0, 0.1, -6.0, 2.0], [-1.0, 0.2, 5.0, 1.0], [0.5, -0.1, -4.0, 1.5]], 1),
        (w, w_hat, [[0.2, 3.0, -1.0, 2.5], [0.1, -3.5, -1.0, 2.0], [0.3, 0.0, -1.0, 4.5]], 2),
    ]
    return make_cases(by_hand, [*_salient_drawn(generator), *_none_and_all(generator)])


def _none_and_all(generator: Generator) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """No channel is kept, and every channel."""
    cases = []
    for inputs, count in ((5, 0), (4, 4)):
        w = _normal(generator, 3, inputs)
        w_hat = w + uniform(generator, -0.2, 0.2, 3, inputs)
        cases.append((w, w_hat, _normal(generator, 4, inputs), count))
    return cases


def _kept(ranking: Ranking) -> Callable[..., np.ndarray]:
    """w_hat with those columns of w that rank first."""

    def keep(w: Any, w_hat: Any, x: Any, count: int) -> np.ndarray:
        chosen = list(_channels(ranking, w, w_hat, x, count))
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
    reference=_kept(lambda w, w_hat, x: _magnitude(x)),
    mistakes=(
        Mistake(
            "salience by the norm of the weights",
            _kept(NAMED["weights"]),
            "The error of a weight is about half a step, large weight or small: what is it multiplied with?",
        ),
        Mistake(
            "the mean of x, not of |x|",
            _kept(NAMED["mean"]),
            "What is the mean of a channel that swings between -6 and 6, and is it a quiet one?",
        ),
        Mistake(
            "the largest |x|, not the mean",
            _kept(NAMED["largest"]),
            "A channel that is loud for one token only: is it loud on the whole?",
        ),
        Mistake(
            "the mean of squares, not of |x|",
            _kept(NAMED["squares"]),
            "Of (4, 0, 0, 0) and (2, 2, 1, 2), which has the larger mean, and which the larger mean of squares?",
        ),
        Mistake(
            "the quietest channels",
            _kept(lambda w, w_hat, x: -_magnitude(x)),
            "Sorting begins at the smallest: at which end of your ranking are the loudest?",
        ),
    ),
)


# 07.2 -------------------------------------------------------------------------------------------------------------


def _fold_cases(generator: Generator) -> list[Case]:
    by_hand = [
        ([1.0, 0.5, 2.0], [0.2, -0.1, 0.4], [[0.3, -0.2, 0.1], [0.5, 0.4, -0.6]], [1.0, 4.0, 0.5]),
        ([0.8, 1.2], [0.0, 0.3], [[0.7, -0.13], [0.33, 0.18], [0.2, 0.4]], [2.0, 2.0]),
    ]
    drawn = [
        (
            uniform(generator, 0.3, 2, inputs),
            uniform(generator, -1, 1, inputs),
            _normal(generator, outputs, inputs),
            uniform(generator, 0.2, 5, inputs),
        )
        for outputs, inputs in ((3, 3), (2, 5), (6, 4))
    ]
    return make_cases(by_hand, drawn)


def _folded(gain: float, shift: float, w: float) -> Callable[..., tuple[np.ndarray, ...]]:
    """Each of the three multiplied by s to a power."""
    powers = gain, shift, w

    def fold(gain: Any, shift: Any, w: Any, s: Any) -> tuple[np.ndarray, ...]:
        return tuple(
            f64(part) * f64(s) ** power
            for part, power in zip((gain, shift, w), powers, strict=True)
        )

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
            "A LayerNorm's output is gain times something, plus the shift: how much of it did you divide?",
        ),
        Mistake(
            "the scale is not folded back",
            _folded(0, 0, 1),
            "The weight is s times as large now: what makes the layer's output the same as before?",
        ),
        Mistake(
            "the gain is multiplied, not divided",
            _folded(1, 1, 1),
            "Put in s = 2: by how much did the output grow?",
        ),
        Mistake(
            "divided on both sides",
            _folded(-1, -1, -1),
            "Put in s = 2: is the output still what it was, or a quarter of it?",
        ),
        Mistake(
            "the wrong way round",
            _folded(1, 1, -1),
            "The output is the same, but which of the two was to become larger before rounding: w, or x?",
        ),
    ),
)


# 07.3 -------------------------------------------------------------------------------------------------------------


def _gram_cases(generator: Generator) -> list[Case]:
    x = f64([[1.0, 2.0], [0.0, 2.0]])
    by_hand = [([[0.6, -0.2]], [[0.5, -0.3]], x.T @ x)]
    drawn = []
    for tokens, outputs, inputs in ((6, 2, 4), (8, 5, 3), (40, 4, 6)):
        w = _normal(generator, outputs, inputs)
        x = f64(
            _normal(generator, tokens, inputs) + uniform(generator, -2, 2, inputs)
        )  # correlated: a common mean
        drawn.append((w, w + uniform(generator, -0.2, 0.2, outputs, inputs), x.T @ x))
    return make_cases(by_hand, drawn, torch.float32)


def _lost(d: np.ndarray, gram: np.ndarray) -> float:
    """||x d^T||^2 by the Gram matrix."""
    return np.trace(d @ gram @ d.T)


def _output_error(w: Any, w_hat: Any, gram: Any) -> float:
    w, d, gram = f64(w), f64(w) - f64(w_hat), f64(gram)
    return np.sqrt(_lost(d, gram) / _lost(w, gram))


def _error_of_diagonal(w: Any, w_hat: Any, gram: Any) -> float:
    return _output_error(w, w_hat, np.diag(np.diag(f64(gram))))


def _error_of_weights(w: Any, w_hat: Any, gram: Any) -> float:
    return _output_error(w, w_hat, np.eye(len(gram)))


def _error_of_outputs_summed(w: Any, w_hat: Any, gram: Any) -> float:
    """All entries of D H D^T, where only the diagonal belongs to one output each."""
    w, d, gram = f64(w), f64(w) - f64(w_hat), f64(gram)
    return np.sqrt((d @ gram @ d.T).sum() / (w @ gram @ w.T).sum())


def _error_absolute(w: Any, w_hat: Any, gram: Any) -> float:
    return np.sqrt(_lost(f64(w) - f64(w_hat), f64(gram)))


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
            lambda w, w_hat, gram: _output_error(w, w_hat, gram) ** 2,
            "The trace is a sum of SQUARES: if every error doubles, by how much does your answer grow?",
        ),
        Mistake(
            "only the diagonal of the Gram matrix",
            _error_of_diagonal,
            "Two inputs that always rise together: do their errors not add up? Which entry of the matrix knows?",
        ),
        Mistake(
            "the error of the weights",
            _error_of_weights,
            "Change the Gram matrix, and leave both weights: should the error of the outputs stay as it is?",
        ),
        Mistake(
            "all entries instead of the trace",
            _error_of_outputs_summed,
            "Entry (o, p) of D H D^T multiplies the errors of two outputs: which entries are squares of one?",
        ),
        *(
            Mistake(
                "not relative to the outputs",
                error,
                "If all x were ten times as large, so were the outputs and their errors: should the answer change?",
            )
            for error in (_error_absolute, _error_over_weights)
        ),
    ),
)


# 07.4 -------------------------------------------------------------------------------------------------------------

ALPHAS = 0.0, 0.25, 0.5, 0.75, 1.0  # the candidates of the drawn cases


def _steps(w: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """w in steps of its row, and the step of each row (out, 1)."""
    step = np.abs(f64(w)).max(axis=1, keepdims=True) / qmax(bits)
    return f64(w) / step, step


def _to_nearest(w: Any, bits: int) -> np.ndarray:
    steps, step = _steps(w, bits)
    return np.rint(steps) * step


def _relative(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(x @ (w - w_hat).T) / np.linalg.norm(x @ w.T))


def _search(
    w_hat_at: Callable[[np.ndarray, np.ndarray, float, int], np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray, np.ndarray], float] = _relative,
) -> Callable[..., tuple[float, float]]:
    """The alpha of the least error, and that error, where w_hat is a function of w, x, alpha and bits."""

    def search(w: Any, x: Any, alphas: Sequence[float], bits: int) -> tuple[float, float]:
        w, x = f64(w), f64(x)
        errors = [measure(w, w_hat_at(w, x, alpha, bits), x) for alpha in alphas]
        best = int(np.argmin(errors))
        return alphas[best], errors[best]

    return search


def _awq(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    s = _magnitude(x) ** alpha
    return _to_nearest(w * s, bits) / s


def _not_divided(w: np.ndarray, x: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    return _to_nearest(w * _magnitude(x) ** alpha, bits)


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


def _of_weights(w: np.ndarray, w_hat: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(w - w_hat) / np.linalg.norm(w))


def _search_on_weights(w: Any, x: Any, alphas: Sequence[float], bits: int) -> tuple[float, float]:
    """The alpha that is best for the weights, with what it does to the outputs."""
    alpha, _ = _search(_awq, _of_weights)(w, x, alphas, bits)
    return alpha, _relative(f64(w), _awq(f64(w), f64(x), alpha, bits), f64(x))


def _alpha_case(generator: Generator, bits: int, loud: int) -> tuple[Tensor, Tensor]:
    """With a loud channel, drawn until an alpha between the ends is best by a margin, and not so for the weights."""
    while True:
        w = _normal(generator, 4, 6)
        x = _normal(generator, 8, 6) * uniform(generator, 0.3, 2, 6)
        x[:, loud] *= 12
        errors = np.array(
            [_relative(f64(w), _awq(f64(w), f64(x), alpha, bits), f64(x)) for alpha in ALPHAS]
        )
        best, by_weights = ALPHAS[errors.argmin()], _search_on_weights(w, x, ALPHAS, bits)[0]
        clear = all(_clear(_steps(f64(w) * _magnitude(x) ** alpha, bits)[0]) for alpha in ALPHAS)
        likely = _apart(errors) and clear and best in (0.25, 0.75) and best != by_weights
        if likely and telling(SEARCH, (w, x, ALPHAS, bits), apart=APART, pairs=False):
            return w, x


def _alpha_cases(generator: Generator) -> list[Case]:
    w = [[0.7, -0.13, 0.33, 0.18]]
    by_hand = [
        (w, [[1.5, 16.0, 1.0, -0.5], [-0.5, 16.0, 1.0, 1.5]], (0.0, 0.5, 1.0), 4),
        (
            w,
            [[1.5, 1.0, 20.0, -0.5], [-0.5, 1.0, -12.0, 1.5]],
            (0.25, 0.5, 1.0),
            3,
        ),  # without 0, which does no harm
    ]
    drawn = [
        (*_alpha_case(generator, bits, loud), ALPHAS, bits)
        for bits, loud in ((4, 1), (3, 4), (3, 0), (5, 2))
    ]
    return make_cases(by_hand, drawn)


SEARCH = Exercise(
    id="07.4",
    title="The search for alpha",
    function="best_alpha",
    points=3,
    cases=_alpha_cases,
    reference=_search(_awq),
    tolerance=1e-3,  # a small error is what is left of two large numbers in float32
    mistakes=(
        *(
            Mistake(
                "searched on the weights, not on the outputs",
                search,
                "A weight that meets x = 16 may not move as far as one that meets 1: where does x come in?",
            )
            for search in (_search_on_weights, _search(_awq, _of_weights))
        ),
        Mistake(
            "w_hat is not divided by s",
            _search(_not_divided),
            "You rounded w s: what stands for w itself, when x is not divided?",
        ),
        Mistake(
            "divided by s on both sides",
            _search(_divided_twice),
            "Without rounding, w_hat must be w again: is it, for s = 2?",
        ),
        Mistake(
            "the mean of x, not of |x|",
            _search(_by_mean),
            "What is the mean of a channel that swings between -16 and 16, and which scale does it get?",
        ),
        *(
            Mistake(
                "alpha the wrong way round",
                _search(at),
                "At alpha = 0 nothing is scaled, and the larger alpha is, the larger the loud columns: are yours?",
            )
            for at in (_alpha_turned, _alpha_negative)
        ),
    ),
)


# 07.5 -------------------------------------------------------------------------------------------------------------

SHARES = 1.0, 0.85, 0.7, 0.55


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
    of_tokens: Callable[[np.ndarray], np.ndarray] = lambda y: np.square(y).sum(axis=0),
) -> np.ndarray:
    """||x_g d^T||^2 for each row, group and share: (out, groups, shares); so many codes below -qmax and above qmax.

    Another function of the outputs' errors (tokens, out, groups) may take the place of the sum of squares.
    """
    groups = f64(w).reshape(len(w), -1, group_size)  # (out, groups, size)
    parts = f64(x).reshape(len(x), -1, group_size)  # (tokens, groups, size)
    losses = []
    for share in shares:
        end = share * np.abs(groups).max(axis=2, keepdims=True)
        scale = end / qmax(bits)
        w_hat = scale * np.clip(np.rint(groups / scale), -qmax(bits) - below, qmax(bits) + above)
        d = (np.clip(groups, -end, end) if clip else groups) - w_hat
        losses.append(of_tokens(np.einsum("tgi,ogi->tog", parts, d)))
    return np.stack(losses, axis=2)


def _shares(losses: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The share of the least loss for each row and group."""

    def best(w: Any, x: Any, group_size: int, shares: Sequence[float], bits: int) -> np.ndarray:
        return np.array(shares)[losses(w, x, group_size, shares, bits).argmin(axis=2)]

    return best


def _losses_unsaturated(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, below=np.inf, above=np.inf)


def _losses_of_clipped(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, clip=True)


def _losses_of_weights(w: Any, x: Any, *arguments: Any) -> np.ndarray:
    """As if each input had a token of its own, and all were as loud."""
    return _group_losses(w, np.eye(len(w[0])), *arguments)


def _losses_absolute(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, of_tokens=lambda y: np.abs(y).sum(axis=0))


def _losses_largest(*arguments: Any) -> np.ndarray:
    return _group_losses(*arguments, of_tokens=lambda y: np.abs(y).max(axis=0))


def _losses_of_all(*arguments: Any) -> np.ndarray:
    losses = _group_losses(*arguments)
    return np.broadcast_to(losses.sum(axis=(0, 1), keepdims=True), losses.shape)


def _clip_row(generator: Generator, x: Tensor, group_size: int, bits: int) -> Tensor:
    """One row (1, in), drawn until each of its groups has a best share by a margin."""
    while True:
        w = _normal(generator, 1, x.shape[1]) * uniform(generator, 0.3, 2)
        losses = _group_losses(w, x, group_size, SHARES, bits)
        groups = f64(w).reshape(1, -1, group_size)
        ends = [share * np.abs(groups).max(axis=2, keepdims=True) / qmax(bits) for share in SHARES]
        if _apart(losses) and all(_clear(groups / end) for end in ends):
            return w


def _clip_case(
    generator: Generator, outputs: int, groups: int, group_size: int, bits: int
) -> tuple[Any, ...]:
    """Drawn until every mistake chooses another share somewhere."""
    while True:
        seen = _normal(generator, 6, groups * group_size) * uniform(
            generator, 0.2, 3, groups * group_size
        )
        w = torch.cat([_clip_row(generator, seen, group_size, bits) for _ in range(outputs)])
        if telling(CLIP, (w, seen, group_size, SHARES, bits), apart=APART, pairs=False):
            return w, seen, group_size, SHARES, bits


def _clip_cases(generator: Generator) -> list[Case]:
    w = [[0.9, 0.31, -0.28, 0.33]]
    x = [[0.1, 4.0, 0.2, 0.1], [0.1, 0.3, 4.0, 0.2], [0.2, 0.1, 0.3, 4.0]]
    by_hand = [
        (w, x, 4, (1.0, 0.5), 2),
        (w, [[9.0, 0.1, 0.2, 0.1], [9.0, -0.1, 0.2, 0.1], [9.0, 0.1, -0.3, 0.2]], 4, (1.0, 0.5), 2),
        (
            [[-0.9, 0.31, -0.28, 0.33]],
            [[4.0, 1.0, -1.0, 1.0]],
            4,
            (1.0, 0.5),
            2,
        ),  # both ends have a code
    ]
    drawn = []
    for outputs, groups, group_size, bits in ((2, 2, 4, 3), (3, 2, 6, 3), (4, 3, 8, 4)):
        drawn.append(_clip_case(generator, outputs, groups, group_size, bits))
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
            "A step for half of the range, and codes without end: what was clipped?",
        ),
        Mistake(
            "chosen by the weights, not by the outputs",
            _shares(_losses_of_weights),
            "Is a clipped weight that meets x = 9 as bad as one that meets 0.1?",
        ),
        Mistake(
            "one share for all groups",
            _shares(_losses_of_all),
            "Each group of each row has a scale of its own: over what do you sum before you look for the least?",
        ),
        *(
            Mistake(
                "not the sum of squares",
                _shares(losses),
                "The square of a length is a sum over the tokens: of what, that you had better not leave out?",
            )
            for losses in (_losses_absolute, _losses_largest)
        ),
        Mistake(
            "compared with the clipped weights",
            _shares(_losses_of_clipped),
            "What clipping takes from the largest weight is an error too. What was it before?",
        ),
    ),
)


SHEET = Sheet("07", "AWQ", (KEEP, FOLD, GRAM, SEARCH, CLIP))
