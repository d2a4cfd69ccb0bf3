"""Calibration data: the batches that a model is run on while it is being quantized, and running it on them.

The idea: a calibrated method needs inputs that are like those of later use, and not many. For a language model they are
whole windows of running text; for any other model, whatever its forward pass takes, batch by batch.

Source: GPTQ (Frantar et al., ICLR 2023), section 5, calibrates on 128 windows of 2048 tokens.

How it differs from ``evaluate.py``: there, windows to judge a model by, each token predicted once; here, to run it on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn

from qcourse.numerics.validation import check_token_ids

Run = Callable[[nn.Module, Any], object]


def windows(
    tokens: Shaped[Tensor, "..."], context: int, *, batch_size: int = 8, count: int | None = None
) -> list[Int[Tensor, "batch context"]]:
    """Cut a text into batches of whole windows, side by side: what a language model is calibrated on.

    Args:
        tokens: ids (tokens,) of one running text; what does not fill a window at the end is left out.
        context: tokens a window.
        batch_size: windows a batch; memory is that of batch_size x context activations.
        count: how many windows at most; by default all.

    Raises:
        TypeError: tokens is not of integers.
        ValueError: tokens is not one row of at least context tokens; context, batch_size or count is below 1.

    >>> import torch
    >>> [batch.tolist() for batch in windows(torch.arange(8), context=2, batch_size=2, count=3)]
    [[[0, 1], [2, 3]], [[4, 5]]]
    """
    for name, value in {
        "context": context,
        "batch_size": batch_size,
        "count": 1 if count is None else count,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_token_ids(tokens, "tokens", least=context)
    whole = tokens[: len(tokens) // context * context].reshape(-1, context)  # (windows, context)
    return list(whole[:count].split(batch_size))


def random_windows(
    tokens: Shaped[Tensor, "..."], context: int, *, count: int, batch_size: int = 8, seed: int = 0
) -> list[Int[Tensor, "batch context"]]:
    """Batches of windows from random places of a text: what a language model is trained on.

    Args:
        tokens: ids (tokens,) of one running text.
        context: tokens a window; one more than are predicted.
        count: how many batches; each is the same whenever it is drawn with this seed.
        batch_size: windows a batch.

    Raises:
        TypeError, ValueError: as ``windows``.

    >>> import torch
    >>> random_windows(torch.arange(100), context=4, count=2, batch_size=1)[1].shape
    torch.Size([1, 4])
    """
    for name, value in {"context": context, "batch_size": batch_size, "count": count}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_token_ids(tokens, "tokens", least=context)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - context + 1, (count, batch_size, 1), generator=generator)
    return list(tokens[starts + torch.arange(context)].long())


def check_batches(calibration: Iterable[Any] | None, *, required: bool) -> list[Any]:
    """The batches as a list, empty for None; TypeError for a single batch, ValueError where there is none.

    >>> check_batches([], required=False)
    Traceback (most recent call last):
    ValueError: calibration has no batch; give at least one, or None
    """
    if calibration is None:
        if required:
            raise ValueError(
                "calibration=None, but the method chooses codes by a layer's inputs: give it batches"
            )
        return []
    if isinstance(calibration, Tensor | str | Mapping):
        raise TypeError(
            f"calibration must be batches, got a single {type(calibration).__name__}: for a row of token ids write"
            " windows(tokens, context), for one batch [batch]"
        )
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration has no batch; give at least one, or None")
    return batches


def run_batch(run: Run, model: nn.Module, batches: Sequence[Any], number: int) -> None:
    """run(model, batches[number]); ValueError, with the batch, for what a model raises that does not fit its input.

    >>> run_batch(lambda model, batch: model(batch["ids"]), nn.Linear(2, 2), [{"x": 1}], 0)
    Traceback (most recent call last):
    ValueError: the model cannot run batch 0 of calibration (dict): KeyError('ids')
    """
    try:
        run(model, batches[number])
    except (RuntimeError, LookupError, TypeError, AttributeError) as error:
        words = _words(batches[number])
        raise ValueError(
            f"the model cannot run batch {number} of calibration ({words}): {error!r}"
        ) from error


def _words(batch: Any) -> str:
    return (
        f"{batch.dtype} of shape {tuple(batch.shape)}"
        if isinstance(batch, Tensor)
        else type(batch).__name__
    )
