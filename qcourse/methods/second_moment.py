"""The second moment of a layer's inputs, gathered batch by batch, and what the rounding of a weight loses by it.

The idea: with D = w_hat - w the outputs lose ||x D^T||^2 = tr(D H D^T), H = x^T x: so H, or x itself while that is the
smaller, is all that has to be kept of the inputs, in one pass and (in, in) however many tokens there are. To judge many
roundings of one weight nothing has to be run on x again, and what a group of inputs causes alone takes its block on H's
diagonal. The size of x is kept apart, as a power of two: squares of very large or small inputs are no floats.

Source: the objective of GPTQ (Frantar et al., ICLR 2023), equation 1; it serves the searches of AWQ as well.

How it differs from ``inverse_factor.py``: there H is solved with, so it is damped and inverted; here it is multiplied with.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Shaped
from torch import Tensor

from qcourse.numerics.chunks import range_of_rows, wide
from qcourse.numerics.validation import check_finite, check_floating


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
        return (
            Moment(parts.mT @ parts, squared=True)
            if parts.shape[1] > size
            else Moment(parts, squared=False)
        )

    def losses(self, d: Float[Tensor, "out in"]) -> Float64[Tensor, "out groups"]:
        """d H d^T for each row of d and each group: the square of what d adds to that output, over all tokens."""
        parts = d.unflatten(1, (len(self.matrix), -1)).transpose(0, 1)  # (groups, out, size)
        y = parts @ self.matrix.mT
        return (y.mul_(parts) if self.squared else y.square_()).sum(-1).double().T


class Hessian:
    """H = (1 / n) sum x x^T over n tokens, gathered batch by batch in float32 (float64 where the first batch is).

    Attributes:
        count: n.
        factor: the power of two that x is multiplied by first: the largest |x| becomes less than 1.
        magnitude: (in,), sum |factor x| over the tokens; batches are added up in float64.
        rows: factor x of all tokens, while they are fewer than the inputs; then empty.
        gram: the sum of (factor x) (factor x)^T from then on, (in, in); None before.

    >>> hessian = Hessian().add(torch.tensor([[1.0, 2.0]])).add(torch.tensor([[3.0, 0.0]]))
    >>> hessian.matrix.tolist(), hessian.count
    ([[5.0, 1.0], [1.0, 2.0]], 2)
    >>> (hessian.magnitude / hessian.factor).tolist()
    [4.0, 2.0]
    """

    def __init__(self) -> None:
        self.count, self.factor = 0, 1.0
        self.magnitude: Tensor = torch.zeros(0, dtype=torch.float64)
        self.rows: list[Tensor] = []
        self.gram: Tensor | None = None
        self._peak, self._dtype = 0.0, torch.float32

    def add(self, x: Shaped[Tensor, "..."]) -> "Hessian":
        """Take x (tokens, in) into account and return the same object; a batch that is refused leaves no trace.

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x is empty, is no matrix, has NaN or infinity, or has another width than the batches before.
        """
        check_floating(x)
        if x.ndim != 2 or (self.count and x.shape[1] != len(self.magnitude)):
            width = len(self.magnitude) if self.count else "in"
            raise ValueError(f"x of shape {tuple(x.shape)} must have the shape (tokens, {width})")
        x = x.detach()
        low, high = range_of_rows(x.reshape(1, -1))
        check_finite(x, low, high)
        if not self.count:
            self.magnitude, self._dtype = (
                self.magnitude.new_zeros(x.shape[1], device=x.device),
                wide(x.dtype),
            )
        self._hold(max(-float(low), float(high)))
        x = (x.to(wide(x.dtype)) * self.factor).to(self._dtype)
        self.magnitude += (
            x.abs().sum(0).double()
        )  # a batch by itself in its dtype: ten times as fast
        self.count += len(x)
        if self.gram is not None:
            self.gram.addmm_(x.T, x)
        else:
            self.rows.append(x)
            if self.count >= x.shape[1]:
                self.gram, self.rows = self._square(), []
        return self

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """H, a tensor of its own, in float64 where float32 could not hold it; ValueError where no batch was added."""
        h = self.scaled
        h = h if 2.0**-40 < self.factor < 2.0**40 else h.double()
        return h.div_(self.factor).div_(self.factor)

    @property
    def scaled(self) -> Float[Tensor, "in in"]:
        """factor^2 H, a tensor of its own, which has no entry above 1; ValueError where no batch was added."""
        self._check_any()
        return self._square().div_(self.count) if self.gram is None else self.gram / self.count

    def moment(self) -> Moment:
        """x^T x, or x, of factor x; not to be written into. ValueError where no batch was added."""
        self._check_any()
        if self.gram is None:
            return Moment(torch.cat(self.rows)[None], squared=False)
        return Moment(self.gram[None], squared=True)

    def _hold(self, peak: float) -> None:
        """Make the factor such that it suits inputs up to peak too."""
        largest = max(self._peak, peak)
        least = -1000 if self._dtype == torch.float64 else -100  # the factor must be a float too
        factor = 2.0 ** -max(math.frexp(largest)[1], least)
        if factor != self.factor:
            ratio = factor / self.factor
            self.magnitude *= ratio
            self.rows = [x * ratio for x in self.rows]
            self.gram = None if self.gram is None else self.gram.mul_(ratio).mul_(ratio)
        self.factor, self._peak = factor, largest

    def _square(self) -> Tensor:
        size = len(self.magnitude)
        total = torch.zeros(size, size, dtype=self._dtype, device=self.magnitude.device)
        for x in self.rows:
            total.addmm_(x.T, x)
        return total

    def _check_any(self) -> None:
        if not self.count:
            raise ValueError("hessian has seen no inputs; add at least one batch")


class BySecondMoment:
    """To derive a method from that has to know the second moment of the inputs: GPTQ, AWQ, Wanda, SparseGPT."""

    calibrated: ClassVar[bool] = True

    def observe(self, seen: Hessian | None, x: Shaped[Tensor, "..."]) -> Hessian:
        """The second moment, with x (tokens, in) taken into account; raises what ``Hessian.add`` does."""
        return (seen or Hessian()).add(x)
