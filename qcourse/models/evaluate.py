"""Evaluate a language model: perplexity, bits per byte, and distance from the unquantized model.

Perplexity is exp(mean -log p of each next token); bits per byte does not depend on the tokenizer.
The KL divergence and the share of equal top-1 tokens measure what quantization changed; they move
long before perplexity does.

Source: transformers' "Perplexity of fixed-length models"; llama.cpp's perplexity tool (KL, top-1).
`numerics.metrics` compares two tensors; this compares two models.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor

from qcourse.models.evaluation_windows import Model, batches_of_windows, call_logits, device_of
from qcourse.numerics.metrics import kl_divergence


@dataclass(frozen=True)
class Perplexity:
    """Result of ``perplexity``. Other windows give other numbers."""

    nll: float  # mean of -log p, in nats per token
    tokens: int  # predicted tokens: all but the first
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(nll), the number of equally likely tokens with the same nll; may be infinite."""
        return _exp(self.nll)

    def bits_per_byte(self, size_bytes: int) -> float:
        """Return nll * tokens / (ln 2 * size_bytes), for size_bytes >= 1 bytes of UTF-8 text.

        >>> Perplexity(nll=math.log(2), tokens=8, context=4, stride=4).bits_per_byte(4)
        2.0
        """
        if size_bytes < 1:
            raise ValueError(f"size_bytes must be at least 1, got {size_bytes}")
        return self.nll * self.tokens / math.log(2) / size_bytes


@dataclass(frozen=True)
class Agreement:
    """Result of ``agreement``: how close a model's predictions are to a reference's."""

    kl: float  # mean of KL(reference || model), in nats per token
    top1: float  # share of tokens with the same most likely prediction, 0 to 1
    tokens: int
    nll: float  # the model's own, as ``perplexity`` with stride = context finds it

    @property
    def perplexity(self) -> float:
        """exp(nll), as in ``Perplexity``."""
        return _exp(self.nll)


def perplexity(
    model: Model,
    tokens: Shaped[Tensor, "..."],
    context: int,
    *,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    """Return the mean of -log p(token | earlier tokens in its window), each token predicted once.

    Args:
        context: tokens per window; window k holds tokens [k stride, k stride + context).
        stride: 1 to context, by default context (no overlap). With less, a prediction sees more
            than context - stride tokens, for context / stride times the work.

    Raises:
        TypeError, ValueError: tokens is not one row of ids; an argument is out of range.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> round(perplexity(uniform, torch.arange(20), context=8).perplexity, 3)
    50.0
    """
    stride = context if stride is None else stride
    total = 0.0
    count = 0
    with torch.no_grad():
        for ids, targets in batches_of_windows(tokens, context, stride, batch_size, model):
            # -1 marks a target that an earlier window predicted.
            new = targets >= 0
            logits = call_logits(model, ids)[new]  # (predicted, vocabulary)
            total += F.cross_entropy(logits, targets[new], reduction="sum").item()
            count += len(logits)
    return Perplexity(total / count, count, context, stride)


def agreement(
    model: Model,
    reference: Model,
    tokens: Shaped[Tensor, "..."],
    context: int,
    *,
    batch_size: int = 8,
) -> Agreement:
    """Return mean KL(reference || model), the share of equal top-1 tokens, and the model's nll.

    Raises TypeError or ValueError as ``perplexity``, or if the two vocabularies differ.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> agreement(uniform, uniform, torch.arange(20), context=8)
    Agreement(kl=0.0, top1=1.0, tokens=19, nll=3.9120...)
    """
    kl = 0.0
    nll = 0.0
    equal = 0
    count = 0
    with torch.no_grad():
        for ids, targets in batches_of_windows(
            tokens, context, context, batch_size, model, reference
        ):
            # The reference may be on another device.
            device = device_of(reference) or ids.device
            theirs = call_logits(reference, ids.to(device)).to(ids.device)
            ours = call_logits(model, ids)
            _check_vocabularies(ours, theirs)

            kl += kl_divergence(theirs, ours).sum(dtype=torch.float64).item()
            equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            logits = ours.flatten(0, 1)  # (predicted, vocabulary)
            nll += F.cross_entropy(logits, targets.flatten(), reduction="sum").item()
            count += targets.numel()
    return Agreement(kl / count, equal / count, count, nll / count)


def record_logits(model: Model) -> Model:
    """Return a function that runs the model once per ids and keeps all logits (a reference).

    >>> answer = record_logits(lambda ids: torch.rand(*ids.shape, 50))
    >>> torch.equal(answer(torch.arange(20)[None]), answer(torch.arange(20)[None]))
    True
    """
    recorded: dict[tuple[int, ...], Tensor] = {}

    def answer(ids: Tensor) -> Tensor:
        key = (*ids.shape, *ids.flatten().tolist())
        if key not in recorded:
            device = device_of(model) or ids.device
            recorded[key] = call_logits(model, ids.to(device))
        return recorded[key]

    return answer


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _check_vocabularies(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape != theirs.shape:
        raise ValueError(
            "model and reference must have one vocabulary, got logits of"
            f" {tuple(ours.shape)} and {tuple(theirs.shape)}"
        )
