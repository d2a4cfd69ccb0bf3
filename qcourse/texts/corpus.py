"""What the tiny language model learns from and is judged by: the standard library, as documentation and as code.

The idea: a language model needs text, and every learner has some megabytes of it: the standard library of the Python
that runs. It is split once and for all by a hash of the qualified name: a twentieth is held out. The unit of splitting
is a class or function of a package's top level, with its docstrings and its source and all that is in it, and with its
C or pure-Python twin: so nothing held out is trained on in another form, and a text that is edited, or moved within its
package, stays on its side in every version of Python. Since parts of the library quote one another, a paragraph that
occurs in a held-out text is also cut out of all training texts, and none is kept twice.

Two kinds of text, each document of one kind only: "docs" are help topics, docstrings and signatures; "code" is source
without its docstrings.

Source: the standard library of the Python that runs, as ``corpus_sources.py`` reads it.

How it differs from ``docstring_pairs.py``: there, short pairs ask an encoder which belongs to which; here, running text is
predicted token by token.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

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
SEPARATOR = "<|endoftext|>"  # the token that begins a text and ends it


def is_held_out(unit: str) -> bool:
    """Tell whether a unit is held out: SHA-256(unit) < 2^256 / 20, whether it is written in C or in Python.

    Args:
        unit: the name of a package and of a class or function in it, "json.JSONDecoder"; that of a module for what else
            is in it; "topics.return" for a help topic.

    Returns:
        The same answer on every machine and version. False for what some installations lack, as tkinter.

    >>> is_held_out("json.loads"), is_held_out("_json.loads"), is_held_out("json.dumps")
    (False, False, False)
    """
    top, dot, rest = unit.partition(".")
    top = re.sub(r"^_+(py_?)?", "", top)
    digest = hashlib.sha256(f"{top}{dot}{rest}".encode()).digest()
    return top not in SKIPPED and int.from_bytes(digest) < HELD_OUT_SHARE * 2**256


@cache
def stdlib_corpus(part: str) -> tuple[Document, ...]:
    """Read the running Python's standard library as documents: topics, then modules by name, docs before code.

    Args:
        part: "held_out" or "train"; either takes some seconds to read, the first time.

    Returns:
        Documents without the paragraphs that an earlier one has or, for "train", that a held-out one has.

    Raises:
        ValueError: another part.

    >>> {document.kind for document in stdlib_corpus("held_out")} == {"docs", "code"}
    True
    """
    if part not in ("train", "held_out"):
        raise ValueError(f"part must be 'train' or 'held_out', got {part!r}")
    readers = [__file__, corpus_sources.__file__]
    return cached_rows(f"stdlib_{part}", Document, lambda: _read_part(part), readers)


def _read_part(part: str) -> tuple[Document, ...]:
    """The documents of a part, from the library's files."""

    def keep(unit: str) -> bool:
        return is_held_out(unit) == (part == "held_out")

    documents = [document for document in read_topics() if keep(document.name)]
    for top in top_level_names():
        documents += read_package(top, keep)
    return unrepeated(documents, against=stdlib_corpus("held_out") if part == "train" else ())


def unrepeated(
    documents: Iterable[Document], *, against: Iterable[Document] = ()
) -> tuple[Document, ...]:
    """Cut out every paragraph of at least 40 characters that stands in ``against`` or in an earlier document.

    Args:
        documents: in the order in which the first to have a paragraph keeps it.
        against: documents whose paragraphs none of the others may have.

    Returns:
        The documents that have something left. Paragraphs are what blank lines separate; they are compared without
        regard to indentation and line breaks.

    >>> page = Document("a", "docs", "A short one." + chr(10) * 2 + "A long one" + 9 * ", longer")
    >>> [len(document.text) for document in unrepeated([page, page])]
    [96, 12]
    >>> [document.text for document in unrepeated([page], against=[page])]
    ['A short one.']
    """
    seen = {_key(paragraph) for document in against for paragraph in paragraphs(document.text)}
    seen = {key for key in seen if len(key) >= MIN_REPEATED}
    kept = []
    for document in documents:
        new = []
        for paragraph in paragraphs(document.text):
            key = _key(paragraph)
            if key and key not in seen:
                new.append(paragraph)
            if len(key) >= MIN_REPEATED:
                seen.add(key)
        if new:
            kept.append(replace(document, text="\n\n".join(new)))
    return tuple(kept)


def encode_documents(documents: Iterable[Document], tokenizer: Tokenizer) -> Int[Tensor, " tokens"]:
    """Join documents to one row of ids, a separator before each and at the end: the text that a model is judged by.

    Args:
        documents: in this order; ``stdlib_corpus("held_out")``, or those of one kind.
        tokenizer: has the token ``<|endoftext|>``, as the tiny language model's.

    Returns:
        The ids; without any document, one separator.

    Raises:
        ValueError: the tokenizer has no separator.

    >>> from tokenizers.models import WordLevel
    >>> tokenizer = Tokenizer(WordLevel({SEPARATOR: 0, "print": 1}))
    >>> encode_documents([Document("a", "code", "print"), Document("b", "code", "print")], tokenizer)
    tensor([0, 1, 0, 1, 0])
    """
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise ValueError(f"tokenizer must have the token {SEPARATOR!r}, and has it not")
    encodings = tokenizer.encode_batch(
        [document.text for document in documents], add_special_tokens=False
    )
    return torch.tensor(
        [separator, *(i for encoding in encodings for i in (*encoding.ids, separator))]
    )


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())
