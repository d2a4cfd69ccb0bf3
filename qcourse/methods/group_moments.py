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
        product = parts @ self.stored.mT

        # Either (d H) * d, or the squared outputs (x d^T)^2; both sum to d H d^T.
        terms = product.mul_(parts) if self.is_gram else product.square_()
        return terms.sum(-1).double().T
