"""The course's commands: each creates .venv if it is missing, then runs inside it.

    python tools/course.py lab         open JupyterLab at the first lesson
    python tools/course.py check       check what was changed: style, types, sheets, its tests
    python tools/course.py test        check everything, as CI does
    python tools/course.py exercises   write exercises/ from solutions/
    python tools/course.py bench       run each script of benchmarks/
    python tools/course.py notebooks   execute lessons and solutions again, in place
    python tools/course.py portability run them on other instruction sets and numbers of threads

`--torch cpu` or `--torch cuda` chooses the build of PyTorch that is installed (make: TORCH=cpu).

This file runs before anything is installed (tools/venv_setup.py installs), so it needs the
standard library only. An error ends a command with one sentence. The Makefile calls this file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import changed
import model_setup
from step_runner import NO_LIMIT, run_steps
from venv_setup import ROOT, check_python, child_environment, ready, say

CORES = min(4, os.cpu_count() or 1)

# seconds after which `check` stops what is still running
CHECK_S = 80.0

CHECK_HELP = """check what was changed, in at most 90 s: lint, format, types, sheets, and the tests
of the files that differ from the base. The base is the commit where this branch left its
upstream branch; without an upstream, where it left main; and on a main without an upstream,
the commit before the last. A change that is not committed counts. The tests of qcourse/a/b.py
are tests/a/test_b*.py and its doctests; those of a sheet, the cases of its number in
tests/checks; those of a notebook, its cells. If that takes longer, it stops and says so."""


def lab(arguments: list, torch: str) -> int:
    """Run `qcourse lab`, which starts JupyterLab, and return its exit code."""
    python = ready("lab", torch=torch)
    model_setup.fetch_model(python)
    command = [str(python), "-m", "qcourse.cli", "lab", *arguments]
    os.chdir(ROOT)
    # as the same process, the server gets the signals that are sent to this command
    if os.name == "posix":
        os.execv(command[0], command)
    return subprocess.run(command, check=False).returncode


def pytest_command(python: Path, *arguments: str, workers: int = 0) -> list:
    """Return a call of pytest, on several workers if their number is not 0."""
    command = [str(python), "-m", "pytest", *arguments]
    # a file stays on one worker, and the order of files is kept
    if workers:
        command += ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    return command


def style_steps(python: Path) -> dict:
    """Return the steps that read the whole repository and run none of its tests, by name."""
    module = [str(python), "-m"]
    return {
        "lint": [*module, "ruff", "check"],
        "format": [*module, "ruff", "format", "--check"],
        "types": [*module, "mypy"],
        "sheets": [str(python), "tools/make_exercises.py", "--check"],
    }


def steps(python: Path, root: Path = ROOT, *, has_model: bool = True) -> dict:
    """Return the steps of `test`, by name and in order."""
    every = style_steps(python)

    # Some tests wait for other processes, so two workers more than cores keep all cores busy. Each
    # worker takes up to 1.4 GB of memory.
    tests = ["qcourse", "tests", "--ignore=tests/browser"]
    every["tests"] = pytest_command(python, *tests, workers=min(4, CORES + 2))

    # The lessons are longer than the solutions: these come last, so that the workers end together.
    folders = []
    for name in ("notebooks", "solutions"):
        if any((root / name).glob("*.ipynb")):
            folders.append(name)
    if folders:
        every["notebooks"] = notebook_command(python, folders, has_model=has_model)
    # one browser at a time
    every["browser"] = pytest_command(python, "tests/browser")
    return every


def notebook_command(python: Path, paths: list, *, has_model: bool = True) -> list:
    """Return a call that runs notebooks and compares what their cells print.

    Without SmolLM2 nothing is compared: the tiny language model prints other numbers.
    """
    compare = "--nbval" if has_model else "--nbval-lax"
    return pytest_command(python, compare, "--nbval-current-env", *paths, workers=CORES)


def check_steps(python: Path, root: Path = ROOT, *, has_model: bool = True) -> dict:
    """Return the steps of `check`, by name and in order."""
    chosen = style_steps(python)

    # the tests, sheets and notebooks that the changes since the base concern
    base = changed.find_base(root)
    names = changed.changed_files(root, base)
    say(f"{len(names)} files differ from {base[:9]}.")
    found = changed.concerned(root, names)
    if found.tests:
        chosen["tests"] = pytest_command(python, "-x", *sorted(found.tests), workers=CORES)
    # the cases of a sheet have its number in their ids
    if found.sheets:
        numbers = " or ".join(sorted(found.sheets))
        sheets = ["tests/checks", "-k", numbers]
        chosen["checks"] = pytest_command(python, "-x", *sheets, workers=CORES)
    if found.notebooks:
        paths = sorted(found.notebooks)
        chosen["notebooks"] = notebook_command(python, paths, has_model=has_model)
    return chosen


def run_tests(names: list, torch: str) -> int:
    """Run the named steps, or all of them."""
    python = ready("dev", torch=torch)
    all_steps = steps(python, has_model=model_setup.fetch_model(python))
    # a name on the command line may be wrong
    unknown = sorted(set(names) - set(all_steps))
    if unknown:
        sys.exit(f"No step is called {', '.join(unknown)}: the steps are {', '.join(all_steps)}.")
    chosen = {name: all_steps[name] for name in names or all_steps}
    return run_offline(chosen, python)


def run_check(torch: str) -> int:
    """Run the steps that the changed files need."""
    python = ready("dev", torch=torch)
    has_model = model_setup.fetch_model(python)
    return run_offline(check_steps(python, has_model=has_model), python, limit_s=CHECK_S)


def run_offline(commands: dict, python: Path, limit_s: float = NO_LIMIT) -> int:
    """Run steps as CI does: offline, one thread per worker, with a progress file of their own."""
    env = child_environment(python)
    # a test that needs the network must fail here as it does in CI
    env["HF_HUB_OFFLINE"] = "1"
    # more threads than cores would slow all workers down
    env["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        env["QCOURSE_PROGRESS"] = os.path.join(folder, "progress.json")
        return run_steps(commands, env, limit_s=limit_s)


def run_script(path: str, *arguments: str, torch: str = "auto") -> int:
    """Run a script of the repository in .venv and return its exit code."""
    python = ready("dev", torch=torch)
    say(f"=== {path}")
    command = [str(python), path, *arguments]
    return subprocess.run(command, cwd=ROOT, env=child_environment(python), check=False).returncode


def bench(torch: str) -> int:
    """Run every benchmark and return the highest exit code."""
    # names with an underscore are shared parts, not benchmarks
    names = sorted(path.name for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    codes = [run_script(f"benchmarks/{name}", torch=torch) for name in names]
    return max(codes, default=0)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    raw = argparse.RawTextHelpFormatter
    top = argparse.ArgumentParser(prog="course.py", description=__doc__, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        builds = "cpu, cuda or auto (default)"
        command.add_argument("--torch", default="auto", metavar="BUILD", help=builds)
        return command

    add("lab", "open JupyterLab, with the options of `qcourse lab`: --port, --no-browser, its own")
    add("check", CHECK_HELP)
    add("test", "check everything").add_argument("steps", nargs="*", help="only these steps")
    add("exercises", "write exercises/ from solutions/")
    add("bench", "run benchmarks/")
    add("notebooks", "execute the notebooks in place").add_argument("paths", nargs="*")
    portability = add("portability", "run all notebooks on other instruction sets and threads")
    portability.add_argument("parts", nargs="*")
    return top


def main(arguments: list) -> int:
    """Run one command and return its exit code."""
    check_python()
    options, more = parser().parse_known_args(arguments)
    if more and options.command != "lab":
        parser().error(f"unknown arguments: {' '.join(more)}")
    return run_command(options, more)


def run_command(options: argparse.Namespace, more: list) -> int:
    """Run the command that was chosen and return its exit code."""
    torch = options.torch
    if options.command == "lab":
        return lab(more, torch)
    if options.command == "check":
        return run_check(torch)
    if options.command == "test":
        return run_tests(options.steps, torch)
    if options.command == "bench":
        return bench(torch)
    if options.command == "notebooks":
        return run_script("tools/run_notebooks.py", *options.paths, torch=torch)
    if options.command == "portability":
        return run_script("tools/portability.py", *options.parts, torch=torch)
    return run_script("tools/make_exercises.py", torch=torch)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command continues from here.")
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename}")
