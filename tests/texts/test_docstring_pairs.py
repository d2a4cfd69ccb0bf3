"""The pairs, from a small library written here and from the real one; the retrieval accuracy."""

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import platformdirs
import pytest
import torch

from qcourse.texts import docstring_pairs
from qcourse.texts.docstring_pairs import BODY_CHARS, StdlibText, retrieval_accuracy, stdlib_texts

BODY = "This goes on for a while, so that it tells one {} from all of the others."
Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a module into a standard library of a few files."""

    def write_module(path: str, source: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source, encoding="utf-8")

    return write_module


def docstring(summary: str, body: str) -> str:
    return f'"""{summary}\n\n    {body}\n    """'


def everything(root: Path) -> dict[str, StdlibText]:
    """All texts of a library, by name."""
    with pytest.raises(ValueError, match="count must be from 1 to") as caught:
        stdlib_texts(10**6, root=root)
    count = int(str(caught.value).split("1 to ")[1].split(",")[0])
    return {text.name: text for text in stdlib_texts(count, root=root)} if count else {}


def test_docstrings_of_modules_classes_and_functions(write: Write, tmp_path: Path) -> None:
    source = f"""{docstring("The module has a summary.", BODY.format("module"))}
class Public:
    {docstring("The class has a summary.", BODY.format("class"))}
    async def method(self):
        {docstring("The method has a summary.", BODY.format("method"))}
        def inner():
            {docstring("The inner function is not public.", BODY.format("inner"))}
    def _private(self):
        {docstring("The private method is not public.", BODY.format("private"))}
"""
    write("json/__init__.py", source)
    found = everything(tmp_path)
    assert set(found) == {"json", "json.Public", "json.Public.method"}
    text = found["json.Public.method"]
    assert text.query == "The method has a summary."
    assert text.document == f"json.Public.method: {BODY.format('method')}"


@pytest.mark.parametrize(
    "path",
    [
        "site-packages/json.py",
        "requests.py",
        "test/json.py",
        "json/tests/a.py",
        "json/_a.py",
        "idlelib/run.py",
    ],
)
def test_other_files_are_left_out(write: Write, tmp_path: Path, path: str) -> None:
    write(path, docstring("The module has a summary.", BODY.format("module")))
    assert everything(tmp_path) == {}


@pytest.mark.parametrize(
    ("summary", "body"),
    [
        ("Too short.", BODY),
        ("A summary of more than one\n    line, which is none.", BODY),
        ("The body is too short.", "See the manual."),
        ("The body repeats its summary.", "As said above: The body repeats its summary. " + BODY),
    ],
)
def test_unfit_docstrings_are_left_out(
    write: Write, tmp_path: Path, summary: str, body: str
) -> None:
    write("json.py", docstring(summary, body))
    assert everything(tmp_path) == {}


def test_repeated_summaries_and_bodies_are_left_out(write: Write, tmp_path: Path) -> None:
    write("json.py", docstring("The summary is a copy.", BODY.format("first")))
    write("csv.py", docstring("The summary is a copy.", BODY.format("second")))
    write("cmd.py", docstring("The body is a copy.", BODY.format("third")))
    write("bdb.py", docstring("The body is another's.", BODY.format("third")))
    assert len(everything(tmp_path)) == 2


def test_bodies_are_cut_at_a_word(write: Write, tmp_path: Path) -> None:
    write("json.py", docstring("The body is very long.", "lorem\n    ipsum " * 100))
    body = everything(tmp_path)["json"].document.removeprefix("json: ")
    assert body.split() == ["lorem", "ipsum"] * 25
    assert BODY_CHARS - 6 < len(body) <= BODY_CHARS


def test_one_more_text_leaves_the_others_in_their_order(write: Write, tmp_path: Path) -> None:
    for module in ("bdb", "cmd", "csv", "json", "queue", "shelve"):
        source = docstring(f"The summary is about {module}.", BODY.format(module))
        write(f"{module}.py", source)
    before = list(everything(tmp_path))
    write("new/json.py", "")
    other = tmp_path / "other"
    for module in (*before, "uuid"):
        source = docstring(f"The summary is about {module}.", BODY.format(module))
        write(f"other/{module}.py", source)
    after = list(everything(other))
    assert len(after) == 7
    assert [name for name in after if name != "uuid"] == before


def test_odd_sources_are_parsed_not_run_and_warn_of_nothing(write: Write, tmp_path: Path) -> None:
    escape = r"'\d'"  # the compiler warns of it, which would fail this test
    source = docstring("The module stops Python.", BODY)
    write("json.py", f"{source}\nraise SystemExit({escape})\n")
    assert set(everything(tmp_path)) == {"json"}


@pytest.mark.parametrize("source", ["def $name():\n", "\0", "x = 'caf\udce9'"])
def test_files_that_do_not_parse_are_skipped(write: Write, tmp_path: Path, source: str) -> None:
    write("json.py", docstring("The module has a summary.", BODY))
    (tmp_path / "csv.py").write_bytes(source.encode(errors="surrogateescape"))
    assert set(everything(tmp_path)) == {"json"}


FOUND = (
    StdlibText("json", "A summary.", "json: é"),
    StdlibText("csv", "Another summary.", "csv: body"),
)


@pytest.fixture
def parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The folders that were parsed, each to FOUND; the cache is in tmp_path."""
    folders: list[Path] = []
    monkeypatch.setattr(docstring_pairs, "_read_texts", lambda root: folders.append(root) or FOUND)
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    docstring_pairs._all_texts.cache_clear()
    yield folders
    docstring_pairs._all_texts.cache_clear()


def in_a_new_process() -> tuple[StdlibText, ...]:
    """All texts, as a process that has not read them yet gets them."""
    docstring_pairs._all_texts.cache_clear()
    return stdlib_texts(len(FOUND))


def test_later_processes_parse_nothing(parsed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_a_new_process() == in_a_new_process() == FOUND
    assert parsed == [Path(sysconfig.get_path("stdlib"))]
    monkeypatch.setattr(sys, "version", "another")
    assert in_a_new_process() == FOUND
    assert len(parsed) == 2


@pytest.mark.parametrize("damage", [b"", b"[[1]]", b"null", b"\xff\xfe["])
def test_damaged_texts_are_parsed_and_kept_anew(
    parsed: list[Path], tmp_path: Path, damage: bytes
) -> None:
    in_a_new_process()
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage)
    assert in_a_new_process() == FOUND
    assert len(parsed) == 2
    assert [(path, path.read_bytes()) for path in (tmp_path / "cache").iterdir()] == [(kept, whole)]


def test_where_nothing_can_be_kept_texts_are_parsed(parsed: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is no folder")
    assert in_a_new_process() == in_a_new_process() == FOUND
    assert len(parsed) == 2


def test_the_real_library_has_enough() -> None:
    first = stdlib_texts(300)
    assert len({text.name for text in first}) == len({text.query for text in first}) == 300
    assert len({text.document.partition(": ")[2] for text in first}) == 300
    assert {text.name.partition(".")[0] for text in first} <= sys.stdlib_module_names
    assert stdlib_texts(20) == first[:20]


@pytest.mark.parametrize("count", [0, -1])
def test_count_is_positive(count: int) -> None:
    with pytest.raises(ValueError, match=f"count must be from 1 to .* got {count}"):
        stdlib_texts(count)


def test_retrieval_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, 0.0]])
    documents = torch.tensor([[5.0, 1.0], [0.0, 1.0], [9.0, -9.0], [-0.1, 0.1]])
    # The third query finds the first document (cosine 0.83), not its own (0).
    assert retrieval_accuracy(queries, documents) == 0.75


def test_retrieval_ignores_length() -> None:
    queries, documents = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.linspace(0.1, 10, 50)[:, None]
    expected = retrieval_accuracy(queries, documents)
    assert retrieval_accuracy(queries * lengths, documents / lengths) == expected


def test_a_collapsed_encoder_is_at_chance() -> None:
    assert retrieval_accuracy(torch.ones(10, 4), torch.ones(10, 4)) == 0.1


@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((4,), (4,)), ((0, 4), (0, 4))])
def test_embeddings_of_other_shapes_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        retrieval_accuracy(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        retrieval_accuracy(torch.full((2, 2), bad), torch.eye(2))
