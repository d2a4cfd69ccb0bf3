"""Move a scale from a layer's input into the module before it, where the model computes the same.

AWQ divides a layer's input by s. A norm before it can do this for free, with a gain that is s times
smaller; so can a linear layer before it, with s times smaller rows.

    norm -> q, k, v and norm -> gate, up    the gain of the norm (and its bias)
    v -> o, where o has one input per row   attention mixes tokens, never channels
    up -> down                              down reads silu(gate) * up

This is right only if nothing else reads the divided output and every operation in between passes
the scale on. So the block is run with its predecessor divided by powers of two and the layers'
input multiplied by them (`block_probe.py`): its output must stay.

Source: Lin et al., "AWQ" (MLSys 2024), section 3.2; Xiao et al., "SmoothQuant" (ICML 2023), section
4. `methods/awq.py` finds the best scale; this finds a place for it.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.numerics.validation import check_scale, check_stored_scale
from qcourse.recipes.block_probe import Block, blocks, put


@torch.no_grad()
def fold(model: nn.Module, names: Sequence[str], input_scale: Shaped[Tensor, "..."]) -> str | None:
    """Divide the output of the module before some layers by input_scale; return its name, or None.

    `names` are all the linear layers that read this input, plain or quantized, in one block;
    input_scale is (in,), positive. The model gets new tensors; old ones are not written to.

    None means that nothing was changed: the model has no blocks or does not run on token ids,
    another layer reads the same input (as after a post-norm), the rows do not match the inputs (as
    of v and o with grouped queries), or a dtype is too narrow. Raises ValueError for names that are
    no linear layers, and for a scale that is not positive and finite or does not fit them.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0).requires_grad_(False)
    >>> fold(model, ["model.layers.0.mlp.down_proj"], torch.full((48,), 2.0))
    'model.layers.0.mlp.up_proj'
    >>> model.model.layers[0].mlp.down_proj.weight *= 2  # now the model computes what it did
    """
    layers = _layers_named(model, names, input_scale)
    # A layer that the model uses in two places may read two inputs.
    block = _block_of(model, names)
    if block is None or not all(has_one_name(model, layer) for layer in layers):
        return None
    # Try each module whose output the layers may read.
    for predecessor in _predecessors(model, block, names):
        new = divided_tensors(model, block, predecessor, names, input_scale)
        if new:
            put(model.get_submodule(predecessor), new)
            return predecessor
    return None


def _layers_named(model: nn.Module, names: Sequence[str], scale: Tensor) -> list[nn.Module]:
    if not names:
        raise ValueError("names is empty; it must name the linear layers that read the input")
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: list[nn.Module] = []
    for name in names:
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear | QuantizedLinear):
            raise ValueError(
                f"names has {name!r}, which is no linear layer of this {type(model).__name__}"
            )
        expected = (layer.in_features,)
        if scale.shape != expected:
            raise ValueError(
                f"input_scale of shape {tuple(scale.shape)} must have the shape {expected},"
                f" one number per input of {name}"
            )
        layers.append(layer)
    check_scale(scale)
    return layers


def _block_of(model: nn.Module, names: Sequence[str]) -> Block | None:
    for block in blocks(model):
        if all(name.startswith(f"{block.name}.") for name in names):
            return block
    return None


def _predecessors(model: nn.Module, block: Block, names: Sequence[str]) -> Iterator[str]:
    """The modules whose output these layers, and no others, may read; by name."""
    wanted = set(names)
    for norm, readers in block.readers().items():
        if wanted & set(readers):
            # Layers that read a norm read nothing else, and all its readers must be among them.
            if wanted == set(readers):
                yield norm
            return
    # They read no norm, so they may read a linear layer beside them (o reads v, down reads up).
    parent = names[0].rpartition(".")[0]
    for child, module in model.get_submodule(parent).named_children():
        name = f"{parent}.{child}"
        if isinstance(module, nn.Linear | QuantizedLinear) and name not in wanted:
            yield name


def divided_tensors(
    model: nn.Module, block: Block, name: str, layers: Sequence[str], scale: Tensor
) -> dict[str, Tensor] | None:
    """Return the tensors that divide a module by a scale; None if the block then changes."""
    module = model.get_submodule(name)
    new = divided_by(scale, module)
    if not new or not has_one_name(model, module):
        return None
    return new if block.takes(name, list(new), layers) else None


def divided_by(scale: Tensor, module: nn.Module) -> dict[str, Tensor] | None:
    """Return the tensors that divide the output of a norm or linear layer by a scale, one per row.

    None means that there are none: no gain, another number of rows, or a dtype that is too narrow.
    """
    # Dividing the scales of a quantized layer divides its weight, and no code changes.
    key = "scale" if isinstance(module, QuantizedLinear) else "weight"
    old = getattr(module, key, None)
    if not isinstance(old, Tensor) or not old.is_floating_point() or not old.ndim:
        return None
    if len(old) != len(scale):
        return None
    # A scale of one byte, as in MX and NVFP4, has too few bits to hold most quotients.
    if old.element_size() == 1:
        return None

    # Divide in float64, then round once to the dtype of the tensor.
    scale = scale.double().to(old.device)
    per_row = scale.reshape(-1, *[1] * (old.ndim - 1))  # (rows, 1, ...)
    exact = old.double() / per_row
    new = {key: exact.to(old.dtype)}
    # The scale of codes has to stay above 0 and finite in its own dtype.
    if key == "scale":
        try:
            check_stored_scale(new[key], exact)
        except ValueError:
            return None
    # y / s = x (W / s)^T + b / s
    bias = getattr(module, "bias", None)
    if bias is not None:
        new["bias"] = (bias.double() / scale).to(bias.dtype)
    return new


def has_one_name(model: nn.Module, module: nn.Module) -> bool:
    """Return whether a module is in one place of the model alone."""
    every = model.named_modules(remove_duplicate=False)
    return sum(each is module for _, each in every) == 1
