"""How far a quantized tensor is from the original, and how much information its codes carry.

The idea: relative error and SQNR measure the size of the error, cosine its effect on the direction,
KL divergence its effect on a distribution. Entropy measures how evenly the codes are used.
How it differs from `recipes/layer_errors.py`: that sums errors over a model, this takes one tensor.
"""

import math

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.chunks import wide


def relative_error(x: Shaped[Tensor, "..."], x_hat: Shaped[Tensor, "..."]) -> float:
    """Return ||x - x_hat|| / ||x||; ValueError if x is all zero or the shapes differ.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    0.2
    """
    x, x_hat = _comparable(x, x_hat)
    x = x.double()
    size = float(torch.linalg.vector_norm(x))
    if size == 0:
        raise ValueError("x is all zero; the relative error is undefined")
    error = x - x_hat.double()
    return float(torch.linalg.vector_norm(error)) / size


def sqnr_db(x: Shaped[Tensor, "..."], x_hat: Shaped[Tensor, "..."]) -> float:
    """Return the signal-to-quantization-noise ratio in decibels, -20 log10(relative error).

    >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0])), 2)
    13.98
    """
    error = relative_error(x, x_hat)
    if error == 0:
        return math.inf
    return -20 * math.log10(error)


def cosine(x: Shaped[Tensor, "..."], y: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return <x, y> / (||x|| ||y||) along the last axis of tensors of one shape.

    >>> cosine(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, -1.0]]))
    tensor([1., 0.])
    """
    x, y = _comparable(x, y)
    return torch.nn.functional.cosine_similarity(x, y, dim=-1)


def kl_divergence(
    logits: Shaped[Tensor, "..."], logits_hat: Shaped[Tensor, "..."]
) -> Float[Tensor, "..."]:
    """Return KL(p || p_hat) in nats; p and p_hat are the softmax of the logits on the last axis.

    >>> round(kl_divergence(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0])).item(), 4)
    0.1201
    """
    logits, logits_hat = _comparable(logits, logits_hat)
    log_p = logits.log_softmax(dim=-1)
    log_p_hat = logits_hat.log_softmax(dim=-1)
    return kl_of_logs(log_p, log_p_hat)


def kl_of_logs(log_p: Float[Tensor, "..."], log_q: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return sum p (log p - log q) over the last axis, with its gradient."""
    terms = log_p.exp() * (log_p - log_q)
    # p log p tends to 0 with p: a masked token (logit -inf) adds nothing, and 0 * -inf is NaN.
    terms = terms.masked_fill(log_p == -math.inf, 0)
    return terms.sum(dim=-1)


def code_entropy(codes: Shaped[Tensor, "*shape"]) -> float:
    """Return the entropy of the codes in bits, -sum p log2 p over how often each occurs.

    >>> code_entropy(torch.tensor([0, 0, 1, 1])), code_entropy(torch.tensor([5, 5, 5]))
    (1.0, 0.0)
    """
    _, counts = torch.unique(codes, return_counts=True)
    p = counts.double() / counts.sum()
    entropy = -(p * p.log2()).sum()
    # A single code has the entropy -0.0 without abs.
    return abs(float(entropy))


def _comparable(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in a dtype wide enough to subtract in."""
    if x.shape != y.shape:
        raise ValueError(
            f"shapes {tuple(x.shape)} and {tuple(y.shape)} differ; compare tensors of one shape"
        )
    x = x.detach().to(wide(x.dtype))
    y = y.detach().to(wide(y.dtype))
    return x, y
