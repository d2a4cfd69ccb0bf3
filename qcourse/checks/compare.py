"""How an answer differs from the expected one: numbers, tuples of results, text and refusals.

Plain data (`answers.py`) is compared by its shape first, so the cost of a comparison depends on the
size of the expected answer, not of the given one.

`words.py` writes out what differs; `judge.py` turns it into a verdict.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcourse.checks.answers import Failure
from qcourse.checks.words import is_small, pinpoint, show

NOTHING = 1e-6  # absolute tolerance if every expected value is 0
BESIDES = 3  # how many other numbers a refusal may name: a remainder, say, or a dtype
WIDTHS = np.dtype(np.uint8), np.dtype(np.int32)  # the dtypes of packed answers

# NumPy's letters for the accepted dtypes ("i" and "u" integers, "f" floats, "b" booleans), and what
# a message calls them, by the letter of the expected dtype. The only unsigned one is uint8.
INTEGER = "iu"
ACCEPTED = {
    "i": (INTEGER, "an integer dtype"),
    "u": (INTEGER, "uint8"),
    "f": (INTEGER + "f", "floats"),
    "b": ("b", "booleans"),
}


@dataclass(frozen=True)
class Difference:
    """What came and what should have come, kept apart because a grader shows only the first."""

    got: str
    expected: str


def difference(
    answer: Any, expected: Any, tolerance: float, *, kinds: bool = True
) -> Difference | None:
    """Return how the answer differs from the expected one, or None if it does not.

    Args:
        answer, expected: plain data or Failures.
        tolerance: see `Exercise`.
        kinds: also compare the kind of dtype, and the numbers that a refusal names.

    >>> difference((1, 2.0), np.array([1, 2]), 0.0)
    Difference(got='returned [1.0, 2.0] (float64)', expected='an integer dtype')
    >>> difference((1, 2), np.array([1, 2]), 0.0) is None
    True
    """
    if isinstance(answer, Failure) or isinstance(expected, Failure):
        return _failure_difference(answer, expected, kinds)
    if isinstance(expected, tuple):
        return _tuple_difference(answer, expected, tolerance, kinds)
    if isinstance(expected, str) or isinstance(answer, str):
        same = type(answer) is type(expected) and answer == expected
        return None if same else Difference(f"returned {show(answer)}", show(expected))
    return _array_difference(answer, np.asarray(expected), tolerance, kinds)


def _failure_difference(answer: Any, expected: Any, kinds: bool) -> Difference | None:
    if isinstance(answer, Failure) and isinstance(expected, Failure):
        same_kind = expected.kinds[0] in answer.kinds
        if same_kind and (not kinds or _names(answer, _numbers(expected))):
            return None
    wanted = _wanted(expected, kinds)
    if not isinstance(answer, Failure):
        return Difference(f"returned {show(answer)}", wanted)
    if answer.kinds[0] == "UnreadableError":
        return Difference(answer.message, wanted)
    if answer.kinds[0] == "ChangedArgumentError":
        return Difference(answer.message, "its arguments as they were")
    where = f" ({answer.line})" if answer.line else ""
    return Difference(f"raised {answer.kinds[0]}: {answer.message}{where}", wanted)


def _numbers(failure: Failure) -> list[str]:
    """Return the numbers in a refusal's message, which identify the case in any wording."""
    return re.findall(r"\d+", failure.message)


def _names(failure: Failure, numbers: list[str]) -> bool:
    """Return whether a refusal names these numbers and few others; a list of all would fit any."""
    if not numbers:
        return True
    named = set(_numbers(failure))
    return named.issuperset(numbers) and len(named.difference(numbers)) <= BESIDES


def _wanted(expected: Any, kinds: bool) -> str:
    if isinstance(expected, tuple):
        return f"a tuple of {len(expected)} values: {show(expected)}"
    if not isinstance(expected, Failure):
        return show(expected)
    wanted = f"a {expected.kinds[0]}"
    numbers = _numbers(expected) if kinds else []
    if numbers:
        wanted += f" that names {' and '.join(numbers)}, and few other numbers"
    return wanted


def _tuple_difference(
    answer: Any, expected: tuple, tolerance: float, kinds: bool
) -> Difference | None:
    count = len(expected)
    if not isinstance(answer, tuple):
        what = "array" if getattr(answer, "shape", ()) else "value"
        return Difference(f"returned one {what}: {show(answer)}", _wanted(expected, kinds))
    if len(answer) != count:
        values = f": {show(answer)}" if is_small(answer) else ""
        got = f"returned a tuple of {len(answer)} values{values}"
        return Difference(got, _wanted(expected, kinds))
    for number, (part, wanted) in enumerate(zip(answer, expected, strict=True), start=1):
        found = difference(part, wanted, tolerance, kinds=kinds)
        if found:
            return Difference(f"{found.got} as value {number} of {count}", found.expected)
    return None


def _array_difference(
    answer: Any, expected: np.ndarray, tolerance: float, kinds: bool
) -> Difference | None:
    shape = _shape(answer)
    if shape is None:
        return Difference("returned lists that do not form an array", f"shape {expected.shape}")
    if shape != expected.shape:
        return Difference(f"returned shape {shape}", f"shape {expected.shape}")

    # Lists become an array only now, when they are known to be as small as the expected answer.
    numbers = _array(answer)
    accepted, word = ACCEPTED[expected.dtype.kind]
    wrong_kind = numbers.dtype.kind not in accepted
    if kinds and wrong_kind and numbers.size:  # an empty list has no dtype
        return Difference(f"returned {show(numbers)} ({numbers.dtype})", word)
    wrong = _wrong(numbers, expected, tolerance)
    if wrong.any():
        return Difference(*pinpoint(numbers, expected, wrong))
    return _width_difference(answer, expected) if kinds else None


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of numbers or of lists of them; None if the lists form no array."""
    if isinstance(value, str):
        return None
    if not isinstance(value, tuple):
        return getattr(value, "shape", ())  # a plain number has no shape
    if not value:
        return (0,)
    shapes = {_shape(part) for part in value}
    if len(shapes) > 1:
        return None
    inner = shapes.pop()
    return None if inner is None else (len(value), *inner)


def _array(value: Any) -> np.ndarray:
    """Return numbers, or lists of them that have a shape, as one array."""
    if not isinstance(value, tuple):
        return np.asarray(value)
    if not value:
        return np.empty(0)
    return np.stack([_array(part) for part in value])


def _width_difference(answer: Any, expected: np.ndarray) -> Difference | None:
    """Compare the dtype of packed answers; a wider one wastes what packing saves."""
    if not isinstance(answer, np.ndarray):  # a list has no dtype
        return None
    if expected.dtype not in WIDTHS or answer.dtype == expected.dtype:
        return None
    got = f"returned {answer.dtype}: {answer.itemsize} bytes per value"
    return Difference(got, str(expected.dtype))


def _wrong(answer: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """Return where the answer is wrong: integers are exact, floats within the tolerance."""
    # Infinities and signaling NaNs, as torch.empty may hold, must not raise warnings here.
    with np.errstate(invalid="ignore", over="ignore"):
        right = answer == expected
        if answer.dtype.kind not in INTEGER or expected.dtype.kind not in INTEGER:
            right |= _near(answer.astype(np.float64), expected.astype(np.float64), tolerance)
    return np.asarray(~right)


def _near(answer: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """Return where float64 values agree; NaN agrees only with NaN."""
    finite = np.isfinite(expected)
    size = np.abs(np.where(finite, expected, 0.0))
    largest = size.max(initial=0.0)

    # The error is relative to the value itself, or to a hundredth of the largest value if that is
    # more. If every value is 0, there is nothing to be relative to.
    allowed = tolerance * np.maximum(size, largest / 100) if size.any() else NOTHING
    near = np.abs(answer - expected) <= allowed
    both_nan = np.isnan(answer) & np.isnan(expected)
    return np.asarray((near & finite) | both_nan)
