"""Linear layers that rotate their input at each call, in any model.

(x Q) (W Q)^T = x W^T for an orthogonal Q, so a layer computes the same with a rotated input and
rotated weights, and both have smaller outliers (QuaRot, Ashkboos et al., NeurIPS 2024, section 4).
`rotate.py` absorbs the rotation of a Llama's stream in the weights.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from qcourse.methods.hadamard import check_size
from qcourse.methods.rotation import Rotation
from qcourse.numerics.chunks import wide
from qcourse.numerics.granularity import PerTensor
from qcourse.recipes.selection import Layers, choose
from qcourse.trace.model_copy import ModelCopy


@dataclass(frozen=True)
class RotationReport:
    """What was done to which module, by name.

    The weights of `fused` modules hold the rotation, layers `at_run_time` rotate their input at
    each call, and `left` says what stays as it was, and why ("" is the whole model).
    """

    fused: tuple[str, ...] = ()
    at_run_time: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        fused = f"{len(self.fused)} modules hold the rotation"
        lines = [f"{fused}, {len(self.at_run_time)} layers rotate at run time"]
        for name, why in self.left:
            lines.append(f"{name or 'the model'} is left as it was: {why}")
        return "\n".join(lines)


class RotatedModel(NamedTuple):
    """A model and what was done to it; the original model if nothing could be done."""

    model: nn.Module
    report: RotationReport


def rotate_at_run_time(model: nn.Module, *, seed: int = 0, layers: Layers = None) -> RotatedModel:
    """Return a copy in which linear layers are nn.Sequential(Rotation, nn.Linear), with W Q for W.

    `seed` is that of the signs, the same for all layers of one width, so that one input is rotated
    alike. `layers` are those of `quantize_model`. The report lists the layers whose width has no
    Hadamard matrix. Raises TypeError or ValueError as `selection.choose`, or if no layer can be
    rotated.

    >>> model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 8))
    >>> rotated, report = rotate_at_run_time(model)
    >>> report.at_run_time, [name for name, why in report.left]
    (('0',), ['1'])
    >>> x = torch.randn(5, 12)
    >>> torch.allclose(rotated(x), model(x), atol=1e-5)
    True
    """
    chosen, kept = choose(model, layers, PerTensor(), "keep")
    fits = {}
    left = [(each.name, each.why) for each in kept]
    misfits = []
    for name, layer in chosen.items():
        why = width_misfit(layer.in_features)
        if why:
            misfits.append((name, why))
        else:
            fits[name] = layer
    # Layers that were not chosen are no error; chosen layers that all misfit are.
    if not fits:
        lines = [f"- {name}: {why}" for name, why in misfits]
        raise ValueError("no layer can be rotated:\n" + "\n".join(lines))

    # Weights that change are not copied first.
    work = ModelCopy(model, fits)
    for name, layer in fits.items():
        rotation = Rotation(layer.in_features, seed=seed)
        work.replace(name, with_rotation(layer, rotation))
    report = RotationReport(at_run_time=tuple(fits), left=(*left, *misfits))
    return RotatedModel(work.model, report)


def with_rotation(layer: nn.Linear, rotation: Rotation) -> nn.Sequential:
    """Return the rotation, then a layer with W Q and copies of the other parameters."""
    w = layer.weight.detach()
    # W Q in at least float32, then rounded once to the dtype of the weight.
    turned = rotation.to(w.device)(w.to(wide(w.dtype))).to(w.dtype)
    # On "meta" the layer allocates and initializes nothing before it gets its parameters.
    with torch.device("meta"):
        new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    new.weight = nn.Parameter(turned, layer.weight.requires_grad)
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return nn.Sequential(rotation, new).train(layer.training)


def width_misfit(n: int) -> str:
    """Return why a width has no Hadamard matrix; "" where it has one."""
    try:
        check_size(n)
    except ValueError as error:
        return str(error)
    return ""
