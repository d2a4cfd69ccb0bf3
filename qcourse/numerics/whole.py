"""The check that an argument is a whole number, for modules that import nothing else."""

from typing import Any


def check_whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> None:
    """Raise ValueError unless value is a Python int, neither below `least` nor above `most`.

    >>> check_whole("bits", 9, 2, 8)
    Traceback (most recent call last):
    ValueError: bits=9 must be a whole number (a Python int) from 2 to 8
    """
    allowed = ""
    if most is not None:
        allowed = f" from {least} to {most}"
    elif least is not None:
        allowed = f" of at least {least}"

    # True, 8.0 and np.uint8(8) would pass the comparisons, and shift wrongly.
    is_whole = type(value) is int
    too_small = is_whole and least is not None and value < least
    too_large = is_whole and most is not None and value > most
    if not is_whole or too_small or too_large:
        raise ValueError(f"{name}={value!r} must be a whole number (a Python int){allowed}")
