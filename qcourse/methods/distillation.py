"""Distillation: train a model on the teacher's probabilities of all tokens, not only on the data.

For a quantized or pruned model the teacher is the original model. A temperature T > 1 gives
unlikely tokens more weight.
Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015), section 2.
In `divergence.py` KL picks the clip of a histogram; here it is a training loss.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.numerics.metrics import kl_of_logs


def distillation_loss(
    student: Shaped[Tensor, "..."],
    teacher: Shaped[Tensor, "..."] | None,
    targets: Shaped[Tensor, "..."] | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """Return (1 - alpha) CE(student, targets) + alpha T^2 KL(teacher || student), mean over tokens.

    student and teacher are logits (..., vocabulary), targets token ids (...). Raises ValueError for
    shapes that differ, a missing tensor, or a temperature or alpha out of range.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> round(float(distillation_loss(logits, None, torch.tensor([1]), alpha=0.0)), 4)
    2.1269
    """
    check_mixture(temperature, alpha)
    loss = student.new_zeros((), dtype=torch.float32)
    if alpha < 1:
        loss = loss + (1 - alpha) * _cross_entropy(student, targets)
    if alpha > 0:
        # Each softmax has the slope 1 / T, so the gradient of the KL shrinks as 1 / T^2.
        kl = _mean_kl(student, teacher, temperature)
        loss = loss + alpha * temperature**2 * kl
    return loss


def _cross_entropy(student: Tensor, targets: Tensor | None) -> Tensor:
    """Return the mean of -log softmax(student)[target]."""
    expected = tuple(student.shape[:-1])
    got = None if targets is None else tuple(targets.shape)
    if targets is None or got != expected:
        raise ValueError(f"targets of shape {got} must have the shape {expected} where alpha < 1")
    logits = student.flatten(0, -2).float()  # (tokens, vocabulary)
    return F.cross_entropy(logits, targets.flatten().long())


def _mean_kl(student: Tensor, teacher: Tensor | None, temperature: float) -> Tensor:
    """Return the mean over tokens of KL(softmax(teacher / T) || softmax(student / T))."""
    expected = tuple(student.shape)
    got = None if teacher is None else tuple(teacher.shape)
    if teacher is None or got != expected:
        raise ValueError(f"teacher of shape {got} must have student's, {expected}, where alpha > 0")
    p_logits = teacher.detach().float() / temperature
    q_logits = student.float() / temperature
    log_p = p_logits.log_softmax(-1)
    log_q = q_logits.log_softmax(-1)
    return kl_of_logs(log_p, log_q).mean()


def check_mixture(temperature: float, alpha: float) -> None:
    """Raise ValueError unless temperature is above 0 and finite, and alpha is from 0 to 1."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be above 0 and finite")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be from 0 to 1")
