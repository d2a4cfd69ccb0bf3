"""Windows of a token sequence that predict each token once, and the call of a model on them.

A model is any function from ids (batch, tokens) to logits, or to an object with ``.logits``.

Source: transformers' "Perplexity of fixed-length models", for windows that overlap.
`window_measures.py` computes measures from these windows; those of `trace/calibration_batches.py`
have no targets.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qcourse.numerics.validation import check_token_ids

Model = Callable[..., Any]  # ids (batch, tokens) -> logits, or an object with .logits

WINDOWS_AT_ONCE = 8
LOGITS_BYTES = 2**27  # 134 MB: more logits are slower and take memory that the model needs


def batches_of_windows(
    tokens: Tensor, context: int, stride: int, batch_size: int, *models: Model
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and targets (batch, context); a target that an earlier window predicts is -1.

    >>> next(batches_of_windows(torch.arange(7), 4, 2, 8, print))
    (tensor([[0, 1, 2, 3],
            [2, 3, 4, 5]]), tensor([[ 1,  2,  3,  4],
            [-1, -1,  5,  6]]))
    """
    room = min(max_positions(model) for model in models)
    _check_windows(tokens, context, stride, batch_size, room)
    tokens = tokens.long().to(device_of(models[0]) or tokens.device)

    # A window starts every stride tokens, until one reaches the last target. Only that one can be
    # shorter than context + 1, and it is a batch of its own.
    last_start = len(tokens) - 1 - context
    starts = [0, *range(stride, last_start + stride, stride)]
    whole = [start for start in starts if start + context < len(tokens)]
    batches = [whole[i : i + batch_size] for i in range(0, len(whole), batch_size)]
    if len(whole) < len(starts):
        batches.append(starts[len(whole) :])

    for batch in batches:
        # A window has one token more than the context: the target of its last id.
        windows = torch.stack([tokens[start : start + context + 1] for start in batch])
        targets = windows[:, 1:].clone()
        # Every window but the first repeats context - stride targets of the one before.
        for row, start in enumerate(batch):
            if start:
                targets[row, : context - stride] = -1
        yield windows[:, :-1], targets


def windows_at_once(context: int, *models: Model) -> int:
    """Return how many windows a batch holds: 8, or fewer if their logits exceed LOGITS_BYTES.

    The vocabulary is ``config.vocab_size``; a model without a config does not lower the number.

    >>> windows_at_once(512, print)
    8
    """
    vocabularies = [getattr(getattr(model, "config", None), "vocab_size", 1) for model in models]
    window_bytes = 4 * max(context, 1) * max(vocabularies)
    return max(1, min(WINDOWS_AT_ONCE, LOGITS_BYTES // window_bytes))


def call_logits(model: Model, ids: Tensor) -> Float[Tensor, "batch tokens vocabulary"]:
    """Return model(ids) in float32."""
    output = model(ids)
    logits = output if isinstance(output, Tensor) else output.logits
    return logits.float()


def device_of(model: Model) -> torch.device | None:
    """Return the device of a module's first parameter; None for a function or a module without."""
    if not isinstance(model, nn.Module):
        return None
    first = next(model.parameters(), None)
    return None if first is None else first.device


def max_positions(model: Model) -> float:
    """Return ``config.max_position_embeddings``, or infinity if the model does not have it."""
    config = getattr(model, "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    return positions or math.inf


def _check_windows(tokens: Tensor, context: int, stride: int, batch_size: int, room: float) -> None:
    check_token_ids(tokens, "tokens", least=2)
    if not 1 <= context <= room:
        raise ValueError(
            f"context must be at least 1, and within the model's {room} positions, got {context}"
        )
    if not 1 <= stride <= context:
        raise ValueError(
            f"stride must be from 1 to context ({context}), or tokens are skipped, got {stride}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
