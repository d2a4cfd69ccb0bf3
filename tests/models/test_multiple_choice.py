"""A choice's score equals a computation by hand; accuracy, margins and errors follow from it."""

import math
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor

from qcourse import PerTensor, fake_quantize, load_tinylm, map_weights, stdlib_questions
from qcourse.models.multiple_choice import START, accuracy
from qcourse.models.standard_error import paired_difference
from qcourse.models.tinylm import TinyLM


@dataclass(frozen=True)
class Asked:
    prompt: str
    choices: tuple[str, ...]
    answer: int


@pytest.fixture(scope="module")
def tiny() -> TinyLM:
    return load_tinylm()


def by_hand(tiny: TinyLM, prompt: str, choice: str) -> float:
    """log p(choice | prompt) / bytes, one token after the other."""
    ids = [tiny.tokenizer.token_to_id(START), *tiny.tokenizer.encode(prompt).ids]
    total = 0.0
    for target in tiny.tokenizer.encode(f" {choice}").ids:
        logits = tiny.model(torch.tensor([ids]))[0, -1].double()
        total += float(logits.log_softmax(0)[target])
        ids.append(target)
    return total / len(choice.encode())


def test_margins_equal_the_hand_computation(tiny: TinyLM) -> None:
    questions = [
        Asked("Return the length of the", ("string", "kitchen", "über"), 0),
        Asked("Raise an", ("exceptionally", "exception"), 1),
        Asked("If the file does not", ("banana", "elephants", "exist", "purple"), 0),
    ]
    found = accuracy(tiny.model, tiny.tokenizer, questions)
    for question, margin in zip(questions, found.margins.tolist(), strict=True):
        scores = [by_hand(tiny, question.prompt, choice) for choice in question.choices]
        right = scores.pop(question.answer)
        assert margin == pytest.approx(right - max(scores), abs=1e-4)
    # The third question's answer is wrong on purpose.
    assert found.correct.tolist() == [True, True, False]
    assert found.accuracy == pytest.approx(2 / 3)
    # The standard deviation of 1, 1, 0 is sqrt(1/3).
    assert found.error == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert str(found) == "66.7% ± 33.3%"


def test_neither_order_nor_company_changes_an_answer(tiny: TinyLM) -> None:
    questions = stdlib_questions(40)
    together = accuracy(tiny.model, tiny.tokenizer, questions).margins
    reverse = accuracy(tiny.model, tiny.tokenizer, questions[::-1]).margins.flip(0)
    torch.testing.assert_close(together, reverse, atol=1e-5, rtol=0)
    alone = [float(accuracy(tiny.model, tiny.tokenizer, [each]).margins) for each in questions[:5]]
    torch.testing.assert_close(together[:5].tolist(), alone, atol=1e-5, rtol=0)


def test_choices_of_one_token_share_their_prompt() -> None:
    words = {"a": 0, "b": 1, "c": 2, " a": 3, " b": 4, " c": 5}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = Split(" ", "merged_with_next")
    seen = []

    def model(ids: Tensor) -> Tensor:
        seen.append(ids.tolist())
        return torch.arange(6.0).expand(*ids.shape, 6)

    found = accuracy(model, tokenizer, [Asked("a b", ("a", "c", "b"), 1)])
    # " c" has the largest logit, 1 above the next.
    assert found.margins.tolist() == pytest.approx([1.0])
    assert seen == [[[0, 4]]]
    seen.clear()
    accuracy(model, tokenizer, [Asked("a b", ("a", "c b", "b"), 1)])
    assert seen == [[[0, 4, 0], [0, 4, 5]]]


def test_a_tie_is_no_right_answer(tiny: TinyLM) -> None:
    found = accuracy(
        lambda ids: torch.zeros(*ids.shape, tiny.model.config.vocab_size),
        tiny.tokenizer,
        [Asked("Return the", ("list", "list"), 0)],
    )
    assert found.accuracy == 0
    assert math.isnan(found.error)


def test_the_tiny_model_knows_more_than_chance_and_two_bits_less(tiny: TinyLM) -> None:
    questions = stdlib_questions(200)
    found = accuracy(tiny.model, tiny.tokenizer, questions)
    # 72% in Python 3.11; the questions differ between versions.
    assert 0.55 < found.accuracy < 0.9
    assert found.error == pytest.approx(
        math.sqrt(found.accuracy * (1 - found.accuracy) / 199), rel=1e-6
    )
    broken = map_weights(tiny.model, lambda w: fake_quantize(w, bits=2, granularity=PerTensor()))
    worse = accuracy(broken, tiny.tokenizer, questions)
    change = paired_difference(worse, found)
    assert change.mean == pytest.approx(worse.accuracy - found.accuracy)
    assert change.mean < 0
    assert change.exceeds_noise()
    assert worse.accuracy < 0.5

    lesser = map_weights(tiny.model, lambda w: fake_quantize(w, bits=8, granularity=PerTensor()))
    nearly = accuracy(lesser, tiny.tokenizer, questions)
    # Two models that agree on most questions: pairing removes the questions' own noise.
    assert paired_difference(nearly, found).error < found.error / 1.5


def test_results_on_other_questions_are_not_paired(tiny: TinyLM) -> None:
    first = accuracy(tiny.model, tiny.tokenizer, stdlib_questions(5))
    other = accuracy(tiny.model, tiny.tokenizer, stdlib_questions(5, seed=1))
    with pytest.raises(ValueError, match="the same windows or questions"):
        paired_difference(first, other)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "at least one question, got none"),
        ([Asked("a", ("b",), 0)], "at least 2 choices .* got 1 choices and the answer 0 for 'a'"),
        ([Asked("a", ("b", "c"), 2)], "got 2 choices and the answer 2 for 'a'"),
        ([Asked("a", ("b", "c"), -1)], "got 2 choices and the answer -1 for 'a'"),
        ([Asked("a", ("b", ""), 0)], "no empty text"),
        ([Asked("", ("b", "c"), 0)], "no empty text"),
    ],
)
def test_bad_questions_are_refused(tiny: TinyLM, questions: list[Asked], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(tiny.model, tiny.tokenizer, questions)
