"""The results of tools/portability.py, which are in benchmarks/results/portability.json.

How it differs from ``portability.py``: that runs notebooks; this keeps what came out.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from notebook_keys import ROOT, notebook_key, run_key

sys.path.insert(0, str(ROOT / "benchmarks"))
from _stamp import RESULTS, stamp

from qcourse.machine import write_whole

RESULT = RESULTS / "portability.json"

# of the values of one assert
MAX_CHARACTERS = 200


def record(results: dict, notebook: str, name: str, outcome: dict) -> None:
    """Put one run into the results, in place of an older one of the same environment.

    The results map each assert to its values, and each value to the environments that have it.
    """
    entry = results["notebooks"].setdefault(notebook, {"runs": {}, "asserts": {}})
    asserts = without_environment(entry["asserts"], name)
    for row in outcome.pop("asserts"):
        place = f"cell {row['cell']}, line {row['line']}: {row['source']}"
        first_line = row["values"].partition("\n")[0]
        # an address in memory is new in each run
        values = re.sub(r" at 0x[0-9a-f]+", "", first_line)[:MAX_CHARACTERS]
        names = asserts.setdefault(place, {}).setdefault(values, [])
        if name not in names:
            names.append(name)
    entry["asserts"] = {place: values for place, values in asserts.items() if values}
    entry["runs"][name] = outcome


def without_environment(asserts: dict, name: str) -> dict:
    """Return the values of asserts without those that only this environment has."""
    # environments with equal values share an entry
    remaining: dict = {}
    for place, values in asserts.items():
        remaining[place] = {}
        for text, names in values.items():
            others = [other for other in names if other != name]
            if others:
                remaining[place][text] = others
    return remaining


def read() -> dict:
    """Return the results so far."""
    if not RESULT.exists():
        return {"stamp": {}, "notebooks": {}}
    return json.loads(RESULT.read_text(encoding="utf-8"))


def write(results: dict) -> None:
    """Write the results in one piece, with the machine and the commit."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    results["stamp"] = {**stamp(), "commit": commit.stdout.strip()}
    results["notebooks"] = dict(sorted(results["notebooks"].items()))
    write_whole(RESULT, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def previous_run(results: dict, notebook: Path, name: str) -> dict | None:
    """Return the run of a notebook in an environment, if there is one."""
    # a notebook may be new
    entry = results["notebooks"].get(label(notebook), {"runs": {}})
    return entry["runs"].get(name)


def is_done(results: dict, notebook: Path, name: str) -> bool:
    """Return whether the results hold this run and nothing that it depends on has changed."""
    before = previous_run(results, notebook, name)
    if before is None:
        return False
    return before["key"] == run_key(notebook_key(notebook), before["modules"])


def label(notebook: Path) -> str:
    """Return a notebook's name in the results."""
    return notebook.resolve().relative_to(ROOT).as_posix()
