"""Hooks that look at the inputs and outputs of a module in a forward pass.

Hooks (of PyTorch's ``nn.Module``) observe while the model runs as usual, so its architecture need
not be known. `call_trace.py` finds out by them how a model calls its layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def check_input(x: Tensor, name: str) -> None:
    """Raise ValueError if x, an input of layer name, has NaN or infinity."""
    if not torch.isfinite(x).all():
        raise ValueError(f"calibration brings NaN or infinity into layer {name!r}")


def on_input(module: nn.Module, look: Callable[[Tensor], None]) -> Any:
    """Call look(x) before each call of a linear layer on x, within the returned context manager."""

    def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        look(args[0] if args else named["input"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def on_output(module: nn.Module, look: Callable[[Any], None]) -> Any:
    """Call look(output) after each call of a module, within the returned context manager."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        look(output)

    return module.register_forward_hook(hook)
