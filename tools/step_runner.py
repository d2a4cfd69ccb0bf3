"""Run commands one after the other, some of them beside the others, and print a table at the end.

Standard library only: tools/course.py imports this before anything is installed.
"""

import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from venv_setup import ROOT, say

# steps that use one core: they run while the others do
BESIDE = ("types", "browser")

# seconds that a stopped step has to end by itself
STOP_S = 10.0
NO_LIMIT = float("inf")


def run_steps(commands: dict, env: dict, cwd: Path = ROOT, limit_s: float = NO_LIMIT) -> int:
    """Run every step, also after one has failed; print a table and return the exit code.

    The steps of BESIDE run in order while the others run; their output comes last. After `limit_s`,
    the running step is stopped and no other one starts.
    """
    started = time.monotonic()
    first, beside = split_names(commands)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = (beside, commands, env, cwd, Path(folder), results)
        thread = threading.Thread(target=run_beside, args=arguments)
        thread.start()
        try:
            for name in first:
                say(f"\n=== {name}")
                left_s = limit_s - (time.monotonic() - started)
                results[name] = run_step(commands[name], env, cwd, left_s=left_s)
        except KeyboardInterrupt:
            # the thread starts none of these any more
            beside.clear()
            raise
        finally:
            thread.join()
        for name in beside:
            show_output(name, Path(folder, name))

    # the table has the order of the commands
    in_order = {name: results[name] for name in commands}
    return report(in_order, time.monotonic() - started)


def split_names(commands: dict) -> tuple:
    """Return the names of the steps that run one by one, and of those that run beside them."""
    beside = [name for name in commands if name in BESIDE]
    first = [name for name in commands if name not in BESIDE]
    # alone, the steps of BESIDE have nothing to run beside
    if not first:
        return beside, []
    return first, beside


def run_beside(
    names: list, commands: dict, env: dict, cwd: Path, folder: Path, results: dict
) -> None:
    """Run steps in order, each with its output in a file of `folder`, and add to `results`."""
    for name in names:
        with (folder / name).open("wb") as output:
            results[name] = run_step(commands[name], env, cwd, output)


def show_output(name: str, path: Path) -> None:
    """Print what a step beside the others has written to its file."""
    say(f"\n=== {name}")
    output = path.read_text(encoding="utf-8", errors="replace")
    say(output.rstrip())


def run_step(
    command: list, env: dict, cwd: Path, output: "IO | None" = None, left_s: float = NO_LIMIT
) -> tuple:
    """Run one step, its output into a file if one is given; return (outcome, seconds)."""
    if left_s <= 0:
        return "stopped", 0.0
    started = time.monotonic()
    # both streams into the file, in the order in which they were written
    errors = subprocess.STDOUT if output else None
    with subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=errors) as process:
        try:
            code = process.wait(None if left_s == NO_LIMIT else left_s)
            outcome = "FAILED" if code else "ok"
        except subprocess.TimeoutExpired:
            interrupt(process)
            outcome = "stopped"
    return outcome, time.monotonic() - started


def interrupt(process: subprocess.Popen) -> None:
    """Stop a step as Ctrl-C does, so that pytest ends its workers; kill it if it goes on."""
    if os.name == "posix":
        process.send_signal(signal.SIGINT)
    else:
        process.terminate()
    try:
        # pytest needs a moment to report
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def report(results: dict, total_s: float) -> int:
    """Print the table of the steps and one sentence; return the exit code."""
    say("")
    failed = []
    stopped = []
    for name, (outcome, time_s) in results.items():
        note = "  (beside the others)" if name in BESIDE and len(results) > 1 else ""
        say(f"{name:10} {outcome:7} {time_s:6.1f} s{note}")
        if outcome == "FAILED":
            failed.append(name)
        elif outcome == "stopped":
            stopped.append(name)

    if failed:
        say(f"Failed: {', '.join(failed)} ({total_s:.0f} s).")
    elif stopped:
        unfinished = ", ".join(stopped)
        say(f"Nothing failed so far, and the time is up in: {unfinished}. `make test` runs all.")
    else:
        say(f"All is well ({total_s:.0f} s).")
    return 1 if failed else 0
