"""New layers for those that read one input: their codes, folded input scale and report rows.

Layers that read the same input share what a method observed of it, and may share an input scale. If
the module before them can divide its output by that scale, the layers need not (AWQ, Lin et al.,
MLSys 2024, section 3.2). `walk.py` puts the new layers into the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.method import LayerCodes, Method, choose_codes
from qcourse.methods.second_moment import SecondMoment
from qcourse.recipes.layer_errors import (
    FoldedScales,
    error_by_moment,
    output_errors,
    weight_error,
)
from qcourse.recipes.report import LayerReport, quantized_row
from qcourse.trace.calibration_batches import Run
from qcourse.trace.model_copy import ModelCopy
from qcourse.trace.replay import Group

Fold = Callable[[nn.Module, Group, Tensor], str | None]


@dataclass
class LayerReplacer:
    """Makes quantized layers for a copy of a model, and gathers the rows of the report."""

    copy: ModelCopy
    chosen: Mapping[str, nn.Linear]
    method: Method
    fold: Fold | None
    # Whether a second moment that the method observes is that of the new model's inputs, and
    # tells the errors of the outputs.
    errors_by_moment: bool = True
    rows: list[LayerReport] = field(default_factory=list)
    folded: FoldedScales = field(default_factory=FoldedScales)

    def quantize(self, names: Group, seen: Any) -> dict[str, QuantizedLinear]:
        """Return new layers for those that read one input, given what the method observed of it."""
        # All of them at once: the method may choose one input scale for them.
        weights = {name: self.chosen[name].weight.detach() for name in names}
        results = choose_codes(self.method, weights, seen)
        layers = {name: _layer_of(results[name], self.chosen[name].bias) for name in names}

        # The errors are of w_hat / input_scale, so they are computed before a scale is folded.
        errors = {name: weight_error(weights[name], layers[name].weight) for name in names}
        lost = {name: self._output_error(layers[name], weights[name], seen) for name in names}
        scaled = [name for name in names if layers[name].input_scale is not None]
        is_folded = bool(scaled) and self._fold_scale(layers)
        scale_note = "input scale folded" if is_folded else "input scale at run time"

        for name, layer in layers.items():
            notes = [scale_note] if name in scaled else []
            notes += [f"untied from {other}" for other in self.copy.untied[name]]
            notes.append(results[name].note)
            row = quantized_row(name, self.chosen[name], layer, errors[name], notes)
            self.rows.append(replace(row, output_error=lost[name]))
        return layers

    def rows_with_output_errors(self, batches: Sequence[Any], run: Run) -> list[LayerReport]:
        """Return the rows, with output errors of the layers that the batches reach."""
        # One more run of the model for the layers whose error no second moment has told. The copy
        # no longer has the original weights.
        unknown = [row.name for row in self.rows if row.output_error is None]
        originals = {name: self.chosen[name].weight.detach() for name in unknown}
        if not originals:
            return self.rows
        errors = output_errors(self.copy.model, originals, self.folded, batches, run)
        rows = []
        for row in self.rows:
            rows.append(replace(row, output_error=errors.get(row.name, row.output_error)))
        return rows

    def _output_error(self, layer: QuantizedLinear, w: Tensor, seen: Any) -> float | None:
        """The error on the inputs that the layer was calibrated on; None if that takes a run."""
        if not self.errors_by_moment or layer.inputs is not None:
            return None
        if not isinstance(seen, SecondMoment):
            return None
        return error_by_moment(w, layer.weight, seen)

    def _fold_scale(self, layers: Mapping[str, QuantizedLinear]) -> bool:
        """Move a common input scale to the module before; False if that is impossible."""
        if self.fold is None:
            return False
        # One module divides the input of all, so all the layers must have one scale in common.
        scales = [layer.input_scale for layer in layers.values()]
        scale = scales[0]
        if scale is None:
            return False
        for other in scales:
            if other is None or not torch.equal(other, scale):
                return False
        predecessor = self.fold(self.copy.model, tuple(layers), scale)
        if predecessor is None:
            return False
        self.folded = self.folded.with_scale(scale, predecessor, tuple(layers))
        for layer in layers.values():
            layer.input_scale = None
        return True


def _layer_of(codes: LayerCodes, bias: Tensor | None) -> QuantizedLinear:
    return QuantizedLinear(
        codes.quantized,
        bias,
        input_scale=codes.input_scale,
        input_order=codes.input_order,
        inputs=codes.inputs,
    )
