"""The second moment H = x^T x / tokens of a layer's inputs, gathered batch by batch.

The idea: a weight error d = w - w_hat changes the mean squared output by tr(d H d^T). So H, of
shape (in, in), is all that GPTQ, AWQ and pruning need to know about the inputs, for any number of
tokens. Squares of very large or small inputs leave the range of floats, so x is scaled first.
Source: Frantar et al., "GPTQ" (ICLR 2023), equation 1.
How it differs: `group_moments.py` evaluates d H d^T for many d; `inverse_factor.py` inverts H.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from qcourse.methods.group_moments import GroupMoments, add_gram
from qcourse.numerics.chunks import wide
from qcourse.numerics.validation import check_finite, check_floating


class SecondMoment:
    """H = x^T x / count over all tokens seen, in float32 (float64 if the first batch is).

    >>> seen = SecondMoment().add(torch.tensor([[1.0, 2.0]])).add(torch.tensor([[3.0, 0.0]]))
    >>> seen.matrix.tolist(), seen.count
    ([[5.0, 1.0], [1.0, 2.0]], 2)
    >>> (seen.sum_of_abs / seen.input_factor).tolist()
    [4.0, 2.0]
    """

    def __init__(self) -> None:
        # The number of tokens seen.
        self.count = 0
        # What x is multiplied by before anything is stored, so that all |x| < 1; a power of two.
        self.input_factor = 1.0
        # The sum of |input_factor x| over the tokens, (in,).
        self.sum_of_abs: Tensor = torch.zeros(0, dtype=torch.float64)
        # The smaller matrix of these two: input_factor x of each batch while count < in, then
        # (input_factor x)^T (input_factor x), (in, in).
        self.batches: list[Tensor] = []
        self.gram: Tensor | None = None
        self._largest = 0.0
        self._dtype = torch.float32

    def add(self, x: Shaped[Tensor, "..."]) -> "SecondMoment":
        """Add the tokens x (tokens, in) and return self; a rejected batch changes nothing.

        Raises TypeError or ValueError unless x is a finite matrix as wide as earlier batches.
        """
        largest = self._checked_largest(x)
        x = x.detach()
        if self.count == 0:
            self._dtype = wide(x.dtype)
            self.sum_of_abs = self.sum_of_abs.new_zeros(x.shape[1], device=x.device)
        self._rescale(largest)
        x = (x.to(wide(x.dtype)) * self.input_factor).to(self._dtype)

        # Sum a batch in its own dtype and the batches in float64: ten times as fast as all float64.
        self.sum_of_abs += x.abs().sum(0).double()
        self.count += len(x)

        # Store x itself until x^T x, (in, in), is no larger than all inputs together.
        if self.gram is not None:
            add_gram(self.gram, x)
            return self
        self.batches.append(x)
        if self.count >= x.shape[1]:
            self.gram = self._gram_of_batches()
            self.batches = []
        return self

    @property
    def matrix(self) -> Float[Tensor, "in in"]:
        """Return a copy of H, in float64 if its values may leave the range of float32."""
        h = self.scaled_matrix
        if not 2.0**-40 < self.input_factor < 2.0**40:
            h = h.double()
        # Divide twice, because the square of the factor may overflow.
        return h.div_(self.input_factor).div_(self.input_factor)

    @property
    def scaled_matrix(self) -> Float[Tensor, "in in"]:
        """Return a copy of input_factor^2 H, whose entries are at most 1 in magnitude."""
        self._check_not_empty()
        if self.gram is None:
            return self._gram_of_batches().div_(self.count)
        return self.gram / self.count

    def as_one_group(self) -> GroupMoments:
        """Return the moments of input_factor x, not divided by count; shares memory with self."""
        self._check_not_empty()
        if self.gram is None:
            return GroupMoments(torch.cat(self.batches)[None], is_gram=False)
        return GroupMoments(self.gram[None], is_gram=True)

    def _checked_largest(self, x: Tensor) -> float:
        """The largest |x| of a batch that passes all checks."""
        check_floating(x)
        if x.ndim != 2 or (self.count and x.shape[1] != len(self.sum_of_abs)):
            width = len(self.sum_of_abs) if self.count else "in"
            raise ValueError(f"x of shape {tuple(x.shape)} must have the shape (tokens, {width})")
        low, high = torch.aminmax(x.detach())
        check_finite(x, ends=(low, high))
        return max(-float(low), float(high))

    def _rescale(self, largest: float) -> None:
        """Choose the power of two that suits inputs up to `largest`, and apply it to all sums."""
        self._largest = max(self._largest, largest)
        # frexp: largest < 2^exponent. The power 2^-exponent must be a float of this dtype too.
        exponent = math.frexp(self._largest)[1]
        lowest_exponent = -1000 if self._dtype == torch.float64 else -100
        input_factor = 2.0 ** -max(exponent, lowest_exponent)
        if input_factor == self.input_factor:
            return

        ratio = input_factor / self.input_factor
        self.input_factor = input_factor
        self.sum_of_abs *= ratio
        self.batches = [x * ratio for x in self.batches]
        if self.gram is not None:
            self.gram.mul_(ratio).mul_(ratio)

    def _gram_of_batches(self) -> Tensor:
        size = len(self.sum_of_abs)
        total = torch.zeros(size, size, dtype=self._dtype, device=self.sum_of_abs.device)
        for x in self.batches:
            add_gram(total, x)
        return total

    def _check_not_empty(self) -> None:
        if not self.count:
            raise ValueError("hessian has seen no inputs; add at least one batch")


class BySecondMoment:
    """Base class of the methods that observe the second moment: GPTQ, AWQ, Wanda, SparseGPT."""

    calibrated: ClassVar[bool] = True

    def observe(self, seen: SecondMoment | None, x: Shaped[Tensor, "..."]) -> SecondMoment:
        """Return the second moment after x (tokens, in); raises what `SecondMoment.add` raises."""
        return (seen or SecondMoment()).add(x)


def output_error(
    w: Float[Tensor, "out in"],
    w_hat: Float[Tensor, "out in"],
    hessian: SecondMoment | Float[Tensor, "in in"],
) -> float:
    """Return ||x (w - w_hat)^T|| / ||x w^T||, as sqrt(tr(d H d^T) / tr(w H w^T)), d = w - w_hat.

    >>> output_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.eye(2))
    0.2
    """
    h = hessian.scaled_matrix if isinstance(hessian, SecondMoment) else hessian
    dtype = torch.promote_types(wide(w.dtype), wide(h.dtype))
    h = h.to(dtype)
    w = w.to(dtype)
    d = w - w_hat.to(dtype)

    lost = _squared_outputs(d, h)
    size = _squared_outputs(w, h)
    if size <= 0:
        raise ValueError("w gives outputs of 0 for these inputs; a relative error is undefined")
    return math.sqrt(max(lost, 0) / size)


def _squared_outputs(d: Tensor, h: Tensor) -> float:
    """tr(d H d^T), summed in float64."""
    return float(((d @ h) * d).sum(dtype=torch.float64))
