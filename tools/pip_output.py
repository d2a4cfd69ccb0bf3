"""Show what pip is doing while it runs, and say in one sentence why it failed.

Standard library only: tools/venv_setup.py imports this before anything is installed.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

WIDTH = 78
RETRY = "and run the same command again."
NO_CONNECTION = r"Retrying \(|ConnectionError|timed out|SSLError|ProxyError"
PROGRESS = r"^ *((?:Collecting|Downloading|Using cached|Building|Installing) .*)$"


def follow(command: list, log: Path, cwd: Path) -> int:
    """Run pip with its output in `log`, show its progress, and return its exit code.

    A terminal shows one line that changes; elsewhere a new line appears every 10 s.
    """
    terminal = sys.stdout.isatty()
    period_s = 0.5 if terminal else 10.0

    started = time.monotonic()
    shown_s = 0.0
    # pip's own progress bars need a terminal, so its log is read instead
    out = log.open("ab")
    with out, subprocess.Popen(command, cwd=cwd, stdout=out, stderr=subprocess.STDOUT) as pip:
        while pip.poll() is None:
            time.sleep(0.1)
            elapsed_s = time.monotonic() - started
            if elapsed_s - shown_s > period_s:
                shown_s = elapsed_s
                show(f"      {elapsed_s:4.0f} s  {condense(read(log))}", terminal)
    # erase the line
    if terminal:
        print(f"\r{'':{WIDTH}}", end="\r")
    return pip.returncode


def show(line: str, terminal: bool) -> None:
    """Print a line; on a terminal, over the one before it."""
    if terminal:
        print(f"\r{line[:WIDTH]:{WIDTH}}", end="", flush=True)
    else:
        print(line, flush=True)


def read(log: Path) -> str:
    """Return the text of a log that may still be growing, in any encoding."""
    return log.read_text(encoding="utf-8", errors="replace")


def condense(log: str) -> str:
    r"""Return what pip is doing, from its output so far.

    >>> line = "  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (190.2 MB)"
    >>> condense("Collecting torch==2.13.0\n" + line)
    'package 1: torch-2.13.0 (190.2 MB)'
    """
    # pip announces each package with "Collecting" and all of them with "Installing"
    doing = re.findall(PROGRESS, log, re.MULTILINE)
    if doing and doing[-1].startswith("Installing collected packages"):
        return f"unpacking {doing[-1].count(',') + 1} packages"
    count = sum(line.startswith("Collecting") for line in doing)
    if not count:
        return "starting"
    # without the verb in front and the platform of a wheel
    package = re.sub("^[A-Z][a-z]+ (cached )?|-(cp|py)[0-9].*[.]whl", "", doing[-1])
    return f"package {count}: {package}"


def why_pip_failed(log: str) -> str:
    """Return one sentence for what pip printed before it failed."""
    # the two common causes first
    if "No space left on device" in log:
        return f"The disk is full: make room for about 3 GB (7 GB with CUDA) {RETRY}"
    if re.search(NO_CONNECTION, log):
        return f"The package index does not answer: connect to the network to install, {RETRY}"
    # the first error; if pip printed none, its last line
    errors = [line for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = errors[0] if errors else last_line(log)
    reason = reason.removeprefix("ERROR: ").strip(".")
    return f"pip could not install the packages ({reason})."


def last_line(text: str) -> str:
    """Return the last line that is not blank."""
    for line in reversed(text.splitlines()):
        if line.strip():
            return line.strip()
    return "it gave no reason"
