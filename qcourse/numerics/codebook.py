"""Codebooks: any list of levels as a grid, NF4 among them, and the list that fits given data best.

The idea: a code is a number in a list of levels, and x becomes the nearest level times a scale. Whole numbers and small
floats are such lists; nothing but habit and hardware says that levels must be evenly spaced or have exponents. If the
data are known to be normal, NF4 puts a level at every quantile: codes are then used about equally often. The list that
makes the squared error least is another one, and Lloyd's iteration finds it for any data.

A product needs the levels themselves: a code is looked up and multiplied as a float. So a codebook saves memory, and no
arithmetic.

Source: Dettmers et al., "QLoRA" (NeurIPS 2023), section 3 (NF4, double quantization); Lloyd, "Least squares
quantization in PCM" (1957/1982); Max (1960).

How it differs from ``affine.py`` and ``float_quantizer.py``: their grids are rules, this one is a list.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.granularity import Granularity, PerGroup, PerTensor
from qcourse.numerics.minifloat import E4M3
from qcourse.numerics.quantized import Parameters, QuantizedTensor
from qcourse.numerics.scaled import ScaledQuantizer
from qcourse.numerics.validation import check_finite, check_floating


def normal_float(bits: int) -> tuple[float, ...]:
    """The levels of NormalFloat: quantiles of the normal distribution, evenly spaced in probability, over the largest.

    2^(bits - 1) - 1 levels below 0, 0 itself, and 2^(bits - 1) above: each half runs from probability 1/2 to
    1 - (1/2)(1/(2^bits - 1) + 1/2^bits)/2, which leaves off the infinite ends.

    >>> [round(level, 4) for level in normal_float(3)]
    [-1.0, -0.535, -0.2469, 0.0, 0.1833, 0.382, 0.623, 1.0]
    """
    if type(bits) is not int or not 2 <= bits <= 8:
        raise ValueError(f"bits={bits!r} must be a whole number (a Python int) from 2 to 8")
    half = 1 << bits - 1
    end = 1 - (1 / (2 * (2 * half - 1)) + 1 / (4 * half)) / 2
    above, below = (
        torch.special.ndtri(torch.linspace(0.5, end, count, dtype=torch.float64))
        for count in (half + 1, half)
    )
    levels = torch.cat([-below.flip(0)[:-1], above]) / above[-1]
    return tuple(levels.tolist())


NF4 = normal_float(4)


@dataclass(frozen=True)
class CodebookQuantizer(ScaledQuantizer):
    """Quantizer to the nearest of a list of levels, times a scale.

    Args:
        levels: ascending, 2 to 256 of them, one of them 0 or not; the largest magnitude becomes amax.
        granularity: which values share a scale.
        scale_rule: "amax": amax / max |level|. "mse": that for the fraction of the range with the least squared error.
        scale_dtype: the floating-point dtype that scales are stored and counted in.

    Raises:
        TypeError: granularity is no granularity.
        ValueError: another argument outside the above.

    >>> CodebookQuantizer((-1.0, 0.0, 0.25, 1.0))(torch.tensor([-2.0, 0.3, 0.2, 1.3])).codes.tolist()
    [0, 2, 1, 3]
    """

    levels: tuple[float, ...] = NF4
    granularity: Granularity = PerTensor()
    scale_rule: str = "amax"
    scale_dtype: torch.dtype = torch.float32
    code_dtype: ClassVar[torch.dtype] = torch.uint8  # type: ignore[misc]
    scale_rules: ClassVar[tuple[str, ...]] = ("amax", "mse")

    def __post_init__(self) -> None:
        levels = torch.tensor(self.levels, dtype=torch.float64)
        if (
            not 2 <= len(levels) <= 256
            or not torch.isfinite(levels).all()
            or not (levels.diff() > 0).all()
        ):
            raise ValueError(
                f"levels={self.levels!r} must be 2 to 256 finite numbers in ascending order"
            )
        self._check_fields()

    @property
    def bits(self) -> int:
        """Bits a code."""
        return (len(self.levels) - 1).bit_length()

    @cached_property
    def _grid(self) -> tuple[Tensor, Tensor]:
        """The levels in float32, and the borders between them."""
        levels = torch.tensor(self.levels, dtype=torch.float64)
        return levels.float(), ((levels[1:] + levels[:-1]) / 2).float()

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.maximum(-low, high) / max(-self.levels[0], self.levels[-1])

    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        return torch.bucketize(
            steps, self._grid[1].to(steps), out_int32=True
        )  # a tie goes to the lower level

    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        return self._grid[0].to(codes.device, dtype)[codes.int()]


def nf4_encode(x: Shaped[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the NF4 level nearest to each number; what lies beyond [-1, 1] gets the end.

    Args:
        x: finite floats, scaled already: blocks of them come from ``CodebookQuantizer(granularity=PerGroup(64))``.

    Raises:
        TypeError, ValueError: as ``CodebookQuantizer.encode``.

    >>> nf4_encode(torch.tensor([-1.0, 0.0, 0.1, 1.0])).tolist()
    [0, 7, 8, 15]
    """
    return CodebookQuantizer(NF4).encode(x, _ONE)


def nf4_decode(codes: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The level that each code stands for, in float32.

    >>> nf4_decode(torch.tensor([0, 7, 15], dtype=torch.uint8)).tolist()
    [-1.0, 0.0, 1.0]
    """
    return CodebookQuantizer(NF4).decode(codes, _ONE)


_ONE = Parameters(torch.tensor(1.0), torch.tensor(0, dtype=torch.uint8))


def lloyd_max(x: Shaped[Tensor, "..."], count: int, *, steps: int = 100) -> tuple[float, ...]:
    """The levels that leave the least mean squared error on x, by Lloyd's iteration: nearest level, then mean, again.

    It starts at quantiles of x and ends where nothing moves, or after so many steps: a local optimum, as k-means in one
    dimension gives it.

    Args:
        x: finite floats, any shape.
        count: of levels, from 2 to 256, and at most as many as x has different values.
        steps: most iterations.

    Raises:
        TypeError: x is no floating-point tensor.
        ValueError: x is empty or not finite; count is outside its range.

    >>> [round(level, 2) for level in lloyd_max(torch.tensor([0.0, 0.1, 0.2, 5.0, 5.2]), 2)]
    [0.1, 5.1]
    """
    check_floating(x)
    values = x.detach().double().flatten().sort().values
    check_finite(x, values[0], values[-1])
    different = values.unique_consecutive()
    if type(count) is not int or not 2 <= count <= min(256, len(different)):
        raise ValueError(
            f"count={count!r} must be from 2 to 256, and at most the {len(different)} different values of x"
        )
    places = (torch.arange(count, device=x.device) + 0.5) / count * len(different)
    levels = different[places.long()]
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(steps):
        borders = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2, right=True)
        ends = torch.cat([borders.new_zeros(1), borders, borders.new_tensor([len(values)])])
        held, total = ends.diff(), sums[ends].diff()
        moved = torch.where(
            held > 0, total / held.clamp(min=1), levels
        )  # a level that has no value stays
        if torch.equal(moved, levels):
            break
        levels = moved
    return tuple(levels.tolist())


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """Scales that are codes themselves: less their mean, in E4M3 with a float32 for each group of `group_size`.

    >>> scales = torch.rand(1024, generator=torch.Generator().manual_seed(0)) + 1
    >>> double = double_quantize(scales)
    >>> double.nbytes, bool((double.dequantize() - scales).abs().max() < 0.02)  # 1024 bytes, 4 scales, the mean
    (1044, True)
    """

    codes: QuantizedTensor
    mean: Float[Tensor, ""]
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """Bytes in storage."""
        return self.codes.nbytes + self.mean.element_size()

    def dequantize(self) -> Float[Tensor, "..."]:
        """The scales again, in float32."""
        return (
            (self.codes.dequantize() + self.mean)
            .flatten()[: self.shape.numel()]
            .reshape(self.shape)
        )


def double_quantize(scale: Shaped[Tensor, "..."], group_size: int = 256) -> DoubleQuantized:
    """Quantize scales in their turn: at blocks of 64 and 256, 0.127 bits a weight instead of 0.5.

    As in QLoRA, whose 8-bit float here is E4M3; less their mean, since scales are all positive.

    Raises:
        TypeError: scale is no floating-point tensor.
        ValueError: scale is empty or not finite; group_size is no whole number of at least 1.
    """
    check_floating(scale, "scale")
    PerGroup(group_size)  # which refuses what is no size
    check_finite(scale, scale, scale, "scale")
    flat = scale.detach().float().flatten()
    mean = flat.mean()
    padded = torch.nn.functional.pad(flat - mean, (0, -len(flat) % group_size))
    return DoubleQuantized(
        FloatQuantizer(E4M3, PerGroup(group_size))(padded[None]), mean, scale.shape
    )
