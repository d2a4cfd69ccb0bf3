"""See into a model, and change its weights in a copy: the tools every experiment on a whole model needs.

The idea: quantization is about the weights of a model's ``nn.Linear`` layers and the activations that meet them. Three
functions that work for any ``nn.Module`` give both: ``linears`` names the layers, ``record_inputs`` keeps what goes
into them, ``map_weights`` makes a copy whose weights went through a function (quantize and dequantize, say). So an
experiment is one line, and the original stays as it was.

Source: the forward pre-hooks of PyTorch's ``nn.Module``.

How it differs from a quantized model: what ``map_weights`` returns holds ordinary float weights, so it shows what
quantization does to a model's answers, not to its size.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name every linear layer of a model, in the order in which its modules were registered.

    Args:
        model: any module; a layer that is reached by two names is listed once, under the first.

    Returns:
        The layers themselves, not copies, by their dotted names; empty if there are none. Weights that no ``nn.Linear``
        holds (embeddings, the ``in_proj_weight`` of ``nn.MultiheadAttention``) are not in it.

    >>> list(linears(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))))
    ['0', '2']
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def map_weights(model: Model, fn: Callable[[Tensor], Tensor]) -> Model:
    """Copy a model, giving each linear layer the weight fn(w) in place of w (out, in).

    Args:
        model: any module with linear layers; it is not changed, and the copy shares nothing with it.
        fn: from a weight (out, in) to one of the same shape; called once a layer, in the order of ``linears``.

    Returns:
        The copy, its weights in their old dtypes. Biases and all else are as they were; a linear weight that was tied
        to an embedding no longer is, so the embedding keeps its values.

    Raises:
        ValueError: the model has no linear layer, or fn changed the shape.
        TypeError: fn returned something that is not a tensor.

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
        w_hat = fn(layer.weight.detach())
        if not isinstance(w_hat, Tensor):
            raise TypeError(
                f"fn must return a tensor of floats, got {type(w_hat).__name__} for layer {name!r}"
                " (a quantized tensor has to be dequantized first)"
            )
        if w_hat.shape != layer.weight.shape:
            raise ValueError(
                f"fn must keep the shape of layer {name!r}, {tuple(layer.weight.shape)}, got {tuple(w_hat.shape)}"
            )
        w_hat = w_hat.detach().to(layer.weight.dtype, copy=True)
        layer.weight = nn.Parameter(w_hat, requires_grad=layer.weight.requires_grad)
    return mapped


def record_inputs(
    model: nn.Module, run: Callable[[], object], *, max_tokens: int | None = None
) -> dict[str, Shaped[Tensor, "tokens in"]]:
    """Record x (tokens, in), the activations that enter each linear layer, while ``run()`` uses the model.

    Args:
        model: any module; a part of a model records that part alone.
        run: uses the model, once or often: ``lambda: model.embed(texts)``. Every leading axis of a layer's input counts
            as tokens, so a batch that run pads has its padding recorded; MiniLM's layers see no padding.
        max_tokens: keep only the first so many tokens a layer. By default all are kept: tokens x in x 4 bytes a layer,
            which is 83 kB a token over all of MiniLM. The first are no fair sample where run sorts its input
            (``MiniLM.embed`` takes long texts first): to keep less, rather give run fewer texts, or record one layer.

    Returns:
        Copies of the activations by layer name, in the order of ``linears``; a layer that run did not call is absent.

    Raises:
        ValueError: max_tokens is not positive, or run called no linear layer of the model.

    >>> model = nn.Linear(2, 1)
    >>> record_inputs(model, lambda: model(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])))
    {'': tensor([[1., 2.],
            [3., 4.]])}
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1 or None (all), got {max_tokens}")
    layers = linears(model)
    chunks: dict[str, list[Tensor]] = {name: [] for name in layers}

    def recorder(
        kept: list[Tensor],
    ) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def keep(layer: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = (args[0] if args else named["input"]).detach()
            x = x.flatten(0, -2) if x.ndim > 1 else x[None]  # (tokens, in)
            room = None if max_tokens is None else max_tokens - sum(map(len, kept))
            kept.append(x[:room].clone())  # a copy: the model may reuse the memory

        return keep

    with ExitStack() as hooks:  # removes the hooks even if run fails
        for name, layer in layers.items():
            hooks.enter_context(
                layer.register_forward_pre_hook(recorder(chunks[name]), with_kwargs=True)
            )
        run()
    recorded = {name: torch.cat(kept) for name, kept in chunks.items() if kept}
    if not recorded:
        raise ValueError(
            f"run called none of the {len(layers)} linear layers of the model: does it use another model?"
        )
    return recorded
