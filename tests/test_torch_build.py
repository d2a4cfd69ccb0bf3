"""Which build of PyTorch is installed, tested with the real pip and package indexes on loopback."""

import os
import re
import subprocess
import sys
import threading
import venv
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch_build
import venv_setup

VERSION = "9.1.0"
CPU_WHEEL = f"{VERSION}+cpu"

# A project of no package whose only requirement is torch, and what builds it without any download.
PYPROJECT = f"""[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "course"
version = "1"
dependencies = ["torch>=9"]
optional-dependencies = {{lab = []}}
# {VERSION}
"""
BACKEND = """import zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "course-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        metadata = "Metadata-Version: 2.1\\nName: course\\nVersion: 1\\nProvides-Extra: lab\\n"
        metadata += "Requires-Dist: torch>=9\\n"
        wheel.writestr("course-1.dist-info/METADATA", metadata)
        tags = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr("course-1.dist-info/WHEEL", tags)
        wheel.writestr("course-1.dist-info/RECORD", "")
    return name
"""


def write_wheel(folder: Path, version: str) -> None:
    """Put a wheel of an empty torch into an index."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        about = f"torch-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        wheel.writestr(f"{about}/METADATA", metadata)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{about}/WHEEL", tags)
        wheel.writestr(f"{about}/RECORD", "")


class QuietHandler(SimpleHTTPRequestHandler):
    """A folder of files is a package index; nothing is printed."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[str]:
    """The address of a server with two indexes: /cpu and /default, each with a wheel of torch."""
    write_wheel(tmp_path / "served" / "cpu" / "torch", CPU_WHEEL)
    write_wheel(tmp_path / "served" / "default" / "torch", VERSION)
    handler = partial(QuietHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def root(tmp_path: Path, indexes: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course to install, with an environment whose pip knows no index but ours."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{indexes}/default")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setattr(torch_build, "CPU_INDEX", f"{indexes}/cpu")
    monkeypatch.setattr(torch_build, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(torch_build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(venv_setup, "say", lambda text: print(text.strip()))
    course = tmp_path / "course"
    course.mkdir()
    (course / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (course / "backend.py").write_text(BACKEND, encoding="utf-8")
    (course / "constraints.txt").write_text(f"numpy==1\ntorch=={VERSION}\n", encoding="utf-8")
    return course


def python_of(root: Path) -> Path:
    """The Python of a new environment, with the pip of this one: ensurepip would take seconds."""
    venv.create(root / ".venv", symlinks=os.name == "posix")
    (packages,) = (root / ".venv").glob("lib/python*/site-packages")
    (packages / "pip").symlink_to(str(distribution("pip").locate_file("pip")))
    return root / ".venv" / venv_setup.PYTHON_IN_VENV


def install(root: Path, python: Path, torch: str = "auto") -> str:
    """Install the course; the version of torch that is there then."""
    venv_setup.pip_install(python, "lab", root, torch)
    return torch_build.installed_version(root / ".venv")


pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only on Linux are there two builds to choose from"
)


def test_the_cpu_build_then_the_other_then_the_cpu_build_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_of(root)
    assert install(root, python) == CPU_WHEEL
    said = capsys.readouterr().out
    assert "(PyTorch for the CPU)" in said
    assert not torch_build.has_build("cuda", root / ".venv")
    assert install(root, python, "cuda") == VERSION
    assert install(root, python) == VERSION  # what was chosen stays
    assert install(root, python, "cpu") == CPU_WHEEL
    assert "default index" not in capsys.readouterr().out


def test_an_index_that_cannot_be_reached(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # nothing listens at port 1
    monkeypatch.setattr(torch_build, "CPU_INDEX", "http://127.0.0.1:1/cpu")
    assert install(root, python_of(root), "cpu") == VERSION
    said = capsys.readouterr().out.splitlines()
    reason = "PyTorch's own CPU index does not answer"
    assert said[0] == f"{reason}, so PyTorch comes from the default index."
    announced = r"It loads \S+ GB \(PyTorch with CUDA\) and takes .* minutes at 50 Mbit/s\."
    assert re.fullmatch(announced, said[1])
    assert re.fullmatch(r"Installed in \d+ s\.", said[-1])


def test_an_index_that_lacks_the_version(
    root: Path, indexes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (wheel,) = (root.parent / "served" / "cpu" / "torch").iterdir()
    wheel.rename(wheel.with_name("torch-8.0.0+cpu-py3-none-any.whl"))
    assert install(root, python_of(root)) == VERSION
    said = capsys.readouterr().out
    reason = "PyTorch's own CPU index lacks this version"
    assert f"{reason}, so PyTorch comes from the default index." in said
    log = (root / ".venv" / "install.log").read_text(encoding="utf-8")
    assert "No matching distribution" in log


def test_an_index_that_breaks_off_stops_and_loads_nothing_larger(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = (root.parent / "served" / "cpu" / "torch").iterdir()
    wheel.write_bytes(b"cut off")
    with pytest.raises(SystemExit, match=r"^pip could not install the packages .*install\.log\.$"):
        install(root, python_of(root))
    assert torch_build.installed_version(root / ".venv") == ""


def test_an_index_that_never_answers_is_left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_build, "REACH_S", 0.1)
    waiting = threading.Event()
    monkeypatch.setattr(torch_build.urllib.request, "urlopen", lambda *_, **__: never(waiting))
    assert not torch_build.cpu_index_answers()
    waiting.set()


def never(waiting: threading.Event) -> None:
    """An index that says nothing, and in the end that there is none."""
    waiting.wait(30)
    raise OSError


# --- which build ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "installed", "gpu", "build"),
    [
        ("auto", "", False, "cpu"),
        ("auto", "", True, "cuda"),
        ("auto", "9.0.0", False, "cuda"),  # an older version of the build that was chosen
        ("auto", "9.0.0+cpu", True, "cpu"),
        ("cpu", "", True, "cpu"),
        ("cuda", "9.0.0+cpu", False, "cuda"),
    ],
)
def test_the_build_is_chosen(
    asked: str, installed: str, gpu: bool, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch_build, "has_nvidia_gpu", lambda: gpu)
    assert torch_build.build_to_install(asked, installed) == build


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_the_default_index_has_the_cpu_build(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_build.platform, "system", lambda: system)
    assert torch_build.build_to_install("cpu", "") == "cpu"
    assert torch_build.pip_arguments("cpu", "", VERSION) == []
    assert torch_build.has_build("cpu", Path("nowhere"))
    with pytest.raises(SystemExit, match=r"^TORCH=cuda needs Linux: .*\.$"):
        torch_build.check_choice("cuda")


@pytest.mark.parametrize("code", [0, 9])
def test_a_gpu_is_there_when_its_program_runs(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_build.Path, "exists", lambda self: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not torch_build.has_nvidia_gpu()
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {code}\n", encoding="utf-8")
    program.chmod(0o755)
    assert torch_build.has_nvidia_gpu() == (code == 0)


def test_a_gpu_is_there_when_its_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch_build.Path, "exists", lambda self: str(self) == "/dev/nvidia0")
    assert torch_build.has_nvidia_gpu()


def test_a_choice_that_there_is_not_is_one_sentence(tmp_path: Path) -> None:
    script = venv_setup.ROOT / "tools" / "course.py"
    command = [sys.executable, str(script), "lab", "--torch=nonsense"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "TORCH=nonsense is unknown: choose cpu, cuda or auto.\n"
    assert done.stdout == ""
