"""What a forward pass shows: what goes into the linear layers, which of them read the same, and in which order.

The idea: hooks look on while the model runs as it always does, so nothing has to be known about what it is.

Source: the forward hooks of PyTorch's ``nn.Module``.

How it differs from ``replay.py``: here one pass is looked at; there, what is seen decides how the next ones are run.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CONSTANT = Tensor | tuple | int | float | str | None  # arguments that a block does not write to


class CallTrace:
    """What is seen of one batch's way through the model.

    Args:
        layers: the linear layers of interest, by name.
        blocks: the model's chain of blocks, if it is one.
        groups, places: what the batches before have shown, to be added to; as in ``Replay``.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        blocks: Sequence[nn.Module],
        groups: dict[str, list[str]],
        places: dict[str, int],
    ) -> None:
        self.layers, self.blocks, self.groups, self.places = layers, blocks, groups, places
        self.calls: Counter[nn.Module] = Counter()
        self.chain = True
        self._input: tuple[Any, str] = (
            None,
            "",
        )  # held, so that no other tensor takes its place in memory
        self._given: dict[
            tuple[int, int], Any
        ] = {}  # objects that blocks were given, held likewise
        self._finished = 0  # blocks, since the first was last begun

    def layer(self, name: str, x: Any) -> None:
        """A layer is about to be called."""
        self.calls[self.layers[name]] += 1
        first = self._input[1] if self._input[0] is x else name
        self._input = x, first
        if name not in self.places:
            self.places[name] = self._finished
            self.groups.setdefault(first, []).append(name)

    def before_block(
        self, i: int, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        """Block i is about to be called; in a chain it is the next, and knows nothing from a call before."""
        self.calls[block] += 1
        if i == 0 and self._finished == len(self.blocks):
            self._finished = 0
        values = (*args, *named.values())
        objects = {(i, id(each)): each for each in values if not isinstance(each, CONSTANT)}
        self.chain = self.chain and i == self._finished and not objects.keys() & self._given.keys()
        self._given |= objects

    def after_block(self, output: Any) -> None:
        """A block was called."""
        self._finished += 1


def check_input(x: Tensor, name: str) -> None:
    """Raise ValueError for NaN and infinity, of which all would be that is learnt from x."""
    if not torch.isfinite(x).all():
        raise ValueError(f"calibration brings NaN or infinity into layer {name!r}")


def on_input(module: nn.Module, look: Callable[[Tensor], None]) -> Any:
    """Let a look at x, a linear layer's input, each time before the layer is called; a context manager."""
    hook = lambda module, args, named: look(args[0] if args else named["input"])  # noqa: E731
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, look: Callable[[Any], None]) -> Any:
    """Let a look at what a module returns; a context manager."""
    return module.register_forward_hook(lambda module, args, output: look(output))
