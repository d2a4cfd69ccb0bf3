"""The best result of each exercise, kept on this computer.

The idea: one small JSON file, {"01.2": {"points": 3, "date": "2026-01-31"}}, read anew before each change, written
aside and then renamed, so that a crash leaves either the old file or the new one. A file that cannot be read is set
aside under another name, with a word; nothing is lost in silence.

The file is progress.json in the user's data folder, or the one that the environment variable QCOURSE_PROGRESS names.
"""

import json
import os
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import platformdirs

from qcourse.checks.judge import NOT_WRITTEN, Verdict
from qcourse.machine import write_whole


def progress_file() -> Path:
    """Where progress is kept."""
    named = os.environ.get("QCOURSE_PROGRESS")
    return (
        Path(named)
        if named
        else Path(platformdirs.user_data_dir("qcourse", appauthor=False), "progress.json")
    )


def read_progress(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """The best result of each exercise that was tried, {id: {"points", "date"}}; a damaged file is set aside."""
    path = path or progress_file()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:  # neither JSON nor UTF-8
        found = None
    if _is_progress(found):
        return found
    aside = _free_name(path)
    path.replace(aside)
    warnings.warn(
        f"{path} could not be read; it is kept as {aside.name} and progress starts anew",
        stacklevel=2,
    )
    return {}


def record(verdict: Verdict, path: Path | None = None) -> None:
    """Keep the verdict where it is the exercise's best; a stub that was never touched is no try.

    Where the file cannot be written, a warning says so.
    """
    path = path or progress_file()
    try:
        if (
            verdict.status == NOT_WRITTEN or Path.cwd().name == "solutions"
        ):  # a solution sheet is nobody's progress
            return
        results = read_progress(path)
        best = results.get(verdict.exercise_id)
        if best is None or verdict.points > best["points"]:
            results[verdict.exercise_id] = {
                "points": verdict.points,
                "date": date.today().isoformat(),
            }
            write_whole(path, json.dumps(results, indent=1, sort_keys=True))
    except OSError as error:
        warnings.warn(f"progress was not saved: {error.strerror}: {path}", stacklevel=3)


def _is_progress(found: Any) -> bool:
    """Whether it is what `record` writes."""
    return isinstance(found, dict) and all(
        isinstance(result, dict)
        and isinstance(result.get("points"), int | float)
        and isinstance(result.get("date"), str)
        for result in found.values()
    )


def _free_name(path: Path) -> Path:
    """A name beside the file that nothing has yet."""
    number = 1
    while (free := path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")).exists():
        number += 1
    return free
