"""The environment the course runs in: .venv, made where it is missing and mended where it is not as it should be.

An environment is ready when its stamp names what pyproject.toml and constraints.txt say now; the stamp goes before an
installation and comes back after it, so an interrupted one is done again. Source of the steps: the Python documentation
of `venv` and pip's user guide ("Constraints Files"). Standard library only, and syntax that an old Python can read far
enough to be told that it is too old: this runs before anything is installed. What stops a reader ends in one sentence.
tools/course.py says what is run inside the environment.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_IN_VENV = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")
WIDTH = 78


def say(text: str) -> None:
    """Print at once, so that our lines and the children's stay in order."""
    print(text, flush=True)


def check_python(version: tuple = sys.version_info[:2], root: Path = ROOT) -> None:
    """Stop with a sentence where pyproject.toml does not allow this Python (read as text: tomllib came with 3.11)."""
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    bounds = re.search(r'requires-python = ">=(\d+)\.(\d+),<(\d+)\.(\d+)"', project).groups()
    least, below = (tuple(map(int, bound)) for bound in (bounds[:2], bounds[2:]))
    if not least <= version < below:
        has, needs, not_yet = (".".join(map(str, numbers)) for numbers in (version, least, below))
        sys.exit(
            f"This is Python {has}; the course needs {needs} or newer, before {not_yet} (make PYTHON=... names one)."
        )


def ready(extra: str, root: Path = ROOT) -> Path:
    """The Python of an environment that has the course and its `extra`; made and installed first where it does not."""
    if os.environ.get("CONDA_DEFAULT_ENV") == "qcourse":  # environment.yml has installed everything there
        return Path(sys.executable)
    venv = root / ".venv"
    python, stamp = venv / PYTHON_IN_VENV, venv / "course.stamp"
    wanted = hashlib.sha256(b"".join((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")))
    stamped = stamp.read_text(encoding="utf-8").split() if stamp.is_file() else []
    usable = python.exists() and stands_where_made(venv)
    if usable and stamped in ([wanted.hexdigest(), extra], [wanted.hexdigest(), "dev"]):  # dev contains every extra
        return python
    stamp.unlink(missing_ok=True)
    if not (usable and has_pip(python)):
        say("[1/2] Making the environment .venv ...")
        make_venv(venv)
    say(f"[2/2] Installing the packages of [{extra}] into .venv: the first time this takes minutes ...")
    pip_install(python, extra, root)
    stamp.write_text(f"{wanted.hexdigest()} {extra}\n", encoding="utf-8")
    return python


def stands_where_made(venv: Path) -> bool:
    """Whether the folder was not moved or copied since: the scripts inside name the place they were made for."""
    lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines() if (venv / "pyvenv.cfg").is_file() else []
    made = [line for line in lines if line.startswith("command = ")]
    return not made or made[0].endswith(str(venv))


def has_pip(python: Path) -> bool:
    """Whether making the environment went on to its end, which is pip."""
    return subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def make_venv(venv: Path) -> None:
    """Make an environment, or stop with a sentence."""
    if not all(importlib.util.find_spec(name) for name in ("venv", "ensurepip")):
        sys.exit("This Python cannot make environments: install its venv module (Debian: apt install python3-venv).")
    command = [sys.executable, "-m", "venv", "--clear", str(venv)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"Python could not make {venv}: {last_line(made.stderr or made.stdout)}")


def pip_install(python: Path, extra: str, root: Path) -> None:
    """Install the course with `extra`, editable, at the versions of constraints.txt, or stop with a sentence."""
    log = root / ".venv" / "install.log"
    command = [str(python), "-m", "pip", "install", "--no-input", "-e", f".[{extra}]", "-c", "constraints.txt"]
    started = time.monotonic()
    if follow(command, log, root):
        sys.exit(f"{why_pip_failed(read(log))} All that pip said is in {log}.")
    say(f"      Installed in {time.monotonic() - started:.0f} s.")


def follow(command: list, log: Path, cwd: Path) -> int:
    """Run pip into `log` and show what it is doing: on one line of a terminal, elsewhere a line every 10 s."""
    terminal, started = sys.stdout.isatty(), time.monotonic()
    period_s = 0.5 if terminal else 10.0
    shown_s = 0.0
    with log.open("wb") as out, subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT) as pip:
        while pip.poll() is None:
            time.sleep(0.1)
            elapsed_s = time.monotonic() - started
            if elapsed_s - shown_s > period_s:
                shown_s = elapsed_s
                line = f"      {elapsed_s:4.0f} s  {condense(read(log))}"
                print(f"\r{line[:WIDTH]:{WIDTH}}" if terminal else line, end="" if terminal else "\n", flush=True)
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
    doing = re.findall(r"^ *((?:Collecting|Downloading|Using cached|Building|Installing) .*)$", log, re.MULTILINE)
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
        return f"The disk is full: make room for about 3 GB (10 GB where torch brings CUDA along) {again}"
    if re.search(r"Retrying \(|ConnectionError|timed out|SSLError|ProxyError", log):
        return f"The package index does not answer: connect to the network, which only installing needs, {again}"
    errors = [line for line in log.splitlines() if line.startswith("ERROR: ")]
    return f"pip could not install the packages ({(errors or [last_line(log)])[0].removeprefix('ERROR: ').strip('.')})."


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it gave no reason")


def child_environment(python: Path) -> dict:
    """The environment of the children: this Python's programs come first on PATH (nbgrader starts alembic there)."""
    return {**os.environ, "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])}
