"""The environment that the course runs in: .venv, created if missing, repaired if broken.

An environment is ready when its stamp matches pyproject.toml and constraints.txt. The stamp is
deleted before an installation and written after it, so that an interrupted one is repeated.

Source: the Python documentation of `venv`; pip's user guide ("Constraints Files").

This runs before anything is installed: the standard library only, and syntax that an old Python can
parse, so that it can say that it is too old. An error ends a command with one sentence.

How it differs from its neighbors: tools/course.py runs commands inside the environment,
tools/torch_build.py chooses PyTorch's build.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch_build
from pip_output import follow, last_line, read, why_pip_failed

ROOT = Path(__file__).resolve().parent.parent
FALLBACK = "so PyTorch comes from the default index."
PYTHON_IN_VENV = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")


def say(text: str) -> None:
    """Print without a buffer, so that our lines and those of child processes stay in order."""
    print(text, flush=True)


def check_python(version: tuple = sys.version_info[:3], root: Path = ROOT) -> None:
    """Stop with a sentence if pyproject.toml does not allow this Python."""
    # as text, because tomllib came with Python 3.11
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.search(r'requires-python = "(.*)"', project).group(1)
    # ">=3.11,!=3.14.1,<3.15": one lower bound, one upper bound, any number of exceptions
    bounds = {"!=": []}
    for sign, number in re.findall(r"(>=|<|!=)([0-9.]+)", wanted):
        if sign == "!=":
            bounds["!="].append(number)
        else:
            bounds[sign] = number

    # compared as tuples: (3, 11, 4) is below (3, 11, 5); (3, 15, 0) is not below (3, 15)
    has = ".".join(str(part) for part in version)
    in_range = numbers(bounds[">="]) <= version < numbers(bounds["<"])
    if in_range and has not in bounds["!="]:
        return
    but = "".join(f" and not {number}" for number in bounds["!="])
    needs = f"{bounds['>=']} or newer, before {bounds['<']}{but}"
    sys.exit(f"This is Python {has}; the course needs {needs} (make PYTHON=... names one).")


def numbers(version: str) -> tuple:
    """Return the numbers of a version, as in (3, 11, 5)."""
    return tuple(int(part) for part in version.split("."))


def ready(extra: str, root: Path = ROOT, *, torch: str = "auto") -> Path:
    """Return the Python of an environment that has the course and its `extra`.

    Create the environment and install the packages if they are missing. `torch` names PyTorch's
    build: cpu, cuda, or auto for the installed one, else the one that suits this machine.
    """
    torch_build.check_choice(torch)
    # here environment.yml has installed everything
    if os.environ.get("CONDA_DEFAULT_ENV") == "qcourse":
        return Path(sys.executable)

    venv = root / ".venv"
    python = venv / PYTHON_IN_VENV
    stamp = venv / "course.stamp"

    usable = python.exists() and stands_where_made(venv)
    # dev contains every extra
    stamps = [stamp_text(extra, root), stamp_text("dev", root)]
    stamped = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    if usable and stamped in stamps and torch_build.has_build(torch, venv):
        return python

    # the stamp comes back when all is installed, so that an interrupted installation is repeated
    stamp.unlink(missing_ok=True)
    if not (usable and has_pip(python)):
        say("[1/2] Making the environment .venv ...")
        make_venv(venv)
    say(f"[2/2] Installing the packages of [{extra}] into .venv ...")
    pip_install(python, extra, root, torch)
    stamp.write_text(stamp_text(extra, root), encoding="utf-8")
    return python


def stamp_text(extra: str, root: Path) -> str:
    """Return the stamp of an extra: its name and a hash of the files that name the packages."""
    project = (root / "pyproject.toml").read_bytes()
    constraints = (root / "constraints.txt").read_bytes()
    files = project + constraints
    return f"{hashlib.sha256(files).hexdigest()} {extra}\n"


def stands_where_made(venv: Path) -> bool:
    """Return whether the folder was neither moved nor copied: its scripts contain its path."""
    config = venv / "pyvenv.cfg"
    if not config.is_file():
        return True
    for line in config.read_text(encoding="utf-8").splitlines():
        if line.startswith("command = "):
            return line.endswith(str(venv))
    return True


def has_pip(python: Path) -> bool:
    """Return whether the environment was completed: pip comes last."""
    command = [str(python), "-m", "pip", "--version"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def make_venv(venv: Path) -> None:
    """Create an environment, or stop with a sentence."""
    for name in ("venv", "ensurepip"):
        if importlib.util.find_spec(name) is None:
            sys.exit(
                "This Python cannot make environments: install its venv module "
                "(Debian: apt install python3-venv)."
            )
    # --clear: what is left of a broken environment goes
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"Python could not make {venv}: {last_line(made.stderr or made.stdout)}")


def pip_install(python: Path, extra: str, root: Path, torch: str = "auto") -> None:
    """Install the course with `extra`, at the versions of constraints.txt, or stop."""
    log = root / ".venv" / "install.log"
    log.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "install", "--no-input"]
    started = time.monotonic()
    # torch first: the second call then finds it installed
    install_torch(pip, extra, root, torch)
    if follow([*pip, "-e", f".[{extra}]", "-c", "constraints.txt"], log, root):
        sys.exit(f"{why_pip_failed(read(log))} All that pip said is in {log}.")
    say(f"      Installed in {time.monotonic() - started:.0f} s.")


def install_torch(pip: list, extra: str, root: Path, torch: str) -> None:
    """Install torch by itself if it needs its own index; announce the size of the download."""
    log = root / ".venv" / "install.log"
    installed = torch_build.installed_version(root / ".venv")
    # the build that is there stays, unless another one is asked for
    build = torch_build.build_to_install(torch, installed)
    arguments = torch_build.pip_arguments(build, installed, torch_build.pinned_version(root))
    from_cpu_index = "--index-url" in arguments
    if from_cpu_index and not torch_build.cpu_index_answers():
        say(f"      PyTorch's own CPU index does not answer, {FALLBACK}")
        arguments = []
        build = "cuda"
    if not installed:
        say(f"      {torch_build.announcement(extra, build)}")
    if not arguments or follow([*pip, *arguments], log, root) == 0:
        return

    # that index may have no wheel for this Python or this processor, but the default index has one
    lacks_version = "No matching distribution" in read(log)
    if not (from_cpu_index and lacks_version):
        sys.exit(f"{why_pip_failed(read(log))} All that pip said is in {log}.")
    say(f"      PyTorch's own CPU index lacks this version, {FALLBACK}")
    if not installed:
        say(f"      {torch_build.announcement(extra, 'cuda')}")


def child_environment(python: Path) -> dict:
    """Return the variables for a child process: the programs beside `python` come first on PATH."""
    # nbgrader finds alembic there
    path = os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path}
