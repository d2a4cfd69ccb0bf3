"""Multiple-choice questions from held-out documentation: which word ends the sentence?

The prompt is a sentence without its last word. The four choices are that word and the last words of
three sentences from other documents, of the same length to one letter. So all choices come from
one distribution, and only the prompt tells them apart. A prompt and a word are a few tokens: 200
questions cost a model less than two pages of text.

Source: Taylor 1953, "Cloze procedure"; Paperno et al. 2016, "LAMBADA" (the last word of a passage).
`docstring_pairs.py` asks an encoder; `models/multiple_choice.py` scores a decoder's answers.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from qcourse.texts.corpus import stdlib_corpus
from qcourse.texts.corpus_sources import Document, paragraphs

CHOICES = 4
SENTENCE_WORDS = range(7, 21)
ANSWER = re.compile(r"[a-z]{4,12}")
MAX_LENGTH_DIFFERENCE = 1  # letters
STEM = 4  # letters: "argument" and "arguments" may both be right
# Prose only: no table, example, markup or cross-reference.
_SENTENCE = re.compile(r"[A-Z][^|=<>*`\\]*[a-z]\.")


@dataclass(frozen=True)
class Question:
    """A prompt, its possible next words, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    document: str  # where the sentence is from


def stdlib_questions(limit: int, seed: int = 0) -> list[Question]:
    """Return ``limit`` questions about held-out documents, in an order drawn with the seed.

    Other versions of Python have other documents, so also other questions. Raises ValueError if
    there are fewer than limit.

    >>> question = stdlib_questions(1)[0]
    >>> len(question.choices), question.choices[question.answer] in question.prompt
    (4, False)
    """
    questions = _draw_questions(_held_out_sentences(), seed)
    if not 1 <= limit <= len(questions):
        raise ValueError(
            f"limit must be from 1 to {len(questions)}, the number of questions found, got {limit}"
        )
    return questions[:limit]


@dataclass(frozen=True)
class _Sentence:
    document: str
    prompt: str
    last: str


@cache
def _held_out_sentences() -> tuple[_Sentence, ...]:
    documents = [each for each in stdlib_corpus("held_out") if each.kind == "docs"]
    return tuple(_sentences(documents))


def _sentences(documents: Iterable[Document]) -> Iterator[_Sentence]:
    """Yield each sentence that makes a question; none twice."""
    seen = set()
    for document in documents:
        for sentence in _prose(document.text):
            prompt, _, end = sentence.rpartition(" ")
            last = end.removesuffix(".")
            suitable = len(sentence.split()) in SENTENCE_WORDS and ANSWER.fullmatch(last)
            # A word that the prompt holds could be copied.
            if suitable and last[:STEM] not in prompt.lower() and sentence not in seen:
                seen.add(sentence)
                yield _Sentence(document.name, prompt, last)


def _prose(text: str) -> Iterator[str]:
    for paragraph in paragraphs(text):
        line = " ".join(paragraph.split())
        if ">>>" in line or "::" in line:
            continue
        for sentence in re.split(r"(?<=[.!?]) (?=[A-Z])", line):
            if _SENTENCE.fullmatch(sentence):
                yield sentence


def _draw_questions(sentences: Iterable[_Sentence], seed: int) -> list[Question]:
    random = Random(seed)
    order = list(sentences)
    random.shuffle(order)
    questions = []
    for sentence in order:
        wrong = _wrong_choices(sentence, order, random)
        if len(wrong) < CHOICES - 1:
            continue
        answer = random.randrange(CHOICES)
        choices = (*wrong[:answer], sentence.last, *wrong[answer:])
        questions.append(Question(sentence.prompt, choices, answer, sentence.document))
    return questions


def _wrong_choices(right: _Sentence, sentences: list[_Sentence], random: Random) -> list[str]:
    """Return up to three last words of other documents that the prompt does not hold."""
    chosen: list[str] = []
    stems = {right.last[:STEM]}
    # Words are drawn as often as they end a sentence, like the right ones.
    for other in random.sample(sentences, len(sentences)):
        stem = other.last[:STEM]
        alike = abs(len(other.last) - len(right.last)) <= MAX_LENGTH_DIFFERENCE
        known = stem in stems or stem in right.prompt.lower()
        if alike and not known and other.document != right.document:
            chosen.append(other.last)
            stems.add(stem)
        if len(chosen) == CHOICES - 1:
            break
    return chosen
