"""The error of a quantized layer: of its weight, and of its outputs.

Round-to-nearest minimizes the error of the weight, but the error of the outputs on real inputs, ||X
W^T - X W_hat^T||, matters (GPTQ, Frantar et al., ICLR 2023, equation 1). Both are those of
`numerics.metrics.relative_error`, summed piece by piece to save memory, or computed from the second
moment of the inputs where a method has gathered it.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.second_moment import SecondMoment
from qcourse.numerics.chunks import CHUNK, sum_of_squares, wide
from qcourse.trace.calibration_batches import Run, run_batch
from qcourse.trace.hooks import check_input, on_input


@dataclass(frozen=True)
class FoldedScales:
    """The input scales that moved into the module before their readers, by name of either side.

    A reader gets its input divided by its scale (in,). A predecessor has its rows divided by the
    scale (out,) of the next layers.

    >>> FoldedScales().with_scale(torch.ones(2), "up", ["down"]).by_reader
    {'down': tensor([1., 1.])}
    """

    by_reader: Mapping[str, Tensor] = field(default_factory=dict)
    by_predecessor: Mapping[str, Tensor] = field(default_factory=dict)

    def with_scale(self, scale: Tensor, predecessor: str, readers: Sequence[str]) -> "FoldedScales":
        """Return these scales and one more."""
        by_reader = {**self.by_reader, **dict.fromkeys(readers, scale)}
        by_predecessor = {**self.by_predecessor, predecessor: scale}
        return FoldedScales(by_reader, by_predecessor)


def weight_error(w: Tensor, w_hat: Tensor) -> float:
    """Return ||w - w_hat|| / ||w|| of two matrices; 0 where both are zero.

    >>> from torch import tensor
    >>> weight_error(tensor([[3.0, 4.0]]), tensor([[3.0, 3.0]]))
    0.2
    """
    # Squares are summed over pieces of about CHUNK values.
    rows = max(1, CHUNK // w.shape[1])
    lost = 0.0
    size = 0.0
    for part, part_hat in zip(w.split(rows), w_hat.split(rows), strict=True):
        lost += sum_of_squares(part.to(part_hat.dtype) - part_hat)
        size += sum_of_squares(part)
    return _relative(lost, size)


def error_by_moment(w: Tensor, w_hat: Tensor, seen: SecondMoment) -> float:
    """Return ||x w^T - x w_hat^T|| / ||x w^T|| over the inputs x that were seen.

    >>> from torch import tensor
    >>> seen = SecondMoment().add(tensor([[1.0, 1.0]]))
    >>> error_by_moment(tensor([[3.0, 4.0]]), tensor([[3.0, 3.0]]), seen)  # 6 instead of 7
    0.14285714285714285
    """
    moments = seen.as_one_group()
    dtype = moments.stored.dtype
    # In units of w's largest value, so that squares stay within the range of floats.
    unit = float(w.abs().max()) or 1.0
    w = w.to(dtype) / unit
    lost = moments.losses(w - w_hat.to(dtype) / unit).sum()
    size = moments.losses(w).sum()
    # Rounding may make a loss of 0 slightly negative.
    return _relative(max(0.0, float(lost)), max(0.0, float(size)))


@torch.no_grad()
def output_errors(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    folded: FoldedScales,
    batches: Sequence[Any],
    run: Run,
) -> dict[str, float]:
    """Return ||x w^T - x_hat w_hat^T|| / ||x w^T|| of each quantized layer that the batches reach.

    x are the inputs of a layer of the model, x_hat the same as the layer rounds it, and w its
    original weight (out, in). Folded scales are undone. Raises ValueError if the model cannot run a
    batch, or an input is not finite.
    """
    lost: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def compare(name: str, layer: QuantizedLinear, x: Tensor) -> None:
        check_input(x, name)
        y, y_hat = _outputs(name, x, weights[name], layer, folded)
        # Sums of squares over all batches; the root is taken at the end.
        lost[name] += sum_of_squares(y_hat - y)  # type: ignore[assignment]
        size[name] += sum_of_squares(y)  # type: ignore[assignment]

    with ExitStack() as hooks:
        for name in weights:
            layer = model.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            hooks.enter_context(on_input(layer, partial(compare, name, layer)))
        for number in range(len(batches)):
            run_batch(run, model, batches, number)
    return {name: _relative(lost[name], size[name]) for name in weights if name in size}


def _outputs(
    name: str, x: Tensor, w: Tensor, layer: QuantizedLinear, folded: FoldedScales
) -> tuple[Tensor, Tensor]:
    """x w^T and x_hat w_hat^T, in at least float32, whatever the dtype of the model."""
    x = x.to(wide(x.dtype))
    w = w.to(x.dtype)
    w_hat = layer.weight.to(x.dtype)
    # (x / s) (w s)^T = x w^T, so the original weight is scaled like the input of the layer.
    if name in folded.by_reader:
        w = w * folded.by_reader[name].to(x.dtype)
    # Undo the division of the rows, which belongs to the next layer.
    if name in folded.by_predecessor:
        w_hat = w_hat * folded.by_predecessor[name].to(x.dtype)[:, None]
    return x @ w.T, layer.rounded(x) @ w_hat.T


def _relative(lost: float, size: float) -> float:
    # A zero output with an error is infinitely wrong, relative to it.
    if size:
        return math.sqrt(lost / size)
    return math.inf if lost else 0.0
