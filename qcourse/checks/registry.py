"""Which sheets there are, and which exercise an id means.

The idea: a sheet is a file here called sheet_NN.py that holds SHEET; nothing else lists it.
"""

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from qcourse.checks.exercise import Exercise, Sheet


def sheet_ids() -> list[str]:
    """The ids of all sheets, in order.

    >>> sheet_ids()[:2]
    ['01', '02']
    """
    return sorted(
        path.stem.removeprefix("sheet_") for path in Path(__file__).parent.glob("sheet_*.py")
    )


def known_id(sheet_id: str) -> str:
    """The id as the sheet's file has it: "01" for "1" too.

    Raises:
        ValueError: there is no such sheet.
    """
    if sheet_id.zfill(2) not in sheet_ids():
        raise ValueError(f"sheet={sheet_id!r} is unknown; the sheets are {', '.join(sheet_ids())}")
    return sheet_id.zfill(2)


def load_sheet(sheet_id: str) -> Sheet:
    """The sheet called "01" (or "1").

    Raises:
        ValueError: there is no such sheet.
    """
    return import_module(f"qcourse.checks.sheet_{known_id(sheet_id)}").SHEET


def find_exercise(exercise_id: object) -> Exercise:
    """The exercise called "01.2".

    Raises:
        TypeError: the id is not a string.
        ValueError: there is no such exercise; the message names the nearest.

    >>> find_exercise("01.2").function
    'quantize'
    >>> find_exercise("01.22")
    Traceback (most recent call last):
    ValueError: exercise_id='01.22' is unknown; did you mean '01.2', '01.5', '01.4'?
    """
    if not isinstance(exercise_id, str):
        raise TypeError(
            f'exercise_id={exercise_id!r} must be a string such as "01.2", then the function'
        )
    its_sheet = [name for name in sheet_ids() if name == exercise_id.partition(".")[0]]
    known = {
        exercise.id: exercise
        for name in its_sheet or sheet_ids()
        for exercise in load_sheet(name).exercises
    }
    if exercise_id not in known:
        near = get_close_matches(exercise_id.zfill(4), known, n=3, cutoff=0.0)
        raise ValueError(
            f"exercise_id={exercise_id!r} is unknown; did you mean {', '.join(map(repr, near))}?"
        )
    return known[exercise_id]
