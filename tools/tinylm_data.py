"""From documents to batches: the tiny language model's tokenizer, and what a training step sees.

The idea: a byte-level tokenizer learns 4096 frequent pieces of the training text, and can spell any other text byte by
byte. All documents of a kind stand in one stream, so no token is padding. A batch is windows at random places of the
streams, drawn by a generator that is seeded with the step: so any step's batch can be made again, which is what lets a
run that was stopped go on exactly.

Source: Sennrich et al. 2016 (byte-pair encoding), Radford et al. 2019 (on bytes); the tokenizers library.

How it differs from ``qcourse.texts.corpus``: there text is chosen, here it becomes numbers.
"""

from collections.abc import Iterable, Mapping

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from qcourse.texts.corpus import SEPARATOR
from qcourse.texts.corpus_sources import Document

# A word with the space before it; up to three digits; signs; line breaks with the white space before them; indentation.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(documents: Iterable[Document], *, vocabulary: int) -> Tokenizer:
    """Learn a byte-level BPE of ``vocabulary`` tokens; the separator is number 0, the 256 bytes follow."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def batch(
    streams: Mapping[str, Tensor],
    step: int,
    *,
    seed: int,
    size: int,
    context: int,
    docs_share: float,
) -> Tensor:
    """Draw the ids (size, context + 1) of one step: windows at random places, a share of them from "docs"."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)  # only 32 bits of it count
    from_docs = torch.rand(size, generator=generator) < docs_share
    rows = []
    for docs in from_docs.tolist():
        stream = streams["docs" if docs else "code"]
        start = int(torch.randint(len(stream) - context, (), generator=generator))
        rows.append(stream[start : start + context + 1])
    return torch.stack(rows).long()
