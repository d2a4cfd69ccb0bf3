"""What a learner's function gave back, as plain data, or the reason why it gave nothing usable.

An answer is read by its exact type: numbers, text, NumPy arrays, tensors, lists and tuples. An
object that calls itself equal to everything is refused, and so is an answer far too large.

`compare.py` compares. This file imports nothing of qcourse, so a sandbox can carry it alone.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

STUB = "not written yet"  # the message of a stub's NotImplementedError
LONGEST = 300  # characters kept of an error's message
DEEPEST = 16  # lists within lists
MOST = {"lists": 2_000, "arrays": 100_000}  # values in all lists or arrays of an answer
_NUMPY_SCALARS = frozenset(np.sctypeDict.values())
_NUMPY_FLOATS = torch.float16, torch.float32, torch.float64


class UnreadableError(TypeError):
    """The function returned something that holds no numbers."""


class ChangedArgumentError(Exception):
    """The function wrote into one of its arguments."""


@dataclass(frozen=True)
class Failure:
    """A call that gave no answer.

    Args:
        kinds: names of the exception's class and its bases, ("ZeroDivisionError", ...).
        line: the line of the learner's function that raised it, "" if there is none to show.
        raised_in: the name of the function that raised it, perhaps one that the learner's calls.
    """

    kinds: tuple[str, ...]
    message: str = ""
    line: str = ""
    raised_in: str = ""

    def is_stub(self, name: str) -> bool:
        """Return whether this is the untouched stub of the function called `name`."""
        found = (self.kinds[0], self.message, self.raised_in)
        return found == ("NotImplementedError", STUB, name)


def capture(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return function(*args) as plain data, or the Failure that it ended in.

    The function gets copies of args. If it changes one in place, the call has failed.

    >>> capture(lambda x: x.add_(1), (torch.tensor([1, 2]),)).message
    'changed its argument x in place; work on a copy of it'
    """
    given = tuple(_copied(arg) for arg in args)
    answer = called(function, given)
    if isinstance(answer, Failure):
        return answer
    for number, (before, after) in enumerate(zip(args, given, strict=True)):
        if not _same(before, after):
            return changed_argument(function, number)
    return answer


def called(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return function(*args) as plain data, or a Failure; changes to args are not checked."""
    try:
        return plain(function(*args))
    except KeyboardInterrupt:  # the learner's own stop button
        raise
    except BaseException as error:  # exit() too: it must not end the notebook
        return _failure(error)


def changed_argument(function: Callable[..., Any], number: int) -> Failure:
    """Return the Failure of a call that wrote into argument `number`, counted from 0."""
    name = _argument_name(function, number)
    message = f"changed its argument {name} in place; work on a copy of it"
    return Failure((ChangedArgumentError.__name__, Exception.__name__), message)


def read(output: Any) -> Any:
    """Return an answer as plain data, or a Failure with the reason; a Failure is returned as is."""
    if type(output) is Failure:
        return output
    try:
        return plain(output)
    except Exception as error:  # any object may raise anything while it is read
        return _failure(error)


def plain(value: Any) -> Any:
    """Return the value as a bool, int, float, str, NumPy array, or a tuple of these.

    Raises:
        UnreadableError: for any other type, most subclasses included, and for too many values.

    >>> plain(torch.aminmax(torch.tensor([3, 1, 2])))
    (array(1), array(3))
    """
    return _plain(value, DEEPEST, dict(MOST))


def _plain(value: Any, depth: int, left: dict[str, int]) -> Any:
    """Read a value with at most `depth` more levels of lists and `left` more values."""
    # An object answers isinstance as it likes, so only its exact type counts.
    kind = type(value)
    fits_64_bits = kind is int and -(1 << 63) <= value < 1 << 64
    if fits_64_bits or _is_one_of(kind, bool, float, str):
        return value

    # A subclass of tuple may define an iterator that never ends, so tuple's own is used.
    own_iterator = list.__iter__ if kind is list else tuple.__iter__
    if kind is list or issubclass(kind, tuple):
        return _plain_parts(own_iterator(value), depth, left)

    # The size is checked before anything is copied.
    if _is_one_of(kind, torch.Tensor, torch.nn.Parameter):
        _count_off("arrays", torch.Tensor.numel(value), left)
        value = _to_numpy(value)
    elif _is_one_of(kind, np.ndarray, *_NUMPY_SCALARS):
        _count_off("arrays", value.size, left)
    if type(value) is np.ndarray or _is_one_of(kind, *_NUMPY_SCALARS):
        array = np.array(value)  # a copy, because the function may reuse its buffer
        if array.dtype.kind in "biuf":
            return array
    allowed = "give back numbers, lists, NumPy arrays or plain tensors"
    raise UnreadableError(f"returned {_described(kind)}; {allowed}")


def _is_one_of(kind: type, *kinds: type) -> bool:
    """Compare with `is`, because `in` calls ==, which a metaclass can override."""
    return any(kind is one for one in kinds)


def _plain_parts(parts: Iterator[Any], depth: int, left: dict[str, int]) -> tuple[Any, ...]:
    if depth == 0:
        raise UnreadableError(f"returned more than {DEEPEST} lists within lists")
    found = []
    for part in parts:
        _count_off("lists", 1, left)
        found.append(_plain(part, depth - 1, left))
    return tuple(found)


def _count_off(where: str, count: int, left: dict[str, int]) -> None:
    left[where] -= count
    if left[where] < 0:
        raise UnreadableError(f"returned more than {MOST[where]:,} values in {where}")


def _described(kind: type) -> str:
    if kind is type(None):
        return "None (is a `return` missing?)"
    if _is_one_of(kind, set, frozenset, dict):
        return f"a {kind.__name__}"
    return f"a value of type {kind.__name__}"


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    value = torch.Tensor.detach(value).cpu()

    # NumPy has neither bfloat16 nor the 8-bit floats.
    if value.is_floating_point() and value.dtype not in _NUMPY_FLOATS:
        value = value.float()
    return value.numpy()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    return value


def _same(before: Any, after: Any) -> bool:
    """Return whether the copy of an argument still equals it; only tensors are compared."""
    if isinstance(before, tuple):
        return all(map(_same, before, after))
    if not isinstance(before, torch.Tensor):
        return True
    try:
        return np.array_equal(_to_numpy(before), _to_numpy(after), equal_nan=True)
    except (RuntimeError, TypeError):  # the call turned it into something NumPy cannot read
        return False


def _argument_name(function: Callable[..., Any], number: int) -> str:
    try:
        return list(inspect.signature(function).parameters)[number]
    except (TypeError, ValueError, IndexError):  # no signature, or *args
        return f"number {number + 1}"


def _failure(error: BaseException) -> Failure:
    # TracebackException copes with an error whose __str__ itself raises.
    said = str(traceback.TracebackException.from_exception(error, limit=0))
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    line, raised_in = _place(error)
    return Failure(kinds, said[:LONGEST], line[:LONGEST], raised_in[:LONGEST])


def _place(error: BaseException) -> tuple[str, str]:
    """Return the innermost line in the learner's own file or cell, and the function that raised."""
    trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in trace if frame.filename != __file__]
    if not frames:
        return "", ""
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f"line {own[-1].lineno}: {own[-1].line}", frames[-1].name
