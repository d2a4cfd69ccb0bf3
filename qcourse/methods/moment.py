"""What the rounding of a weight loses on a layer's inputs, by their second moment: tr(D H D^T), H = x^T x.

The idea: to judge many roundings w_hat of one weight, nothing has to be run on x again. With D = w_hat - w the outputs
lose ||x D^T||^2 = tr(D H D^T), and H is (in, in) however many tokens there were, gathered in one pass. While there are
fewer tokens than inputs x itself is the smaller: the same loss then takes fewer products, and no rounding of H. What a
group of inputs causes alone takes its block on H's diagonal.

Source: the objective of GPTQ (Frantar et al., ICLR 2023), equation 1; here it serves the searches of AWQ.

How it differs from ``hessian.py``: that one is solved with, so it is square and damped; this is multiplied with.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qcourse.numerics.rows import wide


@dataclass(frozen=True, eq=False)
class Moment:
    """H of one or more groups of inputs, in the form that is the smaller: H, or x.

    Args:
        matrix: H (groups, size, size), or x (groups, tokens, size).
        squared: whether it is H.

    >>> x = torch.tensor([[1.0, 0.0, 2.0, 1.0]])  # one token
    >>> d = torch.tensor([[1.0, 1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 3.0]])
    >>> Moment(x[None], squared=False).losses(d).T.tolist(), Moment((x.T @ x)[None], squared=True).losses(d).T.tolist()
    ([[4.0, 9.0]], [[4.0, 9.0]])
    >>> Moment(x[None], squared=False).blocks(2).losses(d).tolist()  # of inputs 0 and 1, of inputs 2 and 3
    [[1.0, 1.0], [0.0, 9.0]]
    """

    matrix: Float[Tensor, "groups k size"]
    squared: bool

    def divided(self, s: Float[Tensor, " in"]) -> "Moment":
        """That of x / s, for a moment of one group."""
        matrix = self.matrix / s
        return replace(self, matrix=matrix.div_(s[:, None]) if self.squared else matrix)

    def blocks(self, groups: int) -> "Moment":
        """That of each of so many runs of neighbours alone, for a moment of one group."""
        parts = self.matrix[0].unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, k, size)
        size = parts.shape[2]
        if self.squared:
            on_diagonal = [part[i * size : (i + 1) * size] for i, part in enumerate(parts)]
            return Moment(torch.stack(on_diagonal), squared=True)  # (groups, size, size)
        return Moment(parts.mT @ parts, squared=True) if parts.shape[1] > size else Moment(parts, squared=False)

    def losses(self, d: Float[Tensor, "out in"]) -> Float64[Tensor, "out groups"]:
        """d H d^T for each row of d and each group: the square of what d adds to that output, over all tokens."""
        parts = d.unflatten(1, (len(self.matrix), -1)).transpose(0, 1)  # (groups, out, size)
        y = parts @ self.matrix.mT
        return (y.mul_(parts) if self.squared else y.square_()).sum(-1).double().T


@dataclass(frozen=True, eq=False)
class Activations:
    """What is kept of the inputs seen so far: sum |x| of each, and x while it has fewer rows than columns, then H.

    Args:
        total: sum |x| over the tokens.
        factor: by which x is multiplied first, a power of two: H of very large or small x is neither infinite nor 0.
        rows: the x that gram does not yet hold, fewer than `in` tokens.
        gram: x^T x of the tokens before; None while there were few.

    >>> x = torch.randn(15, 8, generator=torch.Generator().manual_seed(0))
    >>> seen = Activations.before(x)
    >>> for batch in x.split(5):
    ...     seen = seen.add(batch)
    >>> torch.allclose(seen.moment().matrix / seen.factor**2, x.T @ x, atol=1e-5)
    True
    """

    total: Float64[Tensor, " in"]
    factor: float
    rows: tuple[Float[Tensor, "_ in"], ...] = ()
    gram: Float[Tensor, "in in"] | None = None

    @classmethod
    def before(cls, x: Float[Tensor, "tokens in"]) -> "Activations":
        """Nothing yet, made for inputs of about x's size."""
        exponent = int(torch.frexp(x.double().abs().max()).exponent)
        total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
        return cls(total, 2.0 ** -max(exponent, -1000))  # 2^1074 would be no float

    def add(self, x: Float[Tensor, "tokens in"]) -> "Activations":
        """These and x, in float32, or float64 where x is."""
        dtype = wide(x.dtype)
        x = x.double() * self.factor
        rows = (*self.rows, x.to(dtype))
        more = replace(self, total=self.total + x.abs().sum(0), rows=rows)
        return more if sum(map(len, rows)) < x.shape[1] else replace(more, rows=(), gram=more._square())

    def moment(self) -> Moment:
        """H, or x, each times what `factor` makes of it; ValueError where H is beyond its dtype."""
        if self.gram is None:
            return Moment(torch.cat(self.rows)[None], squared=False)
        gram = self._square()
        if not torch.isfinite(gram.diagonal()).all():
            raise ValueError(f"x^T x overflows {gram.dtype}: some batches of x are far larger than the first")
        return Moment(gram[None], squared=True)

    def _square(self) -> Tensor:
        gram = self.gram
        for x in self.rows:
            gram = x.T @ x if gram is None else torch.addmm(gram, x.T, x)
        assert gram is not None  # once x was added there are rows or gram
        return gram
