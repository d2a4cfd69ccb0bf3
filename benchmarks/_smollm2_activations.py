"""SmolLM2 with weights and activations in few bits: W8A8 in several ways, FP8, NVFP4.

Each arm takes the model and calibration batches of ids (batch, tokens), and returns a new model and
its bits per weight. All round the weights of the 210 linear layers; the head stays in floats.

Rows of integer weights have one float16 scale per output. "per tensor", "SmoothQuant" and
"rotated" round activations with one scale per call and layer, found as the model runs; their
"static" forms fix it by calibration. "per token" has one scale per token.

SmoothQuant smooths the layers that a norm feeds, as published: q, k, v, gate and up. o and down are
rounded as they are. QuaRot's rotations are those of its section 4, without the one across heads.

Source: Xiao et al., "SmoothQuant" (ICML 2023), section 4; Ashkboos et al., "QuaRot" (NeurIPS 2024),
section 4; Dettmers et al., "LLM.int8()" (NeurIPS 2022); Micikevicius et al., "FP8 formats" (2022).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qcourse import (
    E4M3,
    FloatQuantizer,
    IntQuantizer,
    NVFP4Quantizer,
    OutlierColumns,
    PerChannel,
    PerGroup,
    PerTensor,
    SmoothQuant,
    WithActivations,
    fold,
    quantize_model,
    rotate_model,
)
from qcourse.models.llama import Llama
from qcourse.recipes.quantize import QuantizedModel

Batches = Sequence[Tensor]

# Of weights: one scale per output, stored in two bytes.
ROWS = IntQuantizer(8, granularity=PerChannel(0), scale_dtype=torch.float16)
# Of activations: one scale per call, or one per token. Neither is stored.
ONE_SCALE = IntQuantizer(8, granularity=PerTensor())
PER_TOKEN = IntQuantizer(8, granularity=PerChannel(0))
NORM_FED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def quantized(
    model: nn.Module, calibration: Batches, method: WithActivations, **options: Any
) -> QuantizedModel:
    """Return the model quantized by a method, and the report without output errors."""
    batches = calibration if method.calibrated else None
    return quantize_model(
        model, method, calibration=batches, output_error=False, progress=False, **options
    )


def with_method(
    model: nn.Module, calibration: Batches, method: WithActivations
) -> tuple[nn.Module, float]:
    """Return the model quantized by a method, and its bits per weight."""
    new, report = quantized(model, calibration, method)
    return new, report.bits_per_weight


def smoothed(
    model: Llama,
    calibration: Batches,
    inputs: IntQuantizer = ONE_SCALE,
    *,
    static: bool = False,
    alpha: float = 0.5,
) -> tuple[nn.Module, float]:
    """Return SmoothQuant as published: scales are folded into the norms, o and down stay."""
    smooth = WithActivations(SmoothQuant(ROWS, alpha=alpha), inputs, static=static)
    plain = WithActivations(ROWS, inputs, static=static)
    # The layers that a norm feeds first, then all that are still in floats.
    new, on_norms = quantized(model, calibration, smooth, layers=reads_norm, fold=fold)
    new, others = quantized(new, calibration, plain)
    # The second report knows only the layers that it quantized.
    both = replace(others, layers=on_norms.layers + others.layers)
    return new, both.bits_per_weight


def rotated(
    model: Llama, calibration: Batches, inputs: IntQuantizer = ONE_SCALE, *, static: bool = False
) -> tuple[nn.Module, float]:
    """Return the model with a rotated stream, rotated values, and a transform before each down."""
    turned = rotate_model(model).model
    return with_method(turned, calibration, WithActivations(ROWS, inputs, static=static))


def reads_norm(name: str, layer: nn.Linear) -> bool:
    """Return whether a norm feeds this layer: q, k, v, gate or up."""
    return name.endswith(NORM_FED)


# One scale per output of the weights, one per token of the activations.
FP8 = FloatQuantizer(E4M3, PerChannel(0))
# As many bits per number as NVFP4 with an integer grid, but for a scale of 16 bits instead of 8.
INT4 = IntQuantizer(4, granularity=PerGroup(16), scale_dtype=torch.float16)

METHODS: dict[str, WithActivations] = {
    "W8A8 per tensor": WithActivations(ROWS, ONE_SCALE),
    "W8A8 per tensor, static": WithActivations(ROWS, ONE_SCALE, static=True),
    "W8A8 per token and channel": WithActivations(ROWS, PER_TOKEN),
    "W8A8 LLM.int8()": WithActivations(ROWS, OutlierColumns(PER_TOKEN)),
    "FP8 W8A8": WithActivations(FP8, FP8),
    "FP8 W8A8 per tensor": WithActivations(FP8, FloatQuantizer(E4M3)),
    "NVFP4 W4A4": WithActivations(NVFP4Quantizer(), NVFP4Quantizer()),
    "INT4 g16 W4A4": WithActivations(INT4, INT4),
}

ACTIVATIONS: dict[str, Callable[[Llama, Batches], tuple[nn.Module, float]]] = {
    what: partial(with_method, method=method) for what, method in METHODS.items()
}
ACTIVATIONS["W8A8 SmoothQuant"] = smoothed
ACTIVATIONS["W8A8 rotated"] = rotated
ACTIVATIONS["W8A8 SmoothQuant, per token"] = partial(smoothed, inputs=PER_TOKEN)
ACTIVATIONS["W8A8 rotated, per token"] = partial(rotated, inputs=PER_TOKEN)
