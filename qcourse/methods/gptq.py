"""GPTQ: codes that keep the outputs of a layer, rather than its weights, near to what they were.

The idea: an error d of the weight costs tr(d H d^T) at the outputs, H the second moment of the inputs. Where inputs go
together, what one weight loses in rounding another can give back, so columns are rounded one after another, and each
error is answered by the columns that are still to come: in closed form, the optimal brain surgeon's step.

Source: Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers" (ICLR 2023);
act_order and static groups as in its authors' published code. The step: Hassibi and Stork, "Second order derivatives
for network pruning: optimal brain surgeon" (NeurIPS 1992).

How it differs from its parts: `second_moment.py` gathers inputs, `inverse_factor.py` makes a triangle of them, `column_sweep.py` uses
it up; this is the method as a whole. Against `quantizer(w)`: the same grid, other codes, and (in groups) scales fitted
to updated weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from qcourse.methods.column_sweep import FittedBefore, FittedOnTheWay, group_size, round_columns
from qcourse.methods.hessian_checks import check_damp
from qcourse.methods.inverse_factor import InverseFactor, inverse_factor
from qcourse.methods.second_moment import BySecondMoment, SecondMoment
from qcourse.numerics.chunks import sum_of_squares, wide
from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import check_matrix, check_quantizer, in_layer


@dataclass(frozen=True, eq=False)
class GPTQResult:
    """What ``gptq`` returns.

    Args:
        quantized: the codes (out, in); their columns in the order of the inputs, or in that of ``input_order``.
        error: tr(d H d^T), d = w - w_hat, H as given: the mean over tokens of ||x w^T - x w_hat^T||^2.
        damp: the damping used, a fraction of the mean of H's diagonal.
        input_order: None, or a permutation (in,): column j of the codes meets input ``input_order[j]``.
        note: what a report should say (damping raised, dead inputs, few tokens), or "".
    """

    quantized: QuantizedTensor
    error: float
    damp: float
    input_order: Int[Tensor, " in"] | None = None
    note: str = ""

    @property
    def g_idx(self) -> Int[Tensor, " in"]:
        """For each input, in the inputs' own order, the group whose scale its weights have; 0 without groups."""
        q = self.quantized
        groups = torch.arange(q.shape[1], device=q.codes.device) // group_size(
            q.granularity, q.shape
        )
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
    """Codes for w that keep tr(d H d^T) small, d = w - w_hat: column by column, errors answered by later columns.

    Args:
        w: (out, in); not changed.
        hessian: the second moment of the inputs, or any multiple of it, (in, in).
        quantizer: any; its granularity says which weights share a scale.
        block_size: columns that are brought up to date in one go; changes speed, and codes only by rounding.
        damp: added to H's diagonal, as a fraction of its mean.
        act_order: take the inputs by falling H_ii: those that matter most are rounded while most others can still
            answer. Groups are then runs of that order (and the codes come in it, with ``input_order``), unless static.
        static_groups: fit the scales of groups before the sweep, on w and in the order of the inputs; otherwise each
            group's at its turn, on the weights as they have become.

    Returns:
        Codes, error, damping used, words for a report. The weights of an input that is always 0 become 0. Computed in
        float32, or in float64 where w or hessian is.

    Raises:
        TypeError: w or hessian holds no floats; quantizer is none.
        ValueError: what `inverse_factor` and the quantizer refuse; w is no matrix, not finite, or of other inputs than
            hessian; block_size below 1; updates that leave the range of floats.

    >>> from qcourse import IntQuantizer
    >>> w, h = torch.tensor([[0.4, 0.4, 7.0]]), torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> IntQuantizer(4)(w).codes.tolist(), gptq(w, h, IntQuantizer(4)).quantized.codes.tolist()  # 0.8 is nearer to 1
    ([[0, 0, 7]], [[0, 1, 7]])
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
    """``gptq`` from the factor on, in the factor's dtype: layers that read the same input share a factor."""
    _check_options(quantizer, block_size)
    check_matrix(w, "w")
    inputs, order = w.shape[1], factor.order
    if len(order) != inputs:
        raise ValueError(
            f"hessian of shape {(len(order),) * 2} does not fit w of shape {tuple(w.shape)}, (out, in)"
        )
    on_the_way = group_size(quantizer.granularity, w.shape) < inputs and not static_groups
    live = w.detach().to(factor.upper.dtype)
    if factor.dead.any():
        live = live.masked_fill(factor.dead, 0)
    grid = FittedOnTheWay(quantizer, live) if on_the_way else FittedBefore(quantizer, live, order)
    columns = live.T.contiguous()[order]
    codes = round_columns(columns, factor.upper, grid, block_size)
    if not on_the_way:
        codes, order = codes[order.argsort()], order.sort().values
    moved = bool((order.diff() < 0).any())
    q = QuantizedTensor(codes.T.contiguous(), grid.parameters, quantizer)
    d = q.dequantize().sub_(live[:, order] if moved else live)
    error = _error(columns, d, factor.dead[order], factor)
    return GPTQResult(q, error, factor.damp, order if moved else None, factor.note)


@dataclass(frozen=True)
class Gptq(BySecondMoment):
    """GPTQ as a method for ``quantize_model``, with the options of ``gptq``.

    Layers that read the same input share one Hessian and the factor of its inverse.

    Args:
        quantizer: the grid of every layer, with any granularity.
        block_size, damp, act_order, static_groups: as in ``gptq``.

    Raises:
        TypeError: quantizer is none.
        ValueError: block_size is below 1; damp is not positive and finite.

    >>> from qcourse import IntQuantizer
    >>> method, x = Gptq(IntQuantizer(4)), torch.tensor([[1.0, 0.9, 0.0], [0.0, 0.0, 1.0]])
    >>> results = method.quantize({"layer": torch.tensor([[0.4, 0.4, 7.0]])}, method.observe(None, x))
    >>> results["layer"].quantized.codes.tolist(), results["layer"].note
    ([[0, 1, 7]], '2 tokens for 3 inputs: H is singular without damping')
    """

    quantizer: Quantizer
    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        _check_options(self.quantizer, self.block_size)
        check_damp(self.damp)

    def quantize(self, weights: Mapping[str, Tensor], seen: SecondMoment) -> dict[str, GPTQResult]:
        """``gptq`` for each layer; ValueError, with the layer's name, for what cannot be done."""
        dtype = (
            torch.float64 if torch.float64 in {w.dtype for w in weights.values()} else torch.float32
        )
        options = {"block_size": self.block_size, "static_groups": self.static_groups}
        with in_layer(", ".join(weights)):
            factor = inverse_factor(seen, damp=self.damp, act_order=self.act_order, dtype=dtype)
        result = {}
        for name, w in weights.items():
            with in_layer(name):
                result[name] = sweep(w, factor, self.quantizer, **options)  # type: ignore[arg-type]
        return result


def _error(e: Tensor, d: Tensor, dead: Tensor, factor: InverseFactor) -> float:
    """tr(d H d^T): the sum of e^2, less what damping and the 1 of dead inputs have in it; both in units of H."""
    total = sum_of_squares(e)
    if not math.isfinite(total):
        raise ValueError(
            "the updates of w leave the range of floats; w is too large, or float64 is needed"
        )
    return factor.unit * max(
        0.0, total - factor.damp * sum_of_squares(d) - sum_of_squares(d[:, dead])
    )


def _check_options(quantizer: object, block_size: int) -> None:
    check_quantizer(quantizer)
    if type(block_size) is not int or block_size < 1:
        raise ValueError(
            f"block_size={block_size!r} must be a whole number (a Python int) of at least 1"
        )
