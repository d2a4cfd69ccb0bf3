"""LLM.int8(): the few input channels with outliers stay in floats, and all others are 8-bit codes.

The idea: a product is a sum over input channels, so it may be taken in two parts. In large models a few channels reach
far beyond all others; whoever shares a scale with them gets steps as wide as theirs demand. Without them 8 bits are
plenty: so

    y = sum over outlier channels of x w, in floats    +    s_x s_w sum over all others of q_x q_w, in integers

with a scale for each token and each output. Which channels those are is looked up in the batch itself: every column of
x in which some |x| exceeds a threshold. That is a magnitude, 6.0 in the paper, and not a count of deviations.

Source: Dettmers et al., "LLM.int8()" (NeurIPS 2022), section 3.2, where the outlier part is FP16. Here it has x's and
w's own precision, and the integer product is simulated: exactly, but not fast.

How it differs from ``smoothquant.py``: nothing moves from x into w, and nothing is calibrated; the price is a second
product, with a part of the weights in floats.
"""

from dataclasses import dataclass
from numbers import Real

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from qcourse.numerics.affine import IntQuantizer
from qcourse.numerics.chunks import wide
from qcourse.numerics.granularity import PerChannel
from qcourse.numerics.quantized import Quantizer
from qcourse.numerics.validation import check_finite, check_floating, check_matrix, check_quantizer

PER_ROW = IntQuantizer(
    8, granularity=PerChannel(0)
)  # of x a scale for each token, of w one for each output


def outlier_columns(x: Shaped[Tensor, "..."], threshold: float = 6.0) -> Bool[Tensor, " in"]:
    """Whether some |x| of a column exceeds the threshold, for each column.

    Args:
        x: (..., in); every axis but the last counts as tokens.
        threshold: in x's own units, above 0; math.inf for no column at all.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x is a scalar, is empty, or has NaN or infinity; threshold is not above 0.

    >>> outlier_columns(torch.tensor([[0.5, -7.0, 6.0], [-1.0, 0.1, 0.2]])).tolist()
    [False, True, False]
    """
    _check_threshold(threshold)
    check_floating(x)
    if not x.ndim:
        raise ValueError("x of shape () must have an axis of input channels: (..., in)")
    amax = x.detach().abs().flatten(0, -2).amax(0) if x.ndim > 1 else x.detach().abs()
    check_finite(x, amax, amax)
    return amax > threshold


def llm_int8_matmul(
    x: Shaped[Tensor, "..."], w: Shaped[Tensor, "..."], threshold: float = 6.0
) -> Float[Tensor, "*batch out"]:
    """x w^T, the outlier columns of x in floats and the others as 8-bit codes of x and w, multiplied as integers.

    Args:
        x: activations (..., in); which columns are outliers is decided by all of them together.
        w: the weight (out, in). Its codes are made without the outlier columns, at each call.
        threshold: as in ``outlier_columns``.

    Returns:
        y (..., out), in x's dtype: infinite in float16 where the sum is beyond it, as any product is.

    Raises:
        TypeError: x or w is no floating-point tensor.
        ValueError: what ``outlier_columns`` refuses; w is no matrix, is empty, or has NaN or infinity; x and w differ
            in inputs; x or w so small that float32 cannot hold a scale.

    >>> x, w = torch.tensor([[0.5, 40.1, -0.2]]), torch.tensor([[0.3, 0.01, -0.7]])
    >>> [round(float(llm_int8_matmul(x, w, threshold)), 2) for threshold in (6.0, 100.0)]  # exactly 0.691
    [0.69, 0.85]
    """
    columns = outlier_columns(x, threshold)
    check_matrix(w, "w")
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(
            f"x {tuple(x.shape)} and w {tuple(w.shape)} must have the same inputs, their last axis"
        )
    dtype = wide(torch.promote_types(x.dtype, w.dtype))
    rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, in)
    q_x, q_w = PER_ROW(rows.masked_fill(columns, 0)), PER_ROW(w.detach().masked_fill(columns, 0))
    sums = q_x.codes.double() @ q_w.codes.double().T  # float64 holds every whole number to 2^53
    y = sums.to(dtype) * q_x.scale.to(dtype) * q_w.scale.to(dtype).T
    y = y + rows[:, columns].to(dtype) @ w.detach()[:, columns].to(dtype).T
    return y.to(x.dtype).reshape(*x.shape[:-1], len(w))


@dataclass(frozen=True)
class OutlierColumns:
    """What becomes of x where a model quantizes its activations but for outlier columns: called, x -> x_hat.

    In a whole model the codes of a weight stand for both parts of the product, as in libraries at inference: a channel
    may be an outlier in one batch and none in the next, and the floats of the weight are no longer there.

    Args:
        quantizer: of the other columns, as of a matrix (tokens, in): ``PerChannel(0)`` gives a scale for each token.
        threshold: as in ``outlier_columns``.

    Raises:
        TypeError: quantizer is no quantizer.
        ValueError: threshold is not above 0.

    >>> inputs = OutlierColumns(IntQuantizer(4, granularity=PerChannel(0)), threshold=8)
    >>> inputs(torch.tensor([[7.0, -40.25, 3.4], [0.875, 3.25, -0.4]])).tolist()  # steps of 1 and of 1/8
    [[7.0, -40.25, 3.0], [0.875, 3.25, -0.375]]
    """

    quantizer: Quantizer
    threshold: float = 6.0

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        _check_threshold(self.threshold)

    @property
    def note(self) -> str:
        """Words for the report."""
        return f"columns beyond {self.threshold:g} in floats"

    def __call__(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """x with all but its outlier columns quantized, in x's dtype and shape; raises what they raise."""
        columns = outlier_columns(x, self.threshold)
        rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, in)
        rest = self.quantizer(rows.masked_fill(columns, 0)).dequantize().to(x.dtype)
        return torch.where(columns, rows, rest).reshape(x.shape)


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not threshold > 0:
        raise ValueError(
            f"threshold={threshold!r} must be a number above 0, in the units of x (6.0 in the paper)"
        )
