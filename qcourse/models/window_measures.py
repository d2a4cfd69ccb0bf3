"""Measure a model window by window: nll, and KL divergence and top-1 agreement with a reference.

There is one loop for all measures. The logits of a large vocabulary are far larger than the model's
activations (100 MB for 512 tokens of 49,152 values), so a batch holds few windows, and their rows
are measured in parts that stay in the processor's cache.

Source: llama.cpp's perplexity tool (KL divergence, same top token).
`evaluation_windows.py` makes the windows; `evaluate.py` gives the results.
"""

import hashlib
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qcourse.models.evaluation_windows import (
    Model,
    batches_of_windows,
    call_logits,
    device_of,
    windows_at_once,
)
from qcourse.models.standard_error import Samples
from qcourse.numerics.metrics import kl_of_logs

PART_VALUES = 2**21  # logits measured at once: 8 MB in float32


def measure_windows(
    model: Model,
    tokens: Tensor,
    context: int,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
    reference: Model | None = None,
) -> Samples:
    """Return "nll" of each window, and "kl" and "top1" if there is a reference, as totals.

    Args:
        batch_size: windows per call of the model; by default at most 8, and fewer where their
            logits would take more than ``LOGITS_BYTES``.
    """
    stride = context if stride is None else stride
    models = [model] if reference is None else [model, reference]
    if batch_size is None:
        batch_size = windows_at_once(context, *models)
    counts: list[int] = []
    totals: dict[str, list[float]] = {}
    with torch.no_grad():
        for ids, targets in batches_of_windows(tokens, context, stride, batch_size, *models):
            for window in _predictions(model, reference, ids, targets):
                counts.append(len(window[-1]))
                for name, total in _window_totals(*window).items():
                    totals.setdefault(name, []).append(total)
    weights = torch.tensor(counts, dtype=torch.float64)
    by_name = {name: torch.tensor(each, dtype=torch.float64) for name, each in totals.items()}
    return Samples(_key(tokens, context, stride), weights, by_name)


def _predictions(
    model: Model, reference: Model | None, ids: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each window's logits, the reference's (none without one), and the targets."""
    ours = call_logits(model, ids)
    theirs = ours[..., :0]
    if reference is not None:
        # The reference may be on another device.
        device = device_of(reference) or ids.device
        theirs = call_logits(reference, ids.to(device)).to(ids.device)
        _check_vocabularies(ours, theirs)
    for row, expected in enumerate(targets):
        # -1 marks the first targets of a window, which an earlier window predicted.
        new = slice(int((expected < 0).sum()), None)
        yield ours[row, new], theirs[row, new], expected[new]


def _window_totals(
    ours: Float[Tensor, "tokens vocabulary"],
    theirs: Float[Tensor, "tokens vocabulary_or_0"],
    expected: Int[Tensor, " tokens"],
) -> dict[str, float]:
    """Return the sum of each measure over a window's tokens."""
    rows = max(1, PART_VALUES // ours.shape[1])
    totals: dict[str, float] = {}
    parts = zip(ours.split(rows), theirs.split(rows), expected.split(rows), strict=True)
    for our_part, their_part, target in parts:
        log_q = our_part.log_softmax(-1)
        measured = {"nll": -log_q.gather(1, target[:, None])}
        if their_part.numel():
            log_p = their_part.log_softmax(-1)
            measured["kl"] = kl_of_logs(log_p, log_q)
            measured["top1"] = our_part.argmax(-1) == their_part.argmax(-1)
        for name, values in measured.items():
            # In float64: a sum of thousands of float32 loses digits.
            totals[name] = totals.get(name, 0.0) + values.sum(dtype=torch.float64).item()
    return totals


def _check_vocabularies(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            "model and reference must have one vocabulary, got logits of"
            f" {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )


def _key(tokens: Tensor, context: int, stride: int) -> str:
    """Return a digest of what decides the windows."""
    digest = hashlib.sha256(f"{context} {stride} ".encode())
    digest.update(tokens.long().cpu().numpy().tobytes())
    return digest.hexdigest()
