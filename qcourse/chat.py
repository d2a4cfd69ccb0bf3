"""A conversation with a chat model: each message continues the tokens in the KV cache.

The cache keeps the keys and values of all earlier turns, so a turn reads only its own message. The
text comes piece by piece: a piece ends where a character ends, because one character may take
several tokens.

Source: SmolLM2's chat template (`models/chat_template.py`).
`chat_command.py` puts a conversation into a terminal; `models/generate.py` chooses the tokens.
"""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer

from qcourse.models.chat_template import ANSWER, END, chat_prompt, chat_turn
from qcourse.models.generate import generate_tokens
from qcourse.models.llama import KVCache, Llama

# what a decoder prints for bytes that are no whole character
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Conversation:
    """A chat model, and what it has read and written so far.

    Args:
        model, tokenizer: as ``load_smollm2`` returns them.
        max_tokens: the most tokens in an answer.
        temperature: 0 takes the most probable token; above 0, tokens are drawn.
        seed: of the random draws.
    """

    model: Llama
    tokenizer: Tokenizer
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0
    cache: KVCache = field(default_factory=KVCache, init=False)
    unread: list[int] = field(default_factory=list, init=False)
    times_s: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.end = self.tokenizer.token_to_id(END)

    def has_room(self, message: str) -> bool:
        """Return whether the message, and at least one token of an answer, fit the context."""
        used = self.cache.length + len(self._prompt(message))
        return used < self.model.config.max_position_embeddings

    def start_anew(self) -> None:
        """Forget every earlier turn."""
        self.cache = KVCache()
        self.unread = []

    def answer(self, message: str) -> Iterator[str]:
        """Yield the answer to a message in pieces of whole characters.

        Whoever stops taking pieces stops the answer; the next message continues after it. Raises
        ValueError if the context has no room for the message.
        """
        if not self.has_room(message):
            room = self.model.config.max_position_embeddings
            raise ValueError(
                f"message must leave room for an answer in the model's context of {room} tokens;"
                f" the conversation and it have {self.cache.length + len(self._prompt(message))}"
            )
        return decode_pieces(self.tokenizer, self._tokens(message))

    def tokens_per_s(self) -> float | None:
        """Return the rate of the last answer without its first token, which reads the message.

        None if the answer has fewer than two tokens.
        """
        steps = len(self.times_s) - 1
        return steps / (self.times_s[-1] - self.times_s[0]) if steps > 0 else None

    def _prompt(self, message: str) -> list[int]:
        """Return the ids that a turn adds to the cache, up to where the answer begins."""
        if not self.cache.length:
            text = chat_prompt([{"role": "user", "content": message}])
            return self.tokenizer.encode(text).ids
        # The template puts a line break after the end mark of the last answer. An answer that was
        # stopped has no end mark yet.
        ended = self.unread == [self.end]
        text = ("" if ended else END) + "\n" + chat_turn("user", message) + ANSWER
        return self.unread + self.tokenizer.encode(text).ids

    def _tokens(self, message: str) -> Iterator[int]:
        ids = torch.tensor(self._prompt(message))
        room = self.model.config.max_position_embeddings - self.cache.length - len(ids)
        self.times_s = []
        tokens = generate_tokens(
            self.model,
            ids,
            min(self.max_tokens, room),
            temperature=self.temperature,
            generator=self.generator,
            stop=self.end,
            cache=self.cache,
        )
        for token in tokens:
            self.times_s.append(time.perf_counter())
            # No step has read the newest token, so the cache lacks it.
            self.unread = [token]
            yield token


def decode_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens in pieces, each as soon as its last character is whole.

    >>> from qcourse.models.tinylm import load_tinylm
    >>> tokenizer = load_tinylm().tokenizer
    >>> ids = tokenizer.encode("naïve").ids
    >>> len(ids), "".join(decode_pieces(tokenizer, ids))
    (5, 'naïve')
    """
    waiting: list[int] = []
    # None marks the end: what waits then will never be whole
    for token in itertools.chain(tokens, [None]):
        if token is not None:
            waiting.append(token)
        piece = tokenizer.decode(waiting)
        if piece and (token is None or not piece.endswith(INCOMPLETE)):
            yield piece
            waiting = []
