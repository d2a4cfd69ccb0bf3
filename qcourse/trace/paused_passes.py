"""Passes over all batches, each paused before the layers that are replaced next.

The idea: the pass over one batch runs in a thread, which pauses before each layer of interest. Once
all passes have arrived at a layer, its inputs are observed and the layer is replaced. Then the
passes go on through the new layer. So each layer runs once per batch, on what the quantized layers
before it produce, and what follows the last layer of interest never runs. One thread runs at a
time; Python's generators would do, if a model's forward were one.
How it differs from `replay.py`: that module runs blocks again for each of their layers, and so it
also takes models that call a layer twice or in another order for each batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor, nn


class _Cancelled(Exception):  # noqa: N818  (nothing failed)
    """Ends a pass that is not needed any more."""


class PausedPass:
    """A function in a thread that runs only inside ``resume``, until it calls ``pause``.

    >>> def work():
    ...     each.pause("layer", torch.ones(1))
    >>> each = PausedPass(work)
    >>> each.resume()
    >>> each.at, each.x, each.is_done
    ('layer', tensor([1.]), False)
    >>> each.resume()
    >>> each.at, each.x, each.is_done
    (None, None, True)
    """

    def __init__(self, work: Callable[[], None]) -> None:
        # The layer before which the pass is paused, and its input.
        self.at: str | None = None
        self.x: Tensor | None = None
        self.is_done = False
        self._is_cancelled = False
        self._error: BaseException | None = None
        # Each side waits until the other one releases its semaphore.
        self._go = Semaphore(0)
        self._paused = Semaphore(0)
        self._thread = Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Let the thread run until it pauses, ends or fails; raise its error here."""
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def pause(self, name: str, x: Tensor) -> None:
        """Stop the thread that calls this until the next ``resume``."""
        self.at = name
        self.x = x
        self._paused.release()
        self._go.acquire()
        self.at = None
        self.x = None
        if self._is_cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """End the thread and wait for its end."""
        self._is_cancelled = True
        self._go.release()
        self._thread.join()

    def _run(self, work: Callable[[], None]) -> None:
        self._go.acquire()
        try:
            # Whether gradients are computed is a setting of each thread.
            with torch.no_grad():
                if not self._is_cancelled:
                    work()
        except _Cancelled:
            pass
        except BaseException as error:  # raised again by resume
            self._error = error
        finally:
            self.is_done = True
            self._paused.release()


class PausedPasses:
    """One paused pass per batch, over a model whose groups of layers are called in one order.

    `groups` has the names of the layers that read one input, in that order.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        groups: Sequence[Sequence[str]],
        works: Sequence[Callable[[], None]],
    ) -> None:
        self.model = model
        self.layers = layers
        self.groups = groups
        self._rank: dict[str, int] = {}
        for rank, names in enumerate(groups):
            self._rank |= dict.fromkeys(names, rank)
        self._passes = [PausedPass(work) for work in works]
        self._running = self._passes[0]

    def __enter__(self) -> "PausedPasses":
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._passes:
            each.cancel()

    def inputs(self, rank: int) -> Iterator[Tensor]:
        """Yield the input of a group per batch that reaches it, once the groups before are done."""
        first = self.groups[rank][0]
        for each in self._passes:
            with self._pausing(rank):
                self._advance(each, rank)
            if each.at == first and each.x is not None:
                yield each.x

    def _advance(self, each: PausedPass, rank: int) -> None:
        self._running = each
        while not each.is_done and (each.at is None or self._rank[each.at] < rank):
            each.resume()

    @contextmanager
    def _pausing(self, rank: int) -> Iterator[None]:
        # Only while a pass runs: the caller may copy or run the model in between.
        waiting = [name for names in self.groups[rank:] for name in names]
        for name in waiting:
            self.layers[name].forward = partial(self._forward, name)
        try:
            yield
        finally:
            for name in waiting:
                del self.layers[name].forward  # the method of the class is visible again

    def _forward(self, name: str, *args: Any, **named: Any) -> Any:
        self._running.pause(name, args[0] if args else named["input"])

        # The layer may have been replaced while the pass was paused.
        old = self.layers[name]
        new = self.model.get_submodule(name)
        if new is not old:
            return new(*args, **named)
        return type(old).forward(old, *args, **named)
