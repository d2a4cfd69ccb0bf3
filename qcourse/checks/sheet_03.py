"""Sheet 03, measuring a model: cases, references, tolerances, points and known mistakes.

In 03.3 no difference lies within a hundredth of two standard errors, so float32 and float64 decide
alike. In 03.4 the windows are shifted by different numbers of tokens, because the exercise says so.
"""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import (
    f64,
    found,
    make_cases,
    pick,
    uniform,
    until_told,
    variants,
    whole,
)
from qcourse.checks.exercise import Exercise, Mistake, Sheet

# 03.1 ---------------------------------------------------------------------------------------------

WORDS = ("naïve", "café", "größer", "π r²", "a → b", "3 € off", "jalapeño", "x ≤ y", "Ωmega")


def _bits_cases(generator: Generator) -> list[Any]:
    by_hand = [
        # Four equally likely tokens cost 2 bits each.
        (torch.zeros(3, 4), torch.tensor([0, 3, 1]), "héé!"),
        # Probabilities 3/4 and 1/4.
        (torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]]), torch.tensor([0, 1]), "añ"),
    ]

    def draw() -> list[tuple[Any, ...]]:
        drawn = []
        for tokens, vocabulary in ((4, 6), (6, 5), (7, 9)):
            logits = torch.randn(tokens, vocabulary, generator=generator) * 2 + 1
            targets = whole(generator, 0, vocabulary - 1, tokens)
            text = " ".join(pick(generator, *WORDS) for _ in range(tokens))
            drawn.append((logits, targets, text))
        return drawn

    return make_cases(by_hand, until_told(BITS, draw))


def _log_softmax(logits: Any, axis: int = 1) -> np.ndarray:
    z = f64(logits)
    return z - np.log(np.exp(z).sum(axis=axis, keepdims=True))


def _chosen(log_p: np.ndarray, targets: Any) -> np.ndarray:
    ids = np.asarray(targets)
    return log_p[np.arange(len(ids)), ids]


def _nats(logits: Any, targets: Any) -> float:
    return -_chosen(_log_softmax(logits), targets).sum()


def _bits_per_byte(logits: Any, targets: Any, text: str) -> float:
    return _nats(logits, targets) / math.log(2) / len(text.encode())


# Known mistakes.


def _bits_per_character(logits: Any, targets: Any, text: str) -> float:
    return _nats(logits, targets) / math.log(2) / len(text)


def _nats_per_byte(logits: Any, targets: Any, text: str) -> float:
    return _nats(logits, targets) / len(text.encode())


def _ln2_times(logits: Any, targets: Any, text: str) -> float:
    return _nats(logits, targets) * math.log(2) / len(text.encode())


def _bits_per_token(logits: Any, targets: Any, text: str) -> float:
    return _nats(logits, targets) / math.log(2) / len(targets)


def _mean_per_byte(logits: Any, targets: Any, text: str) -> float:
    return _bits_per_byte(logits, targets, text) / len(targets)


def _raw_logits(logits: Any, targets: Any, text: str) -> float:
    return -_chosen(f64(logits), targets).sum() / math.log(2) / len(text.encode())


def _softmax_over_tokens(logits: Any, targets: Any, text: str) -> float:
    log_p = _chosen(_log_softmax(logits, axis=0), targets)
    return -log_p.sum() / math.log(2) / len(text.encode())


def _perplexity_instead(logits: Any, targets: Any, text: str) -> float:
    return math.exp(_nats(logits, targets) / len(targets))


BITS = Exercise(
    id="03.1",
    title="Bits per byte",
    function="bits_per_byte",
    points=1,
    cases=_bits_cases,
    reference=_bits_per_byte,
    mistakes=(
        Mistake(
            "characters, not bytes",
            _bits_per_character,
            "How many bytes does UTF-8 need for an é? Compare len(text) with len(text.encode()).",
        ),
        *variants(
            "nats, not bits",
            "A bit is ln 2 nats, about 0.69. Does a loss become a larger or a smaller number when"
            " you count it in the smaller unit?",
            _nats_per_byte,
            _ln2_times,
        ),
        Mistake(
            "per token, not per byte",
            _bits_per_token,
            "Two tokenizers cut one text into different numbers of tokens. What do they have in"
            " common?",
        ),
        Mistake(
            "the mean per token, divided by the bytes",
            _mean_per_byte,
            "You divide twice, by tokens and by bytes. What does the whole text cost?",
        ),
        Mistake(
            "logits taken for log-probabilities",
            _raw_logits,
            "Do the exponentials of a row of logits sum to 1?",
        ),
        Mistake(
            "the softmax over tokens, not over the vocabulary",
            _softmax_over_tokens,
            "Which axis holds the alternatives between which the model chooses?",
        ),
        Mistake(
            "the perplexity",
            _perplexity_instead,
            "Perplexity depends on the tokenizer. Which sum stands in its exponent?",
        ),
    ),
)


# 03.2 ---------------------------------------------------------------------------------------------


def _windows(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
    """Draw the nll totals and the tokens of windows; long windows are easier."""
    tokens = whole(generator, 8, 64, count)
    means = uniform(generator, 2.0, 4.0, count) - tokens / 64
    return (means * tokens * 100).round() / 100, tokens


def _error_cases(generator: Generator) -> list[Any]:
    written = [
        # Equal lengths: the usual error of a mean.
        ([2.0, 4.0, 6.0], [2, 2, 2]),
        # The long window weighs three times as much.
        ([4.0, 6.0], [1, 3]),
        # Windows that agree leave no error.
        ([3.0, 6.0, 12.0], [1, 2, 4]),
    ]
    by_hand = [(torch.tensor(totals), torch.tensor(tokens)) for totals, tokens in written]

    def draw() -> list[tuple[Any, ...]]:
        return [_windows(generator, count) for count in (3, 5, 8)]

    return make_cases(by_hand, until_told(ERROR, draw))


def _mean(totals: Any, tokens: Any) -> float:
    return f64(totals).sum() / f64(tokens).sum()


def _residuals(totals: Any, tokens: Any) -> np.ndarray:
    return f64(totals) - f64(tokens) * _mean(totals, tokens)


def _mean_and_error(totals: Any, tokens: Any) -> tuple[float, float]:
    count = len(totals)
    squares = np.square(_residuals(totals, tokens)).sum()
    error = math.sqrt(count / (count - 1) * squares) / f64(tokens).sum()
    return _mean(totals, tokens), error


# Known mistakes.


def _error_of_means(totals: Any, tokens: Any) -> float:
    means = f64(totals) / f64(tokens)
    return float(means.std(ddof=1)) / math.sqrt(len(means))


def _windows_alike(totals: Any, tokens: Any) -> tuple[float, float]:
    return float((f64(totals) / f64(tokens)).mean()), _error_of_means(totals, tokens)


def _error_alike(totals: Any, tokens: Any) -> tuple[float, float]:
    return _mean(totals, tokens), _error_of_means(totals, tokens)


def _error_times(factor: Callable[[int], float]) -> Callable[..., tuple[float, float]]:
    def measure(totals: Any, tokens: Any) -> tuple[float, float]:
        mean, error = _mean_and_error(totals, tokens)
        return mean, error * factor(len(totals))

    return measure


def _variance(totals: Any, tokens: Any) -> tuple[float, float]:
    mean, error = _mean_and_error(totals, tokens)
    return mean, error**2


def _tokens_independent(totals: Any, tokens: Any) -> tuple[float, float]:
    spread = float((f64(totals) / f64(tokens)).std(ddof=1))
    return _mean(totals, tokens), spread / math.sqrt(f64(tokens).sum())


def _spread_of_means(totals: Any, tokens: Any) -> tuple[float, float]:
    return _mean(totals, tokens), float((f64(totals) / f64(tokens)).std(ddof=1))


ERROR = Exercise(
    id="03.2",
    title="A mean and its standard error",
    function="mean_and_error",
    points=3,
    cases=_error_cases,
    reference=_mean_and_error,
    tolerance=1e-4,  # a residual is the difference of two large numbers in float32
    mistakes=(
        Mistake(
            "every window counts the same",
            _windows_alike,
            "A window of 8 tokens and one of 64: should they weigh the same in a mean per token?",
        ),
        Mistake(
            "every window counts the same in the error",
            _error_alike,
            "Your mean weighs each window by its tokens. By how much does one window move the"
            " total away from what the mean predicts for it?",
        ),
        *variants(
            "the spread of the windows, not the error of their mean",
            "More windows leave their spread as it is, and yet the mean becomes more certain."
            " Which factor is missing?",
            _error_times(math.sqrt),
            _spread_of_means,
        ),
        Mistake(
            "divided by K, not by K - 1",
            _error_times(lambda count: math.sqrt((count - 1) / count)),
            "The residuals sum to 0, so the last one is known from the others. How many are free?",
        ),
        Mistake(
            "the square of the error",
            _variance,
            "In which unit is your error, and in which is the mean?",
        ),
        Mistake(
            "every token counted as independent",
            _tokens_independent,
            "A window about a hard subject is hard in all its tokens. How many independent samples"
            " do you have?",
        ),
    ),
)


# 03.3 ---------------------------------------------------------------------------------------------

MARGIN = 0.02  # the least distance of |difference| / error from 2


def _table(generator: Generator, models: int, windows: int) -> Tensor:
    """Draw the nll of models on the same windows; no pair is close to two standard errors."""
    while True:
        subjects = uniform(generator, 2.0, 4.0, windows)
        qualities = uniform(generator, 0.0, 0.15, models, 1)
        noise = 0.08 * torch.randn(models, windows, generator=generator)
        nll = ((subjects + qualities + noise) * 1000).round() / 1000
        ratios = np.abs(_ratios(nll))
        apart = np.abs(ratios[~np.eye(models, dtype=bool)] - 2)
        if apart.min() > MARGIN:
            return nll


def _verdict_cases(generator: Generator) -> list[Any]:
    by_hand = [
        # The windows differ by far more than the models, which never change places.
        torch.tensor([[2.0, 3.0, 4.0, 3.5], [2.1, 3.1, 4.1, 3.7]]),
        # One window decides the mean.
        torch.tensor([[2.0, 3.0, 4.0, 3.5], [2.1, 3.1, 4.1, 2.9]]),
        # Two models are equal.
        torch.tensor([[2.0, 3.0, 2.5], [2.0, 3.0, 2.5], [2.4, 3.3, 3.0]]),
    ]

    sizes = (4, 4), (5, 5), (6, 8)
    drawn = [_table(generator, *size) for size in sizes]
    while not _all_told(drawn):
        drawn = [_table(generator, *size) for size in sizes]
    return make_cases(by_hand, drawn)


def _all_told(tables: list[Tensor]) -> bool:
    """Return whether the reference and all mistakes differ from one another on some table."""
    by_table = [found(VERDICTS, (table,)) for table in tables]
    for (i, (name, _)), (j, (other, _)) in combinations(enumerate(by_table[0]), 2):
        alike = [np.array_equal(answers[i][1], answers[j][1]) for answers in by_table]
        if name != other and all(alike):
            return False
    return True


def _differences(nll: Any) -> np.ndarray:
    """Return nll of model i less that of model j on each window, (i, j, windows)."""
    values = f64(nll)
    return values[:, None] - values[None]


def _ratios(nll: Any, *, ddof: int = 1, spread: bool = False) -> np.ndarray:
    """Return each paired difference in units of its error, and 0 for two equal models."""
    differences = _differences(nll)
    units = differences.std(axis=2, ddof=ddof)
    if not spread:
        units = units / math.sqrt(differences.shape[2])
    return _divided(differences.mean(axis=2), units)


def _divided(means: np.ndarray, units: np.ndarray) -> np.ndarray:
    # A constant difference has no error, and then any difference is certain.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(means == 0, 0, means / units)


def _beyond(ratios: np.ndarray, errors: float = 2) -> np.ndarray:
    """Return 1 where model i has the lower nll, -1 where j has it, 0 within the noise."""
    return np.where(np.abs(ratios) > errors, -np.sign(ratios), 0).astype(np.int64)


def _verdicts(nll: Any) -> np.ndarray:
    return _beyond(_ratios(nll))


# Known mistakes.


def _errors_of_each(nll: Any) -> np.ndarray:
    values = f64(nll)
    return values.std(axis=1, ddof=1) / math.sqrt(values.shape[1])


def _unpaired(nll: Any) -> np.ndarray:
    errors = _errors_of_each(nll)
    means = _differences(nll).mean(axis=2)
    return _beyond(_divided(means, np.hypot(errors[:, None], errors[None])))


def _bars_overlap(nll: Any) -> np.ndarray:
    errors = _errors_of_each(nll)
    means = _differences(nll).mean(axis=2)
    return _beyond(_divided(means, errors[:, None] + errors[None]))


def _one_error(nll: Any) -> np.ndarray:
    return _beyond(_ratios(nll), errors=1)


def _any_difference(nll: Any) -> np.ndarray:
    return _beyond(_ratios(nll), errors=0)


def _by_spread(nll: Any) -> np.ndarray:
    return _beyond(_ratios(nll, spread=True))


def _by_spread_once(nll: Any) -> np.ndarray:
    return _beyond(_ratios(nll, spread=True), errors=1)


def _population(nll: Any) -> np.ndarray:
    return _beyond(_ratios(nll, ddof=0))


def _most_windows(nll: Any) -> np.ndarray:
    wins = np.sign(_differences(nll)).sum(axis=2)
    return _beyond(wins, errors=0)


VERDICTS = Exercise(
    id="03.3",
    title="Which models differ?",
    function="verdicts",
    points=3,
    cases=_verdict_cases,
    reference=_verdicts,
    mistakes=(
        *variants(
            "the errors of the two models, not of their difference",
            "Both models read the same windows, so a hard window raises both. What is left of that"
            " if you subtract window by window first?",
            _unpaired,
            _bars_overlap,
        ),
        Mistake(
            "one standard error, not two",
            _one_error,
            "Chance alone moves a mean by more than one standard error in a third of all cases."
            " How far must the difference be from 0?",
        ),
        Mistake(
            "any difference counts",
            _any_difference,
            "Two means are never exactly equal. Which of these differences would other windows"
            " turn around?",
        ),
        *variants(
            "the spread of the differences, not the error of their mean",
            "Would a hundred more windows make your threshold smaller?",
            _by_spread,
            _by_spread_once,
        ),
        Mistake(
            "divided by K, not by K - 1",
            _population,
            "std in NumPy divides by K unless told otherwise. How many differences are free once"
            " their mean is known?",
        ),
        Mistake(
            "the model that wins most windows",
            _most_windows,
            "Three small wins and one large loss: what is the mean difference, and what its error?",
        ),
    ),
)


# 03.4 ---------------------------------------------------------------------------------------------


def _overlapping(generator: Generator, windows: int, context: int) -> tuple[Tensor, Tensor]:
    """Draw the nll of windows; a token with little context is harder to predict."""
    steps = [int(whole(generator, 1, context)) for _ in range(windows - 1)]
    starts = np.cumsum([int(whole(generator, 0, 3)), *steps])
    by_place = 3.0 / torch.arange(1, context + 1)
    nll = uniform(generator, 1.0, 3.0, windows, context) + by_place
    return (nll * 100).round() / 100, torch.tensor(starts)


def _once_cases(generator: Generator) -> list[Any]:
    written = [
        # No overlap: each prediction counts.
        ([[3.0, 1.0], [2.0, 2.0]], [0, 2]),
        # Each window repeats two tokens of the one before.
        ([[4.0, 2.0, 1.0], [3.0, 2.0, 1.0], [5.0, 4.0, 1.0]], [0, 1, 2]),
        # The last window is shifted by less than the others.
        ([[4.0, 2.0, 1.0], [3.0, 2.0, 1.0], [5.0, 4.0, 2.0]], [0, 2, 3]),
    ]
    by_hand = [(torch.tensor(nll), torch.tensor(starts)) for nll, starts in written]

    def draw() -> list[tuple[Any, ...]]:
        return [_overlapping(generator, *sizes) for sizes in ((3, 4), (4, 5), (5, 6))]

    return make_cases(by_hand, until_told(ONCE, draw))


def _predictions(nll: Any, starts: Any) -> list[list[float]]:
    """Return the predictions of each token, that of the earliest window first."""
    by_token: dict[int, list[float]] = {}
    for start, row in zip(np.asarray(starts).tolist(), f64(nll).tolist(), strict=True):
        for place, value in enumerate(row):
            by_token.setdefault(start + place, []).append(value)
    return list(by_token.values())


def _perplexity_by(choose: Callable[[list[float]], float]) -> Callable[..., tuple[int, float]]:
    """Return a measure that makes one nll of the predictions of each token."""

    def measure(nll: Any, starts: Any) -> tuple[int, float]:
        chosen = [choose(each) for each in _predictions(nll, starts)]
        return len(chosen), float(np.exp(np.mean(chosen)))

    return measure


def _first(predictions: list[float]) -> float:
    return predictions[0]


def _last(predictions: list[float]) -> float:
    return predictions[-1]


_each_token_once = _perplexity_by(_first)

# Known mistakes.


def _every_prediction(nll: Any, starts: Any) -> tuple[int, float]:
    return f64(nll).size, float(np.exp(f64(nll).mean()))


def _every_but_counted(nll: Any, starts: Any) -> tuple[int, float]:
    return len(_predictions(nll, starts)), float(np.exp(f64(nll).mean()))


def _kept_by(kept: Callable[[np.ndarray, int], list[int]]) -> Callable[..., tuple[int, float]]:
    """Return a measure of the last kept(starts, context)[k] predictions of each window."""

    def measure(nll: Any, starts: Any) -> tuple[int, float]:
        values = f64(nll)
        context = values.shape[1]
        counts = kept(np.asarray(starts), context)
        rows = zip(values, counts, strict=True)
        chosen = np.concatenate([row[context - count :] for row, count in rows])
        return chosen.size, float(np.exp(chosen.mean()))

    return measure


def _one_stride(starts: np.ndarray, context: int) -> list[int]:
    return [context, *[int(starts[1] - starts[0])] * (len(starts) - 1)]


def _first_too(starts: np.ndarray, context: int) -> list[int]:
    steps = np.diff(starts).tolist()
    return [steps[0], *steps]


def _mean_of_exponentials(nll: Any, starts: Any) -> tuple[int, float]:
    chosen = [_first(each) for each in _predictions(nll, starts)]
    return len(chosen), float(np.exp(chosen).mean())


def _mean_of_windows(nll: Any, starts: Any) -> tuple[int, float]:
    by_window = np.exp(f64(nll).mean(axis=1))
    return len(_predictions(nll, starts)), float(by_window.mean())


ONCE = Exercise(
    id="03.4",
    title="Each token once",
    function="perplexity_once",
    points=4,
    cases=_once_cases,
    reference=_each_token_once,
    tolerance=1e-4,
    mistakes=(
        *variants(
            "tokens counted twice",
            "Add up your predictions and compare with the number of tokens between the first and"
            " the last. Which of them did you count twice?",
            _every_prediction,
            _every_but_counted,
        ),
        Mistake(
            "the mean of a token's predictions",
            _perplexity_by(lambda predictions: float(np.mean(predictions))),
            "A window that begins just before a token knows little about it. Why should its guess"
            " count at all, when another window knows more?",
        ),
        Mistake(
            "the prediction with the least context",
            _perplexity_by(_last),
            "In which of two windows does a token stand farther from the start?",
        ),
        Mistake(
            "the best prediction of each token",
            _perplexity_by(min),
            "You look at the loss before you choose. Would a model in use know which of two"
            " predictions turns out better?",
        ),
        Mistake(
            "one stride for all windows",
            _kept_by(_one_stride),
            "Are all the starts equally far apart? How many tokens are new in each window?",
        ),
        Mistake(
            "the start of the first window is dropped",
            _kept_by(_first_too),
            "Which window predicts the very first tokens, if not the first?",
        ),
        *variants(
            "a mean of perplexities",
            "The exponential comes last: perplexity is exp of a mean. What did you average?",
            _mean_of_exponentials,
            _mean_of_windows,
        ),
    ),
)


SHEET = Sheet(
    id="03",
    title="Measuring a model",
    exercises=(BITS, ERROR, VERDICTS, ONCE),
)
