"""Execute every lesson and solution on other instruction sets and numbers of threads, and show each cell that fails.

    python tools/portability.py                                   all notebooks in all environments
    python tools/portability.py notebooks/16_whole_model.ipynb avx2-4       these notebooks, these environments
    python tools/portability.py --fresh                           also what was run before and has not changed

A processor with AVX-512 also runs the code that torch, oneDNN, MKL, OpenBLAS and NumPy have for older ones: environment
variables choose it. A sum in another order differs in its last digits, and what is chaotic (GPTQ at 3 bits, training,
sampled text) then differs in its first ones. Each notebook is judged as `make test` judges it, by nbval. The result,
benchmarks/results/portability.json, holds every failed cell and, for each assert, the values that it compared; a run is
repeated when the notebook's code or outputs changed, or a module of qcourse that it loaded.
"""

import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import nbformat
from assert_values import LOG
from instruction_sets import check_kernel, environments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from _stamp import RESULTS, stamp  # noqa: E402

from qcourse.machine import write_whole  # noqa: E402

RESULT = RESULTS / "portability.json"
TIMEOUT_S = 1800
MAX_CHARACTERS = 200  # of the values of one assert


def code_of(source: str) -> str:
    """What a text of Python computes: its syntax tree without comments, layout and docstrings."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a magic command
        return source
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body[0] = ast.Pass()
    return ast.dump(tree)


def notebook_key(path: Path) -> str:
    """A hash of a notebook's code and of the outputs that nbval compares."""
    parts = []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            outputs = (
                []
                if "nbval-ignore-output" in tags
                else [o for o in cell.outputs if "image/png" not in str(o)]
            )
            parts += [code_of(cell.source), str(tags), str(outputs)]
    return digest("\n".join(parts))


def module_key(path: Path) -> str:
    """A hash of what a module of qcourse computes; empty where it is gone."""
    return digest(code_of(path.read_text(encoding="utf-8"))) if path.exists() else ""


def digest(text: str) -> str:
    """Sixteen hexadecimal digits of a hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def key(notebook_hash: str, modules: str) -> str:
    """What a run depends on: the notebook and the modules that its kernel had loaded in the end."""
    return digest(notebook_hash + "".join(module_key(ROOT / name) for name in modules.split()))


def run(notebook: Path, env: dict[str, str]) -> dict:
    """Execute a notebook under nbval in one environment: modules, seconds, failures, and the values of each assert."""
    with tempfile.TemporaryDirectory() as folder:
        log, junit, profile = (
            Path(folder, "log"),
            Path(folder, "junit.xml"),
            Path(folder, "profile_default"),
        )
        profile.mkdir()
        profile.joinpath("ipython_kernel_config.py").write_text(
            "c.IPKernelApp.extensions = ['assert_values']\n"
        )
        own = {"IPYTHONDIR": folder, "PYTHONPATH": str(ROOT / "tools"), LOG: str(log)}
        offline = {"HF_HUB_OFFLINE": "1", "QCOURSE_PROGRESS": str(Path(folder, "progress.json"))}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "--nbval",
            "--nbval-current-env",
            "--color=no",
            str(notebook),
        ]
        started = time.monotonic()
        done = subprocess.run(
            [*command, f"--junitxml={junit}", "-p", "no:cacheprovider"],
            cwd=ROOT, env=env | own | offline, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
        time_s = time.monotonic() - started
        if done.returncode not in (0, 1):
            raise RuntimeError(
                f"pytest ended with {done.returncode} for {notebook}: {done.stdout}{done.stderr}"
            )
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        failures = [
            f"{case.get('name')}\n{case[0].text}"
            for case in ET.parse(junit).iter("testcase")
            if len(case)
        ]
    loaded = {name for row in rows for name in row.get("modules", [])}
    return {
        "modules": " ".join(sorted(str(Path(name).relative_to(ROOT)) for name in loaded)),
        "time_s": round(time_s, 1),
        "failures": [what_failed(text) for text in failures],
        "asserts": [row for row in rows if "source" in row],
    }


def what_failed(text: str) -> dict[str, str]:
    """The cell, and what nbval says of it without the cell's source: the error, or expected against got."""
    cell, _, words = text.partition("\n")
    words = re.sub(r"(\x1b|#x1B)\[[0-9;]*m", "", words)  # colors
    said = words.partition("Traceback:")[2] or words
    return {"cell": cell, "said": said.strip()[-1500:]}


def record(results: dict, notebook: str, name: str, outcome: dict) -> None:
    """Put one run into the results, in the place of an older one; environments with equal values share an entry."""
    entry = results["notebooks"].setdefault(notebook, {"runs": {}, "asserts": {}})
    asserts = entry["asserts"]
    for place, values in list(asserts.items()):
        others = {
            text: [other for other in names if other != name] for text, names in values.items()
        }
        asserts[place] = {text: names for text, names in others.items() if names}
    for row in outcome.pop("asserts"):
        place = f"cell {row['cell']}, line {row['line']}: {row['source']}"
        values = re.sub(r" at 0x[0-9a-f]+", "", row["values"].partition("\n")[0])[:MAX_CHARACTERS]
        names = asserts.setdefault(place, {}).setdefault(values, [])
        names += [] if name in names else [name]
    entry["asserts"] = {place: values for place, values in asserts.items() if values}
    entry["runs"][name] = outcome


def read() -> dict:
    """The results so far."""
    return (
        json.loads(RESULT.read_text(encoding="utf-8"))
        if RESULT.exists()
        else {"stamp": {}, "notebooks": {}}
    )


def write(results: dict) -> None:
    """Write the results whole, stamped with the commit as well."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    results["stamp"] = {**stamp(), "commit": commit.stdout.strip()}
    results["notebooks"] = dict(sorted(results["notebooks"].items()))
    write_whole(RESULT, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def is_done(results: dict, notebook: Path, name: str) -> bool:
    """Whether this run is among the results, and nothing that it depends on has changed."""
    run_before = results["notebooks"].get(label(notebook), {"runs": {}})["runs"].get(name)
    return run_before is not None and run_before["key"] == key(
        notebook_key(notebook), run_before["modules"]
    )


def label(notebook: Path) -> str:
    """How a notebook is called in the results."""
    return notebook.resolve().relative_to(ROOT).as_posix()


def show(results: dict, notebooks: list[Path], names: list[str]) -> int:
    """Print each failed cell in each environment; returns how many there are."""
    count, nothing = 0, {"runs": {}, "failures": []}
    for notebook, name in itertools.product(map(label, notebooks), names):
        for failure in (
            results["notebooks"].get(notebook, nothing)["runs"].get(name, nothing)["failures"]
        ):
            count += 1
            print(f"\n{notebook}, {failure['cell']}, {name}\n{failure['said']}", flush=True)
    print(f"\n{count} failed cells in {len(notebooks)} notebooks and {len(names)} environments.")
    return count


def main() -> int:
    """Run what was asked for and has not been run yet; returns 1 where a cell failed."""
    known = environments()
    everything = [
        path
        for folder in ("notebooks", "solutions")
        for path in sorted((ROOT / folder).glob("*.ipynb"))
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", help=f"notebooks, and environments among {', '.join(known)}"
    )
    parser.add_argument("--fresh", action="store_true", help="run again also what has not changed")
    options = parser.parse_args()
    names = [part for part in options.parts if part in known] or list(known)
    notebooks = [Path(part) for part in options.parts if part not in known] or everything
    if missing := [str(path) for path in notebooks if not path.is_file()]:
        parser.error(
            f"neither a notebook nor an environment of this processor: {', '.join(missing)}"
        )

    for name in names:
        env = os.environ | known[name]
        waiting = [path for path in notebooks if options.fresh or not is_done(read(), path, name)]
        if waiting:
            check_kernel(name, env)
        for notebook in waiting:
            before = notebook_key(notebook)
            try:
                outcome = run(notebook, env)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                print(f"{name:10} {label(notebook):48} was not finished: {error}", flush=True)
                continue
            outcome["key"] = key(before, outcome["modules"])
            results = read()  # another run of this tool may have written meanwhile
            record(results, label(notebook), name, outcome)
            write(results)
            failed = ", ".join(
                failure["cell"].rpartition("::")[2] for failure in outcome["failures"]
            )
            print(
                f"{name:10} {label(notebook):48} {outcome['time_s']:6.1f} s  {failed or 'ok'}",
                flush=True,
            )
    return int(show(read(), notebooks, names) > 0)


if __name__ == "__main__":
    sys.exit(main())
