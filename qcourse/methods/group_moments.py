"""The squared output error d H d^T of a weight error d, for one or more groups of inputs.

The idea: sum over tokens of (x d^T)^2 equals d H d^T with H = x^T x. Every search over roundings
of one weight needs only H, or x itself while x is the smaller matrix.
Source: Frantar et al., "GPTQ" (ICLR 2023), equation 1.
How it differs from `second_moment.py`: that module gathers H from batches, this one evaluates it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

BLOCK = 256  # columns of a product that is symmetric: large enough for its full speed


@dataclass(frozen=True, eq=False)
class GroupMoments:
    """The second moment of each group of inputs, stored as H or as the inputs x.

    >>> x = torch.tensor([[1.0, 0.0, 2.0, 1.0]])  # one token, four inputs
    >>> d = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 3.0]])
    >>> GroupMoments(x[None], is_gram=False).split(2).losses(d).tolist()  # inputs 0-1, inputs 2-3
    [[1.0, 1.0], [0.0, 9.0]]
    """

    # H = x^T x, (groups, size, size), if is_gram; otherwise x, (groups, tokens, size).
    stored: Float[Tensor, "groups k size"]
    is_gram: bool

    def divided_by(self, s: Float[Tensor, " in"]) -> "GroupMoments":
        """Return the moments of x / s; needs a single group."""
        stored = self.stored / s
        if self.is_gram:
            # H_ij becomes H_ij / (s_i s_j): the columns are done, the rows follow.
            stored.div_(s[:, None])
        return GroupMoments(stored, self.is_gram)

    def split(self, groups: int) -> "GroupMoments":
        """Return the moments of `groups` runs of neighboring inputs; needs a single group."""
        parts = self.stored[0].unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, k, size)
        size = parts.shape[2]

        if self.is_gram:
            # Part i holds the columns of group i; its own rows form the i-th diagonal block of H.
            diagonal_blocks = []
            for i, part in enumerate(parts):
                diagonal_blocks.append(part[i * size : (i + 1) * size])
            return GroupMoments(torch.stack(diagonal_blocks), is_gram=True)

        # A group has fewer inputs than the whole, so x^T x may now be the smaller matrix.
        if parts.shape[1] > size:
            return GroupMoments(parts.mT @ parts, is_gram=True)
        return GroupMoments(parts, is_gram=False)

    def losses(self, d: Float[Tensor, "out in"]) -> Float64[Tensor, "out groups"]:
        """Return d H d^T for each row of d and each group, a sum over tokens."""
        groups = len(self.stored)
        parts = d.unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, out, size)
        if not self.is_gram:
            return (parts @ self.stored.mT).square_().sum(-1).double().T

        # H is symmetric, so the blocks beside its diagonal come in equal pairs: take one of each
        # pair, and half of each block on the diagonal, and double the sum.
        half = torch.zeros(parts.shape[:2], dtype=torch.float64, device=d.device)
        for run in runs(self.stored.shape[1]):
            below = self.stored[:, run.start :, run].clone()
            below[:, : run.stop - run.start].mul_(0.5)
            product = parts[:, :, run.start :] @ below
            half += product.mul_(parts[:, :, run]).sum(-1)
        return 2 * half.T


def runs(size: int) -> list[slice]:
    """Return the runs of up to BLOCK columns that `size` columns consist of.

    >>> runs(600)
    [slice(0, 256, None), slice(256, 512, None), slice(512, 600, None)]
    """
    return [slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK)]


def add_gram(total: Float[Tensor, "in in"], x: Float[Tensor, "tokens in"]) -> None:
    """Add x^T x to `total`, in place, block by block: those below the diagonal are mirrored."""
    for run in runs(x.shape[1]):
        part = x[:, run]
        total[run, run].addmm_(part.T, part)
        later = slice(run.stop, None)
        above = total[run, later].addmm_(part.T, x[:, later])
        total[later, run] = above.T
