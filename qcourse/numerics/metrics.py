"""How far a quantized tensor is from the original, and how much its codes still say.

The idea: no single number tells the whole story. Relative error and SQNR look at the size of the error, cosine at the
direction, KL at what it does to a distribution, and the entropy of the codes at how many of the levels are at work.

Two tensors that are compared have one shape (nothing broadcasts); the comparison is in float32 at least, without
gradients.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.chunks import wide


def relative_error(x: Shaped[Tensor, "..."], x_hat: Shaped[Tensor, "..."]) -> float:
    """||x - x_hat|| / ||x|| (Frobenius norm).

    Raises:
        ValueError: the shapes differ; x is all zero, so that there is nothing to be relative to.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    0.2
    """
    x, x_hat = _comparable(x, x_hat)
    size = float(torch.linalg.vector_norm(x.double()))
    if size == 0:
        raise ValueError("x is all zero; the relative error is undefined")
    return float(torch.linalg.vector_norm(x.double() - x_hat.double())) / size


def sqnr_db(x: Shaped[Tensor, "..."], x_hat: Shaped[Tensor, "..."]) -> float:
    """The signal-to-quantization-noise ratio in decibels, -20 log10(relative error); infinite where nothing was lost.

    >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])), 2)
    13.98
    """
    error = relative_error(x, x_hat)
    return -20 * math.log10(error) if error else math.inf


def cosine(x: Shaped[Tensor, "..."], y: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The cosine of the angle between x and y (..., size) along the last axis, <x, y> / (||x|| ||y||).

    Raises:
        ValueError: the shapes differ.

    >>> cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, -1.0]])).tolist()
    [1.0, 0.0]
    """
    return torch.nn.functional.cosine_similarity(*_comparable(x, y), dim=-1)


def kl_divergence(
    logits: Shaped[Tensor, "..."], logits_hat: Shaped[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """KL(p || p_hat) in nats, p and p_hat the softmax of the logits (..., size) along the last axis.

    Raises:
        ValueError: the shapes differ.

    >>> round(kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])).item(), 4)
    0.1201
    """
    log_p, log_p_hat = (each.log_softmax(dim=-1) for each in _comparable(logits, logits_hat))
    terms = log_p.exp() * (log_p - log_p_hat)
    return terms.masked_fill(log_p == -math.inf, 0).sum(
        dim=-1
    )  # p log p tends to 0 with p (masked logits)


def code_entropy(codes: Shaped[Tensor, "*shape"]) -> float:
    """The entropy of the codes in bits, -sum p log2 p over how often each occurs: at most `bits`, 0 if all are one.

    >>> code_entropy(torch.tensor([0, 0, 1, 1])), code_entropy(torch.tensor([5, 5, 5]))
    (1.0, 0.0)
    """
    _, counts = torch.unique(codes, return_counts=True)
    p = counts.double() / counts.sum()
    return abs(float(-(p * p.log2()).sum()))  # abs: -0.0 for a single code


def _comparable(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both, in a dtype wide enough to subtract in; ValueError where the shapes differ."""
    if x.shape != y.shape:
        raise ValueError(
            f"shapes {tuple(x.shape)} and {tuple(y.shape)} differ; compare tensors of one shape"
        )
    return x.detach().to(wide(x.dtype)), y.detach().to(wide(y.dtype))
