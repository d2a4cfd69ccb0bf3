"""Figures that need more than a few lines: each function takes numbers and returns a Figure.

The idea: a cell that makes a figure names what is drawn, and this module draws it; a test can call
the same function. `widgets.py` puts sliders beside these figures.
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

# distinct for color-blind readers and in grayscale
BLUE = "#1f6fb4"
ORANGE = "#d9581c"
GREY = "#8a8f98"
GREEN = "#2a8c4a"

FIELD_COLORS = {"sign": GREY, "exponent": ORANGE, "mantissa": BLUE}


def new_figure(
    *, width: float = 8.0, height: float = 3.2, rows: int = 1, columns: int = 1, **options: Any
) -> tuple:
    """Return a figure in the course's style and its axes, as plt.subplots does.

    The figure is closed: a notebook shows it once, when a cell returns it.

    >>> figure, axes = new_figure()
    >>> figure.get_size_inches().tolist()
    [8.0, 3.2]
    """
    size = (width, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    # plt.subplots returns one axes or an array; figure.axes is always a list
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
    """Return a figure of weights as dots that drop to their levels, above the count of each code.

    Args:
        outlier: one more weight, in another color; it shares the scale.
    """
    # matplotlib knows neither bfloat16 nor gradients
    w = weights.detach().float()
    colors = [BLUE] * len(w)
    if outlier is not None:
        w = torch.cat([w, w.new_tensor([outlier])])
        colors.append(ORANGE)

    quantizer = IntQuantizer(bits, symmetric)
    quantized = quantizer(w)

    heights = {"height_ratios": [3, 1.2]}
    figure, (drops, counts) = new_figure(height=4.2, rows=2, gridspec_kw=heights)
    _draw_drops(drops, w, colors, quantized, quantizer)
    _draw_counts(counts, quantized, quantizer)
    return figure


def float_figure(code: int, format: FloatFormat) -> Figure:
    """Return a figure of the bits of a small float, above its place among all the numbers.

    Args:
        code: 0 to 2^bits - 1.
    """
    heights = {"height_ratios": [1, 1]}
    figure, (cells, line) = new_figure(height=2.6, rows=2, gridspec_kw=heights)
    _draw_bits(cells, code, format)
    _draw_number_line(line, code, format)
    return figure


def step_figure(parts: Mapping[str, float]) -> Figure:
    """Return a figure of a decoding step's time: one bar for all bytes, one for the operations.

    Args:
        parts: seconds of "weights", "cache" and "activations" (memory) and of "operations".
    """
    figure, ax = new_figure(height=1.9)

    # memory: its three parts, end to end
    memory_ms = 0.0
    for name, color in (("weights", BLUE), ("cache", ORANGE), ("activations", GREY)):
        part_ms = 1000 * parts[name]
        ax.barh(1, part_ms, left=memory_ms, color=color, label=name)
        memory_ms += part_ms

    operations_ms = 1000 * parts["operations"]
    ax.barh(0, operations_ms, color=GREEN, label="operations")
    ax.axvline(max(memory_ms, operations_ms), color="black", lw=1, ls=":")

    ax.set(yticks=[0, 1], yticklabels=["multipliers", "memory"])
    ax.set(xlabel="time of a step in ms; the longer bar is the step's")
    figure.legend(loc="outside right center", frameon=False)
    return figure


def _draw_drops(
    ax: Axes, w: Tensor, colors: list[str], quantized: QuantizedTensor, quantizer: IntQuantizer
) -> None:
    """Draw weights at the top, levels at the bottom, and a line from each weight to its level."""
    codes = torch.arange(quantizer.qmin, quantizer.qmax + 1, dtype=quantized.codes.dtype)
    levels = quantizer.decode(codes, quantized.parameters)
    w_hat = quantized.dequantize()
    for before, after, color in zip(w.tolist(), w_hat.tolist(), colors, strict=True):
        ax.plot([before, after], [1, 0], color=color, lw=0.8, alpha=0.6)
    ax.scatter(w.numpy(), [1] * len(w), c=colors, s=22, zorder=3)

    # thinner ticks where many levels lie close together
    tick_width = 1.4 if len(levels) <= 32 else 0.5
    ax.vlines(levels.numpy(), -0.12, 0.12, color="black", lw=tick_width)

    ax.set(yticks=[0, 1], yticklabels=["levels", "weights"], ylim=(-0.25, 1.2))
    ax.set(xlabel="value of the weight")
    step = quantized.scale.item()
    title = f"{quantizer.bits} bits: {len(levels)} levels, {step:.3g} apart"
    ax.set_title(title, loc="left")


def _draw_counts(ax: Axes, quantized: QuantizedTensor, quantizer: IntQuantizer) -> None:
    """Draw one bar per code: the number of weights that have it."""
    codes = torch.arange(quantizer.qmin, quantizer.qmax + 1)
    # bincount starts at 0, the codes at qmin
    from_zero = quantized.codes.long() - quantizer.qmin
    counts = torch.bincount(from_zero, minlength=len(codes))
    ax.bar(codes.numpy(), counts.numpy(), color=GREY, width=0.8)
    limits = (quantizer.qmin - 1, quantizer.qmax + 1)
    ax.set(xlabel="code", ylabel="weights on it", xlim=limits)


def _draw_bits(ax: Axes, code: int, format: FloatFormat) -> None:
    """Draw one cell per bit, highest bit first, with a label above each field."""
    fields = ["sign"]
    fields += ["exponent"] * format.exponent_bits
    fields += ["mantissa"] * format.mantissa_bits
    for i, field in enumerate(fields):
        place = format.bits - 1 - i
        bit = (code >> place) & 1
        color = FIELD_COLORS[field]
        opacity = 0.9 if bit else 0.25
        ax.add_patch(Rectangle((i, 0), 0.92, 1, facecolor=color, alpha=opacity))
        ax.text(i + 0.46, 0.5, str(bit), ha="center", va="center", fontsize=15)
        # label a field at its first bit
        if field not in fields[:i]:
            ax.text(i, 1.12, field, color=color, fontsize=9)
    ax.set(xlim=(-0.1, 8.1), ylim=(-0.05, 1.5), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _draw_number_line(ax: Axes, code: int, format: FloatFormat) -> None:
    """Draw a tick per number of the format; the number of this code stands out."""
    values = code_values(format)
    finite = torch.isfinite(values)
    ax.vlines(values[finite].numpy(), 0, 1, color=GREY, lw=0.6)
    if finite[code]:
        ax.vlines([float(values[code])], 0, 1.5, color=ORANGE, lw=2.5)

    # linear below the smallest normal number, where the subnormal ones are evenly spaced
    ax.set_xscale("symlog", linthresh=format.smallest_normal)
    ax.set(ylim=(0, 1.6), yticks=[])
    ax.set(xlabel=f"the numbers of {format}, on a logarithmic scale but for the middle")
    ax.minorticks_off()
