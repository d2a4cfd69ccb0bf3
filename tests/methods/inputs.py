"""Inputs of layers that several tests use."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers(tokens: int, size: int, seed: int = 0, factor: float = 30) -> Tensor:
    """Normal numbers with every sixteenth channel larger by the factor."""
    x = normal(tokens, size, seed=seed)
    x[:, 3::16] *= factor
    return x
