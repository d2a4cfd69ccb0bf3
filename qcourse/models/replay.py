"""What goes into each layer of a model, group by group, while the model is being quantized from its input on.

The idea: a layer late in a quantized model sees what quantized layers before it produce, so a calibrated method goes
through a model in the order of use: observe a layer's inputs, quantize it, go on with the next. To run the whole model
again for each would take a time that grows with the square of its depth. Most models are a chain of like blocks, each
reading the one before: so the outputs of the last finished block are kept, and all finished blocks answer with them at
once. Memory stays that of one block's outputs, and of what the method gathers. Whether a model is such a chain is
looked at, on all the calibration data; where it is not, it runs from its input each time.

Source: GPTQ's and AWQ's published code keep the inputs of one decoder block; here the model's own forward pass hands
out masks and positions, so that no architecture has to be known.

How it differs from ``inspect.record_inputs``: that keeps the activations of all layers; here each is used and dropped.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcourse.models.method import Method

Run = Callable[[nn.Module, Any], object]
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

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Any], run: Run) -> None:
        self.model, self.layers, self.batches, self.run = model, dict(layers), batches, run
        self.blocks = _longest_chain(model, layers)
        self.calls: list[Counter[nn.Module]] = []  # how often each layer and block is called, for each batch
        self.groups: dict[str, list[str]] = {}  # the layers that read one input, by the first of them, in order of use
        self.places: dict[str, int] = {}  # how many blocks have to be finished before a layer's input is final
        self.done = 0  # blocks that are finished
        self.outputs: list[list[Any]] = []  # of the last of them, for each batch and call
        self._trace()

    def in_order(self, method: Method) -> Iterator[tuple[Group, Any]]:
        """Yield each group and what the method saw of its input, x (tokens, in), once the groups before are done."""
        order = sorted(self.groups, key=self.places.__getitem__) if self.blocks else self.groups
        for first in order:
            while self.done < min(self.places[first], len(self.blocks)):
                block = self.blocks[self.done]
                self.outputs = [self._collect(number, block, after=True) for number in range(len(self.batches))]
                self.done += 1
            seen = None
            for number in range(len(self.batches)):
                for x in self._collect(number, self.layers[first], after=False):
                    seen = observe(method, seen, x, first)
            yield tuple(self.groups[first]), seen

    def at_once(self, method: Method) -> Iterator[tuple[Group, Any]]:
        """Yield the same for the model as it is now: every layer is observed before the first is given out."""
        seen: dict[str, Any] = dict.fromkeys(self.groups)

        def look(first: str) -> Callable[[Tensor], None]:
            return lambda x: seen.update({first: observe(method, seen[first], x, first)})

        with ExitStack() as hooks:
            for first in self.groups:
                hooks.enter_context(_before(self.layers[first], look(first)))
            for batch in self.batches:
                self.run(self.model, batch)
        yield from ((tuple(group), seen.pop(first)) for first, group in self.groups.items())

    def _collect(self, number: int, module: nn.Module, *, after: bool) -> list[Any]:
        """The inputs, or the outputs, of a module's calls on one batch; finished blocks are passed over."""
        found: list[Any] = []
        if not self.calls[number][module]:
            return found

        def keep(value: Any) -> None:
            found.append(value)
            if len(found) == self.calls[number][module]:
                raise _Enough

        finished = self.blocks[: self.done]
        try:
            with ExitStack() as stack:
                for block in finished:
                    answers = iter(self.outputs[number])
                    block.forward = lambda *args, answers=answers, **named: next(answers)
                    stack.callback(delattr, block, "forward")
                stack.enter_context(_after(module, keep) if after else _before(module, keep))
                self.run(self.model, self.batches[number])
        except _Enough:
            pass
        return found

    def _trace(self) -> None:
        """Let all batches pass once; note the calls, the groups, and whether the blocks are a chain."""
        chain = bool(self.blocks)
        for number, batch in enumerate(self.batches):
            watch = _Watch(self.layers, self.blocks, self.groups, self.places)
            with ExitStack() as hooks:
                for name, layer in self.layers.items():
                    hooks.enter_context(_before(layer, partial(watch.layer, name)))
                for i, block in enumerate(self.blocks):
                    hooks.enter_context(_before(block, partial(watch.before_block, i)))
                    hooks.enter_context(_after(block, watch.after_block))
                try:
                    self.run(self.model, batch)
                except (RuntimeError, IndexError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"the model cannot run batch {number} of calibration ({_words(batch)}): {error}"
                    ) from error
            self.calls.append(watch.calls)
            chain = chain and watch.chain
        if not chain:
            self.blocks = []


class _Watch:
    """What is seen of one batch's way through the model."""

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
        self._input: tuple[Any, str] = (None, "")  # held, so that no other tensor takes its place in memory
        self._output: Any = None
        self._finished = 0  # blocks, since the first was last begun

    def layer(self, name: str, x: Any) -> None:
        self.calls[self.layers[name]] += 1
        first = self._input[1] if self._input[0] is x else name
        self._input = x, first
        self.places.setdefault(name, self._finished)
        if not any(name in group for group in self.groups.values()):
            self.groups.setdefault(first, []).append(name)

    def before_block(self, i: int, x: Any) -> None:
        self.calls[self.blocks[i]] += 1
        if i == 0 and self._finished == len(self.blocks):
            self._finished = 0
        reads_last = x is not None and x is self._output
        self.chain = self.chain and i == self._finished and reads_last == (i > 0)

    def after_block(self, output: Any) -> None:
        self._output = output[0] if isinstance(output, tuple) else output
        self._finished += 1


def observe(method: Method, seen: Any, x: Tensor, name: str) -> Any:
    """method.observe of x with its leading axes as tokens; ValueError for NaN and infinity, of which all would be."""
    if not torch.isfinite(x).all():
        raise ValueError(f"calibration brings NaN or infinity into layer {name!r}")
    return method.observe(seen, x.detach().reshape(-1, x.shape[-1]))  # (tokens, in)


def _longest_chain(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The longest ModuleList whose members all have layers of interest in them."""
    wanted = set(layers.values())
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    chains = [blocks for blocks in lists if all(wanted & set(block.modules()) for block in blocks)]
    return max(chains, key=len, default=[])


def _before(module: nn.Module, look: Callable[[Any], None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        look(args[0] if args else named.get("input", named.get("hidden_states")))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _after(module: nn.Module, look: Callable[[Any], None]) -> Any:
    return module.register_forward_hook(lambda module, args, output: look(output))


def _words(batch: Any) -> str:
    return f"{batch.dtype} of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
