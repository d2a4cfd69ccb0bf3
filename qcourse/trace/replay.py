"""What goes into each layer of a model, group by group, while the model is being quantized from its input on.

The idea: a layer late in a quantized model sees what quantized layers before it produce, so a calibrated method goes
through a model in the order of use: observe a layer's inputs, quantize it, go on with the next. To run the whole model
again for each would take a time that grows with the square of its depth. Most models are a chain of like blocks, each
reading the one before: so the outputs of the last finished block are kept, and finished blocks answer at once, the last
with its outputs, those before it with NaN. Memory stays that of one block's outputs, and of what the method gathers.

Whether a model is such a chain is looked at, on all the calibration data. Its blocks are called in order, and none is
given an object (a cache) twice that it may have written to. If something else reads an earlier block, NaN shows it.
Where a model is no chain, it runs from its input each time.

Source: GPTQ's and AWQ's published code keep the inputs of one decoder block; here the model's own forward pass hands
out masks and positions, so that no architecture has to be known.

How it differs from ``inspect.record_inputs``: that keeps the activations of all layers; here each is used and dropped.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from qcourse.methods.method import Observer
from qcourse.trace.batches import Run, run_batch
from qcourse.trace.hooks import CallTrace, check_input, on_input, on_output
from qcourse.trace.model_copy import ModelCopy

Group = tuple[str, ...]


class _Enough(Exception):  # noqa: N818  (nothing is wrong)
    """Ends a forward pass that has shown what it was run for."""


class Replay:
    """Runs a model over batches, as far and as often as is needed.

    Args:
        model: has the layers.
        layers: the linear layers of interest, by name; who iterates over ``in_order`` replaces them as they come.
        batches: what run is given, one after another.
        run: uses the model on one batch.

    Raises:
        ValueError: the model fails on a batch.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], run: Run
    ) -> None:
        self.model, self.layers, self.batches, self.run = model, dict(layers), batches, run
        self.blocks = _longest_chain(model, layers)
        self.calls: list[
            Counter[nn.Module]
        ] = []  # how often each layer and block is called, for each batch
        self.groups: dict[
            str, list[str]
        ] = {}  # the layers that read one input, by the first of them, in order of use
        self.places: dict[
            str, int
        ] = {}  # how many blocks have to be finished before a layer's input is final
        self.answers: list[list[list[Any]]] = []  # of each finished block, for each batch and call
        self._trace()

    def in_order(self, method: Observer) -> Iterator[tuple[Group, Any]]:
        """Yield each group and what the method saw of its input, x (tokens, in), once the groups before are done.

        A group that nothing reaches any more, as may be in a mixture of experts, is left out.
        """
        order = sorted(self.groups, key=self.places.__getitem__) if self.blocks else self.groups
        for first in order:
            while len(self.answers) < min(self.places[first], len(self.blocks)):
                block = self.blocks[len(self.answers)]
                outputs = [
                    self._collect(number, block, after=True) for number in range(len(self.batches))
                ]
                self.answers = [*tree_map(_spoilt, self.answers), outputs]
            seen = None
            for number in range(len(self.batches)):
                for x in self._collect(number, self.layers[first], after=False):
                    seen = observe(method, seen, x, first)
            if seen is not None:
                yield tuple(self.groups[first]), seen

    def at_once(self, method: Observer) -> Iterator[tuple[Group, Any]]:
        """Yield the same for the model as it is now: every layer is observed before the first is given out."""
        seen: dict[str, Any] = dict.fromkeys(self.groups)

        def look(first: str, x: Tensor) -> None:
            seen[first] = observe(method, seen[first], x, first)

        with ExitStack() as hooks:
            for first in self.groups:
                hooks.enter_context(on_input(self.layers[first], partial(look, first)))
            for number in range(len(self.batches)):
                run_batch(self.run, self.model, self.batches, number)
        yield from (
            (tuple(group), seen.pop(first))
            for first, group in self.groups.items()
            if seen[first] is not None
        )

    def _collect(self, number: int, module: nn.Module, *, after: bool) -> list[Any]:
        """The inputs, or the outputs, of a module's calls on one batch; finished blocks are passed over."""
        found: list[Any] = []
        calls = self.calls[number][module]

        def keep(value: Any) -> None:
            last = len(found) + 1 == calls
            found.append(value if last else tree_map(_copied, value))
            if last:
                raise _Enough

        try:
            with ExitStack() as stack:
                for block, outputs in zip(self.blocks, self.answers, strict=False):
                    answers = iter(outputs[number])
                    block.forward = lambda *args, answers=answers, **named: tree_map(
                        _copied, next(answers)
                    )
                    stack.callback(delattr, block, "forward")
                stack.enter_context(on_output(module, keep) if after else on_input(module, keep))
                if calls:
                    run_batch(self.run, self.model, self.batches, number)
        except _Enough:
            pass
        if len(self.answers) > 1 and any(map(_is_spoilt, tree_leaves(found))):  # no chain after all
            self.blocks, self.answers = [], []
            return self._collect(number, module, after=after)
        return found

    def _trace(self) -> None:
        """Let all batches pass once; note the calls, the groups, and whether the blocks are called as a chain is."""
        chain = True
        for number in range(len(self.batches)):
            watch = CallTrace(self.layers, self.blocks, self.groups, self.places)
            with ExitStack() as hooks:
                for name, layer in self.layers.items():
                    hooks.enter_context(on_input(layer, partial(watch.layer, name)))
                for i, block in enumerate(self.blocks):
                    hook = block.register_forward_pre_hook(
                        partial(watch.before_block, i), with_kwargs=True
                    )
                    hooks.enter_context(hook)
                    hooks.enter_context(on_output(block, watch.after_block))
                run_batch(self.run, self.model, self.batches, number)
            self.calls.append(watch.calls)
            chain = chain and watch.chain
        if not chain:
            self.blocks = []


def groups(
    method: Observer, copy: ModelCopy, batches: Sequence[Any], run: Run, *, sequential: bool = True
) -> Iterator[tuple[Group, Any]]:
    """The layers to be replaced, group by group, with what was seen of their inputs; each alone if nothing is.

    Args:
        copy: whose pending layers are replaced as they come.
        batches, run: as ``Replay`` takes them.
        sequential: whether a group is seen on what the groups replaced before it produce, or all on the original's.
    """
    if not method.calibrated:
        return (((name,), None) for name in list(copy.pending))
    replay = Replay(copy.model, copy.pending, batches, run)
    return replay.in_order(method) if sequential else replay.at_once(method)


def observe(method: Observer, seen: Any, x: Tensor, name: str) -> Any:
    """method.observe of x with its leading axes as tokens; seen where x has none."""
    check_input(x, name)
    return (
        method.observe(seen, x.detach().reshape(-1, x.shape[-1])) if x.numel() else seen
    )  # (tokens, in)


def _longest_chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The longest ModuleList whose members all have layers of interest in them."""
    wanted = set(layers.values())
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    chains = [
        blocks for blocks in lists if all(wanted & {*block.modules()} - {block} for block in blocks)
    ]
    return max(chains, key=len, default=[])


def _copied(value: Any) -> Any:
    return (
        value.clone() if isinstance(value, Tensor) else value
    )  # the model may write into what it is given


def _spoilt(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.new_full((), torch.nan).expand(value.shape) if floats else value


def _is_spoilt(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.isnan().any())
