"""How an answer differs from what was expected: numbers, tuples of results, text and refusals.

The idea: plain data (`answers.py`) is compared by its shape first. So what it costs to compare grows with what was
expected, however much came. `words.py` writes out what differs; `judge.py` makes a verdict of it.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcourse.checks.answers import Failure
from qcourse.checks.words import is_small, pinpoint, show

NOTHING = 1e-6  # how far a float may be off where all that is expected is 0: there is no size to be relative to
BESIDES = 3  # how many numbers a refusal may name besides those that it must: a remainder, say, or a dtype
WIDTHS = np.dtype(np.uint8), np.dtype(np.int32)  # in which a reference gives what is packed
INTEGER = "iu"  # NumPy's letters for integers; "f" is floats, "b" booleans
ACCEPTED = {
    "i": (INTEGER, "an integer dtype"),
    "u": (INTEGER, "uint8"),  # no reference gives any other
    "f": (INTEGER + "f", "floats"),
    "b": ("b", "booleans"),
}


@dataclass(frozen=True)
class Difference:
    """How an answer differs: what came, and what should have come (kept apart: a grader shows only the first)."""

    got: str
    expected: str


def difference(
    answer: Any, expected: Any, tolerance: float, *, kinds: bool = True
) -> Difference | None:
    """How the answer differs from what is expected; None where it does not.

    Args:
        answer, expected: plain data or Failures.
        tolerance: as in `Exercise`.
        kinds: whether the dtype must be of the expected kind, and a refusal name the expected numbers.

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
    refused = (
        isinstance(answer, Failure)
        and isinstance(expected, Failure)
        and expected.kinds[0] in answer.kinds
    )
    if refused and (not kinds or _names(answer, _numbers(expected))):
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
    """The numbers in a refusal's message: what it says of the case, whatever its words."""
    return re.findall(r"\d+", failure.message)


def _names(failure: Failure, numbers: list[str]) -> bool:
    """Whether a refusal names these numbers and few besides: a list of all numbers says nothing of the case."""
    named = set(_numbers(failure))
    return not numbers or (named.issuperset(numbers) and len(named.difference(numbers)) <= BESIDES)


def _wanted(expected: Any, kinds: bool) -> str:
    """What was expected, in words."""
    if isinstance(expected, tuple):
        return f"a tuple of {len(expected)} values: {show(expected)}"
    if not isinstance(expected, Failure):
        return show(expected)
    numbers = _numbers(expected) if kinds else []
    naming = f" that names {' and '.join(numbers)}, and few numbers besides" if numbers else ""
    return f"a {expected.kinds[0]}{naming}"


def _tuple_difference(
    answer: Any, expected: tuple, tolerance: float, kinds: bool
) -> Difference | None:
    if not isinstance(answer, tuple):
        what = "array" if getattr(answer, "shape", ()) else "value"
        return Difference(f"returned one {what}: {show(answer)}", _wanted(expected, kinds))
    if len(answer) != len(expected):
        many = f": {show(answer)}" if is_small(answer) else ""
        return Difference(
            f"returned a tuple of {len(answer)} values{many}", _wanted(expected, kinds)
        )
    for number, (part, wanted) in enumerate(zip(answer, expected, strict=True), start=1):
        found = difference(part, wanted, tolerance, kinds=kinds)
        if found:
            return Difference(f"{found.got} as value {number} of {len(expected)}", found.expected)
    return None


def _array_difference(
    answer: Any, expected: np.ndarray, tolerance: float, kinds: bool
) -> Difference | None:
    shape = _shape(answer)
    if shape is None:
        return Difference("returned lists that make no array", f"shape {expected.shape}")
    if shape != expected.shape:
        return Difference(f"returned shape {shape}", f"shape {expected.shape}")

    # Only now, when it is as small as what is expected, does an answer in lists become an array.
    numbers = _array(answer)
    accepted, word = ACCEPTED[expected.dtype.kind]
    if kinds and numbers.size and numbers.dtype.kind not in accepted:  # an empty list has no dtype
        return Difference(f"returned {show(numbers)} ({numbers.dtype})", word)
    wrong = _wrong(numbers, expected, tolerance)
    if wrong.any():
        return Difference(*pinpoint(numbers, expected, wrong))
    return _width_difference(answer, expected) if kinds else None


def _shape(value: Any) -> tuple[int, ...] | None:
    """The shape of numbers, or of lists of them; None where these make no array."""
    if isinstance(value, str):
        return None
    if not isinstance(value, tuple):
        return getattr(value, "shape", ())  # a plain number has none
    if not value:
        return (0,)
    shapes = {_shape(part) for part in value}
    inner = shapes.pop()
    return None if shapes or inner is None else (len(value), *inner)


def _array(value: Any) -> np.ndarray:
    """Numbers, or lists of them that have a shape, as one array."""
    if isinstance(value, tuple):
        return np.stack([_array(part) for part in value]) if value else np.empty(0)
    return np.asarray(value)


def _width_difference(answer: Any, expected: np.ndarray) -> Difference | None:
    """Bytes must be uint8, and words int32: a wider dtype gives away what packing saves. A list has no dtype."""
    if (
        expected.dtype not in WIDTHS
        or not isinstance(answer, np.ndarray)
        or answer.dtype == expected.dtype
    ):
        return None
    return Difference(
        f"returned {answer.dtype}: {answer.itemsize} bytes per value", str(expected.dtype)
    )


def _wrong(answer: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """Where the answer is off: integers are right exactly, floats within the tolerance, NaN only for NaN."""
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # infinities, which == settles, and NaNs as torch.empty has them
        right = answer == expected
        if answer.dtype.kind not in INTEGER or expected.dtype.kind not in INTEGER:
            answer = answer.astype(np.float64)
            expected = expected.astype(np.float64)
            finite = np.isfinite(expected)
            size = np.abs(np.where(finite, expected, 0.0))

            # Relative to the value itself, or to a hundredth of the largest one where that is more.
            allowed = (
                tolerance * np.maximum(size, size.max(initial=0.0) / 100) if size.any() else NOTHING
            )
            near = np.abs(answer - expected) <= allowed
            right |= (near & finite) | (np.isnan(answer) & np.isnan(expected))
    return np.asarray(~right)
