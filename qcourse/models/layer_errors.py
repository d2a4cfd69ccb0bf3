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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcourse.models.quantized_linear import QuantizedLinear
from qcourse.models.replay import Run
from qcourse.numerics.rows import CHUNK


def weight_error(w: Tensor, w_hat: Tensor) -> float:
    """||w - w_hat|| / ||w|| of two matrices; 0 where both are all zero.

    >>> weight_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]))
    0.2
    """
    rows = max(1, CHUNK // w.shape[1])
    lost = size = 0.0
    for part, part_hat in zip(w.split(rows), w_hat.split(rows), strict=True):
        lost += _square(part.to(part_hat.dtype) - part_hat)
        size += _square(part)
    return _relative(lost, size)


def output_errors(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    divided: Mapping[str, Tensor],
    batches: Sequence[Any],
    run: Run,
) -> dict[str, float]:
    """||x (w - w_hat)^T|| / ||x w^T|| over all x that enter each quantized layer while the model runs, by name.

    Args:
        model: has the quantized layers.
        weights: the original weight (out, in) of each.
        divided: for a layer whose input reaches it divided by an input scale (in,), that scale.
        batches: what run is given, one after another.
        run: uses the model on one batch.

    Returns:
        The errors; a layer that no batch reaches is absent.
    """
    lost: Counter[str] = Counter()
    size: Counter[str] = Counter()

    def compare(name: str, layer: QuantizedLinear, x: Tensor, y_hat: Tensor) -> None:
        x_was = x * divided[name] if name in divided else x
        y = F.linear(x_was.to(x.dtype), weights[name].to(x.dtype))
        lost[name] += _square(y_hat - y if layer.bias is None else y_hat - layer.bias - y)  # type: ignore[assignment]
        size[name] += _square(y)  # type: ignore[assignment]

    with ExitStack() as hooks:
        for name in weights:
            hook = lambda layer, args, y_hat, name=name: compare(name, layer, args[0], y_hat)  # noqa: E731
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        for batch in batches:
            run(model, batch)
    return {name: _relative(lost[name], size[name]) for name in weights if name in size}


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _relative(lost: float, size: float) -> float:
    return math.sqrt(lost / size) if size else math.inf if lost else 0.0
