"""The best result of each exercise, kept on this computer.

One small JSON file holds {"01.2": {"points": 3, "date": "2026-01-31", "edition": 2}}. It is read
again before each change and replaced as a whole, so a crash leaves either the old file or the new
one. A file that cannot be read is renamed with a warning. Edition 1 of the course had other sheet
numbers; its results are read under the exercises' present ids.

The file is progress.json in the user's data folder, or the path in the environment variable
QCOURSE_PROGRESS.
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

# The numbers of the sheets have changed once: sheets 03 to 13 of edition 1 are 04 to 14 now.
EDITION = 2
_MOVED_SHEETS = range(3, 14)


def progress_file() -> Path:
    """Return the path of the progress file."""
    chosen = os.environ.get("QCOURSE_PROGRESS")
    if chosen:
        return Path(chosen)
    folder = platformdirs.user_data_dir("qcourse", appauthor=False)
    return Path(folder, "progress.json")


def read_progress(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return the best result of each exercise tried, {id: {"points", "date"}}.

    A damaged file is renamed, with a warning.
    """
    path = path or progress_file()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:  # neither JSON nor UTF-8
        found = None
    if _is_progress(found):
        return _in_this_edition(found)
    aside = _free_name(path)
    path.replace(aside)
    warnings.warn(
        f"{path} could not be read; it is kept as {aside.name} and progress starts from zero",
        stacklevel=2,
    )
    return {}


def record(verdict: Verdict, path: Path | None = None) -> None:
    """Keep the verdict if it is the exercise's best so far; an untouched stub does not count.

    If the file cannot be written, warn.
    """
    path = path or progress_file()
    try:
        # Running a solution sheet says nothing about the learner.
        is_solution = Path.cwd().name == "solutions"
        if verdict.status == NOT_WRITTEN or is_solution:
            return
        results = read_progress(path)
        best = results.get(verdict.exercise_id)
        if best is None or verdict.points > best["points"]:
            today = date.today().isoformat()
            result = {"points": verdict.points, "date": today, "edition": EDITION}
            results[verdict.exercise_id] = result
            write_whole(path, json.dumps(results, indent=1, sort_keys=True))
    except OSError as error:
        warnings.warn(f"progress was not saved: {error.strerror}: {path}", stacklevel=3)


def _in_this_edition(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results under the exercises' present ids; of two for one, the better."""
    moved: dict[str, dict[str, Any]] = {}
    for exercise_id, result in results.items():
        new_id = exercise_id
        if result.get("edition") != EDITION:
            new_id = _renumbered(exercise_id)
        other = moved.get(new_id)
        if other is None or result["points"] > other["points"]:
            moved[new_id] = {**result, "edition": EDITION}
    return moved


def _renumbered(exercise_id: str) -> str:
    sheet, dot, number = exercise_id.partition(".")
    if sheet.isdigit() and int(sheet) in _MOVED_SHEETS:
        sheet = f"{int(sheet) + 1:02}"
    return sheet + dot + number


def _is_progress(found: Any) -> bool:
    return isinstance(found, dict) and all(map(_is_result, found.values()))


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict):
        return False
    has_points = isinstance(result.get("points"), int | float)
    has_date = isinstance(result.get("date"), str)
    return has_points and has_date


def _free_name(path: Path) -> Path:
    """Return the first unused path progress.damaged-1.json, progress.damaged-2.json, ..."""
    number = 1
    while True:
        free = path.with_name(f"{path.stem}.damaged-{number}{path.suffix}")
        if not free.exists():
            return free
        number += 1
