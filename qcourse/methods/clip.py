"""Clipping: the share of its range that each scale should be made for, by what the outputs lose.

The idea: a scale made for 80% of a range clips the few values beyond it, and rounds all others a fifth finer. Whether
that pays is a matter of the outputs: each scale tries a few shares and keeps the one with which its own values lose
least on the inputs that they meet. With the moment of the inputs (`second_moment.py`) a trial costs one product of small
matrices, however many tokens there were.

A quantizer's ``fit`` takes no range. But the parameters that it makes for 0.8 x are those for 0.8 of x's range, and x
encoded by them is clipped: so any quantizer and granularity will do.

Source: Lin et al., "AWQ" (MLSys 2024); the shares, 1 down to 0.55 in twentieths, are those of its published code.

How it differs from ``scale_rule="mse"``: that looks at the weights' own error, this at the outputs'.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from qcourse.methods.group_moments import GroupMoments
from qcourse.numerics.quantized import Quantizer

SHRINKS = tuple(1 - i / 20 for i in range(10))
STRIP = 1 << 20  # weights worked on at a time: what a trial makes of them stays in the cache


@dataclass(frozen=True, eq=False)
class Rounding:
    """What it loses to round w s to the nearest codes, for inputs x / s, in units of unit^2.

    Args:
        quantizer: gives the codes.
        moment: of x / s, in one group.
        s: (in,), positive.
        unit: about the size of w; the losses of very large or small weights then stay within float32.

    >>> from qcourse import IntQuantizer, PerGroup
    >>> quantizer = IntQuantizer(2, granularity=PerGroup(4))
    >>> rounding = Rounding(quantizer, GroupMoments(torch.eye(4)[None], is_gram=True), torch.ones(4), unit=1.0)
    >>> w = torch.tensor([[1.0, -0.6, 0.6, -0.6]])  # on a grid of -2, -1, 0, 1 times the scale
    >>> unclipped = rounding.losses(w)
    >>> shrink, lost = rounding.clipped(w, unclipped)
    >>> [round(each.item(), 4) for each in (shrink, lost, unclipped)]  # 0.3^2 + 3 x 0.1^2 against 3 x 0.4^2
    [0.7, 0.12, 0.48]
    """

    quantizer: Quantizer
    moment: GroupMoments
    s: Float[Tensor, " in"]
    unit: float

    def losses(self, w: Float[Tensor, "out in"]) -> Float64[Tensor, "out 1"]:
        """Of each row; infinite where the quantizer refuses w s."""
        return torch.cat([self._losses(strip) for strip in self._strips(w)])

    def clipped(
        self, w: Float[Tensor, "out in"], unclipped: Float64[Tensor, "out 1"]
    ) -> tuple[Float[Tensor, "rows groups"], Float64[Tensor, "out 1"]]:
        """For each scale the share of SHRINKS with which its own values lose least, and the loss of each row.

        What groups lose does not add up to what their row loses, since their errors may cancel: a row that loses more
        than `unclipped` is not clipped, or, where rows share parameters, no row is.
        """
        blocks = replace(self, moment=self.moment.split((self._scales(w) or (1, 1))[1]))
        shrinks, losses = [], []
        for strip, before in zip(self._strips(w), self._strips(unclipped), strict=True):
            shrink = blocks._least(strip)
            lost = self._losses(strip, shrink)
            better = lost < before if self._rows_are_alone else lost.sum() < before.sum()
            shrinks.append(torch.where(better, shrink, 1.0))
            losses.append(torch.where(better, lost, before))
        return torch.cat(shrinks), torch.cat(losses)

    def _least(self, w: Tensor) -> Tensor:
        """The share for each scale with which its own values lose least; the largest of equals."""
        best = torch.ones(self._scales(w) or (1, 1), dtype=w.dtype, device=w.device)
        least = torch.full_like(best, torch.inf, dtype=torch.float64)
        for share in SHRINKS:
            lost = self._losses(w, torch.full_like(best, share))
            lost = lost if len(best) == len(lost) else lost.sum(0, keepdim=True)
            best, least = torch.where(lost < least, share, best), torch.minimum(lost, least)
        return best

    def _losses(self, w: Tensor, shrink: Tensor | None = None) -> Tensor:
        """By row, and by group of the moment, with each scale (rows, groups) made for a share of its range."""
        ws = w * self.s
        try:
            parameters = self.quantizer.fit(ws if shrink is None else shrunk(ws, shrink))
        except ValueError:  # a scale that its dtype cannot hold
            return torch.full(
                (len(w), len(self.moment.stored)), torch.inf, dtype=torch.float64, device=w.device
            )
        w_hat = self.quantizer.nearest(ws, parameters)[1]
        return self.moment.losses(w_hat.to(w.dtype).sub_(ws).div_(self.unit))

    def _scales(self, w: Tensor) -> tuple[int, ...]:
        return self.quantizer.granularity.scale_shape(w.shape)

    def _strips(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows in pieces that the quantizer can take one by one."""
        return rows.split(max(1, STRIP // len(self.s)) if self._rows_are_alone else len(rows))

    @property
    def _rows_are_alone(self) -> bool:
        """Whether the quantizer's parameters have a row for each row of the weight, so that no two share one."""
        parameters = self.quantizer.fit(torch.zeros(2, len(self.s)))
        values = [getattr(parameters, field.name) for field in fields(parameters)]
        return all(value.ndim and len(value) == 2 for value in values)


def shrunk(
    w: Float[Tensor, "out in"], shrink: Float[Tensor, "rows groups"]
) -> Float[Tensor, "out in"]:
    """w, the values of each scale times its share."""
    return (w.unflatten(1, (shrink.shape[1], -1)) * shrink[..., None]).flatten(1)  # (out, in)
