"""The prompt is what transformers makes of the template in SmolLM2's own file."""

from pathlib import Path

import pytest

from qcourse.models.chat_template import chat_prompt
from qcourse.models.smollm2_files import find_smollm2

USER = {"role": "user", "content": "What is Python?"}
SYSTEM = {"role": "system", "content": "Answer in one word."}
ASSISTANT = {"role": "assistant", "content": "A language.\n"}

# `tokenizer.chat_template` in SmolLM2-135M-Instruct.Q4_1.gguf
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
    " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATIONS = [
    [USER],
    [SYSTEM, USER],
    [USER, ASSISTANT, USER],
    [SYSTEM, USER, ASSISTANT, USER],
    [USER, SYSTEM],
    [{"role": "user", "content": " <b>{{ x }}</b>\n\n日本 "}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_prompt_is_that_of_the_template(messages: list[dict[str, str]]) -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)
    assert chat_prompt(messages) == template.render(messages=messages, add_generation_prompt=True)


def test_transformers_makes_the_same_of_the_file() -> None:
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    try:
        path: Path = find_smollm2()
    except FileNotFoundError:
        pytest.skip("SmolLM2's file is not on this machine")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert tokenizer.chat_template == TEMPLATE
    for messages in CONVERSATIONS:
        expected = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert chat_prompt(messages) == expected


def test_a_message_without_role_or_content_is_refused() -> None:
    with pytest.raises(ValueError, match="messages must hold at least one message"):
        chat_prompt([])
    with pytest.raises(ValueError, match="one lacks its content"):
        chat_prompt([{"role": "user"}])
