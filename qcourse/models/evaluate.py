"""Evaluate a language model: perplexity, bits per byte, and distance from the unquantized model.

Perplexity is exp(mean -log p of each next token); bits per byte does not depend on the tokenizer.
The KL divergence and the share of equal top-1 tokens measure what quantization changed; they move
long before perplexity does. Each has a standard error over windows, which is NaN for one window.

Source: transformers' "Perplexity of fixed-length models"; llama.cpp's perplexity tool (KL, top-1).
`numerics.metrics` compares two tensors; this compares two models. `multiple_choice.py` asks them.
"""

from jaxtyping import Shaped
from torch import Tensor

from qcourse.models.evaluation_results import (
    Agreement,
    Evaluation,
    Perplexity,
    bits_per_byte_of_nat,
)
from qcourse.models.evaluation_windows import Model
from qcourse.models.window_measures import measure_windows


def evaluate(
    model: Model,
    tokens: Shaped[Tensor, "..."],
    context: int,
    *,
    reference: Model | None = None,
    size_bytes: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Return perplexity, bits per byte, KL(reference || model) and top-1 with standard errors.

    Args:
        context: tokens per window; windows do not overlap.
        reference: adds KL divergence and top-1; ``record_logits`` saves running it for each model.
        size_bytes: of the text in UTF-8; adds bits per byte.

    Raises:
        TypeError, ValueError: as ``agreement``; size_bytes is below 1.

    >>> import torch
    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> print(evaluate(uniform, torch.arange(20), 8, reference=uniform).top1)
    1 ± 0
    """
    factor = None if size_bytes is None else bits_per_byte_of_nat(len(tokens) - 1, size_bytes)
    samples = measure_windows(model, tokens, context, batch_size=batch_size, reference=reference)
    nll = samples.estimate("nll")
    return Evaluation(
        perplexity=nll.exponential(),
        nll=nll,
        bits_per_byte=None if factor is None else nll.scaled(factor),
        kl=None if reference is None else samples.estimate("kl"),
        top1=None if reference is None else samples.estimate("top1"),
        samples=samples,
    )


def perplexity(
    model: Model,
    tokens: Shaped[Tensor, "..."],
    context: int,
    *,
    stride: int | None = None,
    batch_size: int | None = None,
) -> Perplexity:
    """Return the mean of -log p(token | earlier tokens in its window), each token predicted once.

    Args:
        context: tokens per window; window k holds tokens [k stride, k stride + context).
        stride: 1 to context, by default context (no overlap). With less, a prediction sees more
            than context - stride tokens, for context / stride times the work.
        batch_size: windows per call of the model, by default ``windows_at_once``.

    Raises:
        TypeError, ValueError: tokens is not one row of ids; an argument is out of range.

    >>> import torch
    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> round(perplexity(uniform, torch.arange(20), context=8).perplexity, 3)
    50.0
    """
    stride = context if stride is None else stride
    samples = measure_windows(model, tokens, context, stride=stride, batch_size=batch_size)
    count = int(samples.weights.sum())
    return Perplexity(samples.estimate("nll").mean, count, context, stride, samples)


def agreement(
    model: Model,
    reference: Model,
    tokens: Shaped[Tensor, "..."],
    context: int,
    *,
    batch_size: int | None = None,
) -> Agreement:
    """Return mean KL(reference || model), the share of equal top-1 tokens, and the model's nll.

    Raises TypeError or ValueError as ``perplexity``, or if the two vocabularies differ.

    >>> import torch
    >>> uniform = lambda ids: torch.zeros(*ids.shape, 50)
    >>> agreement(uniform, uniform, torch.arange(20), context=8)
    Agreement(kl=0.0, top1=1.0, tokens=19, nll=3.9120...)
    """
    samples = measure_windows(model, tokens, context, batch_size=batch_size, reference=reference)
    mean = {name: samples.estimate(name).mean for name in samples.totals}
    count = int(samples.weights.sum())
    return Agreement(mean["kl"], mean["top1"], count, mean["nll"], samples)
