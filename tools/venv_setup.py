"""The environment the course runs in: .venv, made where it is missing and mended where it is not as it should be.

An environment is ready when its stamp names what pyproject.toml and constraints.txt say now; the stamp goes before an
installation and comes back after it, so an interrupted one is done again. Source of the steps: the Python documentation
of `venv` and pip's user guide ("Constraints Files"). Standard library only, and syntax that an old Python can read far
enough to be told that it is too old: this runs before anything is installed. What stops a reader ends in one sentence.
tools/course.py says what is run inside the environment, tools/torch_build.py which PyTorch comes into it.
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

ROOT = Path(__file__).resolve().parent.parent
PYTHON_IN_VENV = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")
WIDTH = 78


def say(text: str) -> None:
    """Print at once, so that our lines and the children's stay in order."""
    print(text, flush=True)


def check_python(version: tuple = sys.version_info[:3], root: Path = ROOT) -> None:
    """Stop with a sentence where pyproject.toml does not allow this Python.

    The file is read as text, because tomllib came with Python 3.11.
    """
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    wanted = re.search(r'requires-python = "(.*)"', project).group(1)
    bounds = {"!=": []}
    for sign, number in re.findall(r"(>=|<|!=)([0-9.]+)", wanted):
        if sign == "!=":
            bounds["!="].append(number)
        else:
            bounds[sign] = number

    # Compared as tuples: (3, 11, 4) is below (3, 11, 5), and (3, 15, 0) is not below (3, 15).
    has = ".".join(str(part) for part in version)
    if numbers(bounds[">="]) <= version < numbers(bounds["<"]) and has not in bounds["!="]:
        return
    but = "".join(f" and not {number}" for number in bounds["!="])
    sys.exit(
        f"This is Python {has}; the course needs {bounds['>=']} or newer, before {bounds['<']}{but} "
        "(make PYTHON=... names one)."
    )


def numbers(version: str) -> tuple:
    """The numbers of a version, as in (3, 11, 5)."""
    return tuple(int(part) for part in version.split("."))


def ready(extra: str, root: Path = ROOT, *, torch: str = "auto") -> Path:
    """Return the Python of an environment that has the course and its `extra`.

    The environment is made, and the packages are installed, where they are missing. `torch` names
    PyTorch's build: cpu, cuda, or auto for the one that is there or suits this machine.
    """
    torch_build.check_choice(torch)
    if os.environ.get("CONDA_DEFAULT_ENV") == "qcourse":  # environment.yml has installed everything
        return Path(sys.executable)
    venv = root / ".venv"
    python = venv / PYTHON_IN_VENV
    stamp = venv / "course.stamp"
    usable = python.exists() and stands_where_made(venv)
    stamps = [stamp_text(name, root) for name in (extra, "dev")]  # dev contains every extra
    stamped = stamp.read_text(encoding="utf-8") if stamp.is_file() else ""
    if usable and stamped in stamps and torch_build.has_build(torch, venv):
        return python

    # The stamp comes back when all is installed, so an interrupted installation is done again.
    stamp.unlink(missing_ok=True)
    if not (usable and has_pip(python)):
        say("[1/2] Making the environment .venv ...")
        make_venv(venv)
    say(f"[2/2] Installing the packages of [{extra}] into .venv ...")
    pip_install(python, extra, root, torch)
    stamp.write_text(stamp_text(extra, root), encoding="utf-8")
    return python


def stamp_text(extra: str, root: Path) -> str:
    """What says that `extra` is installed: a hash of the files that name the packages."""
    files = b"".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    return f"{hashlib.sha256(files).hexdigest()} {extra}\n"


def stands_where_made(venv: Path) -> bool:
    """Whether the folder was not moved or copied since: the scripts inside name the place they were made for."""
    lines = (
        (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        if (venv / "pyvenv.cfg").is_file()
        else []
    )
    made = [line for line in lines if line.startswith("command = ")]
    return not made or made[0].endswith(str(venv))


def has_pip(python: Path) -> bool:
    """Whether making the environment went on to its end, which is pip."""
    return (
        subprocess.run(
            [str(python), "-m", "pip", "--version"], capture_output=True, check=False
        ).returncode
        == 0
    )


def make_venv(venv: Path) -> None:
    """Make an environment, or stop with a sentence."""
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        sys.exit(
            "This Python cannot make environments: install its venv module (Debian: apt install python3-venv)."
        )
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"Python could not make {venv}: {last_line(made.stderr or made.stdout)}")


def pip_install(python: Path, extra: str, root: Path, torch: str = "auto") -> None:
    """Install the course with `extra`, editable, at the versions of constraints.txt, or stop with a sentence."""
    log = root / ".venv" / "install.log"
    log.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "install", "--no-input"]
    started = time.monotonic()
    install_torch(pip, extra, root, torch)
    if follow([*pip, "-e", f".[{extra}]", "-c", "constraints.txt"], log, root):
        sys.exit(f"{why_pip_failed(read(log))} All that pip said is in {log}.")
    say(f"      Installed in {time.monotonic() - started:.0f} s.")


def install_torch(pip: list, extra: str, root: Path, torch: str) -> None:
    """Install torch alone where it does not come as every other package; say what will be loaded."""
    log = root / ".venv" / "install.log"
    installed = torch_build.installed_version(root / ".venv")
    build = torch_build.build_to_install(torch, installed)
    arguments = torch_build.pip_arguments(build, installed, torch_build.pinned_version(root))
    from_cpu_index = "--index-url" in arguments
    if from_cpu_index and not torch_build.cpu_index_answers():
        say(
            "      PyTorch's own CPU index does not answer, so PyTorch comes from the default index."
        )
        arguments, build = [], "cuda"
    if not installed:
        say(f"      {torch_build.announcement(extra, build)}")
    if not arguments or follow([*pip, *arguments], log, root) == 0:
        return

    # A Python or a processor for which that index has no wheel is no reason to stop.
    if not (from_cpu_index and "No matching distribution" in read(log)):
        sys.exit(f"{why_pip_failed(read(log))} All that pip said is in {log}.")
    say(
        "      PyTorch's own CPU index lacks this version, so PyTorch comes from the default index."
    )
    if not installed:
        say(f"      {torch_build.announcement(extra, 'cuda')}")


def follow(command: list, log: Path, cwd: Path) -> int:
    """Run pip into `log` and show what it is doing: on one line of a terminal, elsewhere a line every 10 s."""
    terminal, started = sys.stdout.isatty(), time.monotonic()
    period_s = 0.5 if terminal else 10.0
    shown_s = 0.0
    with (
        log.open("ab") as out,
        subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT) as pip,
    ):
        while pip.poll() is None:
            time.sleep(0.1)
            elapsed_s = time.monotonic() - started
            if elapsed_s - shown_s > period_s:
                shown_s = elapsed_s
                line = f"      {elapsed_s:4.0f} s  {condense(read(log))}"
                print(
                    f"\r{line[:WIDTH]:{WIDTH}}" if terminal else line,
                    end="" if terminal else "\n",
                    flush=True,
                )
    if terminal:
        print(f"\r{'':{WIDTH}}", end="\r")
    return pip.returncode


def read(log: Path) -> str:
    """A log that may still be growing, in whatever encoding."""
    return log.read_text(encoding="utf-8", errors="replace")


def condense(log: str) -> str:
    r"""What pip is doing, from its output so far.

    >>> condense("Collecting torch==2.13.0\n  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (190.2 MB)\n")
    'package 1: torch-2.13.0 (190.2 MB)'
    """
    doing = re.findall(
        r"^ *((?:Collecting|Downloading|Using cached|Building|Installing) .*)$", log, re.MULTILINE
    )
    if doing and doing[-1].startswith("Installing collected packages"):
        return f"unpacking {doing[-1].count(',') + 1} packages"
    count = sum(line.startswith("Collecting") for line in doing)
    return (
        f"package {count}: {re.sub('^[A-Z][a-z]+ (cached )?|-(cp|py)[0-9].*[.]whl', '', doing[-1])}"
        if count
        else "starting"
    )


def why_pip_failed(log: str) -> str:
    """One sentence for what pip said before it gave up."""
    again = "and run the same command again."
    if "No space left on device" in log:
        return f"The disk is full: make room for about 3 GB (7 GB where PyTorch brings CUDA along) {again}"
    if re.search(r"Retrying \(|ConnectionError|timed out|SSLError|ProxyError", log):
        return f"The package index does not answer: connect to the network, which only installing needs, {again}"
    errors = [line for line in log.splitlines() if line.startswith("ERROR: ")]
    return f"pip could not install the packages ({(errors or [last_line(log)])[0].removeprefix('ERROR: ').strip('.')})."


def last_line(text: str) -> str:
    """The last line that says something."""
    return next(
        (line.strip() for line in reversed(text.splitlines()) if line.strip()), "it gave no reason"
    )


def child_environment(python: Path) -> dict:
    """The environment of the children: this Python's programs come first on PATH (nbgrader starts alembic there)."""
    return {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])}
