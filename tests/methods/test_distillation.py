"""The distillation loss: by hand in NumPy, its gradient as T grows, its direction, bad input."""

from typing import Any

import numpy as np
import pytest
import torch
from inputs import normal

from qcourse.methods.distillation import distillation_loss


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_by_hand(alpha: float, temperature: float) -> None:
    student = 3 * normal(2, 5, 7)
    teacher = 3 * normal(2, 5, 7, seed=1)
    targets = torch.randint(7, (2, 5), generator=torch.Generator().manual_seed(2))
    p = softmax(teacher.double().numpy() / temperature)
    q = softmax(student.double().numpy() / temperature)
    kl = (p * np.log(p / q)).sum(-1).mean()
    probabilities = softmax(student.double().numpy())
    chosen = np.take_along_axis(probabilities, targets.numpy()[..., None], -1)
    ce = -np.log(chosen).mean()
    loss = distillation_loss(student, teacher, targets, temperature=temperature, alpha=alpha)
    assert float(loss) == pytest.approx((1 - alpha) * ce + alpha * temperature**2 * kl, rel=1e-5)


def test_the_gradients_scale_tends_to_a_constant() -> None:
    teacher = normal(1, 50, seed=1)
    sizes = {}
    for temperature in (1.0, 4.0, 64.0, 256.0):
        student = normal(1, 50).requires_grad_()
        distillation_loss(student, teacher, temperature=temperature).backward()
        sizes[temperature] = float(student.grad.norm())
    difference = normal(1, 50) - teacher
    # (z - v) / vocabulary, for logits of mean 0.
    limit = float((difference - difference.mean()).norm()) / 50
    assert sizes[256.0] == pytest.approx(limit, rel=0.02)
    assert sizes[64.0] == pytest.approx(limit, rel=0.05)
    assert abs(sizes[1.0] / limit - 1) > 0.2  # and it is not constant


def test_the_teacher_gets_no_gradient() -> None:
    student = normal(3, 4).requires_grad_()
    teacher = normal(3, 4, seed=1).requires_grad_()
    distillation_loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_it_is_kl_of_the_teacher_from_the_student() -> None:
    sure = torch.tensor([[8.0, 0.0, 0.0]])
    open_ = torch.zeros(1, 3)
    # The student gives almost no probability to tokens that the teacher considers likely.
    missing = distillation_loss(sure, open_)
    hedging = distillation_loss(open_, sure)
    assert float(missing) > 3 * float(hedging)


def test_masked_tokens_of_the_teacher() -> None:
    teacher = torch.tensor([[0.0, -torch.inf]])
    student = normal(1, 2).requires_grad_()
    loss = distillation_loss(student, teacher)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"alpha": 1.5}, "alpha=1.5 must be from 0 to 1"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"teacher": None}, "teacher of shape None"),
        (
            {"teacher": torch.zeros(3, 5)},
            r"teacher of shape \(3, 5\) must have student's, \(3, 4\)",
        ),
        ({"alpha": 0.5}, r"targets of shape None must have the shape \(3,\)"),
        ({"alpha": 0.5, "targets": torch.zeros(4)}, r"targets of shape \(4,\)"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    student = normal(3, 4)
    teacher = arguments.pop("teacher", student)
    with pytest.raises(ValueError, match=words):
        distillation_loss(student, teacher, arguments.pop("targets", None), **arguments)
