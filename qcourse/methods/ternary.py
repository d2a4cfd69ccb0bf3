"""Ternary weights: -1, 0 or 1 times one scale, the grid of BitNet b1.58, and how to store such codes.

The idea: with three levels a product needs no multiplication, only sums and differences. The scale is the mean of |w|:
what is below half of it becomes 0, all else the sign. Rounding a trained model so is the end of it; a model trained
that way from the start, through the straight-through estimator, with 8-bit activations, works.

Three values are log2 3 = 1.585 bits. Two bits waste a code; five trits in a byte, 3^5 = 243 of its 256 values, take
1.6.

Source: Ma et al., "The era of 1-bit LLMs: all large language models are in 1.58 bits" (2024), section 2.

How it differs from ``IntQuantizer(2)``: that has four levels, and a scale that the largest weight sets.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int8, Shaped, UInt8
from torch import Tensor

from qcourse.numerics.chunks import wide
from qcourse.numerics.granularity import Granularity, PerTensor
from qcourse.numerics.quantized import Parameters
from qcourse.numerics.scaled import ScaledQuantizer

TRITS = 5  # in a byte
POWERS = tuple(3**i for i in range(TRITS))


@dataclass(frozen=True)
class TernaryQuantizer(ScaledQuantizer):
    """Quantize to {-1, 0, 1} times a scale.

    Args:
        granularity: which values share a scale; BitNet has one per tensor.
        scale_rule: "absmean": the mean of |x|. "amax": the largest |x|. "mse": "amax" of the
            fraction of the range that leaves the least squared error.
        scale_dtype: the floating-point dtype that scales are stored in.

    Raises:
        TypeError, ValueError: an argument is not one of the above.

    >>> q = TernaryQuantizer()(torch.tensor([0.9, -0.2, 0.1, -1.2]))  # the mean of |x| is 0.6
    >>> q.codes.tolist(), round(q.scale.item(), 4)
    ([1, 0, 0, -1], 0.6)
    """

    granularity: Granularity = PerTensor()
    scale_rule: str = "absmean"
    scale_dtype: torch.dtype = torch.float32
    code_dtype: ClassVar[torch.dtype] = torch.int8
    scale_rules: ClassVar[tuple[str, ...]] = ("absmean", "amax", "mse")
    bits: ClassVar[int] = 2

    def __post_init__(self) -> None:
        self._check_fields()

    def fit(self, x: Shaped[Tensor, "*shape"]) -> Parameters:
        """Return the scale by `scale_rule`. Raises what `ScaledQuantizer.fit` raises."""
        if self.scale_rule != "absmean":
            return super().fit(x)
        rows, _, _ = self._checked_rows(x)
        magnitudes = rows.to(wide(x.dtype)).abs()
        mean = magnitudes.mean(dim=1, dtype=torch.float64)
        mean = mean.reshape(self.granularity.scale_shape(x.shape))
        return self.from_range(-mean, mean)

    def _exact_scale(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.maximum(-low, high)

    def _to_codes(self, steps: Tensor, zero_point: Tensor) -> Tensor:
        return steps.round_().clamp_(-1, 1)

    def _from_codes(self, codes: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


def pack_trits(codes: Shaped[Tensor, "..."]) -> UInt8[Tensor, " bytes"]:
    """Five codes a byte, sum (code_i + 1) 3^i: 1.6 bits each; what is missing at the end counts as code -1.

    Args:
        codes: int8 in {-1, 0, 1}, any shape.

    Raises:
        TypeError: codes are not int8.
        ValueError: codes are empty, or one is another number.

    >>> pack_trits(torch.tensor([1, 0, -1, 1, 1, -1], dtype=torch.int8)).tolist()
    [221, 0]
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes have dtype {codes.dtype}; trits are int8")
    if not codes.numel() or int(codes.abs().max()) > 1:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} must be at least one, each of them -1, 0 or 1"
        )
    digits = torch.nn.functional.pad(codes.flatten() + 1, (0, -codes.numel() % TRITS)).reshape(
        -1, TRITS
    )
    return (
        (digits.int() * torch.tensor(POWERS, dtype=torch.int32, device=codes.device))
        .sum(dim=1)
        .to(torch.uint8)
    )


def unpack_trits(packed: Shaped[Tensor, "..."], count: int) -> Int8[Tensor, " count"]:
    """The inverse of ``pack_trits``: the first `count` codes.

    Raises:
        TypeError: packed is not uint8.
        ValueError: packed does not hold `count` codes; a byte is above 242, which stands for no five trits.

    >>> unpack_trits(torch.tensor([221, 0], dtype=torch.uint8), 6).tolist()
    [1, 0, -1, 1, 1, -1]
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed has dtype {packed.dtype}; packed trits are uint8")
    if packed.ndim != 1 or -(-count // TRITS) != len(packed) or count < 1:
        raise ValueError(
            f"packed of shape {tuple(packed.shape)} does not hold count={count} trits, {TRITS} a byte"
        )
    if int(packed.max()) >= 3**TRITS:
        raise ValueError(
            f"packed has the byte {int(packed.max())}; five trits are at most {3**TRITS - 1}"
        )
    powers = torch.tensor(POWERS, dtype=torch.int32, device=packed.device)
    digits = packed.int()[:, None] // powers % 3  # (bytes, trits)
    return (digits - 1).to(torch.int8).flatten()[:count]
