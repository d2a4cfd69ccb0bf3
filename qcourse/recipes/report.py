"""What quantizing a model did to it, layer by layer and in all: sizes, errors, and what was left as it was, and why.

The idea: "4 bits" is a property of codes. What a model takes is codes and scales and zero points, and the embedding and
head that stay in floats; for a small model these are most of it. So the totals count every tensor of the model.

Source: none; the sizes are those of the tensors held.

How it differs from ``numerics.metrics``: there, one tensor's error; here, a table of them with their bytes.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer; errors are relative, ||a - a_hat|| / ||a||.

    Args:
        bits_per_weight: of all that is held for the weight, so without the bias.
        weight_error: of the weight that the layer now acts by.
        output_error: of the layer's outputs without bias, on the inputs that it meets in the quantized model; None
            where no inputs were given.
        note: what the method, the fold or the tie had to say.
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


@dataclass(frozen=True)
class ModelReport:
    """What ``quantize_model`` did; printed, it is a table.

    Args:
        bytes_before, bytes_after: of the whole model, each tensor once: embeddings, norms and kept layers included.
        parameters: how many numbers the whole model had, those that a quantized layer stands for included.
    """

    layers: tuple[LayerReport, ...]
    kept: tuple[KeptLayer, ...]
    bytes_before: int
    bytes_after: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the quantized layers, scales and zero points included."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        bits = [
            layer.bits_per_weight * size for layer, size in zip(self.layers, sizes, strict=True)
        ]
        return sum(bits) / sum(sizes)

    @property
    def bits_per_parameter(self) -> float:
        """Bits a parameter of the whole model, what stays in floats included."""
        return 8 * self.bytes_after / self.parameters

    @property
    def bytes_unquantized(self) -> int:
        """Bytes after that belong to no quantized layer."""
        return self.bytes_after - sum(layer.bytes_after for layer in self.layers)

    def __repr__(self) -> str:
        return "\n".join([*_table(self), *_totals(self)])


def nbytes(model: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, each once, however many names it has.

    >>> nbytes(nn.Linear(10, 10))
    440
    """
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def _table(report: ModelReport) -> list[str]:
    rows = [("layer", "shape", "bits/weight", "before", "after", "error w", "error y", "")]
    for layer in report.layers:
        output = "" if layer.output_error is None else f"{layer.output_error:.4f}"
        sizes = f"{layer.bytes_before:,}", f"{layer.bytes_after:,}"
        numbers = f"{layer.bits_per_weight:.3f}", *sizes, f"{layer.weight_error:.4f}", output
        rows.append((layer.name or "(the model)", _shape(layer.shape), *numbers, layer.note))
    for kept in report.kept:
        size = f"{kept.bytes_before:,}"
        rows.append(
            (
                kept.name or "(the model)",
                _shape(kept.shape),
                "",
                size,
                size,
                "",
                "",
                f"kept: {kept.why}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        (name, shape), numbers, note = row[:2], row[2:-1], row[-1]
        padded = [number.rjust(width) for number, width in zip(numbers, widths[2:], strict=False)]
        lines.append(
            "  ".join([name.ljust(widths[0]), shape.ljust(widths[1]), *padded, note]).rstrip()
        )
    return lines


def _totals(report: ModelReport) -> list[str]:
    before, after = report.bytes_before, report.bytes_after
    return [
        f"{len(report.layers)} layers quantized to {report.bits_per_weight:.3f} bits a weight, {len(report.kept)} kept",
        f"whole model: {before:,} bytes -> {after:,} ({before / after:.2f} times smaller),"
        f" {report.bits_per_parameter:.3f} bits a parameter; {report.bytes_unquantized:,} bytes unquantized",
    ]


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"
