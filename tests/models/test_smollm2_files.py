"""SmolLM2's file is found where it may be, and is used only if it is the published one."""

import hashlib
from pathlib import Path

import platformdirs
import pytest

from qcourse.models import smollm2_files
from qcourse.models.smollm2_files import find_smollm2

CONTENT = b"GGUF and so on"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder, and a small file in the role of the published one."""
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setattr(platformdirs, "user_data_path", lambda *names, **options: data)
    monkeypatch.delenv("QCOURSE_SMOLLM2", raising=False)
    monkeypatch.setattr(smollm2_files, "SIZE_BYTES", len(CONTENT))
    monkeypatch.setattr(smollm2_files, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return data


def write(path: Path, content: bytes = CONTENT) -> Path:
    path.write_bytes(content)
    return path


def test_the_order_is_argument_then_variable_then_data_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_data = write(folder / smollm2_files.FILE)
    assert find_smollm2() == in_data
    named = write(tmp_path / "named.gguf")
    monkeypatch.setenv("QCOURSE_SMOLLM2", str(named))
    assert find_smollm2() == named
    given = write(tmp_path / "given.gguf")
    assert find_smollm2(given) == given


def test_each_place_and_what_to_do_are_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = write(folder / smollm2_files.FILE, CONTENT[:5])
    with pytest.raises(FileNotFoundError) as refused:
        find_smollm2()
    assert str(refused.value).splitlines() == [
        "SmolLM2's file was not found. Tried:",
        "- the environment variable QCOURSE_SMOLLM2: not set",
        f"- the user's data folder: {half} has 5 bytes instead of {len(CONTENT)}",
        "To get it: qcourse fetch smollm2",
    ]
    monkeypatch.setenv("QCOURSE_SMOLLM2", "nowhere.gguf")
    with pytest.raises(FileNotFoundError, match=r"QCOURSE_SMOLLM2: there is no file nowhere\.gguf"):
        find_smollm2()


def test_a_variable_that_names_nothing_leads_to_the_data_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOURSE_SMOLLM2", "nowhere.gguf")
    in_data = write(folder / smollm2_files.FILE)
    assert find_smollm2() == in_data


def test_an_argument_is_the_only_place(folder: Path) -> None:
    write(folder / smollm2_files.FILE)
    with pytest.raises(FileNotFoundError, match="path: there is no file"):
        find_smollm2(folder / "other.gguf")


def test_a_file_of_the_right_size_with_another_content_is_refused(folder: Path) -> None:
    write(folder / smollm2_files.FILE, CONTENT[::-1])
    with pytest.raises(ValueError, match=r"is damaged or another version.* qcourse fetch smollm2"):
        find_smollm2()
