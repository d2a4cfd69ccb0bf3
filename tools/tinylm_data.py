"""From documents to batches: the tiny language model's tokenizer, and what a training step sees.

The idea: a byte-level tokenizer learns 4096 frequent pieces of the training text, and spells other
text byte by byte. All documents of a kind form one stream, so no token is padding. A batch is
windows at random positions of the streams. Their generator is seeded with the step, so a resumed
run draws the same batches.

Source: Sennrich et al. 2016 (byte-pair encoding), Radford et al. 2019 (on bytes).

How it differs from ``qcourse.texts.corpus``: that selects text; this turns it into numbers.
"""

from collections.abc import Iterable, Mapping

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from qcourse.texts.corpus import SEPARATOR
from qcourse.texts.corpus_sources import Document

# a word with the space before it; up to three digits; signs; line breaks with the white space
# before them; indentation
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(documents: Iterable[Document], *, vocabulary: int) -> Tokenizer:
    """Return a byte-level BPE of ``vocabulary`` tokens; 0 is the separator, then come the bytes."""
    tokenizer = Tokenizer(models.BPE())

    # pieces first, then bytes: no token spans two pieces
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
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
    """Draw the ids (size, context + 1) of one step: random windows, a share of them from "docs"."""
    # a prime keeps the steps of two seeds apart; only 32 bits of the number count
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    from_docs = torch.rand(size, generator=generator) < docs_share
    rows = []
    for docs in from_docs.tolist():
        stream = streams["docs" if docs else "code"]
        # any position that leaves room for a window
        start = int(torch.randint(len(stream) - context, (), generator=generator))
        rows.append(stream[start : start + context + 1])
    return torch.stack(rows).long()
