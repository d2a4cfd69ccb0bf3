"""Stand-ins for finished blocks, which return stored outputs so that a pass skips the blocks.

In a chain only the next block reads a block's output, so only the last finished block needs its
stored outputs. Earlier ones return ``Placeholder`` tensors, which have a shape but no values; the
next stand-in ignores them. All that is computed from a placeholder is one too: if a layer receives
one, or code needs its values (``NoChain``), something else reads an earlier block.

Source: PyTorch's tensor subclasses. `hooks.py` observes a pass; stand-ins replace a part of it.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


class NoChain(Exception):  # noqa: N818  (it says what the model is, and nothing failed)
    """Raised in a pass that shows that the model's blocks are no chain."""


class Placeholder(Tensor):
    """A tensor without values; the result of each operation on it is a placeholder too.

    >>> x = without_values(torch.ones(2, 3))
    >>> torch.cat([x, torch.ones(1, 3)]).softmax(-1)
    Placeholder(torch.float32 of shape (3, 3))
    >>> bool(x.sum() > 0)
    Traceback (most recent call last):
    qcourse.trace.stand_ins.NoChain: _local_scalar_dense needs values of an earlier block
    """

    _empty: Tensor

    @staticmethod
    def __new__(cls, empty: Tensor, device: torch.device) -> "Placeholder":
        made = Tensor._make_wrapper_subclass(
            cls, empty.shape, strides=empty.stride(), dtype=empty.dtype, device=device
        )
        made._empty = empty
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placeholder({self.dtype} of shape {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute the shape of an operation's result; NoChain where values matter."""
        named = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if _writes_to_values(func, args, named):
            # The tensor would hold values of an earlier block and would not be a placeholder.
            raise NoChain(f"{name} writes values of an earlier block")

        # Tensors on "meta" have a shape only, so the operation computes a shape.
        try:
            result = func(*tree_map(_empty_of, args), **tree_map(_empty_of, named))
        except RuntimeError as error:
            raise NoChain(f"{name} needs values of an earlier block") from error

        every = tree_leaves((args, named))
        device = next(each.device for each in every if isinstance(each, Placeholder))

        def placeholder(value: Any) -> Any:
            return Placeholder(value.to("meta"), device) if isinstance(value, Tensor) else value

        return tree_map(placeholder, result)


def without_values(value: Any) -> Any:
    """Return a placeholder for a tensor of floats, and any other value as it is."""
    if isinstance(value, Placeholder) or not isinstance(value, Tensor):
        return value
    if not value.is_floating_point():
        return value
    return Placeholder(value.detach().to("meta"), value.device)


def drop_values(module: nn.Module, args: Any, named: Any) -> Any:
    """Give a module placeholders for its arguments; a pre-hook (with_kwargs) of the module."""
    return tree_map(without_values, (args, named))


def copied(value: Any) -> Any:
    """Return a clone of a tensor, because the model may write to it; any other value as it is."""
    return value.clone() if isinstance(value, Tensor) else value


class StandIn:
    """Replaces the forward of a block by its stored outputs, in order, in a with statement."""

    def __init__(self, block: nn.Module, outputs: Sequence[Any]) -> None:
        self.block = block
        self._remaining = iter(outputs)

    def __enter__(self) -> "StandIn":
        self.block.forward = self._next_output
        return self

    def __exit__(self, *error: object) -> None:
        del self.block.forward  # the method of the class is visible again

    def _next_output(self, *args: Any, **named: Any) -> Any:
        for output in self._remaining:
            return tree_map(copied, output)
        raise NoChain("a finished block is called more often than in the first pass")


class FinishedBlocks:
    """The finished blocks of a chain, with stored outputs of the last one alone."""

    def __init__(self) -> None:
        self._blocks: list[nn.Module] = []
        self._outputs: list[Any] = []  # per block, batch and call

    def __len__(self) -> int:
        return len(self._blocks)

    def append(self, block: nn.Module, outputs: Sequence[Sequence[Any]]) -> None:
        """Add the next block with its outputs per batch and call; drop the values before."""
        self._outputs = tree_map(without_values, self._outputs)
        self._outputs.append(outputs)
        self._blocks.append(block)

    def standing_in(self, number: int) -> ExitStack:
        """Let stand-ins replace the blocks for one batch, in a with statement."""
        stack = ExitStack()
        for block, outputs in zip(self._blocks, self._outputs, strict=True):
            stack.enter_context(StandIn(block, outputs[number]))
        return stack


def has_placeholder(value: Any) -> bool:
    """Return whether a value is, or contains, a placeholder."""
    return any(isinstance(each, Placeholder) for each in tree_leaves(value))


def _writes_to_values(op: Any, args: Sequence[Any], named: Mapping[str, Any]) -> bool:
    for number, argument in enumerate(op._schema.arguments):
        if argument.is_write:
            given = args[number] if number < len(args) else named.get(argument.name)
            for value in tree_leaves(given):
                if isinstance(value, Tensor) and not isinstance(value, Placeholder):
                    return True
    return False


def _empty_of(value: Any) -> Any:
    if isinstance(value, Placeholder):
        return value._empty
    return value.to("meta") if isinstance(value, Tensor) else value
