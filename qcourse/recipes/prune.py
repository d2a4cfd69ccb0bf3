"""Prune a whole model to N of M, layer by layer in order of use, by one of three methods.

The walk is that of `quantize_model`; a layer is pruned by the second moment of its inputs in the
model pruned so far. Layers stay ``nn.Linear``: the zeros are stored, for
`sparse_storage.compress_sparse` to find. The sources are those of `methods/sparsity.py`.
`quantize.py` returns layers of codes; this returns layers with zeros.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcourse.methods.second_moment import BySecondMoment, SecondMoment
from qcourse.methods.sparsity import NM, Pruned, magnitude, sparsegpt, wanda
from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.validation import in_layer
from qcourse.recipes.report import KeptLayer, all_kept
from qcourse.recipes.selection import Layers, choose
from qcourse.recipes.walk import Walk
from qcourse.trace.calibration_batches import Run, check_batches
from qcourse.trace.model_copy import ModelCopy
from qcourse.trace.replay import Group


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest |w| of each run of M weights."""

    pattern: NM
    calibrated: ClassVar[bool] = False

    def observe(self, seen: None, x: Tensor) -> None:
        """Observe nothing."""

    def prune(self, w: Tensor, seen: None) -> Pruned:
        """Prune one layer."""
        return magnitude(w, self.pattern)


@dataclass(frozen=True)
class Wanda(BySecondMoment):
    """Keep the largest |w_j| ||x_j|| of each run of M weights."""

    pattern: NM

    def prune(self, w: Tensor, seen: SecondMoment) -> Pruned:
        """Prune one layer."""
        return wanda(w, seen, self.pattern)


@dataclass(frozen=True)
class SparseGPT(BySecondMoment):
    """Remove the smallest w_j^2 / [H^-1]_jj of each run; the remaining weights compensate."""

    pattern: NM
    damp: float = 0.01

    def prune(self, w: Tensor, seen: SecondMoment) -> Pruned:
        """Prune one layer."""
        return sparsegpt(w, seen, self.pattern, damp=self.damp)


PruningMethod = Magnitude | Wanda | SparseGPT


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model, in eval mode and without gradients.

    Per pruned layer: `masks`, True where a weight was kept, and `errors` of the outputs (for
    ``Magnitude`` of the weight). `kept` has every linear layer that is not pruned, and why.
    """

    model: nn.Module
    masks: Mapping[str, Bool[Tensor, "..."]]
    errors: Mapping[str, float]
    kept: tuple[KeptLayer, ...]


def prune_model(
    model: nn.Module,
    method: PruningMethod,
    *,
    calibration: Iterable[Any] | None = None,
    run: Run = lambda model, batch: model(batch),
    layers: Layers = None,
    progress: bool = True,
) -> PrunedModel:
    """Return a new model in which each chosen linear layer is pruned; model is not changed.

    The method is ``Magnitude``, ``Wanda`` or ``SparseGPT``, with a pattern. The other arguments are
    those of `quantize_model`. A chosen layer that no batch reaches keeps all its weights: `kept`
    names it, and `masks` does not. Raises TypeError for another method, ValueError where there is
    no layer to prune, M does not divide a layer's inputs, calibration is missing or reaches no
    chosen layer, or a value is not finite.

    >>> pruned = prune_model(nn.Sequential(nn.Linear(8, 4)), Magnitude(NM(2, 4)), progress=False)
    >>> int((pruned.model[0].weight != 0).sum())
    16
    """
    if not isinstance(method, PruningMethod):
        raise TypeError(
            f"method={method!r} must be such as Magnitude(NM(2, 4)), Wanda(...) or SparseGPT(...)"
        )
    # M weights in a row form a run, so M must divide the inputs of a layer.
    chosen, kept = choose(model, layers, PerGroup(method.pattern.m), "refuse")
    batches = check_batches(calibration, required=method.calibrated)
    work = ModelCopy(model, chosen)
    pruner = _LayerPruner(method, chosen)
    # Each group is pruned by its inputs in the model pruned so far.
    walk = Walk("pruning", batches, run, progress=progress)
    unreached = walk.replace_layers(work, method, pruner.prune)
    new = work.model.requires_grad_(False)
    return PrunedModel(new, pruner.masks, pruner.errors, all_kept(model, kept, unreached))


@dataclass
class _LayerPruner:
    """Prunes the chosen layers of a model, and gathers masks and errors."""

    method: PruningMethod
    chosen: Mapping[str, nn.Linear]
    masks: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def prune(self, names: Group, seen: Any) -> dict[str, nn.Linear]:
        """Return new layers for those that read one input, given what the method observed of it."""
        new = {}
        for name in names:
            old = self.chosen[name]
            # An error of the method names the layer.
            with in_layer(name):
                pruned = self.method.prune(old.weight.detach(), seen)
            self.masks[name] = pruned.mask
            self.errors[name] = pruned.error
            new[name] = _linear(pruned.weight, old.bias)
        return new


def hold_zeros(model: nn.Module, masks: Mapping[str, Shaped[Tensor, "..."]]) -> nn.Module:
    """Return a copy to train, whose weights w * mask stay 0 where a mask is False.

    With a new choice of zeros at each step no weight would learn to replace the others. Masks are
    boolean, by the name of a linear layer and in its weight's shape; others raise ValueError.
    """
    student = copy.deepcopy(model).requires_grad_(True).train()
    layers = {name: each for name, each in student.named_modules() if isinstance(each, nn.Linear)}
    for name, mask in masks.items():
        if name not in layers:
            raise ValueError(f"masks has {name!r}, and the model no such linear layer")
        expected = tuple(layers[name].weight.shape)
        if mask.dtype != torch.bool or tuple(mask.shape) != expected:
            raise ValueError(
                f"the mask of {name} must be boolean of the shape {expected},"
                f" got {mask.dtype} {tuple(mask.shape)}"
            )
        # From now on the layer multiplies by w * mask, and the gradient is masked too.
        parametrize.register_parametrization(layers[name], "weight", Masked(mask))
    return student


class Masked(nn.Module):
    """A parametrization of a weight: w where the mask is True, else 0."""

    mask: Tensor

    def __init__(self, mask: Bool[Tensor, "*shape"]) -> None:
        super().__init__()
        # A buffer follows the model to its device and into its state_dict.
        self.register_buffer("mask", mask)

    def forward(self, w: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return w * mask."""
        return w * self.mask


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight.shape
    # On "meta" the layer allocates and initializes nothing before it gets its tensors.
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
