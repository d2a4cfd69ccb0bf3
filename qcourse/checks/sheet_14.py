"""Sheet 14, sparsity and distillation: cases, references, tolerances, points and known mistakes.

Ranked values are never close to a tie: float32 and float64 keep the same weights, also in 14.5 at
every step of the mistakes that choose again. Cases are drawn until they tell the mistakes apart.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, telling, telling_rows, uniform, variants
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

# of four adjacent weights, two are kept
RUN = 4
KEPT = 2

# rows from which suitable ones are chosen
CANDIDATES = 300


def _top(score: Any, *, keep: int = KEPT, run: int = RUN) -> np.ndarray:
    """Return True for the `keep` highest of each run along the last axis."""
    runs = f64(score).reshape(-1, run)
    ranks = (-runs).argsort(axis=1).argsort(axis=1)
    return (ranks < keep).reshape(np.shape(score))


def _clear(score: Any) -> bool:
    """Return whether the second and the third of each run are far apart."""
    return bool(_clear_rows(score).all())


def _clear_rows(score: Any) -> np.ndarray:
    """Return for each row whether the second and the third of each run are far apart."""
    runs = f64(score).reshape(len(score), -1, RUN)
    ordered = np.sort(runs, axis=2)
    gaps = ordered[..., -KEPT] - ordered[..., -KEPT - 1]
    least = 0.02 * np.abs(score).max()
    return (gaps > least).all(axis=1)


def _until(draw: Callable[[], tuple], good: Callable[[tuple], bool]) -> tuple:
    """Return the first draw that is good."""
    args = draw()
    while not good(args):
        args = draw()
    return args


# 14.1 ---------------------------------------------------------------------------------------------


def _bits_cases(generator: Generator) -> list[Case]:
    # 2 of 4 at 4 and 16 bits, and a run whose length is not a power of 2
    by_hand = [(4, 2, 4, 32), (16, 2, 4, 128), (8, 5, 6, 64)]
    drawn = []
    for m, keeps in ((8, (3, 5)), (10, (3, 7)), (16, (3, 5))):
        bits = pick(generator, 3, 4, 8)
        keep = pick(generator, *keeps)
        drawn.append((bits, keep, m, pick(generator, 32, 64, 128)))
    return make_cases(by_hand, drawn)


def _sum_of_bits(
    bits: int, keep: int, m: int, group_size: int, *, position: float, scale: float = 16.0
) -> float:
    # a code and a position per kept weight, and a share of its group's scale
    kept_share = keep / m
    return kept_share * (bits + position) + scale / group_size


def _position(m: int) -> int:
    return int(np.ceil(np.log2(m)))


def _bits(bits: int, keep: int, m: int, group_size: int) -> float:
    return _sum_of_bits(bits, keep, m, group_size, position=_position(m))


# Known mistakes.


def _without_positions(bits: int, keep: int, m: int, group_size: int) -> float:
    return _sum_of_bits(bits, keep, m, group_size, position=0)


def _position_per_weight(bits: int, keep: int, m: int, group_size: int) -> float:
    return _sum_of_bits(bits, keep, m, group_size, position=0) + _position(m)


def _fractional_position(bits: int, keep: int, m: int, group_size: int) -> float:
    return _sum_of_bits(bits, keep, m, group_size, position=np.log2(m))


def _without_scales(bits: int, keep: int, m: int, group_size: int) -> float:
    return _sum_of_bits(bits, keep, m, group_size, position=_position(m), scale=0)


def _groups_of_kept_weights(bits: int, keep: int, m: int, group_size: int) -> float:
    scale = 16 * keep / m
    return _sum_of_bits(bits, keep, m, group_size, position=_position(m), scale=scale)


BITS = Exercise(
    id="14.1",
    title="Bits a weight, positions included",
    function="bits_per_weight",
    points=1,
    cases=_bits_cases,
    reference=_bits,
    mistakes=(
        Mistake(
            "the positions are forgotten",
            _without_positions,
            "You have the values that stayed. How does a program know where each one belongs?",
        ),
        Mistake(
            "a position for every weight, kept or not",
            _position_per_weight,
            "Does a weight that is not stored need a position?",
        ),
        Mistake(
            "a fraction of a bit",
            _fractional_position,
            "With six neighbors there are positions 0 to 5: how many whole bits hold a 5?",
        ),
        Mistake(
            "the scales are forgotten",
            _without_scales,
            "Codes are worth nothing without their scale: what does a scale add to each weight of"
            " its group?",
        ),
        Mistake(
            "groups of kept weights only",
            _groups_of_kept_weights,
            "The card says which weights a group counts: do pruned weights belong to one?",
        ),
    ),
)


# 14.2 ---------------------------------------------------------------------------------------------


def _store_cases(generator: Generator) -> list[Case]:
    # the example of the founding document, two runs, two rows
    by_hand = [
        [[0.0, -1.25, 0.0, 0.5]],
        [[0.3, -1.2, 0.4, 0.9, 2.0, 0.1, 0.05, -0.2]],
        [[-0.1, 0.7, -3.0, 0.2], [1.5, 0.3, -0.9, 0.6]],
    ]

    def draw(outputs: int, inputs: int) -> tuple:
        # every second run is smaller
        sizes = torch.tensor([1.0, 0.3] * 4)[: inputs // RUN].repeat_interleave(RUN)
        return (uniform(generator, -2, 2, outputs, inputs) * sizes,)

    drawn = []
    for shape in ((2, 8), (3, 12), (1, 16)):
        drawn.append(_until(partial(draw, *shape), _tells_storage))
    return make_cases(by_hand, drawn)


def _tells_storage(args: tuple) -> bool:
    magnitudes = np.abs(f64(args[0]))
    return _clear(magnitudes) and telling(STORE, args, apart=1e-3)


def _largest(w: Any) -> np.ndarray:
    return _top(np.abs(f64(w)))


def _in_row(w: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept values and their positions in the row, in the order of the inputs."""
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    rows = len(mask)
    return f64(w)[mask].reshape(rows, -1), positions[mask].reshape(rows, -1)


def _in_run(w: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the kept values and their positions in the run of four."""
    values, positions = _in_row(w, mask)
    return values, positions % RUN


def _store(w: Any) -> tuple[np.ndarray, np.ndarray]:
    return _in_run(w, _largest(w))


# Known mistakes.


def _store_from_1(w: Any) -> tuple[np.ndarray, np.ndarray]:
    values, positions = _store(w)
    return values, positions + 1


def _store_in_row(w: Any) -> tuple[np.ndarray, np.ndarray]:
    return _in_row(w, _largest(w))


def _store_by_size(w: Any) -> tuple[np.ndarray, np.ndarray]:
    runs = f64(w).reshape(-1, RUN)
    order = (-np.abs(runs)).argsort(axis=1)[:, :KEPT]
    shape = (len(w), -1)
    values = np.take_along_axis(runs, order, axis=1)
    return values.reshape(shape), order.reshape(shape)


def _store_largest_values(w: Any) -> tuple[np.ndarray, np.ndarray]:
    return _in_run(w, _top(w))


def _store_half_of_row(w: Any) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.shape(w)[1]
    mask = _top(np.abs(f64(w)), keep=inputs // 2, run=inputs)
    return _in_run(w, mask)


STORE = Exercise(
    id="14.2",
    title="Two of four, stored",
    function="store",
    points=2,
    cases=_store_cases,
    reference=_store,
    mistakes=(
        Mistake(
            "positions counted from 1",
            _store_from_1,
            "Two bits hold 0 to 3: which position has the first of four?",
        ),
        Mistake(
            "positions in the row, not in the run",
            _store_in_row,
            "Two bits hold 0 to 3: what is the position of a weight in the SECOND run of four?",
        ),
        Mistake(
            "in the order of size",
            _store_by_size,
            "Right weights, wrong order: they are read along the inputs. Which of the two comes"
            " first?",
        ),
        Mistake(
            "the largest values, not magnitudes",
            _store_largest_values,
            "Is -3 nearer to 0 than 0.2?",
        ),
        Mistake(
            "the larger half of a row",
            _store_half_of_row,
            "Count how many stay in each run of four: may a run keep three because its neighbor is"
            " small?",
        ),
    ),
)


# 14.3 ---------------------------------------------------------------------------------------------


def _wanda_cases(generator: Generator) -> list[Case]:
    def draw(outputs: int, inputs: int, tokens: int) -> tuple[Tensor, Tensor]:
        # input channels that differ in size
        channels = torch.exp(uniform(generator, -1, 1.5, inputs)).float()
        w = uniform(generator, -2, 2, outputs, inputs)
        x = uniform(generator, -1, 1, tokens, inputs) * channels
        return w, x

    drawn = []
    for shape in ((4, 8, 6), (8, 4, 5), (4, 4, 3)):
        drawn.append(_until(partial(draw, *shape), _tells_scores))

    # four rows, and inputs of norms 5, 1, 1 and 2.83
    w = torch.tensor(
        [
            [0.3, -1.2, 0.4, 0.9],
            [-0.2, 1.5, -0.8, 0.1],
            [0.5, 2.9, 0.7, -0.6],
            [0.1, 0.6, -1.0, -0.3],
        ]
    )
    x = torch.tensor([[3.0, 1.0, 0.0, 2.0], [-4.0, 0.0, 1.0, -2.0]])
    return make_cases([(w, x)], drawn)


def _score(w: Any, x: Any, power: float = 1) -> np.ndarray:
    """Return |w| times a power of the norm of its input."""
    norms = np.linalg.norm(f64(x), axis=0)
    return np.abs(f64(w)) * norms**power


def _signed(w: Any, x: Any) -> np.ndarray:
    return np.sign(f64(w)) * _score(w, x)


def _all_clear(w: Any, x: Any) -> bool:
    scores = [_score(w, x, power) for power in (0, 1, 2)]
    scores += [_score(w, x).T, _signed(w, x)]
    return all(_clear(score) for score in scores)


def _tells_scores(args: tuple) -> bool:
    return _all_clear(*args) and telling(WANDA, args, apart=1e-2)


def _wanda(w: Any, x: Any) -> np.ndarray:
    return f64(w) * _top(_score(w, x))


# Known mistakes.


def _by_magnitude(w: Any, x: Any) -> np.ndarray:
    return f64(w) * _top(_score(w, x, 0))


def _by_squared_norm(w: Any, x: Any) -> np.ndarray:
    return f64(w) * _top(_score(w, x, 2))


def _by_signed_score(w: Any, x: Any) -> np.ndarray:
    return f64(w) * _top(_signed(w, x))


def _along_outputs(w: Any, x: Any) -> np.ndarray:
    return f64(w) * _top(_score(w, x).T).T


WANDA = Exercise(
    id="14.3",
    title="Wanda",
    function="wanda",
    points=2,
    cases=_wanda_cases,
    reference=_wanda,
    mistakes=(
        Mistake(
            "the inputs are ignored",
            _by_magnitude,
            "That is pruning by magnitude. What does a small weight do to the output if its input"
            " is large?",
        ),
        Mistake(
            "the norm is squared",
            _by_squared_norm,
            "The error of dropping a weight is |w| times the NORM of its input: is a square root"
            " missing?",
        ),
        Mistake(
            "the sign decides",
            _by_signed_score,
            "A weight of -2 on a large input: should it rank last?",
        ),
        Mistake(
            "runs along the outputs",
            _along_outputs,
            "Hardware skips inputs: along which axis of (out, in) do the four neighbors lie?",
        ),
    ),
)


# 14.4 ---------------------------------------------------------------------------------------------


def _loss_cases(generator: Generator) -> list[Case]:
    # one token, with T = 2 and with T = 1
    teacher = torch.tensor([[3.0, 0.5, 0.0, -2.0]])
    student = torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    by_hand = [
        (student, teacher, torch.tensor([2]), 2.0, 0.5),
        (student, teacher, torch.tensor([0]), 1.0, 0.75),
    ]

    def draw(tokens: int, temperature: float) -> tuple:
        student = uniform(generator, -3, 3, tokens, 5)
        teacher = uniform(generator, -3, 3, tokens, 5)
        targets = torch.randint(5, (tokens,), generator=generator)
        alpha = pick(generator, 0.2, 0.3, 0.7, 0.9)
        return student, teacher, targets, temperature, alpha

    drawn = []
    for tokens, temperature in ((3, 2.0), (4, 3.0), (2, 0.5)):
        drawn.append(_until(partial(draw, tokens, temperature), _tells_losses))
    return make_cases(by_hand, drawn)


def _tells_losses(args: tuple) -> bool:
    return telling(LOSS, args, apart=0.02)


def _log_softmax(logits: Any, temperature: float = 1.0) -> np.ndarray:
    z = f64(logits) / temperature
    # shifted, so that exp does not overflow
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _entropy_part(student: Any, targets: Any) -> float:
    log_q = _log_softmax(student)
    of_targets = log_q[np.arange(len(log_q)), np.asarray(targets)]
    return -of_targets.mean()


def _kl_part(p_logits: Any, q_logits: Any, temperature: float) -> float:
    # sum of p (log p - log q) over the vocabulary, mean over the tokens
    log_p = _log_softmax(p_logits, temperature)
    log_q = _log_softmax(q_logits, temperature)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    return kl.mean()


def _loss(student: Any, teacher: Any, targets: Any, temperature: float, alpha: float) -> float:
    entropy = _entropy_part(student, targets)
    kl = _kl_part(teacher, student, temperature)
    return (1 - alpha) * entropy + alpha * temperature**2 * kl


# Known mistakes.


def _loss_without_square(
    student: Any, teacher: Any, targets: Any, temperature: float, alpha: float
) -> float:
    entropy = _entropy_part(student, targets)
    kl = _kl_part(teacher, student, temperature)
    return (1 - alpha) * entropy + alpha * kl


def _loss_of_reverse_kl(
    student: Any, teacher: Any, targets: Any, temperature: float, alpha: float
) -> float:
    entropy = _entropy_part(student, targets)
    kl = _kl_part(student, teacher, temperature)
    return (1 - alpha) * entropy + alpha * temperature**2 * kl


def _loss_of_reverse_alpha(
    student: Any, teacher: Any, targets: Any, temperature: float, alpha: float
) -> float:
    return _loss(student, teacher, targets, temperature, 1 - alpha)


def _loss_of_soft_targets(
    student: Any, teacher: Any, targets: Any, temperature: float, alpha: float
) -> float:
    entropy = _entropy_part(f64(student) / temperature, targets)
    kl = _kl_part(teacher, student, temperature)
    return (1 - alpha) * entropy + alpha * temperature**2 * kl


def _loss_of_mean_kl(
    student: Any, teacher: Any, targets: Any, temperature: float, alpha: float
) -> float:
    entropy = _entropy_part(student, targets)
    kl = _kl_part(teacher, student, temperature)
    vocabulary = np.shape(student)[-1]
    return (1 - alpha) * entropy + alpha * temperature**2 * kl / vocabulary


LOSS = Exercise(
    id="14.4",
    title="The distillation loss",
    function="distillation_loss",
    points=3,
    cases=_loss_cases,
    reference=_loss,
    # KL is a small difference of larger numbers, in float32
    tolerance=1e-4,
    mistakes=(
        Mistake(
            "T^2 is forgotten",
            _loss_without_square,
            "Between T = 1 and T = 10, how much smaller does the gradient of the KL term become?"
            " What compensates for that?",
        ),
        Mistake(
            "KL the wrong way round",
            _loss_of_reverse_kl,
            "Which probabilities weight the logarithms? The student should pay wherever the TEACHER"
            " sees something.",
        ),
        Mistake(
            "alpha the wrong way round",
            _loss_of_reverse_alpha,
            "At alpha = 1, does the student learn from the text or from the teacher?",
        ),
        Mistake(
            "the text is softened as well",
            _loss_of_soft_targets,
            "The temperature softens two distributions that are compared: which term compares"
            " them?",
        ),
        Mistake(
            "KL averaged over the vocabulary too",
            _loss_of_mean_kl,
            "A divergence is a SUM over the vocabulary. Over what is the mean taken, and what does"
            " your reduction do?",
        ),
    ),
)


# 14.5 ---------------------------------------------------------------------------------------------


def _heal_cases(generator: Generator) -> list[Case]:
    # one step, and four
    w = torch.tensor([[1.2, 0.9, 0.8, 0.4]])
    x = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    by_hand = [(w, x, 0.5, 1), (w, x, 0.5, 4)]

    # outputs, inputs, tokens and steps; the last case takes no step
    sizes = ((1, 4, 6, 5), (2, 8, 7, 4), (3, 12, 9, 3))
    drawn = [_heal_case(generator, *each) for each in sizes]
    untrained = _heal_case(generator, 2, 8, 5, 0)
    return make_cases(by_hand, [*drawn, untrained])


def _heal_case(
    generator: Generator, outputs: int, inputs: int, tokens: int, steps: int
) -> tuple[Any, ...]:
    """Return a case in which no run comes near a tie, at whatever step a mask is chosen."""
    while True:
        own = uniform(generator, -1, 1, tokens, inputs)
        shared = uniform(generator, -1, 1, tokens, 1)
        x = own + shared
        rows = uniform(generator, -1, 1, CANDIDATES, inputs)

        # Above 2 / (largest eigenvalue) errors would grow. Just below, weights move so far that
        # masks change.
        largest = float(torch.linalg.eigvalsh(x.T @ x / tokens)[-1])
        rate = round(1.8 / largest, 2)

        # each row is trained by itself, so rows can be chosen one by one
        told = np.ones((CANDIDATES, 1), dtype=bool)
        if steps:
            told = _rows_told(rows, x, rate, steps)
        suits = _never_close(rows, x, rate, steps)
        chosen = telling_rows(told, suits, outputs)
        if len(chosen):
            return rows[chosen], x, rate, steps


def _rows_told(rows: Tensor, *others: Any) -> np.ndarray:
    """Return which pairs of answers, right or wrong, each row tells apart, (rows, pairs)."""
    functions = [HEAL.reference]
    functions += [mistake.function for mistake in HEAL.mistakes]
    answers = [function(rows, *others) for function in functions]
    told = []
    for one, other in combinations(answers, 2):
        told.append(np.abs(one - other).max(axis=1) > 0.01)
    return np.stack(told, axis=1)


def _step(w: np.ndarray, w_hat: np.ndarray, x: Any, rate: float) -> np.ndarray:
    """Return what a step adds to every weight: -rate times the gradient of the output error."""
    error = f64(x) @ (w_hat - w).T
    return -rate * error.T @ f64(x) / len(x)


def _held(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    w = f64(w)
    mask = _top(np.abs(w))
    w_hat = w * mask
    for _ in range(steps):
        w_hat = w_hat + mask * _step(w, w_hat, x, rate)
    return w_hat


# Known mistakes.


def _pruned(w: Any) -> np.ndarray:
    return f64(w) * _largest(w)


def _untrained(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    return _pruned(w)


def _filled(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    """Prune once, then train all weights."""
    w_hat = _pruned(w)
    for _ in range(steps):
        w_hat = w_hat + _step(f64(w), w_hat, x, rate)
    return w_hat


def _chosen_anew(w: Any, x: Any, rate: float, steps: int, seen: list | None = None) -> np.ndarray:
    """Train a dense weight, straight through the mask that it has at each step."""
    dense = f64(w)
    for _ in range(steps):
        dense = dense + _step(f64(w), _pruned(dense), x, rate)
        if seen is not None:
            seen.append(dense)
    return _pruned(dense)


def _pruned_anew(w: Any, x: Any, rate: float, steps: int, seen: list | None = None) -> np.ndarray:
    """Prune the smallest two of four again after each step."""
    w_hat = _pruned(w)
    for _ in range(steps):
        w_hat = w_hat + _step(f64(w), w_hat, x, rate)
        if seen is not None:
            seen.append(w_hat)
        w_hat = _pruned(w_hat)
    return w_hat


def _never_close(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    """Return for each row whether all masks, at whatever step, are far from a tie."""
    seen = [f64(w)]
    _chosen_anew(w, x, rate, steps, seen)
    _pruned_anew(w, x, rate, steps, seen)
    clear = [_clear_rows(np.abs(each)) for each in seen]
    return np.all(clear, axis=0)


HEAL = Exercise(
    id="14.5",
    title="Train what is left",
    function="heal",
    points=3,
    cases=_heal_cases,
    reference=_held,
    tolerance=1e-4,
    mistakes=(
        *variants(
            "the mask is chosen anew at each step",
            "A pruned weight may come back a step later, and another one may go: how often is the"
            " choice made?",
            _chosen_anew,
            _pruned_anew,
        ),
        Mistake(
            "the zeros fill up again",
            _filled,
            "Count the zeros after one step: what does the gradient say to a weight that is 0?",
        ),
        Mistake(
            "the pruned weight never moves",
            _untrained,
            "Print the gradient of your first step. If it is 0: is it the gradient of the whole"
            " weight, not of the pruned one? If not: which weight does your step change, and is it"
            " the one that you return?",
        ),
    ),
)


SHEET = Sheet("14", "Sparsity and distillation", (BITS, STORE, WANDA, LOSS, HEAL))
