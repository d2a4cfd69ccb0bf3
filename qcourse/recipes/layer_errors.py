"""How far a quantized layer is from the layer it replaced: by its weight, and by what it puts out.

The idea: the error of the weight is what rounding to nearest makes small; the error of the outputs, on inputs that
occur, is what matters. A calibrated method may well have more of the first and less of the second.

Source: the output error ||X W^T - X W_hat^T|| is what GPTQ (Frantar et al., ICLR 2023), equation 1, minimises.

How it differs from ``numerics.metrics.relative_error``: the same measure, summed up piece by piece, so that neither
float64 copies nor the outputs of all batches are ever held.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.numerics.chunks import CHUNK, sum_of_squares, wide
from qcourse.trace.batches import Run, run_batch
from qcourse.trace.hooks import check_input, on_input


def weight_error(w: Tensor, w_hat: Tensor) -> float:
    """||w - w_hat|| / ||w|| of two matrices; 0 where both are all zero.

    >>> from torch import tensor
    >>> weight_error(tensor([[3.0, 4.0]]), tensor([[3.0, 3.0]]))
    0.2
    """
    rows = max(1, CHUNK // w.shape[1])
    lost = size = 0.0
    for part, part_hat in zip(w.split(rows), w_hat.split(rows), strict=True):
        lost += sum_of_squares(part.to(part_hat.dtype) - part_hat)
        size += sum_of_squares(part)
    return _relative(lost, size)


def output_errors(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    divided: Mapping[str, Tensor],
    took: Mapping[str, Tensor],
    batches: Sequence[Any],
    run: Run,
) -> dict[str, float]:
    """||x w^T - x_hat w_hat^T|| / ||x w^T|| over all x that enter each quantized layer while the model runs, by name.

    x_hat is what the layer rounds x to, if it does. Computed in float32 (float64 where x is), whatever the model
    computes in.

    Args:
        model: has the quantized layers.
        weights: the original weight (out, in) of each.
        divided: for a layer whose input reaches it divided by an input scale (in,), that scale.
        took: for a layer whose rows now divide its outputs by the input scale of the next, that scale (out,).
        batches: what run is given, one after another.
        run: uses the model on one batch.

    Returns:
        The errors; a layer that no batch reaches is absent.

    Raises:
        ValueError: the model cannot run a batch, or an input is not finite.
    """
    layers = {
        name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)
    }
    lost: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def compare(name: str, x: Tensor) -> None:
        check_input(x, name)
        x = x.to(wide(x.dtype))
        w, w_hat = weights[name].to(x.dtype), layers[name].weight.to(x.dtype)
        w = w * divided[name].to(x.dtype) if name in divided else w
        w_hat = w_hat * took[name].to(x.dtype)[:, None] if name in took else w_hat
        y = x @ w.T
        lost[name] += sum_of_squares(layers[name].rounded(x) @ w_hat.T - y)  # type: ignore[assignment]
        size[name] += sum_of_squares(y)  # type: ignore[assignment]

    with ExitStack() as hooks:
        for name in weights:
            hooks.enter_context(on_input(layers[name], partial(compare, name)))
        for number in range(len(batches)):
            run_batch(run, model, batches, number)
    return {name: _relative(lost[name], size[name]) for name in weights if name in size}


def _relative(lost: float, size: float) -> float:
    return math.sqrt(lost / size) if size else math.inf if lost else 0.0
