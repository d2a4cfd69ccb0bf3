"""A bounds check for Triton's interpreter: an access outside every tensor becomes an error.

The idea: remember the addresses of the tensors that a kernel is launched with, and compare the
addresses of each load and store with them.

Source: triton/runtime/interpreter.py, whose GridExecutor and InterpreterBuilder are wrapped here.

How it differs from ``tiny_triton.py``: that replaces Triton; this extends it.
"""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

# the first address of a tensor's memory, and the first behind it
Span = tuple[int, int]

# the interpreter's words, and where the mask stands behind the pointers
MASK_POSITIONS = {"create_masked_load": 0, "create_masked_store": 1}


def stay_inside() -> None:
    """Let Triton's interpreter refuse an access outside the tensors that a kernel received.

    Do nothing if the interpreter of the installed Triton lacks the methods wrapped here.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    if not hasattr(GridExecutor, "_init_args_hst"):
        return
    if not all(hasattr(InterpreterBuilder, word) for word in MASK_POSITIONS):
        return
    # a second call must not wrap the wrappers
    if hasattr(GridExecutor, "stays_inside"):
        return

    # of the kernel that runs now
    spans: list[Span] = []
    GridExecutor._init_args_hst = _remembering(GridExecutor._init_args_hst, spans)
    for word, position in MASK_POSITIONS.items():
        access = getattr(InterpreterBuilder, word)
        setattr(InterpreterBuilder, word, _checked(access, position, spans))
    GridExecutor.stays_inside = True


def _remembering(prepare: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    """Return the interpreter's preparation of arguments, which now also fills `spans`."""

    def prepared(*given: Any) -> Any:
        args, options = prepare(*given)
        tensors = _tensors((*args, *options.values()))
        spans[:] = [_span(tensor) for tensor in tensors]
        return args, options

    return prepared


def _checked(access: Callable[..., Any], position: int, spans: list[Span]) -> Callable[..., Any]:
    """Return a load or store that checks its addresses first."""

    def checked(builder: Any, pointers: Any, *more: Any, **options: Any) -> Any:
        mask = more[position].data.astype(bool)
        _check(pointers.data[mask], spans)
        return access(builder, pointers, *more, **options)

    return checked


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples of arguments, and those behind a view or a descriptor."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
    elif hasattr(value, "base"):
        yield from _tensors(value.base)


def _span(tensor: Tensor) -> Span:
    memory = tensor.untyped_storage()
    start = memory.data_ptr()
    return start, start + memory.nbytes()


def _check(addresses: Any, spans: list[Span]) -> None:
    for address in set(addresses.ravel().tolist()):
        if not any(start <= address < end for start, end in spans):
            raise IndexError("a place outside of every tensor: a mask is missing")
