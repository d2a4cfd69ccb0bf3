"""Training what rounding or pruning broke: fake-quantize a model's weights, train it, take the codes.

The idea: three steps around an ordinary training loop. ``prepare`` puts a parametrization on the weight of each linear
layer, so that whoever uses it, the layer itself or an optimizer, needs to know nothing. ``heal`` trains, on the text
alone or on what a teacher says of it; the best teacher is the model as it was. ``convert`` takes the codes that the
weights have by then, and gives the same model as ``quantize_model`` would, with other codes.

Source: Jacob et al. (CVPR 2018), section 3, for training with rounding in the loop; LLM-QAT (Liu et al., 2023) for the
unquantized model as the teacher.

How it differs from ``quantize.py``: that never changes a weight but by rounding it.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.activations import Dynamic
from qcourse.methods.distillation import check_mixture, distillation_loss
from qcourse.methods.qat import FakeQuantized, straight_through
from qcourse.numerics.quantized import Quantizer
from qcourse.recipes.selection import Layers, choose


@dataclass(frozen=True)
class Healing:
    """What ``heal`` did.

    Args:
        losses: of each step, before its update; the last may be what stopped it.
        note: "" or why it stopped early.
    """

    losses: tuple[float, ...]
    note: str = ""


def prepare_qat(
    model: nn.Module,
    quantizer: Quantizer,
    *,
    inputs: Quantizer | None = None,
    learned_scale: bool = False,
    layers: Layers = None,
) -> nn.Module:
    """A copy of the model to be trained, the weights of whose linear layers are multiplied as rounded.

    Args:
        model: any with nn.Linear layers; not changed.
        quantizer: the grid of the weights.
        inputs: of the activations, token by token (8 bits in BitNet); None leaves them.
        learned_scale: whether the scales are trained too (LSQ), from where the quantizer puts them.
        layers: as in ``quantize_model``; by default all but the head.

    Raises:
        TypeError, ValueError: as ``FakeQuantized`` and ``selection.choose``: no linear layer, groups that do not
            divide.

    >>> from qcourse import IntQuantizer
    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> student = prepare_qat(model, IntQuantizer(2))
    >>> int(student[0].weight.unique().numel()) <= 4, int(model[0].weight.unique().numel())
    (True, 8)
    """
    chosen, _ = choose(model, layers, quantizer.granularity, "refuse")
    student = copy.deepcopy(model).requires_grad_(True).train()
    for name in chosen:
        layer = student.get_submodule(name)
        grid = FakeQuantized(quantizer, layer.weight, learned_scale=learned_scale)  # type: ignore[arg-type]
        parametrize.register_parametrization(layer, "weight", grid)
        if inputs is not None:
            layer.register_forward_pre_hook(_Rounded(inputs))
    return student


def convert_qat(student: nn.Module) -> nn.Module:
    """The trained model with ``QuantizedLinear`` layers, in eval mode, without gradients; the student stays as it is.

    Raises:
        ValueError: it was not prepared.
    """
    model = copy.deepcopy(student)
    found = {name: each for name, each in model.named_modules() if _grid(each) is not None}
    if not found:
        raise ValueError(
            f"student must come from prepare: this {type(student).__name__} has no fake-quantized layer"
        )
    for name, layer in found.items():
        owner, _, last = name.rpartition(".")
        original = layer.parametrizations.weight.original.detach()
        rounded = [hook for hook in layer._forward_pre_hooks.values() if isinstance(hook, _Rounded)]
        q = _grid(layer).quantized(original)  # type: ignore[union-attr]
        inputs = Dynamic(rounded[0].quantizer) if rounded else None
        setattr(model.get_submodule(owner), last, QuantizedLinear(q, layer.bias, inputs=inputs))
    return model.eval().requires_grad_(False)


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
    """Train a language model in place, one step a batch: AdamW, a short warm-up, a cosine down to nothing.

    Args:
        student: from ids (batch, tokens) to logits.
        batches: ids; each is predicted from those before it.
        teacher: the unquantized model; without one the loss is that of the text.
        temperature, alpha: as in ``distillation_loss``; alpha is 1 where there is a teacher, unless given, else 0.
        learning_rate: at its highest.
        steps: how many batches are taken; None takes all, of a collection that knows its length.
        progress: whether to show a progress bar.

    Returns:
        The loss of each step. Where a loss is NaN or infinite, training stops with a warning, and the student has the
        weights of the last step whose loss was finite.

    Raises:
        TypeError: steps is None and batches has no length.
        ValueError: no batch; temperature, alpha or learning_rate out of range; alpha without a teacher.
    """
    alpha = (1.0 if teacher is not None else 0.0) if alpha is None else alpha
    steps = len(batches) if steps is None else steps  # type: ignore[arg-type]
    _check(teacher, temperature, alpha, learning_rate, steps)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    losses: list[float] = []
    good = [parameter.detach().clone() for parameter in trained]
    for ids in tqdm(
        islice(batches, steps), total=steps, desc="healing", unit="step", disable=not progress
    ):
        loss = _loss(student, teacher, ids, temperature, alpha)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        _copy(trained, good)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    if not losses:
        raise ValueError("batches has no batch")
    finite = math.isfinite(losses[-1]) and all(bool(torch.isfinite(each).all()) for each in trained)
    return Healing(tuple(losses), "" if finite else _back_to(good, trained, losses))


def _loss(
    student: nn.Module, teacher: nn.Module | None, ids: Tensor, temperature: float, alpha: float
) -> Tensor:
    with torch.no_grad():
        said = None if teacher is None else teacher(ids[:, :-1])
    return distillation_loss(
        student(ids[:, :-1]), said, ids[:, 1:], temperature=temperature, alpha=alpha
    )


def _share(step: int, steps: int) -> float:
    """The share of the highest learning rate: up over a twentieth of the steps, then a cosine down."""
    warm = max(1, steps // 20)
    return min(
        (step + 1) / warm,
        0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, steps - warm)),
    )


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)


def _back_to(good: Sequence[Tensor], trained: Sequence[Tensor], losses: Sequence[float]) -> str:
    """Put the weights back that gave the last finite loss; says so."""
    _copy(good, trained)
    last = sum(map(math.isfinite, losses))
    found = (
        f"the loss became {losses[-1]}"
        if last < len(losses)
        else "the last update left the range of floats"
    )
    note = f"stopped after {len(losses)} steps: {found}; the weights are those of step {last}"
    warnings.warn(f"heal {note}; a lower learning_rate may help", stacklevel=3)
    return note


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


def _grid(layer: nn.Module) -> FakeQuantized | None:
    """The grid on a layer's weight, if there is one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    steps: Any = layer.parametrizations.weight  # type: ignore[union-attr]
    return next((step for step in steps if isinstance(step, FakeQuantized)), None)


class _Rounded:
    """A hook that rounds what goes into a layer, token by token, straight through."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        (x,) = args
        return straight_through(x.reshape(-1, x.shape[-1]), self.quantizer).reshape(
            x.shape
        )  # (tokens, in) and back
