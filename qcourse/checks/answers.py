"""What a learner's function gave back, as plain data, or what went wrong instead.

The idea: an answer is told apart by its exact type and turned into numbers, text, NumPy arrays and tuples of these
before anything compares it. So a list, a NumPy array and a tensor are equally good, and an object that calls itself
equal to everything gets nowhere: it is no answer. Nor is one that is far larger than any right answer.

`judge.py` compares; this file never sees what is right. It needs torch and NumPy but nothing of qcourse, so that a
process that holds no reference can carry it alone.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

STUB = "not written yet"  # what a stub's NotImplementedError says
LONGEST = 300  # characters kept of an error's message
DEEPEST = 16  # lists within lists
MOST = {
    "lists": 2_000,
    "arrays": 100_000,
}  # values of an answer, those of all its lists, and of all its arrays


class UnreadableError(TypeError):
    """The function gave back something that stands for no numbers."""


class ChangedArgumentError(Exception):
    """The function wrote into one of its arguments."""


@dataclass(frozen=True)
class Failure:
    """A call that gave no answer.

    Args:
        kinds: the names of the exception's class and of its bases, ("ZeroDivisionError", "ArithmeticError", ...).
        message: what it said.
        line: the line of the learner's function that it came from, "" where there is none to show.
        raised_in: the name of the function that raised it, which may be one that the learner's calls.
    """

    kinds: tuple[str, ...]
    message: str = ""
    line: str = ""
    raised_in: str = ""

    def is_stub(self, name: str) -> bool:
        """Whether this is the untouched stub of the function called `name`."""
        return (self.kinds[0], self.message, self.raised_in) == ("NotImplementedError", STUB, name)


def capture(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """function(*args) as plain data, or the Failure it ended in; args are copied, so the caller's stay as they are.

    A function that changes an argument in place has failed, whatever it gives back: the caller may need it yet.

    >>> capture(lambda x: x + 1, (torch.tensor([1, 2]),)).tolist()
    [2, 3]
    >>> capture(lambda x: 1 / x, (0,)).message
    'division by zero'
    >>> capture(lambda x: x.add_(1), (torch.tensor([1, 2]),)).message
    'changed its argument x in place; work on a copy of it'
    """
    given = tuple(map(_copied, args))
    answer = called(function, given)
    changed = [
        number for number, pair in enumerate(zip(args, given, strict=True)) if not _same(*pair)
    ]
    if changed and not isinstance(answer, Failure):
        return changed_argument(function, changed[0])
    return answer


def called(function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """function(*args) as plain data, or the Failure it ended in; what it does to args is not looked at."""
    try:
        return plain(function(*args))
    except KeyboardInterrupt:  # the learner's own stop button
        raise
    except (
        BaseException
    ) as error:  # exit() too: a learner's error ends the answer, not the notebook
        return _failure(error)


def changed_argument(function: Callable[..., Any], number: int) -> Failure:
    """The Failure of a call that wrote into its argument of this number, from 0; function tells the argument's name."""
    message = f"changed its argument {_name(function, number)} in place; work on a copy of it"
    return Failure((ChangedArgumentError.__name__, Exception.__name__), message)


def read(output: Any) -> Any:
    """An answer as plain data, or the Failure that says why it is none; a Failure stays what it is."""
    if type(output) is Failure:
        return output
    try:
        return plain(output)
    except Exception as error:  # an object may raise anything while it is looked at
        return _failure(error)


def plain(value: Any) -> Any:
    """The value as a bool, int, float, str, NumPy array, or a tuple of these.

    A named tuple counts as a tuple, and an nn.Parameter as a tensor.

    Raises:
        UnreadableError: anything else, other subclasses of the above included, or too many values.

    >>> plain([1, (2.5, True)])
    (1, (2.5, True))
    >>> plain(torch.aminmax(torch.tensor([3, 1, 2])))
    (array(1), array(3))
    """
    return _plain(value, DEEPEST, dict(MOST))


def _plain(value: Any, depth: int, left: dict[str, int]) -> Any:
    """`plain`, with so many lists within lists and so many values left."""
    kind = type(value)  # not isinstance, which an object may answer as it likes
    if _is_one_of(kind, bool, float, str) or (kind is int and -(1 << 63) <= value < 1 << 64):
        return value
    if kind is list:
        return _plain_parts(list.__iter__(value), depth, left)
    if issubclass(kind, tuple):  # a subclass may have an iterator of its own, that never ends
        return _plain_parts(tuple.__iter__(value), depth, left)
    if _is_one_of(kind, torch.Tensor, torch.nn.Parameter):
        _count_off("arrays", torch.Tensor.numel(value), left)
        value = _to_numpy(value)
    elif _is_one_of(kind, np.ndarray, *_NUMPY_SCALARS):
        _count_off("arrays", value.size, left)
    if type(value) is np.ndarray or _is_one_of(kind, *_NUMPY_SCALARS):
        array = np.array(value)  # a copy: the function may go on writing into what it gave back
        if array.dtype.kind in "biuf":
            return array
    raise UnreadableError(
        f"returned {_described(kind)}; give back numbers, lists, NumPy arrays or plain tensors"
    )


def _is_one_of(kind: type, *kinds: type) -> bool:
    """Whether the type is one of these; `in` would ask ==, which a type may answer as it likes."""
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
    """What a value of this type is, which stands for no numbers."""
    if kind is type(None):
        return "None (is a `return` missing?)"
    return (
        f"a {kind.__name__}"
        if _is_one_of(kind, set, frozenset, dict)
        else f"a value of type {kind.__name__}"
    )


_NUMPY_SCALARS = frozenset(np.sctypeDict.values())


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    value = torch.Tensor.detach(value).cpu()
    if value.is_floating_point() and value.dtype not in (
        torch.float16,
        torch.float32,
        torch.float64,
    ):
        value = value.float()  # bfloat16 and the 8-bit floats, which NumPy does not have
    return value.numpy()


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value


def _same(before: Any, after: Any) -> bool:
    """Whether a copy of an argument still holds what the argument does; what was not copied is not looked at."""
    if isinstance(before, tuple):
        return all(map(_same, before, after))
    if not isinstance(before, torch.Tensor):
        return True
    try:
        return np.array_equal(_to_numpy(before), _to_numpy(after), equal_nan=True)
    except (RuntimeError, TypeError):  # it was made into something that NumPy cannot read
        return False


def _name(function: Callable[..., Any], number: int) -> str:
    """What the function calls its argument of that number, from 0."""
    try:
        return list(inspect.signature(function).parameters)[number]
    except (TypeError, ValueError, IndexError):  # it does not say, or takes *args
        return f"number {number + 1}"


def _failure(error: BaseException) -> Failure:
    said = traceback.TracebackException.from_exception(
        error, limit=0
    )  # also where its __str__ is broken
    kinds = tuple(kind.__name__ for kind in type(error).__mro__)
    line, raised_in = _place(error)
    return Failure(kinds, str(said)[:LONGEST], line[:LONGEST], raised_in[:LONGEST])


def _place(error: BaseException) -> tuple[str, str]:
    """The innermost line of the file (or cell) that the learner's function is written in, and who raised the error."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__
    ]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return (f"line {own[-1].lineno}: {own[-1].line}", frames[-1].name) if own else ("", "")
