"""The course's commands: each sets .venv up where it is missing, then runs inside it.

    python tools/course.py lab         JupyterLab, opened at the first lesson
    python tools/course.py test        all that CI checks: lint, format, types, sheets, tests, notebooks, browser
    python tools/course.py exercises   exercises/ written anew from solutions/
    python tools/course.py bench       each script of benchmarks/
    python tools/course.py notebooks   lessons and solutions executed again, in place

It runs before anything is installed (tools/venv_setup.py sees to that), so it needs the standard library only. What
stops a reader ends in one sentence. The Makefile is a thin face of this file.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from venv_setup import ROOT, check_python, child_environment, ready, say


def lab(arguments: list) -> int:
    """Become `qcourse lab`, which starts JupyterLab and stays until it ends."""
    command = [str(ready("lab")), "-m", "qcourse.cli", "lab", *arguments]
    os.chdir(ROOT)
    if os.name == "posix":  # a signal sent to this command then ends the server
        os.execv(command[0], command)
    return subprocess.run(command, check=False).returncode


def steps(python: Path, root: Path = ROOT) -> dict:
    """What `test` runs, by name and in order."""
    module = [str(python), "-m"]
    workers = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]  # a notebook's cells stay in order
    folders = [name for name in ("notebooks", "solutions") if any((root / name).glob("*.ipynb"))]
    lessons = {"notebooks": [*module, "pytest", "--nbval", "--nbval-current-env", *folders, *workers]}
    return {
        "lint": [*module, "ruff", "check"],
        "format": [*module, "ruff", "format", "--check"],
        "types": [*module, "mypy"],
        "sheets": [str(python), "tools/make_exercises.py", "--check"],
        "tests": [*module, "pytest", "qcourse", "tests", "--ignore=tests/browser", *workers],
        **(lessons if folders else {}),
        "browser": [*module, "pytest", "tests/browser"],
    }


def run_steps(commands: dict, env: dict, cwd: Path = ROOT) -> int:
    """Run every step, also after one failed; end in a table and one sentence."""
    results = {}
    for number, (name, command) in enumerate(commands.items(), start=1):
        say(f"\n=== {number}/{len(commands)} {name}")
        started = time.monotonic()
        code = subprocess.run(command, cwd=cwd, env=env, check=False).returncode
        results[name] = ("FAILED" if code else "ok", time.monotonic() - started)
    say("\n" + "\n".join(f"{name:10} {outcome:7} {time_s:6.1f} s" for name, (outcome, time_s) in results.items()))
    failed = [name for name, (outcome, _) in results.items() if outcome == "FAILED"]
    total_s = sum(time_s for _, time_s in results.values())
    say(f"Failed: {', '.join(failed)} ({total_s:.0f} s)." if failed else f"All is well ({total_s:.0f} s).")
    return int(bool(failed))


def run_tests(names: list) -> int:
    """Run the named steps, or all of them."""
    python = ready("dev")
    all_steps = steps(python)
    unknown = sorted(set(names) - set(all_steps))
    if unknown:
        sys.exit(f"No step is called {', '.join(unknown)}: the steps are {', '.join(all_steps)}.")
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **child_environment(python),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # two workers of two threads each would wait for one another on two cores
            "QCOURSE_PROGRESS": os.path.join(folder, "progress.json"),  # the learner's own stays as it is
        }
        return run_steps({name: all_steps[name] for name in names or all_steps}, env)


def run_script(path: str, *arguments: str) -> int:
    """Run a script of the repository in the environment."""
    python = ready("dev")
    say(f"=== {path}")
    command = [str(python), path, *arguments]
    return subprocess.run(command, cwd=ROOT, env=child_environment(python), check=False).returncode


def bench() -> int:
    """Run every benchmark; the highest exit code."""
    names = sorted(path.name for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    return max([0, *(run_script(f"benchmarks/{name}") for name in names)])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="course.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("lab", help="JupyterLab, with the options of `qcourse lab`: --port, --no-browser, its own")
    commands.add_parser("test", help="all checks").add_argument("steps", nargs="*", help="only these steps")
    commands.add_parser("exercises", help="write exercises/ from solutions/")
    commands.add_parser("bench", help="run benchmarks/")
    commands.add_parser("notebooks", help="execute the notebooks in place").add_argument("paths", nargs="*")
    return top


def main(arguments: list) -> int:
    """Run one command; returns its exit code."""
    check_python()
    options, more = parser().parse_known_args(arguments)
    if more and options.command != "lab":
        parser().error(f"unknown arguments: {' '.join(more)}")
    run = {
        "lab": lambda: lab(more),
        "test": lambda: run_tests(options.steps),
        "exercises": lambda: run_script("tools/make_exercises.py"),
        "bench": bench,
        "notebooks": lambda: run_script("tools/run_notebooks.py", *options.paths),
    }
    return run[options.command]()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nStopped. The same command goes on from here.")
    except OSError as error:
        sys.exit(f"{error.strerror}: {error.filename}")
