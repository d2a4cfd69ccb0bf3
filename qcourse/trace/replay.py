"""The inputs of each layer of a model, group by group, while its layers are being quantized.

A late layer of a quantized model receives what quantized layers before it produce. So a calibrated
method follows the order of use: observe a layer's inputs, quantize it, go on. To run the whole
model for each layer would take time quadratic in its depth. Most models are a chain of blocks, each
of which reads only the block before, so stand-ins replace finished blocks (`stand_ins.py`) and
memory is that of one block's outputs. A model that is no chain runs from its input each time.
And where each batch calls each layer once, in one order, a single pass is enough
(`paused_passes.py`).

Source: GPTQ's published code stores the inputs of one decoder block; this works for any model.
`linears.record_inputs` keeps all inputs; here each is used and dropped.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qcourse.methods.method import Observer
from qcourse.trace.calibration_batches import Run, run_batch
from qcourse.trace.call_trace import LayerGroups, longest_chain, traced_calls
from qcourse.trace.hooks import check_input, on_input, on_output
from qcourse.trace.model_copy import ModelCopy
from qcourse.trace.paused_passes import PausedPasses
from qcourse.trace.stand_ins import FinishedBlocks, NoChain, copied, has_placeholder

Group = tuple[str, ...]  # names of the layers that read the same input
MOST_PASSES = 64  # paused at the same time: each takes a thread


class _Enough(Exception):  # noqa: N818  (nothing failed)
    """Ends a forward pass once it has shown what it was run for."""


@dataclass
class Replay:
    """Runs a traced model over batches, as far and as often as needed; see ``traced``.

    `layers` are the linear layers of interest, in `groups` that read one input. `blocks` are the
    chain, empty if there is none. `calls` has, per batch, how often each layer and block is called.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    batches: Sequence[Any]
    run: Run
    groups: LayerGroups
    calls: Sequence[Counter[nn.Module]]
    blocks: list[nn.Module]
    _finished: FinishedBlocks = field(default_factory=FinishedBlocks)

    @classmethod
    def traced(
        cls, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], run: Run
    ) -> "Replay":
        """Run the model once per batch and return a replay of it; ValueError if it fails on one."""
        # The layers as they are now: the caller may change its mapping while it replaces them.
        layers = dict(layers)
        blocks = longest_chain(model, layers)

        # Shapes often tell all that a trace asks for, and take almost no time.
        try:
            trace = traced_calls(model, layers, blocks, batches, run, with_values=False)
        except (NoChain, ValueError):
            trace = traced_calls(model, layers, blocks, batches, run, with_values=True)
        groups, calls, is_chain = trace
        return cls(model, layers, batches, run, groups, calls, blocks if is_chain else [])

    def in_order(self, method: Observer, *, one_pass: bool = True) -> Iterator[tuple[Group, Any]]:
        """Yield each group with what the method observed, after the groups before are replaced.

        one_pass allows a single pass per batch: what it has computed before a group must stay
        valid when the group is replaced.
        """
        order = list(self.groups.members)
        if self.blocks:
            order.sort(key=self.groups.blocks_before.__getitem__)
        if one_pass and self._calls_once_in(order):
            yield from self._in_one_pass(method, order)
            return
        for first in order:
            self._finish_blocks(self.groups.blocks_before[first])
            seen = None
            for number in range(len(self.batches)):
                for x in self._inputs(number, self.layers[first]):
                    seen = observe(method, seen, x, first)
            # No batch may reach an expert of a mixture any more.
            if seen is not None:
                yield tuple(self.groups.members[first]), seen

    def _calls_once_in(self, order: Sequence[str]) -> bool:
        """Whether each batch calls each layer at most once, and groups in this order."""
        rank = {}
        for number, first in enumerate(order):
            for name in self.groups.members[first]:
                rank[self.layers[name]] = number
        for calls in self.calls:
            called = [module for module in calls if module in rank]
            ranks = [rank[module] for module in called]
            if ranks != sorted(ranks) or any(calls[module] > 1 for module in called):
                return False
        return len(self.batches) <= MOST_PASSES

    def _in_one_pass(self, method: Observer, order: Sequence[str]) -> Iterator[tuple[Group, Any]]:
        groups = [tuple(self.groups.members[first]) for first in order]
        works = []
        for number in range(len(self.batches)):
            works.append(partial(run_batch, self.run, self.model, self.batches, number))
        with PausedPasses(self.model, self.layers, groups, works) as passes:
            for rank, names in enumerate(groups):
                seen = None
                for x in passes.inputs(rank):
                    seen = observe(method, seen, x, names[0])
                if seen is not None:
                    yield names, seen

    def at_once(self, method: Observer) -> Iterator[tuple[Group, Any]]:
        """Yield the same for the model as it is: all layers are observed in one pass per batch."""
        seen: dict[str, Any] = dict.fromkeys(self.groups.members)

        def look(first: str, x: Tensor) -> None:
            seen[first] = observe(method, seen[first], x, first)

        with ExitStack() as hooks:
            for first in self.groups.members:
                hooks.enter_context(on_input(self.layers[first], partial(look, first)))
            for number in range(len(self.batches)):
                run_batch(self.run, self.model, self.batches, number)
        for first, group in self.groups.members.items():
            observed = seen.pop(first)  # so that its memory is free after its group
            if observed is not None:
                yield tuple(group), observed

    def _finish_blocks(self, count: int) -> None:
        # A block is finished when its layers are replaced; its outputs are then final.
        while len(self._finished) < min(count, len(self.blocks)):
            block = self.blocks[len(self._finished)]
            outputs = [self._outputs(number, block) for number in range(len(self.batches))]
            # These passes may have shown that the model is no chain.
            if self.blocks:
                self._finished.append(block, outputs)

    def _inputs(self, number: int, layer: nn.Module) -> list[Tensor]:
        return self._collect(number, layer, on_input)

    def _outputs(self, number: int, block: nn.Module) -> list[Any]:
        return self._collect(number, block, on_output)

    def _collect(self, number: int, module: nn.Module, hook: Any) -> list[Any]:
        try:
            return self._run_until_seen(number, module, hook)
        except (NoChain, ValueError):
            if len(self._finished) == 0:
                raise
        # A model that fails with stand-ins is no chain after all.
        self._forget_chain()
        return self._run_until_seen(number, module, hook)

    def _forget_chain(self) -> None:
        # All later passes run from the model's input.
        self.blocks = []
        self._finished = FinishedBlocks()

    def _run_until_seen(self, number: int, module: nn.Module, hook: Any) -> list[Any]:
        # The pass ends with the last call of the module; what comes after it has no use.
        found: list[Any] = []
        calls = self.calls[number][module]
        if not calls:
            return found

        def keep(value: Any) -> None:
            if has_placeholder(value):
                raise NoChain("a layer reads the output of an earlier block")
            is_last = len(found) + 1 == calls
            found.append(value if is_last else tree_map(copied, value))
            if is_last:
                raise _Enough

        with self._finished.standing_in(number), hook(module, keep), suppress(_Enough):
            run_batch(self.run, self.model, self.batches, number)
        return found


def observed_groups(
    method: Observer,
    copy: ModelCopy,
    batches: Sequence[Any],
    run: Run,
    *,
    sequential: bool = True,
    one_pass: bool = True,
) -> Iterator[tuple[Group, Any]]:
    """Return the groups of layers to be replaced, each with what the method observed of its input.

    The caller replaces the copy's pending layers while it iterates. With sequential=True a group is
    observed after the groups before it were replaced; one_pass as for ``in_order``. A method that
    is not calibrated gets None.
    """
    if not method.calibrated:
        return (((name,), None) for name in list(copy.pending))
    replay = Replay.traced(copy.model, copy.pending, batches, run)
    return replay.in_order(method, one_pass=one_pass) if sequential else replay.at_once(method)


def observe(method: Observer, seen: Any, x: Tensor, name: str) -> Any:
    """Return method.observe(seen, x), x as (tokens, in); seen itself where x has no token."""
    check_input(x, name)
    if not x.numel():
        return seen
    return method.observe(seen, x.detach().reshape(-1, x.shape[-1]))  # (tokens, in)
