"""`qcourse chat` in a pipe and in a terminal, with a scripted conversation and with SmolLM2."""

import io
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qcourse import chat_command, cli
from qcourse.chat import Conversation
from qcourse.models.smollm2 import SmolLM2
from qcourse.models.smollm2_files import find_smollm2
from qcourse.models.tinylm import load_tinylm


class Scripted(Conversation):
    """A conversation whose answers are the letters of the message."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.heard: list[str] = []
        self.cache = self
        self.length = 0
        self.times_s: list[float] = []

    def has_room(self, message: str) -> bool:
        return self.length + len(message) <= self.room

    def start_anew(self) -> None:
        self.length = 0

    def answer(self, message: str) -> Iterator[str]:
        if len(message) > self.room:
            raise ValueError("message must leave room")
        self.heard.append(message)
        self.length += len(message)
        return iter(message)

    def tokens_per_s(self) -> float | None:
        return 12.34


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the reader types; an exception is raised."""
    lines: list[object] = []

    def read(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    return lines


@pytest.mark.parametrize("end", ["", "  ", EOFError(), KeyboardInterrupt()])
def test_a_conversation_goes_on_until_the_reader_ends(
    typed: list[object], end: object, capsys: pytest.CaptureFixture
) -> None:
    typed += ["one", "two ", end, "never"]
    talk = Scripted()
    chat_command._talk(talk)
    assert talk.heard == ["one", "two"]
    said = capsys.readouterr()
    assert said.out == "one\ntwo\n"
    assert "[0 tokens, 12.3 tokens per second]" in said.err


def test_a_full_context_starts_anew(typed: list[object], capsys: pytest.CaptureFixture) -> None:
    typed += ["12345", "678", "9" * 20, "0", ""]
    talk = Scripted(room=6)
    chat_command._talk(talk)
    assert talk.heard == ["12345", "678", "0"]
    said = capsys.readouterr().err
    assert said.count("The context is full: the conversation starts anew.") == 2
    assert "message must leave room" in said


class Interrupted(Scripted):
    """Ctrl-C is pressed while each answer appears, once or twice."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def answer(self, message: str) -> Iterator[str]:
        self.heard.append(message)
        yield "a"
        for _ in range(self.times):
            signal.raise_signal(signal.SIGINT)
        yield "b"
        yield "c"


def test_ctrl_c_stops_an_answer_and_no_more(
    typed: list[object], capsys: pytest.CaptureFixture
) -> None:
    typed += ["one", "two", ""]
    talk = Interrupted(times=1)
    before = signal.getsignal(signal.SIGINT)
    chat_command._talk(talk)
    assert talk.heard == ["one", "two"]
    assert capsys.readouterr().out == "ab\nab\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends(typed: list[object]) -> None:
    typed += ["one", "two"]
    talk = Interrupted(times=2)
    with pytest.raises(KeyboardInterrupt):
        chat_command._talk(talk)
    assert talk.heard == ["one"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny LM in the place of SmolLM2; it has no marks of ChatML, so nothing ends an answer."""

    def load(*, dtype: torch.dtype) -> SmolLM2:
        return SmolLM2(*load_tinylm(dtype=dtype))

    monkeypatch.setattr(chat_command, "load_smollm2", load)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_pipe_is_one_message(
    tiny: None, weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a list?\n"))
    assert cli.main(["chat", "--weights", weights, "--max-tokens", "8"]) == 0
    said = capsys.readouterr()
    assert len(said.out) > 8
    assert said.err.startswith("[8 tokens, ")


def test_an_empty_pipe_asks_nothing(
    tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert cli.main(["chat"]) == 0
    assert capsys.readouterr() == ("", "")


def test_without_the_file_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    nowhere = Path("nowhere.gguf")
    monkeypatch.setattr(chat_command, "load_smollm2", lambda dtype: find_smollm2(nowhere))
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is a list?\n"))
    assert cli.main(["chat"]) == 2
    assert capsys.readouterr().err.endswith("To get it: qcourse fetch smollm2\n")


def test_smollm2_knows_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    try:
        find_smollm2()
    except FileNotFoundError:
        pytest.skip("SmolLM2's file is not on this machine")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is Python?\n"))
    assert cli.main(["chat", "--max-tokens", "16"]) == 0
    assert "programming language" in capsys.readouterr().out
