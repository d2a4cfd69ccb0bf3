"""How a model calls its layers: which layers read one input, and the order of layers and blocks.

The idea: hooks observe one pass per batch. Layers called one after another with the same tensor are
a group. The shapes alone often tell this, so the layers may return placeholders (`stand_ins.py`),
and the pass takes almost no time.
How it differs from `replay.py`: that module decides by this trace how the next passes run.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from qcourse.trace.calibration_batches import Run, run_batch
from qcourse.trace.hooks import on_input, on_output
from qcourse.trace.stand_ins import drop_values

CONSTANT = Tensor | tuple | int | float | str | None  # arguments that no block writes to


@dataclass
class LayerGroups:
    """Groups of layers that read one input, by the first of each, in order of use.

    `blocks_before` has, per layer, how many blocks have to finish before its input is final.
    """

    members: dict[str, list[str]] = field(default_factory=dict)
    blocks_before: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, first: str, blocks_before: int) -> None:
        """Add a layer, when it is first called, to the group of ``first`` or to one of its own."""
        if name in self.blocks_before:
            return
        self.blocks_before[name] = blocks_before
        # An earlier batch may have put `first` into another group. Its layer is replaced with that
        # group, so a layer that joined it now would never be observed.
        if first in self.members:
            self.members[first].append(name)
        else:
            self.members[name] = [name]


class CallTrace:
    """Observe how the model calls its layers and blocks on one batch.

    It adds to `groups` what earlier batches have not shown, counts the `calls` of each module, and
    clears `is_chain` if blocks are called out of order or share an object that they could write to.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], blocks: Sequence[nn.Module], groups: LayerGroups
    ) -> None:
        self.layers = layers
        self.blocks = blocks
        self.groups = groups
        self.calls: Counter[nn.Module] = Counter()
        self.is_chain = True
        self._blocks_finished = 0  # since the first block was last called

        # Inputs are compared by identity. Holding them keeps their addresses from being reused.
        self._last_input: Any = None
        self._first_reader = ""  # the layer that first read the last input
        self._arguments: dict[tuple[int, int], Any] = {}  # by block number and id

    def attached(self) -> ExitStack:
        """Register the hooks; the returned context manager removes them."""
        hooks = ExitStack()
        for name, layer in self.layers.items():
            hooks.enter_context(on_input(layer, partial(self._before_layer, name)))
        for number, block in enumerate(self.blocks):
            before = partial(self._before_block, number)
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(on_output(block, self._after_block))
        return hooks

    def _before_layer(self, name: str, x: Any) -> None:
        self.calls[self.layers[name]] += 1
        # Layers called one after another with the same tensor form a group.
        if self._last_input is not x:
            self._last_input = x
            self._first_reader = name
        self.groups.add(name, self._first_reader, self._blocks_finished)

    def _before_block(
        self, number: int, block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self.calls[block] += 1
        if number == 0 and self._blocks_finished == len(self.blocks):
            self._blocks_finished = 0  # the model runs once more

        # A block that gets the same object twice (a cache, say) may remember its last call.
        objects = {}
        for value in (*args, *named.values()):
            if not isinstance(value, CONSTANT):
                objects[number, id(value)] = value
        in_order = number == self._blocks_finished
        if not in_order or objects.keys() & self._arguments.keys():
            self.is_chain = False
        self._arguments |= objects

    def _after_block(self, output: Any) -> None:
        self._blocks_finished += 1


def traced_calls(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    blocks: Sequence[nn.Module],
    batches: Sequence[Any],
    run: Run,
    *,
    with_values: bool,
) -> tuple[LayerGroups, list[Counter[nn.Module]], bool]:
    """Return the groups, the calls per batch, and whether the blocks are a chain, by one pass each.

    Without values the layers return placeholders, so NoChain is raised where the model reads them.
    """
    groups = LayerGroups()
    calls = []
    is_chain = True
    for number in range(len(batches)):
        trace = CallTrace(layers, blocks, groups)
        with trace.attached() as hooks:
            for layer in () if with_values else layers.values():
                hooks.enter_context(layer.register_forward_pre_hook(drop_values, with_kwargs=True))
            run_batch(run, model, batches, number)
        calls.append(trace.calls)
        is_chain = is_chain and trace.is_chain
    return groups, calls, is_chain


def longest_chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the longest ModuleList in which each member contains a layer of interest."""
    wanted = set(layers.values())
    longest: list[nn.Module] = []
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) <= len(longest):
            continue
        # A block that is itself a layer of interest does not count, because it will be replaced.
        if all(wanted & (set(block.modules()) - {block}) for block in module):
            longest = list(module)
    return longest
