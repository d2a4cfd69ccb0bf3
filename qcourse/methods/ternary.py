"""Ternary weights, -1, 0 or 1 times one scale (the grid of BitNet b1.58), and their storage.

A product with three levels needs no multiplication. The scale is the mean of |w|. Rounding a
trained model to this grid destroys it; training on it from the start, through the STE, works. Three
values are log2 3 = 1.585 bits; five trits per byte (3^5 = 243 of 256 values) take 1.6.
Source: Ma et al., "The era of 1-bit LLMs: all large language models are in 1.58 bits" (2024).
``IntQuantizer(2)`` has four levels, and the largest weight sets its scale.
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

TRITS = 5  # per byte
POWERS = tuple(3**i for i in range(TRITS))


@dataclass(frozen=True)
class TernaryQuantizer(ScaledQuantizer):
    """Quantize to {-1, 0, 1} times a scale; BitNet has one scale per tensor.

    >>> TernaryQuantizer()(torch.tensor([0.9, -0.2, 0.1, -1.2])).codes.tolist()
    [1, 0, 0, -1]
    """

    granularity: Granularity = PerTensor()
    # The mean of |x|; or "amax", the largest |x|; or "mse", the fraction of the largest |x| with
    # the least squared error.
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
    """Return five codes per byte, sum (code_i + 1) 3^i; the last byte is padded with codes -1.

    >>> pack_trits(torch.tensor([1, 0, -1, 1, 1, -1], dtype=torch.int8)).tolist()
    [221, 0]
    """
    if codes.dtype != torch.int8:
        raise TypeError(f"codes have dtype {codes.dtype}; trits are int8")
    if not codes.numel() or int(codes.abs().max()) > 1:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} must be at least one, each of them -1, 0 or 1"
        )
    # A byte is a number of five base-3 digits, the lowest first.
    missing = -codes.numel() % TRITS
    digits = torch.nn.functional.pad(codes.flatten() + 1, (0, missing))
    digits = digits.reshape(-1, TRITS).int()  # (bytes, trits)
    packed = (digits * _powers(codes.device)).sum(dim=1)
    return packed.to(torch.uint8)


def unpack_trits(packed: Shaped[Tensor, "..."], count: int) -> Int8[Tensor, " count"]:
    """Return the first `count` codes, the inverse of ``pack_trits``.

    >>> unpack_trits(torch.tensor([221, 0], dtype=torch.uint8), 6).tolist()
    [1, 0, -1, 1, 1, -1]
    """
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed has dtype {packed.dtype}; packed trits are uint8")
    needed = -(-count // TRITS)  # rounded up
    if packed.ndim != 1 or len(packed) != needed or count < 1:
        raise ValueError(
            f"packed of shape {tuple(packed.shape)} does not hold count={count} trits,"
            f" {TRITS} per byte"
        )
    largest = int(packed.max())
    if largest >= 3**TRITS:
        raise ValueError(f"packed has the byte {largest}; five trits are at most {3**TRITS - 1}")
    digits = packed.int()[:, None] // _powers(packed.device) % 3  # (bytes, trits)
    codes = (digits - 1).to(torch.int8)
    return codes.flatten()[:count]


def _powers(device: torch.device) -> Tensor:
    return torch.tensor(POWERS, dtype=torch.int32, device=device)
