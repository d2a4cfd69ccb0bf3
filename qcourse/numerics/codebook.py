"""Codebooks: any list of levels as a grid, with NF4 among them, and the best list for given data.

The idea: a code is an index into a list of levels, and x becomes the nearest level times a scale.
NF4 has a level at every quantile of normal data, so codes are used about equally often; Lloyd's
iteration lowers the squared error instead. A codebook saves memory, and no arithmetic.
Source: Dettmers et al., "QLoRA" (NeurIPS 2023), section 3; Lloyd (1957/1982); Max (1960).
How it differs from `affine.py` and `float_quantizer.py`: their grids are rules, this one is a list.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.numerics.granularity import Granularity, PerTensor
from qcourse.numerics.scaled import ScaledQuantizer
from qcourse.numerics.validation import check_finite, check_floating
from qcourse.numerics.whole import check_whole


def normal_float(bits: int) -> tuple[float, ...]:
    """Return the 2^bits levels of NormalFloat: normal quantiles, over the largest; 2 to 8 bits.

    >>> [round(level, 4) for level in normal_float(3)]
    [-1.0, -0.535, -0.2469, 0.0, 0.1833, 0.382, 0.623, 1.0]
    """
    check_whole("bits", bits, 2, 8)
    # Stop half a step short of probability 1, whose quantile is infinite. QLoRA takes the mean of
    # the steps 1 / 2^bits and 1 / (2^bits - 1).
    count = 1 << bits
    step = (1 / (count - 1) + 1 / count) / 2
    end = 1 - step / 2
    # Half of the levels are above 0, one fewer below.
    above = _normal_quantiles(end, count // 2 + 1)
    below = -_normal_quantiles(end, count // 2).flip(0)
    # Both halves hold 0, and one is enough.
    levels = torch.cat([below[:-1], above]) / above[-1]
    return tuple(levels.tolist())


def _normal_quantiles(end: float, count: int) -> Tensor:
    probabilities = torch.linspace(0.5, end, count, dtype=torch.float64)
    return torch.special.ndtri(probabilities)


NF4 = normal_float(4)


@dataclass(frozen=True)
class CodebookQuantizer(ScaledQuantizer):
    """Quantize to the nearest of 2 to 256 ascending levels, times a scale.

    >>> codebook = CodebookQuantizer((-1.0, 0.0, 0.25, 1.0))
    >>> codebook(torch.tensor([-2.0, 0.3, 0.2, 1.3])).codes.tolist()
    [0, 2, 1, 3]
    """

    levels: tuple[float, ...] = NF4
    granularity: Granularity = PerTensor()
    # "amax" is amax / max |level|; "mse" is "amax" of the best fraction of the range.
    scale_rule: str = "amax"
    scale_dtype: torch.dtype = torch.float32
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    scale_rules: ClassVar[tuple[str, ...]] = ("amax", "mse")

    def __post_init__(self) -> None:
        levels = torch.tensor(self.levels, dtype=torch.float64)
        finite = torch.isfinite(levels).all()
        ascending = (levels.diff() > 0).all()
        if not 2 <= len(levels) <= 256 or not finite or not ascending:
            raise ValueError(
                f"levels={self.levels!r} must be 2 to 256 finite numbers in ascending order"
            )
        self._check_fields()

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @cached_property
    def _levels(self) -> Tensor:
        return torch.tensor(self.levels, dtype=torch.float32)

    @cached_property
    def _borders(self) -> Tensor:
        # Halfway between two neighboring levels the nearest level changes.
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return ((levels[1:] + levels[:-1]) / 2).float()

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        largest_level = max(-self.levels[0], self.levels[-1])
        return torch.maximum(-low, high) / largest_level

    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        # The code is the number of borders below x; a tie goes to the lower level.
        return torch.bucketize(steps.contiguous(), self._borders.to(steps), out_int32=True)

    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        return self._levels.to(codes.device, dtype)[codes.int()]


def lloyd_max(x: Shaped[Tensor, "..."], count: int, *, steps: int = 100) -> tuple[float, ...]:
    """Return `count` levels (2 to 256) with a locally least mean squared error on finite x.

    Lloyd's iteration gives each value its nearest level, moves each level to the mean of its
    values, and repeats: k-means in one dimension.

    >>> [round(level, 2) for level in lloyd_max(torch.tensor([0.0, 0.1, 0.2, 5.0, 5.2]), 2)]
    [0.1, 5.1]
    """
    check_floating(x)
    values = x.detach().double().flatten().sort().values
    check_finite(x, ends=(values[0], values[-1]))
    different = values.unique_consecutive()
    if type(count) is not int or not 2 <= count <= min(256, len(different)):
        raise ValueError(
            f"count={count!r} must be from 2 to 256,"
            f" and at most the {len(different)} different values of x"
        )
    # Start at quantiles of the different values.
    fractions = (torch.arange(count, device=x.device) + 0.5) / count
    places = fractions * len(different)
    levels = different[places.long()]
    # sums[i] is the sum of the i smallest values.
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(steps):
        moved = _moved_to_means(levels, values, sums)
        if torch.equal(moved, levels):
            break
        levels = moved
    return tuple(levels.tolist())


def _moved_to_means(levels: Tensor, values: Tensor, sums: Tensor) -> Tensor:
    # The values are sorted, so those of one level are a run from one border to the next.
    middles = (levels[1:] + levels[:-1]) / 2
    borders = torch.searchsorted(values, middles, right=True)
    first = borders.new_zeros(1)
    last = borders.new_tensor([len(values)])
    ends = torch.cat([first, borders, last])
    counts = ends.diff()
    means = sums[ends].diff() / counts.clamp(min=1)
    # A level without values stays where it is.
    return torch.where(counts > 0, means, levels)
