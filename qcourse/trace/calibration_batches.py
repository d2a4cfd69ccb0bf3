"""Calibration batches: cut them from a text, check them, run a model on them.

A calibrated method needs a few inputs like those of later use: whole windows of running text for a
language model (GPTQ: 128 windows of 2048 tokens), for any other what its forward pass takes.
`models/evaluation_windows.py` predicts each token once; these windows need not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from qcourse.numerics.validation import check_token_ids
from qcourse.numerics.whole import check_whole

Run = Callable[[nn.Module, Any], object]


def windows(
    tokens: Shaped[Tensor, "..."], context: int, *, batch_size: int = 8, count: int | None = None
) -> list[Int[Tensor, "batch context"]]:
    """Return batches of whole windows of a text, side by side, to calibrate a language model on.

    `tokens` are the ids (tokens,) of one text, `context` the tokens per window, `count` the largest
    number of windows. Raises TypeError or ValueError for tokens that are no row of at least context
    integers, and ValueError unless the numbers are whole and at least 1.

    >>> import torch
    >>> [batch.tolist() for batch in windows(torch.arange(8), context=2, batch_size=2, count=3)]
    [[[0, 1], [2, 3]], [[4, 5]]]
    """
    _check_numbers(context=context, batch_size=batch_size)
    if count is not None:
        _check_numbers(count=count)
    check_token_ids(tokens, "tokens", least=context)

    whole = len(tokens) // context * context
    every = tokens[:whole].reshape(-1, context)  # (windows, context)
    return list(every[:count].split(batch_size))


def random_windows(
    tokens: Shaped[Tensor, "..."], context: int, *, count: int, batch_size: int = 8, seed: int = 0
) -> list[Int[Tensor, "batch context"]]:
    """Return count batches of windows from random places of a text, with arguments as of `windows`.

    >>> import torch
    >>> random_windows(torch.arange(100), context=4, count=2, batch_size=1)[1].shape
    torch.Size([1, 4])
    """
    _check_numbers(context=context, batch_size=batch_size, count=count)
    check_token_ids(tokens, "tokens", least=context)

    generator = torch.Generator().manual_seed(seed)
    places = len(tokens) - context + 1
    starts = torch.randint(places, (count, batch_size, 1), generator=generator)
    # A start and the offsets 0 .. context - 1 broadcast to the indices of one window.
    indices = starts + torch.arange(context)  # (count, batch, context)
    return list(tokens[indices].long())


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        check_whole(name, value, least=1)


def check_batches(calibration: Iterable[Any] | None, *, required: bool) -> list[Any]:
    """Return the batches as a list, empty for None.

    Raises TypeError for a single batch, ValueError for no batch at all, or for None if required.

    >>> check_batches([], required=False)
    Traceback (most recent call last):
    ValueError: calibration has no batch; give at least one, or None
    """
    if calibration is None:
        if required:
            raise ValueError(
                "calibration=None, but the method chooses codes by a layer's inputs:"
                " give it batches"
            )
        return []
    if isinstance(calibration, Tensor | str | Mapping):
        raise TypeError(
            f"calibration must be batches, got a single {type(calibration).__name__}: for a row of"
            " token ids write windows(tokens, context), for one batch [batch]"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration has no batch; give at least one, or None")
    return batches


def run_batch(run: Run, model: nn.Module, batches: Sequence[Any], number: int) -> None:
    """Call run(model, batches[number]); ValueError, with the batch, if the model cannot take it.

    >>> def by_name(model, batch):
    ...     return model(batch["ids"])
    >>> run_batch(by_name, nn.Linear(2, 2), [{"x": 1}], 0)
    Traceback (most recent call last):
    ValueError: the model cannot run batch 0 of calibration (dict): KeyError('ids')
    """
    batch = batches[number]
    try:
        run(model, batch)
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the model cannot run batch {number} of calibration ({_in_words(batch)}): {error!r}"
        ) from error


def _in_words(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{batch.dtype} of shape {tuple(batch.shape)}"
    return type(batch).__name__
