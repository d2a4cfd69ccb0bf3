"""Answer multiple-choice questions by log-likelihood: the model picks the likeliest choice.

Nothing is generated. Each choice follows the prompt, and the sum of its tokens' log p divided by
its bytes is its score. Division by bytes does not depend on the tokenizer and lets long choices
win. lm-evaluation-harness calls it acc_bytes; its acc_norm divides by characters.

Source: Gao et al., lm-evaluation-harness (acc_bytes); Brown et al. 2020, "GPT-3", section 2.4.
`evaluate.py` measures all tokens of running text.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qcourse.models.evaluation_windows import Model, call_logits, device_of
from qcourse.models.standard_error import Samples

START = "<|endoftext|>"  # the token in front of a document, if the tokenizer has it
ROWS_AT_ONCE = 16

Row = tuple[int, ...]


@runtime_checkable
class MultipleChoice(Protocol):
    """A prompt, its possible continuations, and the index of the right one."""

    @property
    def prompt(self) -> str: ...

    @property
    def choices(self) -> Sequence[str]: ...

    @property
    def answer(self) -> int: ...


@dataclass(frozen=True)
class Accuracy:
    """Result of ``accuracy``; two models' results on the same questions can be paired.

    A margin is the score of the right choice less that of the best wrong one, in nats per byte.
    """

    accuracy: float  # share of questions whose right choice has the highest score
    error: float  # the standard error over questions
    correct: Bool[Tensor, " questions"] = field(repr=False, compare=False)
    margins: Float[Tensor, " questions"] = field(repr=False, compare=False)
    samples: Samples = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} ± {self.error:.1%}"


def accuracy(model: Model, tokenizer: Tokenizer, questions: Sequence[MultipleChoice]) -> Accuracy:
    """Return the share of questions whose right choice has the highest log p per byte.

    A choice follows the prompt and a space.

    Raises:
        ValueError: there are no questions, or one has no wrong choice or an empty text.
    """
    _check_questions(questions)
    scores = _scores(model, tokenizer, questions)
    margins = torch.empty(len(questions), dtype=torch.float64)
    for i, question in enumerate(questions):
        wrong = scores[i][: question.answer] + scores[i][question.answer + 1 :]
        margins[i] = scores[i][question.answer] - max(wrong)

    # A tie is no answer: a model that knows nothing must not be right by the order of choices.
    correct = margins > 0
    totals = {"accuracy": correct.double(), "margin": margins}
    samples = Samples(_key(questions), torch.ones(len(questions)).double(), totals)
    found = samples.estimate("accuracy")
    return Accuracy(found.mean, found.error, correct, margins, samples)


def _scores(
    model: Model, tokenizer: Tokenizer, questions: Sequence[MultipleChoice]
) -> list[list[float]]:
    """Return the log p per byte of each choice of each question."""
    start = tokenizer.token_to_id(START)
    first = [] if start is None else [start]
    asked: list[list[tuple[Row, Row]]] = []
    for question in questions:
        prompt = (*first, *_encode(tokenizer, question.prompt))
        choices = [_encode(tokenizer, f" {choice}") for choice in question.choices]
        asked.append([(prompt, choice) for choice in choices])

    log_p = _log_likelihoods(model, [pair for pairs in asked for pair in pairs])
    scores = []
    for question, pairs in zip(questions, asked, strict=True):
        sizes = [len(choice.encode()) for choice in question.choices]
        scores.append([log_p[pair] / size for pair, size in zip(pairs, sizes, strict=True)])
    return scores


def _log_likelihoods(
    model: Model, pairs: Sequence[tuple[Row, Row]]
) -> dict[tuple[Row, Row], float]:
    """Return log p(choice | prompt) of each pair of prompt and choice."""
    # The last token is predicted, not read. So all choices of one token share the prompt's row.
    by_row: dict[Row, list[tuple[Row, Row]]] = {}
    for prompt, choice in pairs:
        by_row.setdefault((*prompt, *choice[:-1]), []).append((prompt, choice))

    # Rows of similar lengths need little padding. On the right it changes no earlier token.
    rows = sorted(by_row, key=len)
    found = {}
    for i in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[i : i + ROWS_AT_ONCE]
        logits = _row_logits(model, batch)
        for row, row_logits in zip(batch, logits, strict=True):
            for prompt, choice in by_row[row]:
                predicted = row_logits[len(prompt) - 1 : len(row)]  # (tokens of choice, vocabulary)
                found[prompt, choice] = _sum_of_log_p(predicted, choice)
    return found


@torch.no_grad()
def _row_logits(model: Model, rows: Sequence[Row]) -> Float[Tensor, "rows longest vocabulary"]:
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return call_logits(model, ids.to(device_of(model) or ids.device))


def _sum_of_log_p(logits: Float[Tensor, "tokens vocabulary"], ids: Row) -> float:
    targets = torch.tensor(ids, device=logits.device)
    log_p = logits.log_softmax(-1).gather(1, targets[:, None])
    return log_p.sum(dtype=torch.float64).item()


def _encode(tokenizer: Tokenizer, text: str) -> Row:
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def _check_questions(questions: Sequence[MultipleChoice]) -> None:
    if not questions:
        raise ValueError("questions must hold at least one question, got none")
    for question in questions:
        count = len(question.choices)
        if count < 2 or not 0 <= question.answer < count:
            raise ValueError(
                "a question must have at least 2 choices and the index of one as its answer, got"
                f" {count} choices and the answer {question.answer} for {question.prompt!r}"
            )
        if not question.prompt or not all(question.choices):
            raise ValueError(f"a question must have no empty text, got {question!r}")


def _key(questions: Sequence[MultipleChoice]) -> str:
    """Return a digest of the questions."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.prompt, tuple(question.choices), question.answer)).encode())
    return digest.hexdigest()
