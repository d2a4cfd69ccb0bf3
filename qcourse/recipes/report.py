"""The report of a quantized model: sizes and errors layer by layer, and why layers were kept.

"4 bits" is a property of codes. A model consists of codes, scales, zero points, and the embedding
and head in floats, which dominate a small model. So the totals count every tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.trace.linears import linears


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer; errors are relative, ||a - a_hat|| / ||a||.

    `bits_per_weight` counts codes, scales and zero points, without the bias. `output_error` is that
    of the outputs without bias, on the layer's inputs in the quantized model; None without
    calibration.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    bytes_before: int
    bytes_after: int
    weight_error: float
    output_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class KeptLayer:
    """One linear layer that stays in floats, and why."""

    name: str
    shape: tuple[int, int]
    bytes_before: int
    why: str


def quantized_row(
    name: str,
    before: nn.Linear,
    after: QuantizedLinear,
    weight_error: float,
    notes: Iterable[str] = (),
) -> LayerReport:
    """Return the report of one layer, given it before and after; empty notes are left out.

    >>> from qcourse import IntQuantizer
    >>> before = nn.Linear(64, 32)
    >>> after = QuantizedLinear(IntQuantizer(bits=4)(before.weight.detach()), before.bias.detach())
    >>> row = quantized_row("up", before, after, 0.1, ["untied from down", ""])
    >>> row.shape, row.bytes_before, row.bytes_after, row.bits_per_weight, row.note
    ((32, 64), 8320, 1156, 4.015625, 'untied from down')
    """
    # The bias stays in floats and is not part of the bits per weight.
    bias_bytes = 0 if after.bias is None else after.bias.nbytes
    weight_bits = 8 * (after.nbytes - bias_bytes)
    return LayerReport(
        name,
        shape=(after.out_features, after.in_features),
        bits_per_weight=weight_bits / before.weight.numel(),
        bytes_before=nbytes(before),
        bytes_after=after.nbytes,
        weight_error=weight_error,
        note="; ".join(filter(None, notes)),
    )


def kept_row(name: str, layer: nn.Linear, why: str) -> KeptLayer:
    """Return the report of a layer that stays in floats."""
    return KeptLayer(name, (layer.out_features, layer.in_features), nbytes(layer), why)


def all_kept(
    model: nn.Module, kept: Iterable[KeptLayer], unreached: Iterable[str]
) -> tuple[KeptLayer, ...]:
    """Return the kept layers and those that no calibration batch reaches, in the model's order."""
    layers = linears(model)
    by_name = {row.name: row for row in kept}
    for name in unreached:
        by_name[name] = kept_row(name, layers[name], "no calibration batch reaches it")
    return tuple(by_name[name] for name in layers if name in by_name)


@dataclass(frozen=True)
class ModelReport:
    """What ``quantize_model`` did; printed, it is a table.

    The bytes are those of the whole model, each tensor once; `parameters` includes the weights that
    are stored as codes.
    """

    layers: tuple[LayerReport, ...]
    kept: tuple[KeptLayer, ...]
    bytes_before: int
    bytes_after: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized layers, scales and zero points included."""
        # A mean over weights, so a large layer counts more.
        bits = []
        sizes = []
        for layer in self.layers:
            size = layer.shape[0] * layer.shape[1]
            sizes.append(size)
            bits.append(layer.bits_per_weight * size)
        return sum(bits) / sum(sizes)

    @property
    def bits_per_parameter(self) -> float:
        """Bits per parameter of the whole model, floats included."""
        return 8 * self.bytes_after / self.parameters

    @property
    def bytes_unquantized(self) -> int:
        """The bytes after quantization that belong to no quantized layer."""
        return self.bytes_after - sum(layer.bytes_after for layer in self.layers)

    def __repr__(self) -> str:
        return "\n".join([*_table(self), *_totals(self)])


def nbytes(model: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers, each tensor once.

    >>> nbytes(nn.Linear(10, 10))
    440
    """
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _table(report: ModelReport) -> list[str]:
    titles = ("layer", "shape", "bits/weight", "before", "after", "error w", "error y", "")
    rows: list[tuple[str, ...]] = [titles]
    rows += [_quantized_cells(layer) for layer in report.layers]
    rows += [_kept_cells(layer) for layer in report.kept]
    # Each column is as wide as its widest cell.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for *cells, note in rows:
        padded = []
        for column, (cell, width) in enumerate(zip(cells, widths, strict=False)):
            # Names and shapes are aligned left, numbers right.
            padded.append(cell.ljust(width) if column < 2 else cell.rjust(width))
        lines.append("  ".join([*padded, note]).rstrip())
    return lines


def _quantized_cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.name or "(the model)",
        _shape(layer.shape),
        f"{layer.bits_per_weight:.3f}",
        f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}",
        f"{layer.weight_error:.4f}",
        "" if layer.output_error is None else f"{layer.output_error:.4f}",
        layer.note,
    )


def _kept_cells(layer: KeptLayer) -> tuple[str, ...]:
    size = f"{layer.bytes_before:,}"
    name = layer.name or "(the model)"
    return (name, _shape(layer.shape), "", size, size, "", "", f"kept: {layer.why}")


def _totals(report: ModelReport) -> list[str]:
    before = report.bytes_before
    after = report.bytes_after
    return [
        f"{len(report.layers)} layers quantized to {report.bits_per_weight:.3f} bits per weight,"
        f" {len(report.kept)} kept",
        f"whole model: {before:,} bytes -> {after:,} ({before / after:.2f} times smaller),"
        f" {report.bits_per_parameter:.3f} bits per parameter;"
        f" {report.bytes_unquantized:,} bytes unquantized",
    ]


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
