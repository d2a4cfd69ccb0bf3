"""The command `qcourse chat`: talk to SmolLM2 in a terminal.

An answer appears token by token. Ctrl-C stops it and returns to the prompt; a second Ctrl-C, Ctrl-D
or an empty line ends the conversation. Without a terminal, all of the input is one message:

    echo "What is Python?" | qcourse chat

How it differs from its neighbor: `chat.py` holds the conversation; this reads, prints and stops.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch

from qcourse.chat import Conversation
from qcourse.models.llama import Llama
from qcourse.models.smollm2 import SmolLM2, load_smollm2
from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.granularity import PerChannel, PerGroup
from qcourse.recipes.quantize import quantize_model

PROMPT = "> "


def chat(options: argparse.Namespace) -> int:
    """Run `qcourse chat` and return its exit code."""
    model, tokenizer = load_model(options.weights)
    conversation = Conversation(
        model,
        tokenizer,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    if sys.stdin.isatty():
        _say(f"SmolLM2-135M, {options.weights} weights. Ctrl-C stops an answer, Ctrl-D ends.")
        _talk(conversation)
    else:
        message = sys.stdin.read().strip()
        if message:
            _answer(conversation, message)
    return 0


def load_model(weights: str) -> SmolLM2:
    """Return SmolLM2 with weights in fp32, int8 or int4, rounded to nearest.

    int8 has one scale per output channel, and decodes before each product, which is slower than
    fp32. int4 has one scale per 32 weights, and the INT4 kernels.
    """
    # On a CPU the INT4 kernel is several times faster with inputs in bfloat16.
    dtype = torch.bfloat16 if weights == "int4" else torch.float32
    model, tokenizer = load_smollm2(dtype=dtype)
    if weights == "int8":
        int8 = IntQuantizer(8, granularity=PerChannel(), scale_dtype=torch.float16)
        model = cast(Llama, quantize_model(model, int8, progress=False).model)
    elif weights == "int4":
        int4 = IntQuantizer(4, granularity=PerGroup(32), scale_dtype=torch.float16)
        model = cast(Llama, quantize_model(model, int4, kernel="int4", progress=False).model)
    return SmolLM2(model, tokenizer)


def _talk(conversation: Conversation) -> None:
    """Answer one line after the other until the reader ends."""
    while True:
        try:
            message = input(PROMPT).strip()
        except (EOFError, KeyboardInterrupt):
            _say("")
            return
        if not message:
            return
        try:
            _answer(conversation, message)
        except ValueError as error:
            # a message that is longer than the whole context
            _say(str(error))


def _answer(conversation: Conversation, message: str) -> None:
    """Print an answer as it comes, then its length and its rate."""
    if conversation.cache.length and not conversation.has_room(message):
        _say("The context is full: the conversation starts anew.")
        conversation.start_anew()
    pieces = conversation.answer(message)
    with stopping_on_interrupt() as stopped:
        for piece in pieces:
            print(piece, end="", flush=True)
            if stopped:
                break
    print(flush=True)

    # On the error stream, so that a pipe carries the answer only.
    rate = conversation.tokens_per_s()
    per_s = f", {rate:.1f} tokens per second" if rate else ""
    _say(f"[{len(conversation.times_s)} tokens{per_s}]")


@contextmanager
def stopping_on_interrupt() -> Iterator[list[bool]]:
    """Give a list that Ctrl-C fills; a second Ctrl-C raises KeyboardInterrupt.

    An exception in the middle of a step would leave a token in the caches of some layers only.
    """
    stopped: list[bool] = []

    def stop(number: int, frame: object) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    earlier = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, earlier)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
