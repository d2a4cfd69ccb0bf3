"""A conversation keeps its cache, and its pieces of text are whole characters."""

import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from qcourse.chat import Conversation, decode_pieces
from qcourse.models.chat_template import chat_prompt
from qcourse.models.generate import generate
from qcourse.models.llama import LlamaConfig, random_llama

MARKS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token per byte, and the two marks of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(MARKS)
    return tokenizer


def conversation(tokenizer: Tokenizer, **options: object) -> Conversation:
    config = LlamaConfig(258, 32, 48, 2, 4, 2, max_position_embeddings=512)
    model = random_llama(config, seed=0).eval().requires_grad_(False)
    # large enough that the argmax varies
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.mul_(8)
    return Conversation(model, tokenizer, **options)


class Recorder:
    """Records what the model of a conversation reads."""

    def __init__(self, talk: Conversation) -> None:
        self.ids: list[int] = []
        talk.model.register_forward_pre_hook(self.record)

    def record(self, model: torch.nn.Module, arguments: tuple) -> None:
        self.ids += arguments[0][0].tolist()


def as_messages(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


def test_the_first_answer_is_that_of_the_prompt(tokenizer: Tokenizer) -> None:
    talk = conversation(tokenizer, max_tokens=20)
    answer = "".join(talk.answer("Hello"))
    prompt = torch.tensor(tokenizer.encode(chat_prompt(as_messages("Hello"))).ids)
    expected = generate(talk.model, prompt, 20, stop=257)[len(prompt) :]
    assert answer == tokenizer.decode(expected.tolist())
    assert len(talk.times_s) == len(expected)
    rate = talk.tokens_per_s()
    assert rate is not None
    assert 0 < rate < math.inf


@pytest.mark.parametrize("taken", [1, 3, 20])
def test_a_stopped_answer_is_closed_as_in_the_template(tokenizer: Tokenizer, taken: int) -> None:
    """The model reads each token once, and the cache holds what the template makes of all turns."""
    talk = conversation(tokenizer, max_tokens=20)
    recorder = Recorder(talk)
    tokens = talk._tokens("Hello")
    first = [token for _, token in zip(range(taken), tokens, strict=False)]
    talk.max_tokens = 1
    list(talk.answer("And then?"))

    before = tokenizer.encode(chat_prompt(as_messages("Hello"))).ids
    after = tokenizer.encode("<|im_end|>\n<|im_start|>user\nAnd then?<|im_end|>\n").ids
    head = tokenizer.encode("<|im_start|>assistant\n").ids
    assert recorder.ids == [*before, *first, *after, *head]
    assert talk.cache.length == len(recorder.ids)


def test_an_answer_that_ended_gets_no_second_end(tokenizer: Tokenizer) -> None:
    talk = conversation(tokenizer, max_tokens=5)
    first = list(talk._tokens("Hello"))
    # as if the second new token were the end mark
    talk = conversation(tokenizer, max_tokens=5)
    talk.end = first[1]
    answered = list(talk._tokens("Hello"))
    assert answered == first[: first.index(first[1]) + 1]
    continued = talk._prompt("And then?")
    text = "\n<|im_start|>user\nAnd then?<|im_end|>\n<|im_start|>assistant\n"
    assert continued == [first[1], *tokenizer.encode(text).ids]


def test_the_context_ends_an_answer_and_has_no_room_then(tokenizer: Tokenizer) -> None:
    talk = conversation(tokenizer, max_tokens=10_000)
    talk.end = -1
    list(talk._tokens("Hello"))
    # the last token is not in the cache
    assert talk.cache.length == 511
    assert not talk.has_room("And then?")
    with pytest.raises(ValueError, match="must leave room for an answer in the model's context"):
        talk.answer("And then?")
    talk.start_anew()
    assert talk.has_room("And then?")
    assert not talk.has_room("long " * 200)


def test_draws_depend_on_the_seed(tokenizer: Tokenizer) -> None:
    answers = []
    for seed in (0, 0, 1):
        talk = conversation(tokenizer, max_tokens=20, temperature=1.0, seed=seed)
        answers.append("".join(talk.answer("Hello")))
    assert answers[0] == answers[1] != answers[2]


def test_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    text = "naïve 日本 🙂\u200d👩 end"
    ids = tokenizer.encode(text).ids
    assert list(decode_pieces(tokenizer, ids)) == list(text)
    # what will never be whole is shown as it is decoded at once
    cut = ids[:-6]
    assert len(cut) > 10
    assert "".join(decode_pieces(tokenizer, cut)) == tokenizer.decode(cut)
    broken = tokenizer.encode("🙂").ids[:2]
    assert "".join(decode_pieces(tokenizer, [*broken, *ids])) == tokenizer.decode([*broken, *ids])
    assert "".join(decode_pieces(tokenizer, broken)) == tokenizer.decode(broken)
