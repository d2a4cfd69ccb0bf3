"""The course's commands: each sets .venv up where it is missing, then runs inside it.

    python tools/course.py lab         open JupyterLab at the first lesson
    python tools/course.py check       check what was changed: style, types, sheets, its tests
    python tools/course.py test        check everything, as CI does
    python tools/course.py exercises   write exercises/ from solutions/
    python tools/course.py bench       run each script of benchmarks/
    python tools/course.py notebooks   execute lessons and solutions again, in place
    python tools/course.py portability run lessons and solutions on other instruction sets and threads

`--torch cpu` or `--torch cuda` chooses the build of PyTorch that is installed (make: TORCH=cpu).

This file runs before anything is installed (tools/venv_setup.py sees to that), so it needs the
standard library only. What stops a reader ends in one sentence. The Makefile is a thin face of it.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import changed
from venv_setup import ROOT, check_python, child_environment, ready, say

CORES = min(4, os.cpu_count() or 1)
BESIDE = ("types", "browser")  # steps of one core, which run while the others do
CHECK_S = 80.0  # when `check` stops what is still running
STOP_S = 10.0  # how long that may take

CHECK_HELP = """check what was changed, in at most 90 s: lint, format, types, sheets, and the tests of
the files that differ from the base. The base is the commit where this branch left its
upstream branch; without an upstream, where it left main; and on a main without an upstream,
the commit before the last. A change that is not committed counts. Of qcourse/a/b.py the tests
are tests/a/test_b*.py and its doctests; of a sheet, the cases of its number in tests/checks;
of a notebook, its cells. If that takes longer, it stops and says so."""


def lab(arguments: list, torch: str) -> int:
    """Become `qcourse lab`, which starts JupyterLab and stays until it ends."""
    command = [str(ready("lab", torch=torch)), "-m", "qcourse.cli", "lab", *arguments]
    os.chdir(ROOT)
    if os.name == "posix":  # a signal sent to this command then ends the server
        os.execv(command[0], command)
    return subprocess.run(command, check=False).returncode


def pytest_command(python: Path, *arguments: str, workers: int = 0) -> list:
    """A call of pytest; with workers, a file stays in one of them and the order of files is kept."""
    command = [str(python), "-m", "pytest", *arguments]
    if workers:
        command += ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
    return command


def style_steps(python: Path) -> dict:
    """The steps that read the whole repository and run none of its tests, by name and in order."""
    module = [str(python), "-m"]
    return {
        "lint": [*module, "ruff", "check"],
        "format": [*module, "ruff", "format", "--check"],
        "types": [*module, "mypy"],
        "sheets": [str(python), "tools/make_exercises.py", "--check"],
    }


def steps(python: Path, root: Path = ROOT) -> dict:
    """What `test` runs, by name and in order."""
    every = style_steps(python)

    # Some tests wait for other processes, so two workers more than cores keep all cores busy. Each
    # worker takes up to 1.4 GB of memory.
    tests = ["qcourse", "tests", "--ignore=tests/browser"]
    every["tests"] = pytest_command(python, *tests, workers=min(4, CORES + 2))

    # The lessons are longer than the solutions: these come last, so that the workers end together.
    folders = [name for name in ("notebooks", "solutions") if any((root / name).glob("*.ipynb"))]
    if folders:
        every["notebooks"] = notebook_command(python, folders)
    every["browser"] = pytest_command(python, "tests/browser")
    return every


def notebook_command(python: Path, paths: list) -> list:
    """Run notebooks and compare what their cells print."""
    return pytest_command(python, "--nbval", "--nbval-current-env", *paths, workers=CORES)


def check_steps(python: Path, root: Path = ROOT) -> dict:
    """What `check` runs, by name and in order."""
    some = style_steps(python)
    base = changed.find_base(root)
    names = changed.changed_files(root, base)
    say(f"{len(names)} files differ from {base[:9]}.")
    found = changed.concerned(root, names)
    if found.tests:
        some["tests"] = pytest_command(python, "-x", *sorted(found.tests), workers=CORES)
    if found.sheets:
        numbers = " or ".join(sorted(found.sheets))
        some["checks"] = pytest_command(python, "-x", "tests/checks", "-k", numbers, workers=CORES)
    if found.notebooks:
        some["notebooks"] = notebook_command(python, sorted(found.notebooks))
    return some


def run_steps(commands: dict, env: dict, cwd: Path = ROOT, limit_s: float = float("inf")) -> int:
    """Run every step, also after one failed; end in a table and one sentence.

    The steps of BESIDE run one after the other while the rest does, unless they are alone. What
    they print is shown when the rest is done. A step of the rest that is still running after
    `limit_s` is stopped, and the steps after it do not start.
    """
    started = time.monotonic()
    beside = [name for name in commands if name in BESIDE]
    first = [name for name in commands if name not in BESIDE]
    if not first:
        first, beside = beside, []
    results = {}
    with tempfile.TemporaryDirectory() as folder:

        def run_beside() -> None:
            for name in beside:
                with open(os.path.join(folder, name), "wb") as output:
                    results[name] = run_step(commands[name], env, cwd, output)

        thread = threading.Thread(target=run_beside)
        thread.start()
        try:
            for name in first:
                say(f"\n=== {name}")
                left_s = limit_s - (time.monotonic() - started)
                results[name] = run_step(commands[name], env, cwd, left_s=left_s)
        except KeyboardInterrupt:
            beside.clear()  # none of them is started any more
            raise
        finally:
            thread.join()
        for name in beside:
            say(f"\n=== {name}")
            output = Path(folder, name).read_text(encoding="utf-8", errors="replace")
            say(output.rstrip())
    return report({name: results[name] for name in commands}, time.monotonic() - started)


def run_step(
    command: list, env: dict, cwd: Path, output: "IO | None" = None, left_s: float = float("inf")
) -> tuple:
    """Run one step, into a file where one is given: how it ended, and how long it took in seconds."""
    if left_s <= 0:
        return "stopped", 0.0
    started = time.monotonic()
    errors = subprocess.STDOUT if output else None
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=errors) as process:
        try:
            code = process.wait(None if left_s == float("inf") else left_s)
            outcome = "FAILED" if code else "ok"
        except subprocess.TimeoutExpired:
            interrupt(process)
            outcome = "stopped"
    return outcome, time.monotonic() - started


def interrupt(process: subprocess.Popen) -> None:
    """Stop a step as Ctrl-C does, so that pytest ends its workers; by force where that does not help."""
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
    else:
        process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def report(results: dict, total_s: float) -> int:
    """Print the table of the steps and one sentence; the exit code."""
    say("")
    for name, (outcome, time_s) in results.items():
        note = "  (beside the others)" if name in BESIDE and len(results) > 1 else ""
        say(f"{name:10} {outcome:7} {time_s:6.1f} s{note}")
    failed = [name for name, (outcome, _) in results.items() if outcome == "FAILED"]
    stopped = [name for name, (outcome, _) in results.items() if outcome == "stopped"]
    if failed:
        say(f"Failed: {', '.join(failed)} ({total_s:.0f} s).")
    elif stopped:
        say(
            f"Nothing failed so far, and the time is up in: {', '.join(stopped)}. `make test` runs all."
        )
    else:
        say(f"All is well ({total_s:.0f} s).")
    return int(bool(failed))


def run_tests(names: list, torch: str) -> int:
    """Run the named steps, or all of them."""
    python = ready("dev", torch=torch)
    all_steps = steps(python)
    unknown = sorted(set(names) - set(all_steps))
    if unknown:
        sys.exit(f"No step is called {', '.join(unknown)}: the steps are {', '.join(all_steps)}.")
    return run_offline({name: all_steps[name] for name in names or all_steps}, python)


def run_check(torch: str) -> int:
    """Run what concerns the changed files."""
    python = ready("dev", torch=torch)
    return run_offline(check_steps(python), python, limit_s=CHECK_S)


def run_offline(commands: dict, python: Path, limit_s: float = float("inf")) -> int:
    """Run steps as CI does: offline, a thread a worker, without touching the learner's progress."""
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **child_environment(python),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # two workers of two threads each would wait for one another
            "QCOURSE_PROGRESS": os.path.join(folder, "progress.json"),
        }
        return run_steps(commands, env, limit_s=limit_s)


def run_script(path: str, *arguments: str, torch: str = "auto") -> int:
    """Run a script of the repository in the environment."""
    python = ready("dev", torch=torch)
    say(f"=== {path}")
    command = [str(python), path, *arguments]
    return subprocess.run(command, cwd=ROOT, env=child_environment(python), check=False).returncode


def bench(torch: str) -> int:
    """Run every benchmark; the highest exit code."""
    names = sorted(path.name for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    return max([0, *(run_script(f"benchmarks/{name}", torch=torch) for name in names)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="course.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument(
            "--torch", default="auto", metavar="BUILD", help="cpu, cuda or auto (default)"
        )
        return command

    add("lab", "open JupyterLab, with the options of `qcourse lab`: --port, --no-browser, its own")
    add("check", CHECK_HELP)
    add("test", "check everything").add_argument("steps", nargs="*", help="only these steps")
    add("exercises", "write exercises/ from solutions/")
    add("bench", "run benchmarks/")
    add("notebooks", "execute the notebooks in place").add_argument("paths", nargs="*")
    add("portability", "run all notebooks on other instruction sets and threads").add_argument(
        "parts", nargs="*"
    )
    return top


def main(arguments: list) -> int:
    """Run one command; returns its exit code."""
    check_python()
    options, more = parser().parse_known_args(arguments)
    if more and options.command != "lab":
        parser().error(f"unknown arguments: {' '.join(more)}")
    torch = options.torch
    run = {
        "lab": lambda: lab(more, torch),
        "check": lambda: run_check(torch),
        "test": lambda: run_tests(options.steps, torch),
        "exercises": lambda: run_script("tools/make_exercises.py", torch=torch),
        "bench": lambda: bench(torch),
        "notebooks": lambda: run_script("tools/run_notebooks.py", *options.paths, torch=torch),
        "portability": lambda: run_script("tools/portability.py", *options.parts, torch=torch),
    }
    return run[options.command]()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename}")
