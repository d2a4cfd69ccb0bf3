"""GPTQ: choose codes that keep the outputs of a layer, rather than its weights, close.

The idea: a weight error d costs tr(d H d^T) at the outputs, H the second moment of the inputs. If
inputs correlate, one weight can compensate the rounding error of another. So GPTQ rounds column
after column, and updates the later columns by the optimal brain surgeon's formula.
Source: Frantar et al., "GPTQ" (ICLR 2023); act_order and static groups as in its authors' code.
The parts: `second_moment.py` gathers H, `inverse_factor.py` inverts it, `column_sweep.py` rounds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from qcourse.methods.column_sweep import FittedBefore, FittedOnTheWay, group_size, round_columns
from qcourse.methods.hessian_checks import check_damp
from qcourse.methods.inverse_factor import InverseFactor, inverse_factor
from qcourse.methods.method import LayerCodes
from qcourse.methods.row_slices import rows_are_alone, split_rows
from qcourse.methods.second_moment import BySecondMoment, SecondMoment
from qcourse.numerics.chunks import sum_of_squares, wide
from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import check_matrix, check_quantizer, in_layer
from qcourse.numerics.whole import check_whole


@dataclass(frozen=True, eq=False, kw_only=True)
class GPTQResult(LayerCodes):
    """What ``gptq`` returns; the note tells of raised damping, dead inputs and few tokens."""

    # Squared and absolute: tr(d H d^T) for H as given, the mean of ||x w^T - x w_hat^T||^2 over
    # the tokens.
    error: float
    # The damping used, a fraction of the mean of H's diagonal.
    damp: float

    @property
    def g_idx(self) -> Int[Tensor, " in"]:
        """Return the group of each input, in the inputs' own order; 0 without groups."""
        q = self.quantized
        size = group_size(q.granularity, q.shape)
        groups = torch.arange(q.shape[1], device=q.codes.device) // size
        return groups if self.input_order is None else groups[self.input_order.argsort()]


def gptq(
    w: Shaped[Tensor, "..."],
    hessian: SecondMoment | Shaped[Tensor, "..."],
    quantizer: Quantizer,
    *,
    block_size: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
) -> GPTQResult:
    """Return codes for w with a small tr(d H d^T), d = w - w_hat; 0 for inputs that are always 0.

    Args:
        hessian: the second moment of the inputs, or any multiple of it, (in, in).
        block_size: the number of columns updated in one product; changes speed, not the result.
        damp: added to H's diagonal, as a fraction of its mean.
        act_order: round the inputs by decreasing H_ii, while most others can still compensate.
            Groups follow that order, unless static.
        static_groups: fit the scales of all groups before the sweep, in the order of the inputs.
            The default fits each group at its turn, on the weights as updated so far.

    Raises:
        TypeError, ValueError: an argument is invalid, or the updates overflow.

    >>> from qcourse import IntQuantizer
    >>> w = torch.tensor([[0.4, 0.4, 7.0]])  # RTN gives 0, 0 and 7
    >>> h = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> gptq(w, h, IntQuantizer(4)).quantized.codes.tolist()  # 0.4 + 0.4 is closer to 1
    [[0, 1, 7]]
    """
    _check_options(quantizer, block_size)
    check_matrix(w, "w")
    factor = inverse_factor(hessian, damp=damp, act_order=act_order, dtype=wide(w.dtype))
    return sweep(w, factor, quantizer, block_size=block_size, static_groups=static_groups)


def sweep(
    w: Shaped[Tensor, "..."],
    factor: InverseFactor,
    quantizer: Quantizer,
    *,
    block_size: int = 128,
    static_groups: bool = False,
) -> GPTQResult:
    """Run ``gptq`` from the factor on: layers that read the same input share a factor."""
    _check_options(quantizer, block_size)
    return _swept([w], factor, quantizer, block_size=block_size, static_groups=static_groups)[0]


def _swept(
    weights: Sequence[Tensor],
    factor: InverseFactor,
    quantizer: Quantizer,
    *,
    block_size: int,
    static_groups: bool,
) -> list[GPTQResult]:
    """The results for several weights by one sweep; more than one needs rows that are alone."""
    for w in weights:
        check_matrix(w, "w")
    live = torch.cat([_live_weights(w, factor) for w in weights])
    order = factor.order
    grid = _grid(quantizer, live, order, static_groups=static_groups)

    # Round column after column of a copy, whose memory then holds the errors.
    columns = live.T.contiguous()[order]  # (in, out)
    codes, e = round_columns(columns, factor.upper, grid, block_size)

    # Groups that follow the sweep keep its order. All other codes return to that of the inputs.
    if isinstance(grid, FittedBefore):
        codes = codes[order.argsort()]
        order = order.sort().values
    moved = bool((order.diff() < 0).any())
    input_order = order if moved else None
    q = QuantizedTensor(codes.T.contiguous(), grid.parameters, quantizer)
    d = q.dequantize().sub_(live[:, order] if moved else live)

    counts = [len(w) for w in weights]
    parts = split_rows(q, counts) if len(weights) > 1 else [q]
    results = []
    for part, own_e, own_d in zip(parts, e.split(counts, 1), d.split(counts), strict=True):
        error = _error(own_e, own_d, factor.dead[order], factor)
        results.append(
            GPTQResult(
                part, input_order=input_order, note=factor.note, error=error, damp=factor.damp
            )
        )
    return results


@dataclass(frozen=True)
class Gptq(BySecondMoment):
    """GPTQ as a method for ``quantize_model``, with the options of ``gptq``."""

    quantizer: Quantizer
    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        _check_options(self.quantizer, self.block_size)
        check_damp(self.damp)

    def quantize(self, weights: Mapping[str, Tensor], seen: SecondMoment) -> dict[str, GPTQResult]:
        """Return ``gptq`` of each layer; a ValueError names the layer."""
        # The layers read the same input, so they share one factor, in the widest of their dtypes.
        dtypes = {w.dtype for w in weights.values()}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        with in_layer(", ".join(weights)):
            factor = inverse_factor(seen, damp=self.damp, act_order=self.act_order, dtype=dtype)

        # If each row has parameters of its own, one sweep takes the rows of all layers.
        options: dict[str, Any] = {
            "block_size": self.block_size,
            "static_groups": self.static_groups,
        }
        try:
            if rows_are_alone(self.quantizer, len(factor.order)):
                every = _swept(list(weights.values()), factor, self.quantizer, **options)
                return dict(zip(weights, every, strict=True))
        except ValueError:
            pass  # one by one, so that the error names its layer

        results = {}
        for name, w in weights.items():
            with in_layer(name):
                results[name] = sweep(w, factor, self.quantizer, **options)
        return results


def _grid(
    quantizer: Quantizer, live: Tensor, order: Tensor, *, static_groups: bool
) -> FittedBefore | FittedOnTheWay:
    # The scales of groups are fitted in the sweep, each at its turn; all others now.
    has_groups = group_size(quantizer.granularity, live.shape) < len(order)
    if has_groups and not static_groups:
        return FittedOnTheWay(quantizer, live)
    return FittedBefore(quantizer, live, order)


def _live_weights(w: Tensor, factor: InverseFactor) -> Tensor:
    """w in the factor's dtype, with 0 for dead inputs; ValueError if the two do not fit."""
    inputs = len(factor.order)
    if w.shape[1] != inputs:
        raise ValueError(
            f"hessian of shape {(inputs, inputs)} does not fit "
            f"w of shape {tuple(w.shape)}, (out, in)"
        )
    live = w.detach().to(factor.upper.dtype)
    return live.masked_fill(factor.dead, 0) if factor.dead.any() else live


def _error(e: Tensor, d: Tensor, dead: Tensor, factor: InverseFactor) -> float:
    """tr(d H d^T) from the errors e of the sweep."""
    total = sum_of_squares(e)
    if not math.isfinite(total):
        raise ValueError("the updates of w leave the range of floats; use float64 or a smaller w")

    # In units of H's mean diagonal, ||e||^2 = tr(d (H + damping + 1 for dead inputs) d^T).
    from_damping = factor.damp * sum_of_squares(d)
    from_dead = sum_of_squares(d[:, dead])
    return factor.unit * max(0.0, total - from_damping - from_dead)


def _check_options(quantizer: object, block_size: int) -> None:
    check_quantizer(quantizer)
    check_whole("block_size", block_size, least=1)
