"""The keys or values of one layer: older tokens as codes, newer tokens in a window of floats.

The codes form a matrix in which each group of PerGroup lies side by side in a row. If the axis is
"channel", the rows are (batch x heads x channels) and new tokens are new columns. If it is
"token", the rows are (tokens x batch x heads) and new tokens are new rows.
Source: Liu et al., "KIVI" (ICML 2024), section 3.
`kv_cache.py` keeps two of these per layer.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from qcourse.numerics.quantized import QuantizedTensor
from qcourse.numerics.validation import check_finite, check_floating


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """Tokens of one layer. `quantizer` has granularity PerGroup, or is None (floats only)."""

    window: Tensor  # (batch, heads, tokens, channels)
    quantizer: Any
    axis: str  # the index that keeps its own scale: "channel" or "token"
    residual: int
    codes: QuantizedTensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, heads and channels."""
        batch, heads, _, channels = self.window.shape
        return batch, heads, channels

    @property
    def length(self) -> int:
        """The number of tokens, as codes and in the window."""
        encoded = 0
        if self.codes is not None:
            encoded = self.codes.codes.numel() // math.prod(self.sizes)
        return encoded + self.window.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the window, the packed codes and their parameters."""
        encoded = 0 if self.codes is None else self.codes.nbytes
        return encoded + self.window.nbytes

    def append(self, name: str, x: Tensor) -> "CachedTokens":
        """Return the tokens with x at the end of the window; raise if x does not fit."""
        check_floating(x, name)
        check_finite(x, name)
        if self.quantizer and self.axis == "token":
            # Raises ValueError unless the group size divides the channels.
            self.quantizer.granularity.scale_shape(x.shape)
        sizes = (*x.shape[:2], x.shape[3])
        dtype = self.window.dtype
        if sizes != self.sizes or x.dtype != dtype:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} and {x.dtype} does not continue"
                f" (batch, kv_heads, head_dim) = {self.sizes} and {dtype}:"
                " a cache is for one batch of sequences"
            )
        window = torch.cat([self.window, x], dim=2)
        return replace(self, window=window)

    def encode_old(self) -> "CachedTokens":
        """Return the tokens with all but the newest `residual` as codes, in whole groups."""
        if self.quantizer is None:
            return self
        # A channel's scale needs a whole group of tokens; a token with its own scales needs none.
        group = self.quantizer.granularity.size if self.axis == "channel" else 1
        ready = self.window.shape[2] - self.residual
        count = ready // group * group
        if count <= 0:
            return self

        old, new = self.window.tensor_split([count], dim=2)
        if self.axis == "channel":
            rows = old.mT.flatten(0, 2)  # (batch x heads x channels, tokens)
            codes = _joined(self.codes, self.quantizer(rows), dim=1)
        else:
            rows = old.movedim(2, 0).flatten(0, 2)  # (tokens x batch x heads, channels)
            codes = _joined(self.codes, self.quantizer(rows), dim=0)
        # Copy the rest: a view would keep the old window in memory.
        return replace(self, window=new.clone(), codes=codes)

    def all_tokens(self) -> Tensor:
        """Return all tokens as attention reads them, oldest first."""
        if self.codes is None:
            return self.window
        past = self.codes.dequantize().to(self.window.dtype)
        batch, heads, channels = self.sizes
        if self.axis == "channel":
            rows = past.view(batch, heads, channels, -1)
            past = rows.mT  # (batch, heads, tokens, channels)
        else:
            rows = past.view(-1, batch, heads, channels)
            past = rows.movedim(0, 2)  # (batch, heads, tokens, channels)
        return torch.cat([past, self.window], dim=2)


def _joined(old: QuantizedTensor | None, new: QuantizedTensor, dim: int) -> QuantizedTensor:
    """Concatenate codes and parameters; a parameter without axes must be equal in both."""
    if old is None:
        return new
    parameters = {}
    for field in fields(old.parameters):
        before = getattr(old.parameters, field.name)
        after = getattr(new.parameters, field.name)
        if before.ndim:
            parameters[field.name] = torch.cat([before, after], dim)
        elif not torch.equal(before, after):
            raise ValueError(
                f"quantizer={old.quantizer!r} fits one {field.name} for all tokens,"
                " so tokens cannot be coded as they come:"
                f" {before.item():.3g} would have to become {after.item():.3g}"
            )
    codes = torch.cat([old.codes, new.codes], dim)
    joined = replace(old.parameters, **parameters)
    return replace(old, codes=codes, parameters=joined)
