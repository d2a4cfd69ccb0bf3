"""The pictures that need more than a few lines: each function takes numbers and returns a matplotlib Figure.

The idea: a cell that makes a figure says what is drawn, not how; and a test can call the same function.
Axes carry names and units. `widgets.py` puts sliders beside these pictures.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.minifloat import FloatFormat, code_values
from qcourse.numerics.quantized import QuantizedTensor

BLUE, ORANGE, GREY, GREEN = (
    "#1f6fb4",
    "#d9581c",
    "#8a8f98",
    "#2a8c4a",
)  # told apart by the colour-blind, and in grey


def new_figure(
    *, width: float = 8.0, height: float = 3.2, rows: int = 1, columns: int = 1, **options: Any
) -> tuple:
    """A figure in the course's style with its axes, as plt.subplots gives them, but not shown until it is returned.

    >>> figure, axes = new_figure()
    >>> figure.get_size_inches().tolist()
    [8.0, 3.2]
    """
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", **options
    )
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    plt.close(figure)
    return figure, axes


def grid_figure(
    weights: Float[Tensor, " count"],
    *,
    bits: int = 4,
    symmetric: bool = True,
    outlier: float | None = None,
) -> Figure:
    """Weights as dots, the 2^bits levels as ticks, each dot's drop to its level; below, how often each code is used.

    Args:
        weights: the ordinary weights.
        outlier: one more weight, drawn in another colour; it shares the scale.
    """
    w = weights.detach().float()  # matplotlib knows neither bfloat16 nor gradients
    if outlier is not None:
        w = torch.cat([w, w.new_tensor([outlier])])
    quantizer = IntQuantizer(bits, symmetric)
    q = quantizer(w)
    figure, (drops, counts) = new_figure(
        height=4.2, rows=2, gridspec_kw={"height_ratios": [3, 1.2]}
    )
    _draw_drops(drops, w, q, quantizer, outlier)
    _draw_counts(counts, q, quantizer)
    return figure


def float_figure(code: int, format: FloatFormat) -> Figure:
    """The bits of a small float as cells, sign, exponent and mantissa apart; below, its place among all the numbers.

    Args:
        code: 0 to 2^bits - 1.
    """
    figure, (cells, line) = new_figure(height=2.6, rows=2, gridspec_kw={"height_ratios": [1, 1]})
    fields = ("sign", *format.exponent_bits * ("exponent",), *format.mantissa_bits * ("mantissa",))
    colors = {"sign": GREY, "exponent": ORANGE, "mantissa": BLUE}
    for i, field in enumerate(fields):
        bit = code >> format.bits - 1 - i & 1
        cells.add_patch(
            Rectangle((i, 0), 0.92, 1, facecolor=colors[field], alpha=0.9 if bit else 0.25)
        )
        cells.text(i + 0.46, 0.5, str(bit), ha="center", va="center", fontsize=15)
        if field not in fields[:i]:
            cells.text(i, 1.12, field, color=colors[field], fontsize=9)
    cells.set(xlim=(-0.1, 8.1), ylim=(-0.05, 1.5), xticks=[], yticks=[])
    cells.spines[:].set_visible(False)
    values = code_values(format)
    numbers = values[torch.isfinite(values)]
    line.vlines(numbers.numpy(), 0, 1, color=GREY, lw=0.6)
    if torch.isfinite(values[code]):
        line.vlines([float(values[code])], 0, 1.5, color=ORANGE, lw=2.5)
    line.set_xscale("symlog", linthresh=format.smallest_normal)
    line.set(
        ylim=(0, 1.6),
        yticks=[],
        xlabel=f"the numbers of {format}, on a logarithmic scale but for the middle",
    )
    line.minorticks_off()
    return figure


def step_figure(parts: Mapping[str, float]) -> Figure:
    """What a step of writing waits for: a bar of the times of all bytes, end to end, and one of the operations' time.

    Args:
        parts: seconds of "weights", "cache" and "activations", which memory takes, and of "operations".
    """
    figure, ax = new_figure(height=1.9)
    left = 0.0
    for name, color in (("weights", BLUE), ("cache", ORANGE), ("activations", GREY)):
        ax.barh(1, 1000 * parts[name], left=left, color=color, label=name)
        left += 1000 * parts[name]
    ax.barh(0, 1000 * parts["operations"], color=GREEN, label="operations")
    ax.axvline(max(left, 1000 * parts["operations"]), color="black", lw=1, ls=":")
    ax.set(
        yticks=[0, 1],
        yticklabels=["multipliers", "memory"],
        xlabel="time of a step in ms; the longer bar is the step's",
    )
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _draw_drops(
    ax: Axes, w: Tensor, q: QuantizedTensor, quantizer: IntQuantizer, outlier: float | None
) -> None:
    """Dots at the top, levels at the bottom, a line from each dot to where it lands."""
    codes = torch.arange(quantizer.qmin, quantizer.qmax + 1, dtype=q.codes.dtype)
    levels = quantizer.decode(codes, q.parameters)
    colors = [BLUE] * len(w) if outlier is None else [BLUE] * (len(w) - 1) + [ORANGE]
    for value, landed, color in zip(w.tolist(), q.dequantize().tolist(), colors, strict=True):
        ax.plot([value, landed], [1, 0], color=color, lw=0.8, alpha=0.6)
    ax.scatter(w.numpy(), [1] * len(w), c=colors, s=22, zorder=3)
    ax.vlines(levels.numpy(), -0.12, 0.12, color="black", lw=1.4 if len(levels) <= 32 else 0.5)
    ax.set(
        yticks=[0, 1],
        yticklabels=["levels", "weights"],
        ylim=(-0.25, 1.2),
        xlabel="value of the weight",
    )
    ax.set_title(
        f"{quantizer.bits} bits: {len(levels)} levels, {q.scale.item():.3g} apart", loc="left"
    )


def _draw_counts(ax: Axes, q: QuantizedTensor, quantizer: IntQuantizer) -> None:
    """A bar for each code: how many weights landed on it."""
    codes = torch.arange(quantizer.qmin, quantizer.qmax + 1)
    counts = torch.bincount(q.codes.long() - quantizer.qmin, minlength=len(codes))
    ax.bar(codes.numpy(), counts.numpy(), color=GREY, width=0.8)
    ax.set(xlabel="code", ylabel="weights on it", xlim=(quantizer.qmin - 1, quantizer.qmax + 1))
