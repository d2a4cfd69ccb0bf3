"""The questions: the same in each run, held out, and answered by nothing but the prompt."""

import subprocess
import sys
from collections import Counter

import pytest

from qcourse.texts.cloze import (
    STEM,
    Question,
    _draw_questions,
    _held_out_sentences,
    _sentences,
    stdlib_questions,
)
from qcourse.texts.corpus import stdlib_corpus
from qcourse.texts.corpus_sources import Document

HELD_OUT = {document.name: document for document in stdlib_corpus("held_out")}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return _draw_questions(_held_out_sentences(), 0)


def test_there_are_a_few_hundred(questions: list[Question]) -> None:
    # 322 in Python 3.11
    assert len(questions) > 200
    assert stdlib_questions(200) == questions[:200]


def test_another_process_asks_the_same_and_another_seed_others() -> None:
    code = "from qcourse.texts.cloze import stdlib_questions; print(stdlib_questions(20, seed=3))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(stdlib_questions(20, seed=3))
    assert stdlib_questions(20, seed=4) != stdlib_questions(20, seed=3)


def test_all_are_held_out(questions: list[Question]) -> None:
    docs = {d.name: " ".join(d.text.split()) for d in stdlib_corpus("held_out") if d.kind == "docs"}
    for question in questions:
        right = question.choices[question.answer]
        assert f"{question.prompt} {right}." in docs[question.document]
    trained_on = " ".join(" ".join(d.text.split()) for d in stdlib_corpus("train"))
    known = [f"{q.prompt} {q.choices[q.answer]}." in trained_on for q in questions]
    # A few set sentences recur in other paragraphs.
    assert sum(known) / len(known) < 0.15


def test_no_choice_is_in_the_prompt(questions: list[Question]) -> None:
    for question in questions:
        for choice in question.choices:
            assert choice[:STEM] not in question.prompt.lower()


def test_choices_differ_and_have_similar_lengths(questions: list[Question]) -> None:
    for question in questions:
        right = question.choices[question.answer]
        stems = {choice[:STEM] for choice in question.choices}
        assert len(stems) == 4
        assert all(abs(len(choice) - len(right)) <= 1 for choice in question.choices)


def test_wrong_choices_are_of_other_documents(questions: list[Question]) -> None:
    documents: dict[str, set[str]] = {}
    for sentence in _held_out_sentences():
        documents.setdefault(sentence.last, set()).add(sentence.document)
    for question in questions:
        for i, choice in enumerate(question.choices):
            others = documents[choice] - {question.document}
            assert i == question.answer or others


def test_every_place_is_as_often_right() -> None:
    places: Counter[int] = Counter()
    for seed in range(5):
        places.update(question.answer for question in _draw_questions(_held_out_sentences(), seed))
    expected = places.total() / 4
    # chi-squared with 3 degrees of freedom is above 16.3 once in 1,000
    assert sum((count - expected) ** 2 / expected for count in places.values()) < 16.3


def test_a_word_alone_tells_little(questions: list[Question]) -> None:
    """Whoever knows how often each word is right, but not the prompt, stays near chance."""
    right = Counter(question.choices[question.answer] for question in questions)
    guessed = 0.0
    for question in questions:
        own = question.choices[question.answer]
        # Leave the question itself out.
        counts = [right[choice] - (choice == own) for choice in question.choices]
        best = max(counts)
        guessed += (counts[question.answer] == best) / counts.count(best)
    assert 0.1 < guessed / len(questions) < 0.4


def test_sentences_by_rule() -> None:
    text = (
        "Return the number of bytes that were written to the file. If it is closed, raise an"
        " error.\n\nThis sentence has its last word twice, because a word is a word.\n\n"
        ">>> This example is no prose, and it is not a part of questions.\n\n"
        "Return the number of bytes that were written to the file."
    )
    found = list(_sentences([Document("demo", "docs", text)]))
    assert [(each.prompt, each.last) for each in found] == [
        ("Return the number of bytes that were written to the", "file"),
        ("If it is closed, raise an", "error"),
    ]


@pytest.mark.parametrize("limit", [0, -1, 100_000])
def test_a_limit_out_of_range_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=rf"limit must be from 1 to \d+.* got {limit}"):
        stdlib_questions(limit)
