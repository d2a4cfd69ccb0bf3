"""Sheet 14, sparsity and distillation: cases, references, tolerances, points and known mistakes.

What is ranked is never close to a tie: float32 and float64 keep the same weights, also in 14.5 at every step of the
mistakes that choose again. Cases are drawn until they tell the mistakes apart.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from qcourse.checks.common import f64, make_cases, pick, telling, telling_rows, uniform
from qcourse.checks.exercise import Case, Exercise, Mistake, Sheet

RUN = 4  # neighbours
KEPT = 2  # of them
CANDIDATES = 300  # rows of which those are taken that suit


def _top(score: Any, *, keep: int = KEPT, run: int = RUN) -> np.ndarray:
    """True for the `keep` highest of each run along the last axis."""
    runs = f64(score).reshape(-1, run)
    ranks = (-runs).argsort(axis=1).argsort(axis=1)
    return (ranks < keep).reshape(np.shape(score))


def _clear(score: Any) -> bool:
    """Whether in no run the second and the third are close."""
    return bool(_clear_rows(score).all())


def _clear_rows(score: Any) -> np.ndarray:
    """In which rows the second and the third of no run are close, (rows,)."""
    ordered = np.sort(f64(score).reshape(len(score), -1, RUN), axis=2)
    gaps = ordered[..., -KEPT] - ordered[..., -KEPT - 1]  # (rows, runs)
    return (gaps > 0.02 * np.abs(score).max()).all(axis=1)


def _until(draw: Callable[[], tuple], good: Callable[[tuple], bool]) -> tuple:
    while not good(args := draw()):
        pass
    return args


# 14.1 -------------------------------------------------------------------------------------------------------------


def _bits_cases(generator: Generator) -> list[Case]:
    by_hand = [(4, 2, 4, 32), (16, 2, 4, 128), (8, 5, 6, 64)]
    drawn = [
        (pick(generator, 3, 4, 8), pick(generator, *keeps), m, pick(generator, 32, 64, 128))
        for m, keeps in ((8, (3, 5)), (10, (3, 7)), (16, (3, 5)))
    ]
    return make_cases(by_hand, drawn)


def _bits(
    bits: int, keep: int, m: int, group_size: int, *, position: float, scale: float = 16.0
) -> float:
    return keep / m * (bits + position) + scale / group_size


def _position(m: int) -> int:
    return int(np.ceil(np.log2(m)))


BITS = Exercise(
    id="14.1",
    title="Bits a weight, positions included",
    function="bits_per_weight",
    points=1,
    cases=_bits_cases,
    reference=lambda bits, keep, m, group: _bits(bits, keep, m, group, position=_position(m)),
    mistakes=(
        Mistake(
            "the positions are forgotten",
            lambda bits, keep, m, group: _bits(bits, keep, m, group, position=0),
            "You have the values that stayed. How does a reader of them know where each one stood?",
        ),
        Mistake(
            "a position for every weight, kept or not",
            lambda bits, keep, m, group: _bits(bits, keep, m, group, position=0) + _position(m),
            "Does a weight that is not stored need a place?",
        ),
        Mistake(
            "a fraction of a bit",
            lambda bits, keep, m, group: _bits(bits, keep, m, group, position=np.log2(m)),
            "With six neighbours there are positions 0 to 5: how many whole bits hold a 5?",
        ),
        Mistake(
            "the scales are forgotten",
            lambda bits, keep, m, group: _bits(
                bits, keep, m, group, position=_position(m), scale=0
            ),
            "Codes are worth nothing without their scale: what does one add to each weight of its group?",
        ),
        Mistake(
            "groups of kept weights only",
            lambda bits, keep, m, group: _bits(
                bits, keep, m, group, position=_position(m), scale=16 * keep / m
            ),
            "The card says what a group is counted over: do pruned weights belong to one?",
        ),
    ),
)


# 14.2 -------------------------------------------------------------------------------------------------------------


def _store_cases(generator: Generator) -> list[Case]:
    by_hand = [
        [[0.0, -1.25, 0.0, 0.5]],
        [[0.3, -1.2, 0.4, 0.9, 2.0, 0.1, 0.05, -0.2]],
        [[-0.1, 0.7, -3.0, 0.2], [1.5, 0.3, -0.9, 0.6]],
    ]

    def draw(outputs: int, inputs: int) -> tuple:
        loud_and_quiet = torch.tensor([1.0, 0.3] * 4)[: inputs // RUN].repeat_interleave(RUN)
        return (uniform(generator, -2, 2, outputs, inputs) * loud_and_quiet,)

    drawn = [
        _until(
            partial(draw, *shape),
            lambda args: _clear(np.abs(f64(args[0]))) and telling(STORE, args, apart=1e-3),
        )
        for shape in ((2, 8), (3, 12), (1, 16))
    ]
    return make_cases(by_hand, drawn)


def _stored(w: Any, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and places in the row, both in the order of the inputs."""
    places = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    return f64(w)[mask].reshape(len(mask), -1), places[mask].reshape(len(mask), -1)


def _store(
    w: Any, *, mask: np.ndarray | None = None, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    values, places = _stored(w, _top(np.abs(f64(w))) if mask is None else mask)
    return values, places % RUN + first


def _store_by_size(w: Any) -> tuple[np.ndarray, np.ndarray]:
    runs = f64(w).reshape(-1, RUN)
    order = (-np.abs(runs)).argsort(axis=1)[:, :KEPT]
    shape = (len(w), -1)
    return np.take_along_axis(runs, order, axis=1).reshape(shape), order.reshape(shape)


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
            lambda w: _store(w, first=1),
            "Two bits hold 0 to 3: which position has the first of four?",
        ),
        Mistake(
            "places in the row, not in the run",
            lambda w: _stored(w, _top(np.abs(f64(w)))),
            "Two bits hold 0 to 3: what does the place of a weight in the SECOND run of four look like?",
        ),
        Mistake(
            "in the order of size",
            _store_by_size,
            "Right weights, wrong order: whoever reads them walks along the inputs. Which of the two comes first?",
        ),
        Mistake(
            "the largest values, not magnitudes",
            lambda w: _store(w, mask=_top(w)),
            "Is -3 nearer to nothing than 0.2?",
        ),
        Mistake(
            "the larger half of a row",
            lambda w: _store(
                w, mask=_top(np.abs(f64(w)), keep=np.shape(w)[1] // 2, run=np.shape(w)[1])
            ),
            "Count how many stay in each run of four: may a run keep three because its neighbour is small?",
        ),
    ),
)


# 14.3 -------------------------------------------------------------------------------------------------------------


def _wanda_cases(generator: Generator) -> list[Case]:
    def draw(outputs: int, inputs: int, tokens: int) -> tuple[Tensor, Tensor]:
        loud = torch.exp(uniform(generator, -1, 1.5, inputs)).float()
        return uniform(generator, -2, 2, outputs, inputs), uniform(
            generator, -1, 1, tokens, inputs
        ) * loud

    drawn = [
        _until(
            partial(draw, *shape),
            lambda args: _all_clear(*args) and telling(WANDA, args, apart=1e-2),
        )
        for shape in ((4, 8, 6), (8, 4, 5), (4, 4, 3))
    ]
    w = torch.tensor(
        [
            [0.3, -1.2, 0.4, 0.9],
            [-0.2, 1.5, -0.8, 0.1],
            [0.5, 2.9, 0.7, -0.6],
            [0.1, 0.6, -1.0, -0.3],
        ]
    )
    x = torch.tensor([[3.0, 1.0, 0.0, 2.0], [-4.0, 0.0, 1.0, -2.0]])  # norms 5, 1, 1 and 2.83
    return make_cases([(w, x)], drawn)


def _score(w: Any, x: Any, power: float = 1) -> np.ndarray:
    """|w| times the norm of its input, to a power."""
    return np.abs(f64(w)) * np.linalg.norm(f64(x), axis=0) ** power


def _signed(w: Any, x: Any) -> np.ndarray:
    return np.sign(f64(w)) * _score(w, x)


def _all_clear(w: Any, x: Any) -> bool:
    scores = [_score(w, x, power) for power in (0, 1, 2)]
    return all(map(_clear, [*scores, scores[1].T, _signed(w, x)]))


WANDA = Exercise(
    id="14.3",
    title="Wanda",
    function="wanda",
    points=2,
    cases=_wanda_cases,
    reference=lambda w, x: f64(w) * _top(_score(w, x)),
    mistakes=(
        Mistake(
            "the inputs are not looked at",
            lambda w, x: f64(w) * _top(_score(w, x, 0)),
            "That is pruning by magnitude. What does a small weight do to the output, if its input is loud?",
        ),
        Mistake(
            "the norm is squared",
            lambda w, x: f64(w) * _top(_score(w, x, 2)),
            "The error of dropping a weight is |w| times the NORM of its input: is there a root missing?",
        ),
        Mistake(
            "the sign decides",
            lambda w, x: f64(w) * _top(_signed(w, x)),
            "A weight of -2 on a loud input: should it rank last?",
        ),
        Mistake(
            "runs along the outputs",
            lambda w, x: f64(w) * _top(_score(w, x).T).T,
            "Hardware skips inputs: along which axis of (out, in) do the four neighbours lie?",
        ),
    ),
)


# 14.4 -------------------------------------------------------------------------------------------------------------


def _loss_cases(generator: Generator) -> list[Case]:
    teacher, student = torch.tensor([[3.0, 0.5, 0.0, -2.0]]), torch.tensor([[1.0, 2.0, -1.0, 0.5]])
    by_hand = [
        (student, teacher, torch.tensor([2]), 2.0, 0.5),
        (student, teacher, torch.tensor([0]), 1.0, 0.75),
    ]

    def draw(tokens: int, temperature: float) -> tuple:
        logits = [uniform(generator, -3, 3, tokens, 5) for _ in range(2)]
        targets = torch.randint(5, (tokens,), generator=generator)
        return *logits, targets, temperature, pick(generator, 0.2, 0.3, 0.7, 0.9)

    drawn = [
        _until(partial(draw, *shape), lambda args: telling(LOSS, args, apart=0.02))
        for shape in ((3, 2.0), (4, 3.0), (2, 0.5))
    ]
    return make_cases(by_hand, drawn)


def _log_softmax(logits: Any, temperature: float = 1.0) -> np.ndarray:
    z = f64(logits) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _entropy_part(student: Any, targets: Any, temperature: float = 1.0) -> float:
    log_q = _log_softmax(student, temperature)
    return -log_q[np.arange(len(log_q)), np.asarray(targets)].mean()


def _kl_part(p_logits: Any, q_logits: Any, temperature: float) -> float:
    log_p, log_q = _log_softmax(p_logits, temperature), _log_softmax(q_logits, temperature)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()


def _loss(student: Any, teacher: Any, targets: Any, temperature: float, alpha: float) -> float:
    kl = _kl_part(teacher, student, temperature)
    return (1 - alpha) * _entropy_part(student, targets) + alpha * temperature**2 * kl


LOSS = Exercise(
    id="14.4",
    title="The distillation loss",
    function="distillation_loss",
    points=3,
    cases=_loss_cases,
    reference=_loss,
    tolerance=1e-4,  # KL is a small difference of larger numbers, in float32
    mistakes=(
        Mistake(
            "T^2 is forgotten",
            lambda s, t, y, T, a: (1 - a) * _entropy_part(s, y) + a * _kl_part(t, s, T),
            "Between T = 1 and T = 10, how much smaller does the gradient of the KL term become? What makes up for it?",
        ),
        Mistake(
            "KL the wrong way round",
            lambda s, t, y, T, a: (1 - a) * _entropy_part(s, y) + a * T**2 * _kl_part(s, t, T),
            "Whose probabilities weigh the logarithms? The student should pay wherever the TEACHER sees something.",
        ),
        Mistake(
            "alpha the wrong way round",
            lambda s, t, y, T, a: _loss(s, t, y, T, 1 - a),
            "At alpha = 1, whom does the student listen to: the text or the teacher?",
        ),
        Mistake(
            "the text is softened as well",
            lambda s, t, y, T, a: (
                (1 - a) * _entropy_part(f64(s) / T, y) + a * T**2 * _kl_part(t, s, T)
            ),
            "The temperature is for comparing two opinions: which term compares them?",
        ),
        Mistake(
            "KL averaged over the vocabulary too",
            lambda s, t, y, T, a: (
                (1 - a) * _entropy_part(s, y) + a * T**2 * _kl_part(t, s, T) / np.shape(s)[-1]
            ),
            "A divergence is a SUM over the vocabulary; over what is the mean taken, and what does your reduction do?",
        ),
    ),
)


# 14.5 -------------------------------------------------------------------------------------------------------------


def _heal_cases(generator: Generator) -> list[Case]:
    w = torch.tensor([[1.2, 0.9, 0.8, 0.4]])
    x = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])

    drawn = [_heal_case(generator, *sizes) for sizes in ((1, 4, 6, 5), (2, 8, 7, 4), (3, 12, 9, 3))]
    untrained = _heal_case(generator, 2, 8, 5, 0)
    return make_cases([(w, x, 0.5, 1), (w, x, 0.5, 4)], [*drawn, untrained])


def _heal_case(
    generator: Generator, outputs: int, inputs: int, tokens: int, steps: int
) -> tuple[Any, ...]:
    """A weight none of whose runs comes near a tie, whenever a mask is chosen; rows are trained each by itself."""
    while True:
        x = uniform(generator, -1, 1, tokens, inputs) + uniform(generator, -1, 1, tokens, 1)
        rows = uniform(generator, -1, 1, CANDIDATES, inputs)

        # Above 2 over the largest eigenvalue errors would grow. Near to that, weights move so far that masks change.
        rate = round(1.8 / float(torch.linalg.eigvalsh(x.T @ x / tokens)[-1]), 2)

        told = _rows_told(rows, x, rate, steps) if steps else np.ones((CANDIDATES, 1), dtype=bool)
        chosen = telling_rows(told, _never_close(rows, x, rate, steps), outputs)
        if len(chosen):
            return rows[chosen], x, rate, steps


def _rows_told(rows: Tensor, *others: Any) -> np.ndarray:
    """Which pairs of answers of the bank each row tells apart, (rows, pairs)."""
    functions = [HEAL.reference, *(mistake.function for mistake in HEAL.mistakes)]
    answers = [function(rows, *others) for function in functions]
    pairs = combinations(answers, 2)
    return np.stack([np.abs(one - other).max(axis=1) > 0.01 for one, other in pairs], axis=1)


def _step(w: np.ndarray, w_hat: np.ndarray, x: Any, rate: float) -> np.ndarray:
    """What a step adds to every weight."""
    return -rate * (f64(x) @ (w_hat - w).T).T @ f64(x) / len(x)


def _held(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    w = f64(w)
    mask = _top(np.abs(w))
    w_hat = w * mask
    for _ in range(steps):
        w_hat = w_hat + mask * _step(w, w_hat, x, rate)
    return w_hat


def _filled(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    """Pruned once, then trained as if nothing had happened."""
    w_hat = f64(w) * _top(np.abs(f64(w)))
    for _ in range(steps):
        w_hat = w_hat + _step(f64(w), w_hat, x, rate)
    return w_hat


def _chosen_anew(w: Any, x: Any, rate: float, steps: int, seen: list | None = None) -> np.ndarray:
    """A dense weight is trained, straight through the mask that it has at each step."""
    dense = f64(w)
    for _ in range(steps):
        dense = dense + _step(f64(w), dense * _top(np.abs(dense)), x, rate)
        if seen is not None:
            seen.append(dense)
    return dense * _top(np.abs(dense))


def _pruned_anew(w: Any, x: Any, rate: float, steps: int, seen: list | None = None) -> np.ndarray:
    """After each step the smallest two of four go, whichever they are by now."""
    w_hat = f64(w) * _top(np.abs(f64(w)))
    for _ in range(steps):
        w_hat = w_hat + _step(f64(w), w_hat, x, rate)
        if seen is not None:
            seen.append(w_hat)
        w_hat = w_hat * _top(np.abs(w_hat))
    return w_hat


def _never_close(w: Any, x: Any, rate: float, steps: int) -> np.ndarray:
    """In which rows no mask, whenever it is chosen, hangs on a close call, (out,)."""
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
        *(
            Mistake(
                "the mask is chosen anew at each step",
                function,
                "Weights that are out may be in again a step later, and others out: how often is the choice made?",
            )
            for function in (_chosen_anew, _pruned_anew)
        ),
        Mistake(
            "the zeros fill up again",
            _filled,
            "Count the zeros after one step: what does the gradient say to a weight that is 0?",
        ),
        Mistake(
            "the pruned weight never moves",
            lambda w, x, rate, steps: f64(w) * _top(np.abs(f64(w))),
            "Print the gradient of your first step. If it is 0: is it the whole weight's, not the pruned one's? If not:"
            " which weight does your step change, and is it the one that you return?",
        ),
    ),
)


SHEET = Sheet("14", "Sparsity and distillation", (BITS, STORE, WANDA, LOSS, HEAL))
