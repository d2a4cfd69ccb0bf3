"""Plant outlier channels into a language model without a change of what it computes.

Trained models have outlier channels; a small model may have none. After each norm of a block x_j
becomes factor * x_j, and the columns w_j of the layers that read it become w_j / factor: the scale
of SmoothQuant (Xiao et al., ICML 2023, section 4) in reverse. `fold.py` moves such a scale away.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from qcourse.recipes.block_probe import Block, blocks, put
from qcourse.recipes.fold import divided_by, divided_tensors, has_one_name

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def plant_outliers(
    model: Model,
    channels: int | Sequence[int],
    factor: float,
    *,
    where: str = "activations",
    seed: int = 0,
) -> Model:
    """Return a copy of a pre-norm language model that has outlier channels and computes the same.

    Args:
        model: runs on token ids and has norms before linear layers, such as a Llama.
        channels: hidden channels, the same in all layers, or how many to draw with ``seed``.
        factor: above 0; a power of two changes no bit of the outputs.
        where: what the factor multiplies, "activations" or "weights"; the other is divided.

    Raises ValueError for other arguments, or if no norm feeds linear layers alone.

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
    # Every norm that can be multiplied without a change of the model.
    found = [each for block in blocks(new) for each in _norms_with_readers(new, block)]
    if not found:
        raise ValueError(f"no norm of this {type(model).__name__} feeds linear layers alone")
    _, first_readers = found[0]
    gain = _gain(channels, factor, where, seed, size=first_readers[0].in_features)
    for norm, readers in found:
        larger = divided_by(1 / gain, norm)
        assert larger is not None  # _norms_with_readers yields only norms that can be divided
        put(norm, larger)
        # y = W x stays: column j of W is divided by what x_j was multiplied by.
        for layer in readers:
            smaller = (layer.weight / gain).to(layer.weight.dtype)
            put(layer, {"weight": smaller})
    return new


def _norms_with_readers(
    model: nn.Module, block: Block
) -> Iterator[tuple[nn.Module, list[nn.Linear]]]:
    for norm, names in block.readers().items():
        readers = []
        for name in names:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear) and has_one_name(model, layer):
                readers.append(layer)
        # A reader that is quantized, or in two places, cannot be divided.
        if len(readers) < len(names):
            continue
        # Whether the block stays does not depend on the scale, so 1 will do here.
        ones = torch.ones(readers[0].in_features)
        if divided_tensors(model, block, norm, names, ones):
            yield model.get_submodule(norm), readers


def _gain(
    channels: int | Sequence[int], factor: float, where: str, seed: int, *, size: int
) -> Float64[Tensor, " in"]:
    if where not in ("activations", "weights"):
        raise ValueError(f"where={where!r} must be 'activations' or 'weights'")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor!r} must be positive and finite")
    gain = torch.ones(size, dtype=torch.float64)
    # gain_j multiplies activation j; weights get the inverse.
    gain[_chosen(channels, size, seed)] = factor if where == "activations" else 1 / factor
    return gain


def _chosen(channels: int | Sequence[int], size: int, seed: int) -> list[int]:
    wrong = ValueError(
        f"channels={channels!r} must be from 0 to {size - 1}, at least one,"
        f" or how many of the {size}"
    )
    if type(channels) is int:
        if not 0 < channels <= size:
            raise wrong
        # A random order, of which the first channels are taken.
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(size, generator=generator)[:channels].tolist()
    if not isinstance(channels, Sequence) or not channels:
        raise wrong
    for channel in channels:
        if type(channel) is not int or not 0 <= channel < size:
            raise wrong
    return list(channels)
