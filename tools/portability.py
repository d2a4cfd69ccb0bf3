"""Execute the notebooks on other instruction sets and numbers of threads; show each failed cell.

    python tools/portability.py                    all lessons and solutions, in all environments
    python tools/portability.py notebooks/16_whole_model.ipynb avx2-4      only these
    python tools/portability.py --fresh            also what has not changed since its last run

A processor with AVX-512 also runs the code that torch, oneDNN, MKL, OpenBLAS and NumPy have for
older ones; environment variables choose it. A sum in another order differs in its last digits, and
chaotic results (GPTQ at 3 bits, training, sampled text) then differ in their first ones. nbval
compares each notebook, as in `make test`. The result, benchmarks/results/portability.json, holds
every failed cell and, for each assert, the values that it compared. A run is repeated if the
notebook's code or outputs have changed, or a module of qcourse that it loaded.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

from assert_values import LOG
from instruction_sets import check_kernel, environments
from notebook_keys import ROOT, notebook_key, run_key
from portability_results import is_done, label, previous_run, read, record, write

TIMEOUT_S = 1800

# of the message of one failure
MAX_CHARACTERS = 1500


def run(notebook: Path, env: dict[str, str]) -> dict:
    """Execute a notebook under nbval; return its modules, seconds, failures and assert values."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        junit = Path(folder, "junit.xml")
        own = kernel_environment(Path(folder), log)
        command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", str(notebook)]
        command += ["--color=no", f"--junitxml={junit}", "-p", "no:cacheprovider"]

        started = time.monotonic()
        run_pytest(command, env | own)
        time_s = time.monotonic() - started
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        failures = failed_cells(junit)
    return {
        "modules": loaded_modules(rows),
        "time_s": round(time_s, 1),
        "failures": failures,
        "asserts": [row for row in rows if "source" in row],
    }


def run_pytest(command: list[str], env: dict[str, str]) -> None:
    """Run pytest; raise RuntimeError if it could not run the notebook at all."""
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=TIMEOUT_S, check=False, **options)
    # 1 stands for failed cells; other codes mean that pytest itself failed
    if done.returncode not in (0, 1):
        output = done.stdout + done.stderr
        raise RuntimeError(f"pytest ended with {done.returncode}: {output}")


def kernel_environment(folder: Path, log: Path) -> dict[str, str]:
    """Return the variables of a kernel that logs its asserts, offline, with its own progress."""
    # IPython loads the extension when the kernel starts
    profile = folder / "profile_default"
    profile.mkdir()
    config = "c.IPKernelApp.extensions = ['assert_values']\n"
    (profile / "ipython_kernel_config.py").write_text(config)
    return {
        "IPYTHONDIR": str(folder),
        "PYTHONPATH": str(ROOT / "tools"),
        LOG: str(log),
        "HF_HUB_OFFLINE": "1",
        "QCOURSE_PROGRESS": str(folder / "progress.json"),
    }


def loaded_modules(rows: list[dict]) -> str:
    """Return the modules of qcourse in a log, relative to the repository, with spaces between."""
    names = set()
    for row in rows:
        for name in row.get("modules", []):
            names.add(str(Path(name).relative_to(ROOT)))
    return " ".join(sorted(names))


def failed_cells(junit: Path) -> list[dict[str, str]]:
    """Return each failed cell of a report of pytest with its message."""
    failures = []
    for case in ET.parse(junit).iter("testcase"):
        # the child of a case is its failure
        if len(case):
            failures.append({"cell": case.get("name"), "said": message_of(case[0].text)})
    return failures


def message_of(text: str) -> str:
    """Return nbval's message without the cell's source: the error, or expected against got."""
    # as terminals get them, and as XML escapes them
    without_colors = re.sub(r"(\x1b|#x1B)\[[0-9;]*m", "", text)
    traceback = without_colors.partition("Traceback:")[2]
    return (traceback or without_colors).strip()[-MAX_CHARACTERS:]


def run_and_record(notebook: Path, name: str, env: dict[str, str]) -> None:
    """Run a notebook in an environment, store the outcome, and print one line about it."""
    line = f"{name:10} {label(notebook):48}"
    notebook_hash = notebook_key(notebook)
    try:
        outcome = run(notebook, env)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"{line} did not finish: {error}", flush=True)
        return
    outcome["key"] = run_key(notebook_hash, outcome["modules"])

    # read again: another process of this tool may have written in the meantime
    results = read()
    record(results, label(notebook), name, outcome)
    write(results)
    cells = [failure["cell"].rpartition("::")[2] for failure in outcome["failures"]]
    print(f"{line} {outcome['time_s']:6.1f} s  {', '.join(cells) or 'ok'}", flush=True)


def show(results: dict, notebooks: list[Path], names: list[str]) -> int:
    """Print each failed cell in each environment; return their number."""
    count = 0
    for notebook in notebooks:
        for name in names:
            outcome = previous_run(results, notebook, name) or {"failures": []}
            for failure in outcome["failures"]:
                count += 1
                print(f"\n{label(notebook)}, {failure['cell']}, {name}")
                print(failure["said"], flush=True)
    print(f"\n{count} failed cells in {len(notebooks)} notebooks and {len(names)} environments.")
    return count


def choose(known: dict[str, dict[str, str]]) -> tuple[list[Path], list[str], bool]:
    """Return the notebooks and environments of the command line, or all, and --fresh."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parts_help = f"notebooks, and environments among {', '.join(known)}"
    parser.add_argument("parts", nargs="*", help=parts_help)
    parser.add_argument("--fresh", action="store_true", help="repeat runs that are still valid")
    options = parser.parse_args()

    # an argument is the name of an environment or a path
    names = [part for part in options.parts if part in known]
    notebooks = [Path(part) for part in options.parts if part not in known]
    missing = [str(path) for path in notebooks if not path.is_file()]
    if missing:
        parser.error(f"neither a notebook nor a known environment: {', '.join(missing)}")
    if not notebooks:
        for folder in ("notebooks", "solutions"):
            notebooks += sorted((ROOT / folder).glob("*.ipynb"))
    return notebooks, names or list(known), options.fresh


def main() -> int:
    """Do the runs that are missing or no longer valid; return 1 if a cell failed."""
    known = environments()
    notebooks, names, fresh = choose(known)
    for name in names:
        # each notebook is compared with its last run in this environment
        env = os.environ | known[name]
        waiting = [path for path in notebooks if fresh or not is_done(read(), path, name)]
        if waiting:
            check_kernel(name, env)
        for notebook in waiting:
            run_and_record(notebook, name, env)
    return 1 if show(read(), notebooks, names) else 0


if __name__ == "__main__":
    sys.exit(main())
