"""Distillation: a model learns another's whole opinion of what comes next, not only what did come.

The idea: a text says which token came. A teacher says how likely each of thousands was, which is far more to learn from
in a step. A model that was quantized or pruned has the best of teachers: itself, before. The loss is a mixture,

    (1 - alpha) CE(student, token) + alpha T^2 KL(teacher || student),   both softmaxes of logits / T

T above 1 makes the unlikely tokens count more. The gradient of the second part would fade as 1 / T^2, once through each
softmax; T^2 keeps its scale, up to a constant that it tends to.

Source: Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015), section 2.

How it differs from ``divergence.py``: there KL picks the clip of a histogram; here it is what a model is trained on.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def distillation_loss(
    student: Shaped[Tensor, "..."],
    teacher: Shaped[Tensor, "..."] | None,
    targets: Shaped[Tensor, "..."] | None = None,
    *,
    temperature: float = 1.0,
    alpha: float = 1.0,
) -> Float[Tensor, ""]:
    """(1 - alpha) CE(student, targets) + alpha T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over tokens.

    Args:
        student, teacher: logits (..., vocabulary); no gradient goes to the teacher. It may be None where alpha is 0.
        targets: ids (...), which tokens came; None only where alpha is 1.
        temperature: T, above 0.
        alpha: the teacher's share, 0 to 1.

    Raises:
        ValueError: temperature or alpha out of range; shapes that differ; what alpha asks for is missing.

    >>> logits = torch.tensor([[2.0, 0.0]])
    >>> float(distillation_loss(logits, logits, temperature=4.0)) < 1e-6
    True
    >>> round(float(distillation_loss(logits, None, torch.tensor([1]), alpha=0.0)), 4)
    2.1269
    """
    check_mixture(temperature, alpha)
    loss = student.new_zeros((), dtype=torch.float32)
    if alpha < 1:
        if targets is None or targets.shape != student.shape[:-1]:
            got = None if targets is None else tuple(targets.shape)
            raise ValueError(
                f"targets of shape {got} must have the shape {tuple(student.shape[:-1])} where alpha < 1"
            )
        loss = loss + (1 - alpha) * F.cross_entropy(
            student.flatten(0, -2).float(), targets.flatten().long()
        )
    if alpha > 0:
        if teacher is None or teacher.shape != student.shape:
            got = None if teacher is None else tuple(teacher.shape)
            raise ValueError(
                f"teacher of shape {got} must have student's, {tuple(student.shape)}, where alpha > 0"
            )
        log_p, log_q = (
            (each.float() / temperature).log_softmax(-1) for each in (teacher.detach(), student)
        )
        kl = (
            (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -math.inf, 0).sum(-1)
        )  # p log p tends to 0 with p
        loss = loss + alpha * temperature**2 * kl.mean()
    return loss


def check_mixture(temperature: float, alpha: float) -> None:
    """Raise ValueError unless temperature is above 0 and finite, and alpha from 0 to 1."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature!r} must be above 0 and finite")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} must be from 0 to 1")
