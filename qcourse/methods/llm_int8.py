"""LLM.int8(): input channels with outliers stay in floats; all others become 8-bit codes.

y = sum over outlier channels of x w  +  s_x s_w sum over all others of q_x q_w. A channel is an
outlier if some |x| of the batch exceeds a threshold; 8 bits are enough for the other channels.
Source: Dettmers et al., "LLM.int8()" (NeurIPS 2022), section 3.2. Here outliers keep x's and w's
dtype (FP16 in the paper), and the integer product is simulated exactly.
`smoothquant.py` moves the range from x into w instead, with calibration.
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

# One scale per row: per token of x, per output of w.
PER_ROW = IntQuantizer(8, granularity=PerChannel(0))


def outlier_columns(x: Shaped[Tensor, "..."], threshold: float = 6.0) -> Bool[Tensor, " in"]:
    """Return, per column of x (..., in), whether some |x| exceeds the threshold.

    >>> outlier_columns(torch.tensor([[0.5, -7.0, 6.0], [-1.0, 0.1, 0.2]])).tolist()
    [False, True, False]
    """
    _check_threshold(threshold)
    check_floating(x)
    if not x.ndim:
        raise ValueError("x of shape () must have an axis of input channels: (..., in)")
    amax = x.detach().abs()
    if x.ndim > 1:
        amax = amax.flatten(0, -2).amax(0)  # (in,)
    check_finite(x, ends=(amax,))
    return amax > threshold


def llm_int8_matmul(
    x: Shaped[Tensor, "..."], w: Shaped[Tensor, "..."], threshold: float = 6.0
) -> Float[Tensor, "*batch out"]:
    """Return x w^T in x's dtype: outlier columns of x in floats, the others as 8-bit codes.

    Raises TypeError or ValueError unless x (..., in) and w (out, in) are finite floats that fit.

    >>> x, w = torch.tensor([[0.5, 40.1, -0.2]]), torch.tensor([[0.3, 0.01, -0.7]])
    >>> [round(float(llm_int8_matmul(x, w, threshold)), 2) for threshold in (6.0, 100.0)]
    [0.69, 0.85]
    """
    columns = outlier_columns(x, threshold)
    check_matrix(w, "w")
    x_shape = tuple(x.shape)
    w_shape = tuple(w.shape)
    if x_shape[-1] != w_shape[1]:
        raise ValueError(f"x {x_shape} and w {w_shape} must have the same inputs, their last axis")
    dtype = wide(torch.promote_types(x.dtype, w.dtype))
    rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, in)
    w = w.detach()

    # Codes of everything except the outlier columns, so that outliers do not widen the steps.
    q_x = PER_ROW(rows.masked_fill(columns, 0))
    q_w = PER_ROW(w.masked_fill(columns, 0))

    # The integer product; float64 is exact for whole numbers up to 2^53.
    sums = q_x.codes.double() @ q_w.codes.double().T
    s_x = q_x.scale.to(dtype)  # (tokens, 1)
    s_w = q_w.scale.to(dtype)  # (out, 1)
    y = sums.to(dtype) * s_x * s_w.T

    # The outlier columns, in floats.
    x_outliers = rows[:, columns].to(dtype)
    w_outliers = w[:, columns].to(dtype)
    y = y + x_outliers @ w_outliers.T
    return y.to(x.dtype).reshape(*x.shape[:-1], len(w))


@dataclass(frozen=True)
class OutlierColumns:
    """Activation quantizer x -> x_hat that leaves outlier columns in floats.

    >>> inputs = OutlierColumns(IntQuantizer(4, granularity=PerChannel(0)), threshold=8)
    >>> x = torch.tensor([[7.0, -40.25, 3.4], [0.875, 3.25, -0.4]])
    >>> inputs(x).tolist()  # steps of 1 and of 1/8
    [[7.0, -40.25, 3.0], [0.875, 3.25, -0.375]]
    """

    quantizer: Quantizer  # gets x as (tokens, in): PerChannel(0) is one scale per token
    threshold: float = 6.0

    def __post_init__(self) -> None:
        check_quantizer(self.quantizer)
        _check_threshold(self.threshold)

    @property
    def note(self) -> str:
        return f"columns beyond {self.threshold:g} in floats"

    def __call__(self, x: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return x with all but its outlier columns quantized, in x's dtype and shape."""
        columns = outlier_columns(x, self.threshold)
        rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, in)
        rest = self.quantizer(rows.masked_fill(columns, 0))
        rest_hat = rest.dequantize().to(x.dtype)
        return torch.where(columns, rows, rest_hat).reshape(x.shape)


def _check_threshold(threshold: float) -> None:
    is_number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not is_number or not threshold > 0:
        raise ValueError(
            f"threshold={threshold!r} must be a number above 0, in the units of x"
            " (6.0 in the paper)"
        )
