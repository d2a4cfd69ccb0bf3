"""Clipping: choose the share of its range that each scale covers, by the error of the outputs.

The idea: a scale that covers 80% of a range clips the few values beyond it and rounds all others a
fifth finer. Each scale takes the share with which its own values lose least on their inputs.
A quantizer's ``fit`` takes no range, but its parameters for 0.8 x are those for 0.8 of x's range,
and encoding x by them clips x. So this works with any quantizer and granularity.
Source: Lin et al., "AWQ" (MLSys 2024); the shares 1, 0.95, ..., 0.55 are those of its code.
How it differs from ``scale_rule="mse"``: that rule minimizes the error of the weights.
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qcourse.methods.group_moments import GroupMoments
from qcourse.methods.row_slices import rows_are_alone
from qcourse.numerics.quantized import Quantizer
from qcourse.numerics.shrinks import best_shrink

SHRINKS = tuple(1 - i / 20 for i in range(10))
STRIP = 1 << 20  # weights that are rounded at a time, so that a trial stays in the cache


@dataclass(frozen=True, eq=False)
class ClipSearch:
    """The squared output error of rounding w s for inputs x / s, and the clips that reduce it.

    >>> from qcourse import IntQuantizer, PerGroup
    >>> quantizer = IntQuantizer(2, granularity=PerGroup(4))
    >>> moments = GroupMoments(torch.eye(4)[None], is_gram=True)
    >>> search = ClipSearch(quantizer, moments, torch.ones(4), unit=1.0)
    >>> w = torch.tensor([[1.0, -0.6, 0.6, -0.6]])  # the codes are -2, -1, 0, 1
    >>> unclipped = search.unclipped_losses(w)  # 3 x 0.4^2
    >>> shrink, lost = search.best_shrinks(w, unclipped)  # 0.3^2 + 3 x 0.1^2
    >>> [round(each.item(), 4) for each in (unclipped, shrink, lost)]
    [0.48, 0.7, 0.12]
    """

    quantizer: Quantizer
    # The moments of x / s, as one group.
    moments: GroupMoments
    # Positive.
    s: Float[Tensor, " in"]
    # About the size of w: losses are in units of unit^2, so that they stay within float32.
    unit: float
    # Whether each row has parameters of its own, so that it can be rounded without the others.
    rows_are_alone: bool = field(init=False)

    def __post_init__(self) -> None:
        alone = rows_are_alone(self.quantizer, len(self.s))
        object.__setattr__(self, "rows_are_alone", alone)

    def unclipped_losses(self, w: Float[Tensor, "out in"]) -> Float64[Tensor, "out 1"]:
        """Return the loss of each row without a clip; infinite if the quantizer rejects w s."""
        parts = [self._strip_losses(strip) for strip in self._strips(w)]
        return torch.cat(parts)

    def best_shrinks(
        self, w: Float[Tensor, "out in"], unclipped: Float64[Tensor, "out 1"]
    ) -> tuple[Float[Tensor, "rows groups"], Float64[Tensor, "out 1"]]:
        """Return the best share of SHRINKS for each scale, and the loss of each row."""
        groups = self.scale_shape(w)[1]
        by_group = replace(self, moments=self.moments.split(groups))
        shrinks = []
        losses = []
        for strip, before in zip(self._strips(w), self._strips(unclipped), strict=True):
            shrink = by_group._best_shrink(strip)
            lost = self._strip_losses(strip, shrink)

            # The best shares of all groups may not be best for their row, where errors of groups
            # cancel. Such a row stays unclipped; rows that share parameters stay so together.
            better = lost < before if self.rows_are_alone else lost.sum() < before.sum()
            shrinks.append(torch.where(better, shrink, 1.0))
            losses.append(torch.where(better, lost, before))
        return torch.cat(shrinks), torch.cat(losses)

    def _best_shrink(self, w: Tensor) -> Tensor:
        """For each scale the share with which its own values lose least; the largest of equals."""
        shape = self.scale_shape(w)

        def loss(share: float) -> Tensor:
            lost = self._strip_losses(w, w.new_full(shape, share))
            rows_share = shape[0] < len(lost)
            return lost.sum(0, keepdim=True) if rows_share else lost

        return best_shrink(SHRINKS, loss).to(w.dtype)

    def _strip_losses(self, w: Tensor, shrink: Tensor | None = None) -> Tensor:
        """The loss of each row and group of the moments, with the grid of the shrunk weights."""
        ws = w * self.s
        fitted_on = ws if shrink is None else shrunk(ws, shrink)
        try:
            parameters = self.quantizer.fit(fitted_on)
        except ValueError:  # a scale that its dtype cannot hold
            shape = (len(w), len(self.moments.stored))
            return torch.full(shape, torch.inf, dtype=torch.float64, device=w.device)

        _, w_hat = self.quantizer.nearest(ws, parameters)
        d = w_hat.to(w.dtype).sub_(ws)
        d.div_(self.unit)
        return self.moments.losses(d)

    def scale_shape(self, w: Float[Tensor, "out in"]) -> tuple[int, ...]:
        """Return the rows and groups of the scales of w; (1, 1) for one scale."""
        return self.quantizer.granularity.scale_shape(w.shape) or (1, 1)

    def _strips(self, rows: Tensor) -> tuple[Tensor, ...]:
        if not self.rows_are_alone:
            return (rows,)
        count = max(1, STRIP // len(self.s))
        return rows.split(count)


def shrunk(
    w: Float[Tensor, "out in"], shrink: Float[Tensor, "rows groups"]
) -> Float[Tensor, "out in"]:
    """Return w with the values of each scale multiplied by its share."""
    groups = shrink.shape[1]
    by_group = w.unflatten(1, (groups, -1))  # (out, groups, size)
    return (by_group * shrink[..., None]).flatten(1)  # (out, in)
