"""Prune a whole model to N of M, layer by layer in the order of use, by any of the ways to choose.

The idea: the same walk as ``quantize_model``'s. What a layer is pruned by is the second moment of its inputs in the
model pruned so far. The layers stay ``nn.Linear``: zeros are kept, and found again by ``sparse_storage.compress``.

To train what is left, ``hold_zeros`` fixes where the zeros are: chosen anew at each step, weights would come and go,
and none would learn to do without the others.

Source: as for the methods (``methods/sparsity.py``).

How it differs from ``quantize.py``: there layers are replaced by layers of codes, here by layers with zeros.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.methods.second_moment import BySecondMoment, SecondMoment
from qcourse.methods.sparsity import NM, Pruned, magnitude, sparsegpt, wanda
from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.validation import in_layer
from qcourse.recipes.selection import Layers, choose
from qcourse.trace.batches import Run, check_batches
from qcourse.trace.model_copy import ModelCopy
from qcourse.trace.replay import groups


@dataclass(frozen=True)
class Magnitude:
    """The largest |w| of each run stay."""

    pattern: NM
    calibrated: ClassVar[bool] = False

    def observe(self, seen: None, x: Tensor) -> None:
        """Nothing to know."""

    def prune(self, w: Tensor, seen: None) -> Pruned:
        """One layer."""
        return magnitude(w, self.pattern)


@dataclass(frozen=True)
class Wanda(BySecondMoment):
    """The largest |w| ||x|| of each run stay."""

    pattern: NM

    def prune(self, w: Tensor, seen: SecondMoment) -> Pruned:
        """One layer."""
        return wanda(w, seen, self.pattern)


@dataclass(frozen=True)
class SparseGPT(BySecondMoment):
    """The smallest w^2 / [H^-1]_jj of each run go, and the others answer for them."""

    pattern: NM
    damp: float = 0.01

    def prune(self, w: Tensor, seen: SecondMoment) -> Pruned:
        """One layer."""
        return sparsegpt(w, seen, self.pattern, damp=self.damp)


PruningMethod = Magnitude | Wanda | SparseGPT


@dataclass(frozen=True)
class PrunedModel:
    """A model with zeros, and which.

    Args:
        model: in eval mode, without gradients.
        masks: by layer, True where a weight was kept.
        errors: by layer, of the outputs, or of the weight where no inputs were asked for.
    """

    model: nn.Module
    masks: Mapping[str, Bool[Tensor, "..."]]
    errors: Mapping[str, float]


def prune_model(
    model: nn.Module,
    method: PruningMethod,
    *,
    calibration: Iterable[Any] | None = None,
    run: Run = lambda model, batch: model(batch),
    layers: Layers = None,
    progress: bool = True,
) -> PrunedModel:
    """Prune each chosen linear layer, in a new model.

    Args:
        model: any module with nn.Linear layers; it is not changed.
        method: ``Magnitude``, ``Wanda`` or ``SparseGPT``, with the pattern.
        calibration, run, layers, progress: as in ``quantize_model``.

    Raises:
        TypeError: method is none of these.
        ValueError: m does not divide a layer's inputs; calibration is missing or empty, or reaches no chosen layer; no
            linear layer; a weight or an input is not finite.

    >>> pruned = prune_model(nn.Sequential(nn.Linear(8, 4)), Magnitude(NM(2, 4)), progress=False)
    >>> int((pruned.model[0].weight != 0).sum())
    16
    """
    if not isinstance(method, PruningMethod):
        raise TypeError(
            f"method={method!r} must be such as Magnitude(NM(2, 4)), Wanda(...) or SparseGPT(...)"
        )
    chosen, _ = choose(model, layers, PerGroup(method.pattern.m), "refuse")
    batches = check_batches(calibration, required=method.calibrated)
    work = ModelCopy(model, chosen)
    work.model.eval()
    masks, errors = {}, {}
    with (
        torch.no_grad(),
        tqdm(total=len(chosen), desc="pruning", unit="layer", disable=not progress) as bar,
    ):
        for names, seen in groups(method, work, batches, run):
            for name in names:
                with in_layer(name):
                    pruned = method.prune(chosen[name].weight.detach(), seen)
                masks[name], errors[name] = pruned.mask, pruned.error
                work.replace(name, _linear(pruned.weight, chosen[name].bias))
                bar.update()
        for name in list(work.pending):
            work.own(name)
    if not masks:
        raise ValueError(
            "no batch of calibration reaches a chosen layer: does run use the model that it is given?"
        )
    return PrunedModel(work.model.requires_grad_(False), masks, errors)


def hold_zeros(model: nn.Module, masks: Mapping[str, Shaped[Tensor, "..."]]) -> nn.Module:
    """A copy to be trained, in which what the masks leave out stays 0.

    Args:
        masks: by the name of a linear layer, boolean, of its weight's shape.

    Raises:
        ValueError: no such layer; a mask that is not boolean or has another shape.
    """
    student = copy.deepcopy(model).requires_grad_(True).train()
    layers = {name: each for name, each in student.named_modules() if isinstance(each, nn.Linear)}
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"masks has {name!r}, and the model no such linear layer")
        if mask.dtype != torch.bool or mask.shape != layers[name].weight.shape:
            expected = tuple(layers[name].weight.shape)
            raise ValueError(
                f"the mask of {name} must be boolean of the shape {expected}, got {mask.dtype} {tuple(mask.shape)}"
            )
        parametrize.register_parametrization(layers[name], "weight", Masked(mask))
    return student


class Masked(nn.Module):
    """A parametrization for a weight: w where the mask is True, else 0."""

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "*shape"]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight with its zeros."""
        return w * self.mask


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
