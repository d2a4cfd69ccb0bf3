r"""The prompt of a chat model, in ChatML: each message between ``<|im_start|>`` and ``<|im_end|>``.

A chat model was trained on conversations in exactly this form. It continues the prompt until it
predicts ``<|im_end|>``, so the prompt ends where the assistant's answer begins.

Source: `tokenizer.chat_template` in SmolLM2's file, a Jinja template; OpenAI's ChatML.
`gguf_llama.py` makes the tokenizer that reads the marks as one token each.
"""

from collections.abc import Mapping, Sequence

DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
END = "<|im_end|>"
ANSWER = "<|im_start|>assistant\n"


def chat_prompt(messages: Sequence[Mapping[str, str]]) -> str:
    r"""Return the prompt that asks SmolLM2 to answer: each message in ChatML, then its head.

    Args:
        messages: each with a "role" (system, user, assistant) and its "content". If the first one
            is no system message, SmolLM2's default one precedes it.

    Raises:
        ValueError: there is no message, or one lacks its role or content.

    >>> prompt = chat_prompt([{"role": "user", "content": "What is Python?"}])
    >>> print(prompt, end="")
    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    What is Python?<|im_end|>
    <|im_start|>assistant
    """
    if not messages:
        raise ValueError("messages must hold at least one message, got none")
    for message in messages:
        missing = {"role", "content"} - set(message)
        if missing:
            lacks = " and ".join(sorted(missing))
            raise ValueError(f"each of messages needs a role and a content; one lacks its {lacks}")
    turns = [chat_turn(message["role"], message["content"]) for message in messages]
    if messages[0]["role"] != "system":
        turns.insert(0, chat_turn("system", DEFAULT_SYSTEM))
    return "".join(turns) + ANSWER


def chat_turn(role: str, content: str) -> str:
    r"""Return one message in ChatML.

    >>> chat_turn("user", "Hello")
    '<|im_start|>user\nHello<|im_end|>\n'
    """
    return f"<|im_start|>{role}\n{content}{END}\n"
