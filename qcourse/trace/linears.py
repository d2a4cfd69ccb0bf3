"""The linear layers of any model: list them, map their weights in a copy, record their inputs.

Quantization concerns the weights of ``nn.Linear`` layers and the activations that meet them. With
these three functions for any ``nn.Module`` an experiment is one line. A quantized model stores
codes; `map_weights` returns float weights: the same errors, not the size.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from qcourse.trace.hooks import on_input

Model = TypeVar("Model", bound=nn.Module)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer of a model by its dotted name, in order of registration.

    A layer with two names is listed once. Weights outside ``nn.Linear`` (embeddings, the
    ``in_proj_weight`` of ``nn.MultiheadAttention``) are not listed.

    >>> list(linears(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
    ['0', '2']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def map_weights(model: Model, fn: Callable[[Tensor], Tensor]) -> Model:
    """Return a copy of a model whose linear layers have the weight fn(w) instead of w (out, in).

    Weights keep their dtype, and the copy shares no memory with the model; a tied weight is untied.
    Raises ValueError if there is no linear layer or fn changes the shape, TypeError if fn returns
    no tensor.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> halved = map_weights(model, lambda w: w / 2)
    >>> torch.equal(halved.weight, model.weight / 2)
    True
    """
    mapped = copy.deepcopy(model)
    layers = linears(mapped)
    if not layers:
        raise ValueError(
            f"model must have an nn.Linear layer, and this {type(model).__name__} has none"
        )
    for name, layer in layers.items():
        old = layer.weight
        w_hat = fn(old.detach())
        _check_mapped(w_hat, old, name)
        # A copy even where fn returned w itself, or one tensor for several layers.
        w_hat = w_hat.detach().to(old.dtype, copy=True)
        layer.weight = nn.Parameter(w_hat, requires_grad=old.requires_grad)
    return mapped


def _check_mapped(w_hat: object, w: Tensor, name: str) -> None:
    if not isinstance(w_hat, Tensor):
        raise TypeError(
            f"fn must return a tensor of floats, got {type(w_hat).__name__} for layer {name!r}"
            " (a quantized tensor has to be dequantized first)"
        )
    if w_hat.shape != w.shape:
        raise ValueError(
            f"fn must keep the shape of layer {name!r}, {tuple(w.shape)}, got {tuple(w_hat.shape)}"
        )


def record_inputs(
    model: nn.Module, run: Callable[[], object], *, max_tokens: int | None = None
) -> dict[str, Shaped[Tensor, "tokens in"]]:
    """Return copies of x (tokens, in), the inputs of each linear layer, by name, during ``run()``.

    `run` uses the model, for example ``lambda: model.embed(texts)``. Every leading axis of an input
    counts as tokens, padding included. With max_tokens only so many first tokens per layer are
    kept; they are no random sample if run sorts its input, as ``MiniLM.embed`` does. Layers that
    run did not call are absent. Raises ValueError if it called none.

    >>> model = nn.Linear(2, 1)
    >>> record_inputs(model, lambda: model(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])))
    {'': tensor([[1., 2.],
            [3., 4.]])}
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 or None (all), got {max_tokens}")
    layers = linears(model)
    chunks: dict[str, list[Tensor]] = {name: [] for name in layers}

    # The stack removes the hooks even if run fails.
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(on_input(layer, partial(_keep, chunks[name], max_tokens)))
        run()

    # A layer that was called several times has one chunk per call.
    recorded = {name: torch.cat(kept) for name, kept in chunks.items() if kept}
    if not recorded:
        raise ValueError(
            f"run called none of the {len(layers)} linear layers of the model:"
            " does it use another model?"
        )
    return recorded


def _keep(kept: list[Tensor], max_tokens: int | None, x: Tensor) -> None:
    """Append a copy of x as (tokens, in), as far as max_tokens allows."""
    x = x.detach()
    x = x.flatten(0, -2) if x.ndim > 1 else x[None]  # (tokens, in)
    if max_tokens is not None:
        room = max_tokens - sum(map(len, kept))
        x = x[:room]
    # A copy, because the model may reuse the memory.
    kept.append(x.clone())
