"""Quantize a whole model: every linear layer becomes one that holds codes, by any method.

A method that quantizes one group of layers is applied to all, in order of use (as in GPTQ, Frantar
et al., ICLR 2023, section 4). The new model never copies the weights that will be replaced, so the
peak memory is the old model, the new one, and one layer. `method.py` chooses codes for one group.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from qcourse.layers.int4_kernels import check_int4, with_int4_kernels
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.activations import WithActivations
from qcourse.methods.method import Method, as_method
from qcourse.numerics.validation import in_layer
from qcourse.recipes.layer_replacer import Fold, LayerReplacer
from qcourse.recipes.report import KeptLayer, LayerReport, ModelReport, all_kept, nbytes
from qcourse.recipes.selection import Layers, choose
from qcourse.recipes.walk import Walk
from qcourse.trace.calibration_batches import Run, check_batches
from qcourse.trace.model_copy import ModelCopy


class QuantizedModel(NamedTuple):
    """A model with ``QuantizedLinear`` layers, and the report."""

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
    """Return a new model whose chosen linear layers hold the method's codes, and a report.

    Args:
        model: any module with nn.Linear layers; it is not changed, and shares no memory with the
            new model, which is in eval mode and without gradients.
        method: a quantizer (round-to-nearest on its grid) or a ``method.Method``.
        calibration: batches, for a language model those of ``windows``. A calibrated method needs
            them; with any method they add output errors to the report.
        run: one forward pass on one batch; for MiniLM ``lambda model, texts: model.embed(texts)``.
        layers: names, or a predicate of name and layer. By default all but the head: what
            get_output_embeddings() returns, lm_head, or a layer tied to an embedding.
        on_indivisible: "refuse", or "keep" in floats, a layer that the group size does not divide.
        sequential: whether a layer is calibrated on what the quantized layers before it produce,
            or on the original's activations.
        fold: called as fold(new model, names, input_scale), divides the output of a module before
            these layers and returns its name, or None; see ``fold.fold``. It must replace weights,
            never write to them. Without it the layers divide their input themselves.
        kernel: "int4" for the INT4 kernels (``with_int4_kernels``), in a model that cannot be
            saved; None for ``QuantizedLinear`` layers, which decode before they multiply.
        output_error: whether the report tells the errors of the outputs. Methods that gather a
            second moment know them; with any other the new model runs on the calibration once more.

    A tied weight (the head's, tied to the embedding) is untied. Chosen layers that no batch reaches
    stay in floats; the report lists them. Raises TypeError if method, calibration or layers is none
    of the above, or the codes are no integers and the kernel needs them. Raises ValueError if there
    is no layer to quantize; a name, a group size or the kernel does not fit; calibration is
    missing, empty, or reaches no chosen layer; a value is not finite.

    >>> from qcourse import IntQuantizer
    >>> model = nn.Sequential(nn.Linear(64, 32))
    >>> quantized, report = quantize_model(model, IntQuantizer(bits=4), progress=False)
    >>> quantized[0].packed.shape, report.layers[0].bits_per_weight
    (torch.Size([1024]), 4.015625)
    """
    # Everything that can be wrong with the arguments is refused first.
    method = as_method(method)
    chosen, kept = choose(model, layers, method.quantizer.granularity, on_indivisible)
    _check_kernel(kernel, model, chosen, method)
    batches = check_batches(calibration, required=method.calibrated)

    # Group by group, codes replace floats in a copy.
    by_moment = sequential and output_error
    replacer = LayerReplacer(ModelCopy(model, chosen), chosen, method, fold, by_moment)
    options = {"sequential": sequential, "one_pass": fold is None, "progress": progress}
    walk = Walk("quantizing", batches, run, **options)
    unreached = walk.replace_layers(replacer.copy, method, replacer.quantize)
    new = replacer.copy.model.requires_grad_(False)

    # The report: some errors of the outputs need one more run of the new model.
    rows = replacer.rows_with_output_errors(batches if output_error else [], run)
    report = _report(model, new, rows, all_kept(model, kept, unreached))
    return QuantizedModel(with_int4_kernels(new) if kernel else new, report)


def _report(
    model: nn.Module, new: nn.Module, rows: Sequence[LayerReport], kept: tuple[KeptLayer, ...]
) -> ModelReport:
    return ModelReport(
        layers=tuple(rows),
        kept=kept,
        bytes_before=nbytes(model),
        bytes_after=nbytes(new),
        parameters=_parameters(model),
    )


def _check_kernel(
    kernel: str | None, model: nn.Module, chosen: Mapping[str, nn.Linear], method: Method
) -> None:
    """Refuse what the kernel will refuse, before hours of calibration."""
    if kernel is None:
        return
    if kernel != "int4":
        raise ValueError(f'kernel={kernel!r} must be "int4" or None')
    inputs = method.inputs if isinstance(method, WithActivations) else None
    for name, layer in chosen.items():
        with in_layer(name):
            check_int4(method.quantizer, inputs, layer.in_features)
    # Layers that an earlier call quantized move to the kernels, too.
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            with in_layer(name):
                check_int4(module.layout.quantizer, module.inputs, module.in_features)


def _parameters(model: nn.Module) -> int:
    """The number of parameters, weights that are stored as codes included."""
    # Codes are buffers, so a quantized weight is counted by its shape.
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            count += module.in_features * module.out_features
            if module.bias is not None:
                count += module.bias.numel()
    return count
