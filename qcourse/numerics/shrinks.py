"""The search for a clip: try a few fractions of each scale's range, and keep the best.

A scale for a part of the range clips the values beyond it and rounds all others finer.
`scaled.py` fits a scale to a range; this module only compares losses.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

# The fractions of the full range that the rule "mse" tries: from 1 down to 0.05.
MSE_SHRINKS = tuple(0.97**i for i in range(100))


def best_shrink(
    shrinks: Sequence[float], loss: Callable[[float], Tensor]
) -> Float64[Tensor, "*scales"]:
    """Return, per scale, the shrink with the least loss(shrink); the first of equals.

    >>> best_shrink([1.0, 0.9, 0.8], lambda shrink: torch.tensor([shrink, 1 - shrink])).tolist()
    [0.8, 1.0]
    """
    least = loss(shrinks[0])
    best = torch.full_like(least, shrinks[0], dtype=torch.float64)
    for shrink in shrinks[1:]:
        lost = loss(shrink)
        # NaN is never less, so a scale with no valid loss keeps the first shrink.
        best = torch.where(lost < least, shrink, best)
        least = torch.minimum(lost, least)
    return best
