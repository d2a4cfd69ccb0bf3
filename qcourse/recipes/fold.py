"""Scales that move from one operation of a model into the next, while what the model computes stays the same.

The idea: a layer that wants its input divided by s, as AWQ does, need not divide it at each call: the norm before it
can, once and for all, by a gain that is s times smaller; or the linear layer before it, by s times smaller rows. That
is right only where nothing else reads what was divided, and nothing in between minds. So a predecessor is not believed
by its name: the block that the layers are in is run on a few random tokens (`block_probe.py`), with the predecessor divided
by powers of two and the layers' input multiplied by them. What the block puts out has to stay. A norm's readers have to
be these layers and no other; and where their input makes no difference, nothing is shown, so nothing is folded.

    norm -> q, k, v and norm -> gate, up    the gain of the norm (and its bias)
    v -> o, where o has one input a row     attention mixes tokens, never channels
    up -> down                              down reads silu(gate) * up

With grouped queries v has fewer rows than o has inputs, and o divides for itself; so do the layers of a post-norm model
such as MiniLM, whose norms feed the residual too. The opposite use is ``plant_outliers``: a gain that is k times larger
and columns k times smaller give a model with outliers that answers as before.

Source: Lin et al., "AWQ" (MLSys 2024), section 3.2, and Xiao et al., "SmoothQuant" (ICML 2023), section 4.

How it differs from ``methods/awq.py``: there, which scale is best for some layers; here, where it can go.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, nn

from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.numerics.validation import check_scale, check_stored_scale
from qcourse.recipes.block_probe import Block, blocks, put

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold(model: nn.Module, names: Sequence[str], input_scale: Shaped[Tensor, "..."]) -> str | None:
    """Divide what precedes some layers by input_scale, so that their input arrives divided; for ``quantize_model``.

    Args:
        model: is changed: new tensors take the place of old ones, which are not written into.
        names: of all the linear layers that read this input, plain or quantized, within one block.
        input_scale: (in,), positive.

    Returns:
        The name of the norm or linear layer that took it; None, and nothing is changed, where none can: the model has
        no blocks or does not run on token ids, another layer reads the same, or the predecessor's dtype cannot hold it.

    Raises:
        ValueError: names is empty, or one of them is no linear layer of the model; input_scale is not positive and
            finite, or not one number an input.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0).requires_grad_(False)
    >>> fold(model, ["model.layers.0.mlp.down_proj"], torch.full((48,), 2.0))
    'model.layers.0.mlp.up_proj'
    >>> model.model.layers[0].mlp.down_proj.weight *= 2  # and the model is what it was
    """
    layers = _layers(model, names, input_scale)
    block = next(
        (each for each in blocks(model) if all(name.startswith(f"{each.name}.") for name in names)),
        None,
    )
    if block is not None and all(_has_one_place(model, layer) for layer in layers):
        for name in _predecessors(model, block, names):
            if new := _taken(model, block, name, names, input_scale):
                put(model.get_submodule(name), new)
                return name
    return None


@torch.no_grad()
def plant_outliers(
    model: Model,
    channels: int | Sequence[int],
    factor: float,
    *,
    where: str = "activations",
    seed: int = 0,
) -> Model:
    """A copy of a pre-norm language model with outlier channels, which computes what the model computes.

    Trained models have such channels; a small one may not. After each norm within a block, x_j becomes factor * x_j and
    the columns w_j of the layers that read it w_j / factor ("activations"); or the other way round ("weights").

    Args:
        model: a Llama of ours or transformers', or any that runs on token ids and has its norms before linear layers.
        channels: which of the hidden channels, or how many, drawn with ``seed``; the same in all layers.
        factor: above 0; a power of two changes no bit of the outputs.
        where: "activations" or "weights": what the factor multiplies. The other is divided.

    Raises:
        ValueError: an argument is none of these; no norm of the model feeds linear layers alone.

    >>> from qcourse.models.llama import random_llama
    >>> from qcourse.models.llama_config import LlamaConfig
    >>> model = random_llama(LlamaConfig(64, 32, 48, 2, 4, 2), seed=0)
    >>> planted = plant_outliers(model, [3], 32.0)
    >>> planted.model.layers[1].input_layernorm.weight[2:5].tolist()
    [1.0, 32.0, 1.0]
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> torch.equal(model(ids), planted(ids))
    True
    """
    new = copy.deepcopy(model)
    found = [each for block in blocks(new) for each in _norms(new, block)]
    if not found:
        raise ValueError(f"no norm of this {type(model).__name__} feeds linear layers alone")
    gain = _gain(channels, factor, where, seed, size=found[0][1][0].in_features)
    for norm, readers in found:
        larger = _divided(norm, 1 / gain)
        assert larger is not None  # as _norms has found
        put(norm, larger)
        for layer in readers:
            put(layer, {"weight": (layer.weight / gain).to(layer.weight.dtype)})
    return new


def _gain(
    channels: int | Sequence[int], factor: float, where: str, seed: int, *, size: int
) -> Float64[Tensor, " in"]:
    """By what each channel of the activations is multiplied."""
    if where not in ("activations", "weights"):
        raise ValueError(f"where={where!r} must be 'activations' or 'weights'")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor!r} must be positive and finite")
    if type(channels) is int:
        drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[
            :channels
        ].tolist()
        wrong = not 0 < channels <= size
    else:
        drawn = list(channels) if isinstance(channels, Sequence) else []
        wrong = not drawn or not all(
            type(channel) is int and 0 <= channel < size for channel in drawn
        )
    if wrong:
        raise ValueError(
            f"channels={channels!r} must be from 0 to {size - 1}, at least one, or how many of the {size}"
        )
    gain = torch.ones(size, dtype=torch.float64)
    gain[drawn] = factor if where == "activations" else 1 / factor
    return gain


def _norms(model: nn.Module, block: Block) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    """Each norm of a block that feeds linear layers alone, and these layers."""
    for norm, names in block.readers().items():
        readers = [
            layer for layer in map(model.get_submodule, names) if isinstance(layer, nn.Linear)
        ]
        alone = len(readers) == len(names) and all(
            _has_one_place(model, layer) for layer in readers
        )
        if alone and _taken(model, block, norm, names, torch.ones(readers[0].in_features)):
            yield model.get_submodule(norm), readers


def _layers(model: nn.Module, names: Sequence[str], scale: Tensor) -> list[nn.Module]:
    """The layers of these names, which a scale has to suit."""
    if not names:
        raise ValueError("names is empty; it must name the linear layers that read the input")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if not isinstance(layer := modules.get(name), nn.Linear | QuantizedLinear):
            raise ValueError(
                f"names has {name!r}, which is no linear layer of this {type(model).__name__}"
            )
        if scale.shape != (layer.in_features,):
            shape, expected = tuple(scale.shape), (layer.in_features,)
            raise ValueError(
                f"input_scale of shape {shape} must have the shape {expected}, one an input of {name}"
            )
    check_scale(scale)
    return [modules[name] for name in names]


def _predecessors(model: nn.Module, block: Block, names: Sequence[str]) -> Iterator[str]:
    """Names of what these layers, and no others, may be reading: a norm, or else a linear layer beside them."""
    for norm, readers in block.readers().items():
        if set(names) & set(readers):
            if set(names) == set(readers):
                yield norm
            return
    parent = names[0].rpartition(".")[0]
    for name, module in model.get_submodule(parent).named_children():
        if isinstance(module, nn.Linear | QuantizedLinear) and f"{parent}.{name}" not in names:
            yield f"{parent}.{name}"


def _taken(
    model: nn.Module, block: Block, name: str, layers: Sequence[str], scale: Tensor
) -> dict[str, Tensor] | None:
    """The tensors that divide a module's output by scale, where the block takes that; None where it does not."""
    module = model.get_submodule(name)
    new = _divided(module, scale)
    return (
        new
        if new and _has_one_place(model, module) and block.takes(name, list(new), layers)
        else None
    )


def _divided(module: nn.Module, scale: Tensor) -> dict[str, Tensor] | None:
    """The tensors that, in the place of a norm's or linear layer's own, divide its output by scale; None if it cannot
    be: too few rows, no gain, or scales in a dtype that cannot hold it."""
    key = "scale" if isinstance(module, QuantizedLinear) else "weight"
    old, bias = getattr(module, key, None), getattr(module, "bias", None)
    if (
        not isinstance(old, Tensor)
        or not old.is_floating_point()
        or not old.ndim
        or len(old) != len(scale)
    ):
        return None
    scale = scale.to(old.device)
    exact = old.double() / scale.double().reshape(-1, *[1] * (old.ndim - 1))
    new = {key: exact.to(old.dtype)}
    if key == "scale":
        try:
            check_stored_scale(new[key], exact)
        except ValueError:
            return None
    return new if bias is None else {**new, "bias": (bias.double() / scale.double()).to(bias.dtype)}


def _has_one_place(model: nn.Module, module: nn.Module) -> bool:
    return sum(each is module for _, each in model.named_modules(remove_duplicate=False)) == 1
