"""The corpus: a fixed split, nothing held out in the training documents, one kind per document."""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from qcourse.texts import corpus, corpus_sources
from qcourse.texts.corpus import encode_documents, is_held_out, stdlib_corpus, unrepeated
from qcourse.texts.corpus_sources import Document, paragraphs, read_package

WORDS = 12  # this many equal words in a row are rarely a coincidence


def words_in_a_row(documents: Iterable[Document]) -> Iterator[tuple[str, ...]]:
    for document in documents:
        words = document.text.split()
        yield from zip(*(words[start:] for start in range(WORDS)), strict=False)


def long_paragraphs(documents: Iterable[Document]) -> set[str]:
    found = {" ".join(p.split()) for document in documents for p in paragraphs(document.text)}
    return {paragraph for paragraph in found if len(paragraph) >= 40}


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of the files that a test writes; only demo.Leaf and demo.eight are held out."""

    def names() -> list[str]:
        return sorted({path.stem for path in tmp_path.iterdir()})

    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(corpus, "read_topics", lambda: iter(()))
    monkeypatch.setattr(corpus, "top_level_names", names)
    # Not through the cache, which holds the real library.
    monkeypatch.setattr(corpus, "stdlib_corpus", corpus._read_part)
    return tmp_path


def texts(part: str) -> list[tuple[str, str, str]]:
    documents = corpus.stdlib_corpus(part)
    return [(document.name, document.kind, document.text) for document in documents]


def test_held_out_and_trained_on_share_no_paragraph_and_hardly_a_phrase() -> None:
    held_out = stdlib_corpus("held_out")
    train = stdlib_corpus("train")
    assert len(long_paragraphs(held_out)) > 1000
    assert long_paragraphs(held_out).isdisjoint(long_paragraphs(train))
    seen = {hash(phrase) for phrase in words_in_a_row(train)}
    shared = [hash(phrase) in seen for phrase in words_in_a_row(held_out)]
    # Set phrases, and paragraphs that differ from another in one word.
    assert sum(shared) / len(shared) < 0.1


def characters(part: str, kind: str) -> int:
    return sum(len(document.text) for document in stdlib_corpus(part) if document.kind == kind)


def test_about_a_twentieth_is_held_out() -> None:
    for kind in ("docs", "code"):
        held_out = characters("held_out", kind)
        train = characters("train", kind)
        assert 0.025 < held_out / (held_out + train) < 0.075


def test_a_held_out_function_is_trained_on_neither_as_source_nor_as_docstring() -> None:
    assert is_held_out("ast.fix_missing_locations")
    lines = {
        "docs": "fix_missing_locations(node)\n",
        "code": "def fix_missing_locations(node):\n",
    }
    held_out = {(d.name, d.kind): d.text for d in stdlib_corpus("held_out")}
    for kind, line in lines.items():
        assert line in held_out["ast", kind]
        assert not any(line in document.text for document in stdlib_corpus("train"))


@pytest.mark.parametrize(
    ("unit", "answer"),
    [
        ("ast.unparse", True),
        ("_ast.unparse", True),
        ("_pyast.unparse", True),
        ("_py_ast.unparse", True),
        ("ast.parse", False),
        ("ast", False),
        ("io.open", True),
        ("_io.open", True),
        ("topics.return", True),
        ("topics.yield", False),
    ],
)
def test_the_split_does_not_change(unit: str, answer: bool) -> None:
    assert is_held_out(unit) is answer


def test_what_some_installations_lack_is_never_held_out() -> None:
    assert sum(is_held_out(f"demo.{number}") for number in range(1000)) > 20
    for top in corpus.SKIPPED:
        assert not any(is_held_out(f"{top}.{number}") for number in range(1000))


DEMO = '''"""The module."""

import os  # loose

# About Leaf.
@decorated
class Leaf(Base):
    """A leaf: {edition} edition."""

    def fall(self, x: int = 1):
        """Fall off."""
        return secret


def tree():
    """A tree."""
    return Leaf
'''


LEAF_DOCS = """Leaf

A leaf: {edition} edition.

Leaf.fall(self, x: int=1)

Fall off."""
LEAF_CODE = """# About Leaf.
@decorated
class Leaf(Base):

    def fall(self, x: int = 1):

        return secret"""


def test_an_edited_class_stays_on_its_side_with_all_of_its_members(library: Path) -> None:
    for edition in ("first", "second"):
        (library / "demo.py").write_text(DEMO.format(edition=edition), encoding="utf-8")
        docs = LEAF_DOCS.format(edition=edition)
        assert texts("held_out") == [("demo", "docs", docs), ("demo", "code", LEAF_CODE)]
        assert texts("train") == [
            ("demo", "docs", "demo\n\nThe module.\n\ntree()\n\nA tree."),
            ("demo", "code", "import os  # loose\n\ndef tree():\n\n    return Leaf"),
        ]


QUOTED = '''def eight():
    """A paragraph that is long enough to be a quotation."""

    return "code that is long enough to be a quotation"
'''
QUOTING = '''"""Mine.

A paragraph that is
long enough   to be a quotation.
"""
def other():

  return "code that is long enough to be a quotation"
'''


@pytest.mark.parametrize(
    "path", ["demo.py", "_demo.py", "_pydemo.py", "demo/__init__.py", "demo/_local.py"]
)
def test_a_class_that_moves_within_its_package_stays_on_its_side(library: Path, path: str) -> None:
    (library / path).parent.mkdir(exist_ok=True)
    (library / path).write_text(DEMO, encoding="utf-8")
    assert not any("secret" in text for _, _, text in texts("train"))
    assert any("secret" in text for _, _, text in texts("held_out"))
    assert any("A tree." in text for _, _, text in texts("train"))


def test_a_quotation_of_a_held_out_document_is_cut_out_of_docs_and_code(library: Path) -> None:
    (library / "demo.py").write_text(QUOTED, encoding="utf-8")
    (library / "other.py").write_text(QUOTING, encoding="utf-8")
    assert texts("train") == [
        ("demo", "docs", "demo"),
        ("other", "docs", "other\n\nMine."),
        ("other", "code", "def other():"),
    ]


def test_another_part_is_refused() -> None:
    with pytest.raises(ValueError, match="part must be 'train' or 'held_out', got 'test'"):
        stdlib_corpus("test")


DEEP = '''"""The module."""

import os
\f
class C(Base):
    """The class."""

    size = 1

    async def method(self, x: int = 1, *rest):
        r"""The method: \\d.

        More of it.
        """
        return x

    def plain(self): return "a string"


if os:
    def outer():
        """Not a definition at the top level, so part of the module: cut, and in no docs."""
'''


def test_a_source_is_split_into_docs_and_code(library: Path) -> None:
    package = library / "demo"
    (package / "tests").mkdir(parents=True)
    (package / "tests" / "test_it.py").write_text('"""A test."""\n', encoding="utf-8")
    (package / "__init__.py").write_text('"""The package."""\n', encoding="utf-8")
    (package / "broken.py").write_text("def (:\n", encoding="utf-8")
    (package / "deep.py").write_text(DEEP, encoding="utf-8")
    documents = [document for document in read_package("demo") if document.text]
    found = {(document.name, document.kind): document.text for document in documents}
    assert set(found) == {("demo", "docs"), ("demo.deep", "docs"), ("demo.deep", "code")}
    assert paragraphs(found["demo.deep", "docs"]) == [
        "demo.deep",
        "The module.",
        "C",
        "The class.",
        "C.method(self, x: int=1, *rest)",
        "The method: \\d.",
        "More of it.",
    ]
    lines = found["demo.deep", "code"].split("\n")
    assert '"""' not in found["demo.deep", "code"]
    for line in (
        "import os",
        "class C(Base):",
        "    size = 1",
        "        return x",
        '    def plain(self): return "a string"',
    ):
        assert line in lines


def test_tables_are_no_code() -> None:
    assert corpus_sources._is_table("TABLE = [\n" + "    0x10, 0x20, (1, 2),\n" * 50 + "]")
    assert not corpus_sources._is_table("TABLE = [0x10, 0x20]")
    assert not corpus_sources._is_table("for name in names:\n    print(name)\n" * 50)


def test_a_c_module_is_read_by_its_docstrings() -> None:
    (document,) = read_package("math")
    assert document.kind == "docs"
    assert document.text.startswith("math\n\n")
    assert "\n\nsqrt(x, /)\n\nReturn the square root of x." in document.text
    (without,) = read_package("math", lambda unit: unit != "math.sqrt")
    assert "\n\nsqrt(x, /)" not in without.text
    assert "Return the square root" not in without.text


def test_no_document_depends_on_memory_addresses() -> None:
    for top in ("_frozen_importlib_external", "_io"):
        for document in read_package(top):
            assert not re.search("object at 0x[0-9a-f]{8}", document.text), document.name


def test_an_absent_module_gives_nothing() -> None:
    assert list(read_package("no_such_module")) == []


def test_repetitions_are_cut_in_the_order_of_the_documents() -> None:
    long = "A paragraph that is long enough to be a quotation."
    other = "Another one, and it is just as long as that."
    documents = [
        Document("a", "docs", f"short\n\n{long}"),
        Document("b", "docs", f"short\n\n{other}"),
        Document("c", "docs", f"short\n\n{long}"),
    ]
    assert [document.text for document in unrepeated(documents)] == [
        f"short\n\n{long}",
        f"short\n\n{other}",
        "short",
    ]
    against = [Document("h", "code", f"    {long}\n\nshort")]
    assert [document.text for document in unrepeated(documents, against=against)] == [
        "short",
        f"short\n\n{other}",
        "short",
    ]
    assert unrepeated([Document("a", "docs", "\n\n \n")]) == ()


def test_a_tokenizer_without_a_separator_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have the token '<\|endoftext\|>'"):
        encode_documents([], Tokenizer(WordLevel({"a": 0})))
