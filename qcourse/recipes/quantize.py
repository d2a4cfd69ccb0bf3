"""Quantize a whole model: every linear layer becomes one that holds codes, by any method, with a report.

The idea: a method that is right for one layer is applied to all, in the order in which the model uses them. The new
model is built without ever copying the weights that are to be replaced, so at most one layer exists as floats twice:
the peak is the old model, the new one, and a layer. A calibrated method sees, layer after layer, the inputs that the
model quantized so far produces (or, with ``sequential=False``, those of the original).

Source: layer-wise quantization in the order of use as in GPTQ (Frantar et al., ICLR 2023), section 4.

How it differs from ``method.py``: there, what chooses codes for one group of layers; here, what becomes of the model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.layers.int4_kernels import with_int4_kernels
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.method import Method, as_method
from qcourse.numerics.quantized import QuantizedTensor
from qcourse.recipes.layer_errors import output_errors, weight_error
from qcourse.recipes.report import KeptLayer, LayerReport, ModelReport, nbytes
from qcourse.recipes.selection import Layers, choose
from qcourse.trace.batches import Run, check_batches
from qcourse.trace.linears import linears
from qcourse.trace.model_copy import ModelCopy
from qcourse.trace.replay import Group, groups

Fold = Callable[[nn.Module, Group, Tensor], str | None]


class QuantizedModel(NamedTuple):
    """A model with ``QuantizedLinear`` layers, and what making it did."""

    model: nn.Module
    report: ModelReport


def quantize_model(
    model: nn.Module,
    method: object,
    *,
    calibration: Iterable[Any] | None = None,
    run: Run = lambda model, batch: model(batch),
    layers: Layers = None,
    on_indivisible: str = "refuse",
    sequential: bool = True,
    fold: Fold | None = None,
    kernel: str | None = None,
    output_error: bool = True,
    progress: bool = True,
) -> QuantizedModel:
    """Give each chosen linear layer the codes that the method chooses for its weight, in a new model.

    Args:
        model: any module with nn.Linear layers, whatever its architecture; it is not changed.
        method: a quantizer (round-to-nearest on its grid) or a value as ``method.Method`` describes.
        calibration: batches, each given to ``run`` once; for a language model what ``batches.windows`` makes. A
            calibrated method needs it; with any method it adds the error of the outputs to the report.
        run: one forward pass on one batch; for MiniLM ``lambda model, texts: model.embed(texts)``.
        layers: names, or a predicate of name and layer. By default all but the head (what the model's
            get_output_embeddings() gives, a layer called lm_head, or one that shares its weight with an embedding).
            Layers of a class that computes more than nn.Linear does are kept.
        on_indivisible: "refuse", or "keep" in floats, a layer whose width the method's groups do not divide.
        sequential: whether a layer is calibrated on what the layers quantized before it produce, or on the original's
            activations.
        fold: called as fold(new model, names, input_scale) to divide what precedes these layers by input_scale; it
            returns the name of the module that it divided, or None. Then the layers divide their input themselves. It
            puts new weights in the place of old ones (never writes into one), and within the block that the layers are
            in. ``fold.fold`` does it for any model of blocks that runs on token ids.
        kernel: "int4" hands the layers to the INT4 kernels at the end (``int4.with_int4_kernels``): such a model runs,
            and is not to be saved. None leaves ``QuantizedLinear`` layers, which decode before they multiply.
        output_error: whether the new model runs on the calibration once more, for the report's error of the outputs:
            with a calibrated method about a third of the time.
        progress: whether to show a progress bar.

    Returns:
        The new model, in eval mode and without gradients, that shares no memory with the original, and the report. A
        chosen layer whose weight is tied to another's (the head's to the embedding) is untied: the other keeps its
        floats, or gets codes of its own. Chosen layers that no calibration batch reaches are kept, and listed as such.

    Raises:
        TypeError: method, calibration or layers is none of the above.
        ValueError: the model has no linear layer, or none is chosen; a name is not one of them; groups do not divide a
            layer; the kernel is unknown, or not for such codes; calibration is missing or empty, or the model cannot
            run it, or it reaches no chosen layer; a weight or an input is not finite.

    >>> from qcourse import IntQuantizer
    >>> quantized, report = quantize_model(nn.Sequential(nn.Linear(64, 32)), IntQuantizer(bits=4), progress=False)
    >>> quantized[0].packed.shape, report.layers[0].bits_per_weight
    (torch.Size([1024]), 4.015625)
    """
    method = as_method(method)
    _check_kernel(kernel, method)
    chosen, kept = choose(model, layers, method.quantizer.granularity, on_indivisible)
    batches = check_batches(calibration, required=method.calibrated)
    places = {name: place for place, name in enumerate(linears(model))}
    work = _Work(ModelCopy(model, chosen), chosen, fold, [], {}, {})
    work.copy.model.eval()
    with (
        torch.no_grad(),
        tqdm(total=len(chosen), desc="quantizing", unit="layer", disable=not progress) as bar,
    ):
        for names, seen in groups(method, work.copy, batches, run, sequential=sequential):
            work.put(
                method.quantize({name: chosen[name].weight.detach() for name in names}, seen), names
            )
            bar.update(len(names))
        kept = sorted([*kept, *work.keep_the_rest()], key=lambda each: places[each.name])
        if not work.rows:
            raise ValueError(
                "no batch of calibration reaches a chosen layer: does run use the model that it is given?"
            )
        new = work.copy.model.requires_grad_(False)
        seen_again = batches if output_error else []
        errors = output_errors(new, work.weights(), work.divided, work.took, seen_again, run)
    rows = tuple(replace(row, output_error=errors.get(row.name)) for row in work.rows)
    report = ModelReport(rows, tuple(kept), nbytes(model), nbytes(new), _parameters(model))
    return QuantizedModel(with_int4_kernels(new) if kernel else new, report)


@dataclass
class _Work:
    """A model half-way: what has been put into the copy so far."""

    copy: ModelCopy
    chosen: Mapping[str, nn.Linear]
    fold: Fold | None
    rows: list[LayerReport]
    divided: dict[str, Tensor]  # the scale by which a layer's predecessor now divides its input
    took: dict[str, Tensor]  # the same scale, by the name of that predecessor

    def put(self, results: Mapping[str, Any], names: Group) -> None:
        """Replace a group of layers by what a method has chosen for them."""
        made = {name: self._layer(name, results[name]) for name in names}
        errors = {
            name: weight_error(self.chosen[name].weight, layer.weight)
            for name, layer in made.items()
        }
        scaled = [name for name, layer in made.items() if layer.input_scale is not None]
        note = "input scale folded" if scaled and self._folded(made) else "input scale at run time"
        for name, layer in made.items():
            old, weight_nbytes = (
                self.chosen[name],
                layer.nbytes - (0 if layer.bias is None else layer.bias.nbytes),
            )
            notes = [note] if name in scaled else []
            notes += [f"untied from {other}" for other in self.copy.untied[name]]
            notes += filter(None, [getattr(results[name], "note", "")])
            bits = 8 * weight_nbytes / old.weight.numel()
            shape = (layer.out_features, layer.in_features)
            row = LayerReport(
                name, shape, bits, nbytes(old), layer.nbytes, errors[name], note="; ".join(notes)
            )
            self.rows.append(row)
            self.copy.replace(name, layer)

    def keep_the_rest(self) -> list[KeptLayer]:
        """Let layers stay that were never given out."""
        kept = []
        for name in list(self.copy.pending):
            self.copy.own(name)
            layer = self.chosen[name]
            shape = (layer.out_features, layer.in_features)
            kept.append(KeptLayer(name, shape, nbytes(layer), "no calibration batch reaches it"))
        return kept

    def weights(self) -> dict[str, Tensor]:
        """The original weight of each layer that has been replaced."""
        return {row.name: self.chosen[row.name].weight.detach() for row in self.rows}

    def _layer(self, name: str, result: Any) -> QuantizedLinear:
        q: QuantizedTensor = getattr(result, "quantized", result)
        extra = {
            key: getattr(result, key, None) for key in ("input_scale", "input_order", "inputs")
        }
        return QuantizedLinear(q, self.chosen[name].bias, **extra)

    def _folded(self, made: Mapping[str, QuantizedLinear]) -> bool:
        """Move the input scale that a group has in common to where its input comes from; False if that cannot be."""
        scales = [layer.input_scale for layer in made.values() if layer.input_scale is not None]
        common = len(scales) == len(made) and all(torch.equal(scale, scales[0]) for scale in scales)
        place = (
            self.fold(self.copy.model, tuple(made), scales[0])
            if self.fold is not None and common
            else None
        )
        if place is None:
            return False
        self.divided |= dict.fromkeys(made, scales[0])
        self.took[place] = scales[0]
        for layer in made.values():
            layer.input_scale = None
        return True


def _check_kernel(kernel: str | None, method: Method) -> None:
    if kernel not in (None, "int4"):
        raise ValueError(f'kernel={kernel!r} must be "int4" or None')
    if kernel and method.quantizer.bits != 4:  # said before hours of calibration, not after
        raise ValueError(
            f"kernel='int4' is for 4 bits; the method's quantizer has {method.quantizer.bits}"
        )


def _parameters(model: nn.Module) -> int:
    """How many numbers a model has, or had before layers of it were quantized."""
    quantized = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    shapes = sum(layer.in_features * layer.out_features for layer in quantized)
    biases = sum(layer.bias.numel() for layer in quantized if layer.bias is not None)
    return shapes + biases + sum(parameter.numel() for parameter in model.parameters())
