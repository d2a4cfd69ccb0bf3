"""Train a language model in place, to repair what rounding or pruning broke.

An ordinary training loop, on the text alone or on the predictions of a teacher, best the model
before rounding or pruning (LLM-QAT, Liu et al., 2023). Training that diverges ends at the last good
weights. `qat_model.py` puts rounding into a model; this trains it.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.methods.distillation import check_mixture, distillation_loss


@dataclass(frozen=True)
class Healing:
    """The losses of all steps, each before its update; a note if training stopped early."""

    losses: tuple[float, ...]
    note: str = ""


def heal(
    student: nn.Module,
    batches: Iterable[Int[Tensor, "batch tokens"]],
    *,
    teacher: nn.Module | None = None,
    temperature: float = 1.0,
    alpha: float | None = None,
    learning_rate: float = 1e-3,
    steps: int | None = None,
    progress: bool = True,
) -> Healing:
    """Train a language model in place: AdamW, one step per batch, a warm-up, a cosine decay to 0.

    The student maps ids (batch, tokens) to logits, and learns to predict each id from those before
    it. The teacher is best the unquantized model; without one the loss is that of the text.
    temperature and alpha are those of `distillation_loss`; alpha is by default 1 with a teacher.
    steps=None takes all batches. Where a loss is NaN or infinite, training stops with a warning,
    and the student gets the weights of the last step with a finite loss. Raises TypeError where
    steps is None and batches has no length, ValueError for no batch or an argument out of range.
    """
    # With a teacher its predictions are the target, without one the text.
    if alpha is None:
        alpha = 0.0 if teacher is None else 1.0
    if steps is None:
        steps = len(batches)  # type: ignore[arg-type]
    _check(teacher, temperature, alpha, learning_rate, steps)

    training = _Training(student, learning_rate, steps)
    taken = islice(batches, steps)
    for ids in tqdm(taken, total=steps, desc="healing", unit="step", disable=not progress):
        loss = _loss(student, teacher, ids, temperature, alpha)
        if not training.step(loss):
            break
    if not training.losses:
        raise ValueError("batches has no batch")
    return Healing(tuple(training.losses), training.finish())


class _Training:
    """The optimizer, the losses, and the last weights whose loss was finite."""

    def __init__(self, student: nn.Module, learning_rate: float, steps: int) -> None:
        self.trained = [each for each in student.parameters() if each.requires_grad]
        self.good = [each.detach().clone() for each in self.trained]
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )

        def share(step: int) -> float:
            return _share(step, steps)

        # The learning rate of step n is learning_rate * share(n).
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def step(self, loss: Tensor) -> bool:
        """Update the weights; False, and no update, for a loss that is not finite."""
        self.losses.append(loss.item())
        if not math.isfinite(self.losses[-1]):
            return False
        # These weights have a finite loss, so they are the ones to return to.
        for weight, good in zip(self.trained, self.good, strict=True):
            good.copy_(weight.detach())
        # One step of gradient descent, with the norm of the gradient limited to 1.
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return True

    def finish(self) -> str:
        """Return to the last good weights if the training diverged; say so, else ""."""
        finite_losses = sum(map(math.isfinite, self.losses))
        if finite_losses < len(self.losses):
            reason = f"the loss became {self.losses[-1]}"
        elif not all(bool(torch.isfinite(weight).all()) for weight in self.trained):
            reason = "the last update left the range of floats"
        else:
            return ""
        with torch.no_grad():
            for weight, good in zip(self.trained, self.good, strict=True):
                weight.copy_(good)
        note = (
            f"stopped after {len(self.losses)} steps: {reason};"
            f" the weights are those of step {finite_losses}"
        )
        warnings.warn(f"heal {note}; a lower learning_rate may help", stacklevel=3)
        return note


def _loss(
    student: nn.Module, teacher: nn.Module | None, ids: Tensor, temperature: float, alpha: float
) -> Tensor:
    # The logits at position i predict token i + 1.
    context = ids[:, :-1]
    with torch.no_grad():
        target = None if teacher is None else teacher(context)
    return distillation_loss(
        student(context), target, ids[:, 1:], temperature=temperature, alpha=alpha
    )


def _share(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step."""
    # Up over a twentieth of the steps, then a cosine down to 0.
    warm = max(1, steps // 20)
    rise = (step + 1) / warm
    progress = max(0, step - warm) / max(1, steps - warm)
    return min(rise, 0.5 + 0.5 * math.cos(math.pi * progress))


def _check(
    teacher: nn.Module | None, temperature: float, alpha: float, learning_rate: float, steps: int
) -> None:
    check_mixture(temperature, alpha)
    if alpha and teacher is None:
        raise ValueError(f"alpha={alpha!r} needs a teacher")
    if not learning_rate > 0 or steps < 1:
        raise ValueError(
            f"learning_rate={learning_rate!r} must be above 0, and steps={steps!r} at least 1"
        )
