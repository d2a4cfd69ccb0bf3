"""The KV cache in codes: keys share a scale along the tokens of a channel, values along the channels of a token.

The idea: at each step attention reads the keys and values of all earlier tokens, so the cache costs memory, and time,
that grow with every token. Its numbers can be codes. Keys have a few channels that are large at every token: so each
channel has scales of its own, one for a group of tokens. Values have no such channels, but tokens of unlike size, and
the error that attention makes of them is a mean over tokens: so each token has its own. A token comes alone, a group of
keys is complete only at its last: so keys wait in full precision until then, and with ``residual`` the newest tokens,
which attention looks at most, wait longer. Each token is rounded once.

Source: Liu et al., "KIVI: A tuning-free asymmetric 2bit quantization for KV cache" (ICML 2024), section 3: axes, groups
and window, and tokens that arrive together (a prompt) meet each other as they are.

How it differs from ``models.llama.KVCache``: that holds the floats, and needs neither groups nor a window.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.quantized import QuantizedTensor, Quantizer
from qcourse.numerics.validation import check_finite, check_floating

AXES = ("channel", "token")


class QuantizedKVCache:
    """Keys and values of each layer, all but the newest tokens as codes; for ``generate(..., cache=...)``.

    Args:
        keys: with granularity PerGroup(g): by default g tokens of one channel of a head share a scale. None leaves the
            keys as they are.
        values: the same; by default g channels of a head at one token share a scale, so g must divide head_dim.
        key_axis: which index keeps its own scale, "channel" or "token".
        value_axis: the same for the values.
        residual: at least so many of the newest tokens stay as they are. Where the axis is "channel", up to g - 1 more.
        max_tokens: how many tokens it may hold; None for any number.

    Raises:
        TypeError: keys or values is no quantizer.
        ValueError: a granularity other than PerGroup, an unknown axis, a negative residual, max_tokens below 1.

    >>> from qcourse import IntQuantizer
    >>> int4 = IntQuantizer(4, granularity=PerGroup(32), scale_dtype=torch.float16)
    >>> cache = QuantizedKVCache(int4, int4)
    >>> k, v = torch.randn(2, 1, 2, 64, 32)  # both (batch 1, kv_heads 2, tokens 64, head_dim 32)
    >>> same, _ = cache.update(0, k, v)  # tokens of one call meet each other as they are
    >>> cache.length, cache.nbytes, torch.equal(same, k)  # 8192 codes of 4 bits, 256 scales of 2 bytes
    (64, 4608, True)
    """

    def __init__(
        self,
        keys: Any,
        values: Any,
        *,
        key_axis: str = "channel",
        value_axis: str = "token",
        residual: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        _check_quantizer("keys", keys, key_axis)
        _check_quantizer("values", values, value_axis)
        if residual < 0:
            raise ValueError(f"residual={residual} must be 0 or more: tokens that stay in full precision")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1, or None for any number")
        self.keys, self.values, self.key_axis, self.value_axis = keys, values, key_axis, value_axis
        self.residual, self.max_tokens = residual, max_tokens
        self.layers: dict[int, tuple[Held, Held]] = {}

    @property
    def length(self) -> int:
        """How many tokens it holds."""
        return self.layers[0][0].length if 0 in self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes in storage: codes as packed, scales and zero points as stored, and the newest tokens in their dtype."""
        return sum(held.nbytes for pair in self.layers.values() for held in pair)

    def update(
        self, layer: int, k: Shaped[Tensor, "..."], v: Shaped[Tensor, "..."]
    ) -> tuple[Shaped[Tensor, "batch kv_heads all_tokens dim"], Shaped[Tensor, "batch kv_heads all_tokens dim"]]:
        """Append a layer's k and v; return all of both, the earlier tokens as they are held, these as they are given.

        Args:
            layer: 0 for the first.
            k: (batch, kv_heads, tokens, head_dim), turned by RoPE already.
            v: of k's shape.

        Returns:
            Keys and values (batch, kv_heads, all tokens, head_dim) in k's and v's dtypes, oldest first.

        Raises:
            TypeError: k or v is not of floats.
            ValueError: k and v are not of one shape with four axes, hold NaN or infinity, are of another batch or other
                heads than before, do not suit a quantizer, or there is no room left. The layer is as it was then.
        """
        if k.ndim != 4 or k.shape != v.shape:
            shapes = f"{tuple(k.shape)} and {tuple(v.shape)}"
            raise ValueError(f"k and v must be of one shape (batch, kv_heads, tokens, head_dim), got {shapes}")
        pair = self.layers.get(layer) or (
            Held(k[:, :, :0], self.keys, self.key_axis, self.residual),
            Held(v[:, :, :0], self.values, self.value_axis, self.residual),
        )
        before, new = pair[0].length, k.shape[2]
        if self.max_tokens is not None and before + new > self.max_tokens:
            raise ValueError(f"max_tokens={self.max_tokens}: the cache holds {before} tokens, no room for {new} more")
        grown = pair[0].append("k", k), pair[1].append("v", v)
        self.layers[layer] = grown[0].coded(), grown[1].coded()
        return grown[0].everything(), grown[1].everything()


@dataclass(frozen=True, eq=False)
class Held:
    """Keys or values of one layer: the older tokens as codes, behind them a window of tokens as they came.

    The codes are a matrix whose groups lie side by side in a row: (batch x heads x channels, tokens) where a channel
    keeps its scale, (tokens x batch x heads, channels) where a token does. New tokens are new columns, or new rows.
    """

    window: Tensor  # (batch, heads, tokens, channels)
    quantizer: Any  # a Quantizer of granularity PerGroup, or None
    axis: str
    residual: int
    codes: QuantizedTensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Batch, heads and channels."""
        batch, heads, _, channels = self.window.shape
        return batch, heads, channels

    @property
    def length(self) -> int:
        """Tokens, coded and not."""
        return self.window.shape[2] + (self.codes.codes.numel() // math.prod(self.sizes) if self.codes else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, parameters and window."""
        return self.window.nbytes + (self.codes.nbytes if self.codes else 0)

    def append(self, name: str, x: Tensor) -> "Held":
        """The same with x in the window, behind all others; raises where x does not belong there."""
        check_floating(x, name)
        check_finite(x, x.min(), x.max(), name)
        if self.quantizer and self.axis == "token":
            self.quantizer.granularity.scale_shape(x.shape)
        if (*x.shape[:2], x.shape[3]) != self.sizes or x.dtype != self.window.dtype:
            raise ValueError(
                f"{name} of shape {tuple(x.shape)} and {x.dtype} does not continue (batch, kv_heads, head_dim) ="
                f" {self.sizes} and {self.window.dtype}: a cache is for one batch of texts"
            )
        return replace(self, window=torch.cat([self.window, x], dim=2))

    def coded(self) -> "Held":
        """The same with those tokens coded that have left the window."""
        if self.quantizer is None:
            return self
        dim, size = (1, self.quantizer.granularity.size) if self.axis == "channel" else (0, 1)
        count = (self.window.shape[2] - self.residual) // size * size
        if count <= 0:
            return self
        old, new = self.window.tensor_split([count], dim=2)
        codes = self.quantizer(old.mT.flatten(0, 2) if dim else old.movedim(2, 0).flatten(0, 2))
        return replace(self, window=new.clone(), codes=_joined(self.codes, codes, dim))  # a view would keep old alive

    def everything(self) -> Tensor:
        """All tokens as attention meets them, the oldest first."""
        if self.codes is None:
            return self.window
        past = self.codes.dequantize().to(self.window.dtype)
        batch, heads, channels = self.sizes
        if self.axis == "channel":
            past = past.view(batch, heads, channels, -1).mT
        else:
            past = past.view(-1, batch, heads, channels).movedim(0, 2)
        return torch.cat([past, self.window], dim=2)


def _joined(old: QuantizedTensor | None, new: QuantizedTensor, dim: int) -> QuantizedTensor:
    """One tensor of both: the parameters of PerGroup are matrices, and join as the codes do."""
    if old is None:
        return new
    both = old.parameters, new.parameters
    joined = {field.name: torch.cat([getattr(p, field.name) for p in both], dim) for field in fields(old.parameters)}
    return replace(old, codes=torch.cat([old.codes, new.codes], dim), parameters=replace(old.parameters, **joined))


def _check_quantizer(name: str, quantizer: Any, axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"axis={axis!r} of the {name} must be one of {', '.join(AXES)}: what keeps its own scale")
    if isinstance(quantizer, type) or not isinstance(quantizer, Quantizer | None):
        raise TypeError(f"{name}={quantizer!r} must be a quantizer such as IntQuantizer(4, ...), or None")
    if quantizer and not isinstance(quantizer.granularity, PerGroup):
        raise ValueError(f"granularity={quantizer.granularity!r} of the {name} must be PerGroup(size)")
