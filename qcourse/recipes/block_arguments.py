"""The arguments that a model calls a block with: masks, positions, and random tokens.

A forward pass on token ids brings the arguments to the block, where a hook catches them and ends
the pass. Random tokens replace the real ones, in float64. `block_probe.py` runs blocks on them.
"""

from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # by position and by name

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # narrower ones are codes


def arguments_of(model: nn.Module, block: nn.Module, ids: Tensor) -> Arguments | None:
    """Return arguments for a block, with random tokens; None if the model cannot run on the ids.

    >>> model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2))
    >>> args, named = arguments_of(model, model[1], torch.arange(3))
    >>> args[0].shape, args[0].dtype, named
    (torch.Size([3, 2]), torch.float64, {})
    """
    # The model runs only as far as the block.
    caught = _caught_arguments(model, block, ids)
    return None if caught is None else _with_random_tokens(caught)


class _Caught(Exception):  # noqa: N818  (nothing failed)
    """Ends the forward pass that brought the arguments."""


def _caught_arguments(model: nn.Module, block: nn.Module, ids: Tensor) -> Arguments | None:
    found: list[Arguments] = []

    def catch(block: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append((args, named))
        raise _Caught

    with block.register_forward_pre_hook(catch, with_kwargs=True):
        try:
            model(ids)
        except _Caught:
            pass
        except (RuntimeError, IndexError, TypeError, ValueError, AttributeError):
            return None
    return found[0] if found else None


def _with_random_tokens(arguments: Arguments) -> Arguments | None:
    args, named = to_double(arguments)
    # The tokens are the first argument, or have the name that transformers gives them.
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (_random_like(args[0]), *args[1:]), named
    x = named.get("hidden_states")
    if isinstance(x, Tensor):
        return args, {**named, "hidden_states": _random_like(x)}
    return None


def _random_like(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator).to(x)


def to_double(value: Any) -> Any:
    """Return a value with its float tensors in float64, also within tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.detach().double() if value.dtype in FLOATS else value
    if type(value) in (tuple, list):
        return type(value)(map(to_double, value))
    if type(value) is dict:
        return {key: to_double(each) for key, each in value.items()}
    return value
