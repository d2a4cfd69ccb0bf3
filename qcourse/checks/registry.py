"""Which sheets there are, and which exercise an id names.

A sheet is a file of this folder called sheet_NN.py that defines SHEET; no other list exists.
"""

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from qcourse.checks.exercise import Exercise, Sheet


def sheet_ids() -> list[str]:
    """Return the ids of all sheets, in order.

    >>> sheet_ids()[:2]
    ['01', '02']
    """
    names = [path.stem for path in Path(__file__).parent.glob("sheet_*.py")]
    return sorted(name.removeprefix("sheet_") for name in names)


def known_id(sheet_id: str) -> str:
    """Return the id in two digits: "01" for "1" too.

    Raises:
        ValueError: there is no such sheet.
    """
    known = sheet_ids()
    full_id = sheet_id.zfill(2)
    if full_id not in known:
        raise ValueError(f"sheet={sheet_id!r} is unknown; the sheets are {', '.join(known)}")
    return full_id


def load_sheet(sheet_id: str) -> Sheet:
    """Return the sheet called "01" (or "1"); raise ValueError if there is none."""
    module = import_module(f"qcourse.checks.sheet_{known_id(sheet_id)}")
    return module.SHEET


def find_exercise(exercise_id: object) -> Exercise:
    """Return the exercise called "01.2".

    Raises:
        TypeError: the id is not a string.
        ValueError: there is no such exercise; the message suggests the closest ids.

    >>> find_exercise("01.2").function
    'quantize'
    """
    if not isinstance(exercise_id, str):
        raise TypeError(
            f'exercise_id={exercise_id!r} must be a string such as "01.2", then the function'
        )
    known = _exercises(exercise_id.partition(".")[0])
    if exercise_id in known:
        return known[exercise_id]
    closest = get_close_matches(exercise_id.zfill(4), known, n=3, cutoff=0.0)
    suggested = ", ".join(repr(name) for name in closest)
    raise ValueError(f"exercise_id={exercise_id!r} is unknown; did you mean {suggested}?")


def _exercises(sheet_id: str) -> dict[str, Exercise]:
    """Return the exercises of one sheet by id, or those of all sheets if there is no such sheet."""
    # Importing a sheet takes time, so a known sheet is the only one loaded.
    names = sheet_ids()
    if sheet_id in names:
        names = [sheet_id]
    found = {}
    for name in names:
        for exercise in load_sheet(name).exercises:
            found[exercise.id] = exercise
    return found
