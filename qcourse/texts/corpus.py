"""The tiny language model's training and held-out documents: the standard library of this Python.

A hash of its name decides whether a unit is held out (one in twenty), in any version of Python. A
unit is a class or function at a package's top level, with its docstrings, source and C or Python
twin: nothing held out is trained on in another form. Paragraphs of held-out documents are also cut
out of all training documents, and no paragraph occurs twice.

Source: the running standard library, as ``corpus_sources.py`` reads it.
`docstring_pairs.py` makes short pairs for an encoder; this makes running text for a decoder.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from qcourse.texts import corpus_sources
from qcourse.texts.cached_rows import cached_rows
from qcourse.texts.corpus_sources import (
    Document,
    paragraphs,
    read_package,
    read_topics,
    top_level_names,
)
from qcourse.texts.docstring_pairs import SKIPPED

HELD_OUT_SHARE = 1 / 20
MIN_REPEATED = 40  # characters: shorter paragraphs recur without being quotations
SEPARATOR = "<|endoftext|>"  # the token that begins and ends a document


def is_held_out(unit: str) -> bool:
    """Return SHA-256(unit) < 2^256 / 20, the same for a C module and its Python twin.

    >>> is_held_out("json.loads"), is_held_out("_json.loads"), is_held_out("json.dumps")
    (False, False, False)
    """
    top, dot, rest = unit.partition(".")
    # _json, _pyio and _py_abc become json, io and abc. Modules that some installations lack, such
    # as tkinter, are never held out.
    top = re.sub(r"^_+(py_?)?", "", top)
    digest = hashlib.sha256(f"{top}{dot}{rest}".encode()).digest()
    return top not in SKIPPED and int.from_bytes(digest) < HELD_OUT_SHARE * 2**256


@cache
def stdlib_corpus(part: str) -> tuple[Document, ...]:
    """Return the "train" or "held_out" documents: topics, then modules by name, docs before code.

    >>> {document.kind for document in stdlib_corpus("held_out")} == {"docs", "code"}
    True
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part must be 'train' or 'held_out', got {part!r}")
    readers = [__file__, corpus_sources.__file__]
    return cached_rows(f"stdlib_{part}", Document, partial(_read_part, part), readers)


def _read_part(part: str) -> tuple[Document, ...]:
    def keep(unit: str) -> bool:
        return is_held_out(unit) == (part == "held_out")

    documents = [document for document in read_topics() if keep(document.name)]
    for top in top_level_names():
        documents += read_package(top, keep)
    held_out = stdlib_corpus("held_out") if part == "train" else ()
    return unrepeated(documents, against=held_out)


def unrepeated(
    documents: Iterable[Document], *, against: Iterable[Document] = ()
) -> tuple[Document, ...]:
    """Drop paragraphs of 40 or more characters that ``against`` or an earlier document has.

    >>> page = Document("a", "docs", "A short one." + chr(10) * 2 + "A long one" + 9 * ", longer")
    >>> [len(document.text) for document in unrepeated([page, page])]
    [96, 12]
    """
    seen: set[str] = set()
    for document in against:
        keys = [_key(paragraph) for paragraph in paragraphs(document.text)]
        seen.update(key for key in keys if len(key) >= MIN_REPEATED)
    # Compare paragraphs without their spacing; a document with nothing left is dropped.
    kept = []
    for document in documents:
        new = []
        for paragraph in paragraphs(document.text):
            key = _key(paragraph)
            if key and key not in seen:
                new.append(paragraph)
            # Short paragraphs never enter `seen`, so they may recur.
            if len(key) >= MIN_REPEATED:
                seen.add(key)
        if new:
            kept.append(replace(document, text="\n\n".join(new)))
    return tuple(kept)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Int[Tensor, " tokens"]:
    """Return one row of ids: a separator before each document and at the end.

    >>> from tokenizers.models import WordLevel
    >>> tokenizer = Tokenizer(WordLevel({SEPARATOR: 0, "print": 1}))
    >>> encode_documents(2 * [Document("a", "code", "print")], tokenizer)
    tensor([0, 1, 0, 1, 0])
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise ValueError(f"tokenizer must have the token {SEPARATOR!r}, and does not")
    texts = [document.text for document in documents]
    ids = [separator]
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [*encoding.ids, separator]
    return torch.tensor(ids)


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())
