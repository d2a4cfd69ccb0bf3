"""The words of Triton that the course's own kernels use, spoken by torch: for systems that Triton is not made for.

The idea: a kernel is a function that runs once for each program of a grid and touches memory by pointers, masks, loads
and stores alone. So a pointer is a tensor and some places in it, a load is an index, a grid is a loop. That is enough
to run a lesson's kernel on macOS and Windows, and to refuse what leaves its tensor, which a GPU does not.

Source: Triton's language reference, for what each word means.

How it differs from Triton's interpreter (TRITON_INTERPRET=1): that knows the whole language, and is what a lesson uses
wherever Triton is installed. It refuses nothing; `stay_inside` teaches it to.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

_place: tuple[tuple[int, ...], tuple[int, ...]] = (
    (0, 0, 0),
    (1, 1, 1),
)  # this program in the grid, and the grid


@dataclass(frozen=True)
class Pointer:
    """Places in a tensor's memory, counted in its elements."""

    memory: Tensor
    at: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        """As Triton has it: the dtype of a pointer, whose element_ty is that of the tensor."""
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.at + more)

    __radd__ = __add__

    def inside(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Places and mask as tensors of one shape.

        Raises:
            IndexError: a place that is not masked lies outside of the tensor.
        """
        at, mask = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(mask))
        if bool((wrong := mask & ((at < 0) | (at >= len(self.memory)))).any()):
            raise IndexError(
                f"place {int(at[wrong][0])} of a tensor of {len(self.memory)} elements: a mask is missing"
            )
        return at.long(), mask


@dataclass(frozen=True)
class Kernel:
    """What `jit` makes of a function: kernel[grid](...) runs it once for each program.

    >>> def double(x_ptr, y_ptr, N, BLOCK):
    ...     n = language.program_id(0) * BLOCK + language.arange(0, BLOCK)
    ...     language.store(y_ptr + n, 2 * language.load(x_ptr + n, n < N, 0.0), n < N)
    >>> x = torch.tensor([1.0, 2.0, 3.0])
    >>> jit(double)[(2,)](x, y := torch.zeros(3), 3, BLOCK=2)
    >>> y
    tensor([2., 4., 6.])
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """How to launch so many programs: a tuple of one to three numbers, or a function of the arguments by name."""

        def launch(*args: Any, num_warps: int = 4, num_stages: int = 1, **options: Any) -> None:
            global _place
            given = inspect.signature(self.function).bind(*args, **options)
            given.apply_defaults()
            meta = given.arguments
            programs = tuple(grid(dict(meta)) if callable(grid) else grid)
            programs += (1,) * (3 - len(programs))
            meta.update(
                {name: _pointer(arg) for name, arg in meta.items() if isinstance(arg, Tensor)}
            )
            for program in product(*map(range, programs)):
                _place = program, programs
                self.function(*given.args, **given.kwargs)

        return launch


def _pointer(tensor: Tensor) -> Pointer:
    """To its first element; whatever its strides, what follows is what lies behind it in memory."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return Pointer(tensor.as_strided((count,), (1,)))


def _arange(start: int, end: int) -> Tensor:
    if (count := end - start) < 1 or count & (count - 1):
        raise ValueError(f"arange({start}, {end}) has {count} numbers; it must be a power of 2")
    return torch.arange(start, end, dtype=torch.int32)


def _load(pointer: Pointer, mask: Any = True, other: float = 0, **_: Any) -> Tensor:
    at, mask = pointer.inside(mask)
    found = pointer.memory[torch.where(mask, at, 0)]
    return torch.where(mask, found, torch.as_tensor(other).to(found.dtype))


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    at, mask = pointer.inside(mask)
    values = torch.as_tensor(value).to(pointer.memory.dtype).expand(at.shape)
    pointer.memory[at[mask]] = values[mask]


def _dot(a: Tensor, b: Tensor, acc: Tensor | None = None, **_: Any) -> Tensor:
    found = a.float() @ b.float()
    return found if acc is None else acc + found


def _dtype(dtype: Any) -> torch.dtype:
    return getattr(dtype, "element_ty", dtype)


jit = Kernel
cdiv: Callable[[int, int], int] = lambda x, div: -(-x // div)  # noqa: E731

language = SimpleNamespace(
    constexpr=object,
    program_id=lambda axis: _place[0][axis],
    num_programs=lambda axis: _place[1][axis],
    arange=_arange,
    zeros=lambda shape, dtype: torch.zeros(tuple(shape), dtype=_dtype(dtype)),
    full=lambda shape, value, dtype: torch.full(tuple(shape), value, dtype=_dtype(dtype)),
    load=_load,
    store=_store,
    dot=_dot,
    sum=lambda x, axis=None: x.sum() if axis is None else x.sum(axis),
    where=torch.where,
    minimum=lambda x, y: torch.minimum(torch.as_tensor(x), torch.as_tensor(y)),
    maximum=lambda x, y: torch.maximum(torch.as_tensor(x), torch.as_tensor(y)),
    cdiv=cdiv,
    range=range,
    static_range=range,
    **{
        name: getattr(torch, name)
        for name in ("float16", "float32", "int8", "uint8", "int16", "int32", "int64")
    },
)


def stay_inside() -> None:
    """Let Triton's interpreter, too, refuse a place outside of the tensors that a kernel was launched with.

    Nothing happens where an interpreter is made otherwise than those that are known here.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    spans: list[
        tuple[int, int]
    ] = []  # addresses of the kernel that runs: the first of a tensor, and the first behind

    def remembering(prepare: Callable[..., Any]) -> Callable[..., Any]:
        def prepared(*given: Any) -> Any:
            args, options = prepare(*given)
            spans[:] = map(_span, _tensors((*args, *options.values())))
            return args, options

        return prepared

    def watched(touch: Callable[..., Any], mask: int) -> Callable[..., Any]:
        def touched(builder: Any, at: Any, *more: Any, **options: Any) -> Any:
            _check(at.data[more[mask].data.astype(bool)], spans)
            return touch(builder, at, *more, **options)

        return touched

    words = {
        "create_masked_load": 0,
        "create_masked_store": 1,
    }  # where the mask stands behind the pointers
    known = hasattr(GridExecutor, "_init_args_hst") and all(
        hasattr(InterpreterBuilder, word) for word in words
    )
    if known and not hasattr(GridExecutor, "stays_inside"):
        GridExecutor._init_args_hst, GridExecutor.stays_inside = (
            remembering(GridExecutor._init_args_hst),
            True,
        )
        for word, mask in words.items():
            setattr(InterpreterBuilder, word, watched(getattr(InterpreterBuilder, word), mask))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in a tuple of arguments, also where a tensor is seen as another dtype or by a descriptor."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in (
            value if isinstance(value, tuple) else [value.base] if hasattr(value, "base") else []
        ):
            yield from _tensors(part)


def _span(tensor: Tensor) -> tuple[int, int]:
    memory = tensor.untyped_storage()
    return memory.data_ptr(), memory.data_ptr() + memory.nbytes()


def _check(addresses: Any, spans: list[tuple[int, int]]) -> None:
    if not all(
        any(start <= address < end for start, end in spans)
        for address in set(addresses.ravel().tolist())
    ):
        raise IndexError("a place outside of every tensor: a mask is missing")
