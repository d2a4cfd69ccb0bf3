"""How good a language model still is: perplexity, bits per byte, and its distance to the unquantized model.

The idea: a model predicts each token of a text from those before it. The mean of -log p is all there is to know about
that text; perplexity is its exponential, bits per byte the same measure where the tokenizer no longer matters. Both ask
how good the model is. To ask what quantization did to it, compare its predictions with the unquantized model's on the
same text: KL divergence and the share of equal first choices differ long before perplexity does, since there no noise
of the text is in between.

Every function takes any model whose call on ids (batch, tokens) returns logits (batch, tokens, vocabulary), or an
object that has them as ``.logits``: ours, transformers', or a function of one's own. Texts are read window by window,
so memory does not grow with their length.

Source: the sliding window is transformers' "Perplexity of fixed-length models"; KL and top-1 as in llama.cpp's
perplexity tool.

How it differs from ``qcourse.numerics.metrics``: there, distances between two tensors; here, between models on a text.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from qcourse.numerics.metrics import kl_divergence
from qcourse.numerics.validation import check_token_ids

Model = Callable[..., Any]  # ids (batch, tokens) -> logits, or an object with .logits


@dataclass(frozen=True)
class Perplexity:
    """What ``perplexity`` found, with the windows it used: without them the number cannot be compared."""

    nll: float  # mean of -log p, in nats a token
    tokens: int  # how many were predicted: each but the first, once
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(nll): as uncertain as a choice among so many equally likely tokens; infinite beyond float64."""
        return _exp(self.nll)

    def bits_per_byte(self, size_bytes: int) -> float:
        """Bits that the model needs for each byte of the text: nll * tokens / (ln 2 * size_bytes).

        Args:
            size_bytes: of the text that the tokens encode, in UTF-8.

        Raises:
            ValueError: size_bytes is not positive.

        >>> Perplexity(nll=math.log(2), tokens=8, context=4, stride=4).bits_per_byte(4)
        2.0
        """
        if size_bytes < 1:
            raise ValueError(f"size_bytes must be at least 1, got {size_bytes}")
        return self.nll * self.tokens / math.log(2) / size_bytes


@dataclass(frozen=True)
class Agreement:
    """How close a model's predictions are to a reference's: mean KL(reference || model), and equal first choices."""

    kl: float  # nats a token
    top1: float  # share of tokens, 0 to 1
    tokens: int
    nll: float  # the model's own mean of -log p, as ``perplexity`` in windows side by side finds it

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
    """Mean -log p(token | those before it in its window) over all tokens but the first, each predicted once.

    Args:
        model: from ids (batch, tokens) to logits.
        tokens: ids (tokens,) of one running text.
        context: most tokens that a prediction sees; window k holds tokens [k stride, k stride + context).
        stride: from one window's start to the next. By default context: windows do not overlap, and a window's first
            prediction sees one token only. A smaller one lets each prediction (but those of the first window) see more
            than context - stride tokens, for context / stride times the work.
        batch_size: windows at a time; memory is that of batch_size x context x vocabulary logits.

    Returns:
        The mean in nats, its perplexity, how many tokens were predicted, and the windows used.

    Raises:
        TypeError: tokens is not of integers.
        ValueError: tokens is not one row of at least 2, context is below 1 or above the model's
            max_position_embeddings, stride is not from 1 to context, or batch_size is below 1.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> round(perplexity(uniform, torch.arange(20), context=8).perplexity, 3)
    50.0
    """
    stride = context if stride is None else stride
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, targets in _batches(tokens, context, stride, batch_size, model):
            logits = _logits(model, ids)[targets >= 0]
            total += F.cross_entropy(logits, targets[targets >= 0], reduction="sum").item()
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
    """Compare a model's predictions with a reference's on the same text, in windows of ``context`` side by side.

    Args:
        model: from ids (batch, tokens) to logits, as a rule quantized.
        reference: the same of the unquantized model, with the same vocabulary.
        tokens: ids (tokens,) of one running text.
        context: tokens a window.
        batch_size: windows at a time.

    Returns:
        Mean KL(reference || model) in nats, the share of tokens for which both hold the same one most likely, and the
        model's perplexity, which comes with them at no cost.

    Raises:
        TypeError, ValueError: as for ``perplexity``; or the two vocabularies differ.

    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> agreement(uniform, uniform, torch.arange(20), context=8)
    Agreement(kl=0.0, top1=1.0, tokens=19, nll=3.9120...)
    """
    kl, equal, count, nll = 0.0, 0, 0, 0.0
    with torch.no_grad():
        for ids, targets in _batches(tokens, context, context, batch_size, model, reference):
            theirs = _logits(reference, ids.to(device_of(reference) or ids.device)).to(ids.device)
            ours = _logits(model, ids)
            if ours.shape != theirs.shape:
                raise ValueError(
                    "model and reference must have one vocabulary, got logits of"
                    f" {tuple(ours.shape)} and {tuple(theirs.shape)}"
                )
            kl += kl_divergence(theirs, ours).sum(dtype=torch.float64).item()
            equal += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            count += targets.numel()
            nll += F.cross_entropy(ours.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return Agreement(kl / count, equal / count, count, nll / count)


def record_logits(model: Model) -> Model:
    """A function that answers as the model does and keeps each answer: a reference that is run once.

    It keeps the logits of every text that it was asked for: tokens x vocabulary floats.

    >>> answer = record_logits(lambda ids: torch.rand(*ids.shape, 50))
    >>> torch.equal(answer(torch.arange(20)[None]), answer(torch.arange(20)[None]))
    True
    """
    answers: dict[tuple[int, ...], Tensor] = {}

    def answer(ids: Tensor) -> Tensor:
        key = (*ids.shape, *ids.flatten().tolist())
        if key not in answers:
            answers[key] = _logits(model, ids.to(device_of(model) or ids.device))
        return answers[key]

    return answer


def _batches(
    tokens: Tensor, context: int, stride: int, batch_size: int, *models: Model
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and targets (batch, context), -1 where a target was predicted before; a shorter last window alone."""
    _check(tokens, context, stride, batch_size, room=min(map(room_of, models)))
    tokens = tokens.long().to(device_of(models[0]) or tokens.device)
    starts = [0, *range(stride, len(tokens) - 1 - context + stride, stride)]
    whole = [start for start in starts if start + context < len(tokens)]
    for batch in [
        *(whole[i : i + batch_size] for i in range(0, len(whole), batch_size)),
        starts[len(whole) :],
    ]:
        if batch:
            windows = torch.stack(
                [tokens[start : start + context + 1] for start in batch]
            )  # (batch, context + 1)
            targets = windows[:, 1:].clone()
            for row, start in enumerate(batch):
                targets[row, : context - stride if start else 0] = -1
            yield windows[:, :-1], targets


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _logits(model: Model, ids: Tensor) -> Float[Tensor, "batch tokens vocabulary"]:
    out = model(ids)
    return (out if isinstance(out, Tensor) else out.logits).float()


def device_of(model: Model) -> torch.device | None:
    """Where a module's weights are; None for one without, or a function."""
    return (
        next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
    )


def room_of(model: Model) -> float:
    """How many positions a model has, by its config; infinity where that does not say."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) or math.inf


def _check(tokens: Tensor, context: int, stride: int, batch_size: int, *, room: float) -> None:
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
