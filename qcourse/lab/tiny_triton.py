"""The part of Triton's language that the course's kernels use, run by torch instead of Triton.

The idea: a kernel is a function that runs once per program of a grid and accesses memory through
pointers, masks, loads and stores only. Here a pointer is a tensor and positions in it, a load is an
index, and a grid is a loop. That runs a lesson's kernel on macOS and Windows. It also refuses an
access outside the tensor, which a GPU does not.

Source: Triton's language reference.

How it differs from Triton's interpreter (TRITON_INTERPRET=1): the interpreter knows the whole
language, and a lesson uses it wherever Triton is installed. It checks no bounds; `stay_inside` of
``interpreter_bounds.py`` adds that check.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from qcourse.lab.interpreter_bounds import stay_inside as stay_inside


@dataclass
class _Launch:
    """The program that runs now, and the size of its grid, along three axes."""

    program: tuple[int, ...] = (0, 0, 0)
    grid: tuple[int, ...] = (1, 1, 1)


# what program_id and num_programs read
_launch = _Launch()


@dataclass(frozen=True)
class Pointer:
    """Positions in a tensor's memory, counted in elements."""

    memory: Tensor
    at: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        """The dtype of a pointer as Triton has it: its element_ty is the dtype of the tensor."""
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.memory, self.at + more)

    __radd__ = __add__

    def inside(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Return positions and mask as tensors of one shape.

        Raises:
            IndexError: a position that the mask does not exclude is outside the tensor.
        """
        at, mask = torch.broadcast_tensors(torch.as_tensor(self.at), torch.as_tensor(mask))
        size = len(self.memory)
        outside = (at < 0) | (at >= size)
        wrong = mask & outside
        if bool(wrong.any()):
            first = int(at[wrong][0])
            raise IndexError(f"place {first} of a tensor of {size} elements: a mask is missing")
        return at.long(), mask


@dataclass(frozen=True)
class Kernel:
    """What `jit` makes of a function: kernel[grid](...) runs it once per program.

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
        """Return a launcher over a grid: one to three numbers, or a function of the arguments."""

        def launch(*args: Any, num_warps: int = 4, num_stages: int = 1, **options: Any) -> None:
            # Triton accepts arguments by position and by name
            given = inspect.signature(self.function).bind(*args, **options)
            given.apply_defaults()
            arguments = given.arguments
            sizes = tuple(grid(dict(arguments)) if callable(grid) else grid)
            missing = 3 - len(sizes)
            _launch.grid = (*sizes, *[1] * missing)

            # a kernel receives pointers in place of tensors
            for name, argument in arguments.items():
                if isinstance(argument, Tensor):
                    arguments[name] = _pointer(argument)

            ranges = [range(size) for size in _launch.grid]
            for program in product(*ranges):
                _launch.program = program
                self.function(*given.args, **given.kwargs)

        return launch


def _pointer(tensor: Tensor) -> Pointer:
    """Return a pointer to the first element of a tensor."""
    storage = tensor.untyped_storage()
    # from the tensor's first element to the end of the storage, whatever the strides
    count = storage.nbytes() // tensor.element_size() - tensor.storage_offset()
    return Pointer(tensor.as_strided((count,), (1,)))


def _program_id(axis: int) -> int:
    return _launch.program[axis]


def _num_programs(axis: int) -> int:
    return _launch.grid[axis]


def _arange(start: int, end: int) -> Tensor:
    count = end - start
    # a power of 2 has one bit set
    if count < 1 or count & (count - 1):
        raise ValueError(f"arange({start}, {end}) has {count} numbers; it must be a power of 2")
    return torch.arange(start, end, dtype=torch.int32)


def _zeros(shape: Any, dtype: Any) -> Tensor:
    return _full(shape, 0, dtype)


def _full(shape: Any, value: Any, dtype: Any) -> Tensor:
    # the dtype of a pointer stands for the dtype of its elements
    return torch.full(tuple(shape), value, dtype=getattr(dtype, "element_ty", dtype))


def _load(pointer: Pointer, mask: Any = True, other: float = 0, **_: Any) -> Tensor:
    at, mask = pointer.inside(mask)
    # read position 0 where masked, then put `other` there
    found = pointer.memory[torch.where(mask, at, 0)]
    return torch.where(mask, found, torch.as_tensor(other).to(found.dtype))


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    at, mask = pointer.inside(mask)
    # a scalar is stored at each position
    values = torch.as_tensor(value).to(pointer.memory.dtype).expand(at.shape)
    pointer.memory[at[mask]] = values[mask]


def _dot(a: Tensor, b: Tensor, acc: Tensor | None = None, **_: Any) -> Tensor:
    # tensor cores multiply float16 and accumulate in float32
    found = a.float() @ b.float()
    return found if acc is None else acc + found


def _sum(x: Tensor, axis: int | None = None) -> Tensor:
    return x.sum() if axis is None else x.sum(axis)


def _minimum(x: Any, y: Any) -> Tensor:
    return torch.minimum(torch.as_tensor(x), torch.as_tensor(y))


def _maximum(x: Any, y: Any) -> Tensor:
    return torch.maximum(torch.as_tensor(x), torch.as_tensor(y))


def cdiv(x: int, div: int) -> int:
    """Return x / div, rounded up."""
    return -(-x // div)


# the decorator is the class itself
jit = Kernel

_names = ("float16", "float32", "int8", "uint8", "int16", "int32", "int64")
_dtypes = {name: getattr(torch, name) for name in _names}

# what a kernel calls `tl`
language = SimpleNamespace(
    constexpr=object,
    program_id=_program_id,
    num_programs=_num_programs,
    arange=_arange,
    zeros=_zeros,
    full=_full,
    load=_load,
    store=_store,
    dot=_dot,
    sum=_sum,
    where=torch.where,
    minimum=_minimum,
    maximum=_maximum,
    cdiv=cdiv,
    range=range,
    static_range=range,
    **_dtypes,
)
