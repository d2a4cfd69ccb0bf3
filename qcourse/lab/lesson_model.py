"""The language model that lessons measure: SmolLM2 where it is installed, else the tiny LM.

The idea: a lesson must run everywhere. Where SmolLM2 cannot be had it runs on the tiny language
model, which comes with the package, says so, and leaves out the asserts about SmolLM2.

How it differs from ``models/smollm2.py``: that raises an error if the file is missing.
"""

from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from qcourse.models.llama import Llama
from qcourse.models.smollm2 import load_smollm2
from qcourse.models.tinylm import load_tinylm


class LessonModel(NamedTuple):
    """A language model, its tokenizer, its name, and whether it is SmolLM2."""

    model: Llama
    tokenizer: Tokenizer
    name: str
    is_smollm2: bool


def load_lesson_model(*, dtype: torch.dtype = torch.float32) -> LessonModel:
    """Return SmolLM2 in `dtype`; if its file is missing, print why and return the tiny LM.

    Raises ValueError if the file is there and damaged.
    """
    try:
        model, tokenizer = load_smollm2(dtype=dtype)
    except FileNotFoundError as error:
        print(f"{error}\nThis lesson runs on the tiny language model instead; figures will differ.")
        model, tokenizer = load_tinylm(dtype=dtype)
        return LessonModel(model, tokenizer, "the tiny LM", is_smollm2=False)
    return LessonModel(model, tokenizer, "SmolLM2-135M", is_smollm2=True)
