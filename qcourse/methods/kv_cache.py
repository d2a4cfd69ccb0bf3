"""The KV cache in codes: keys share a scale along the tokens of a channel, values along the channels of a token.

The idea: at each step attention reads the keys and values of all earlier tokens, so the cache costs memory, and time,
that grow with every token. Its numbers can be codes. Keys have a few channels that are large at every token: so each
channel has scales of its own, one for a group of tokens. Values have hardly any, so either axis would do; a token comes
alone, and with scales of its own it can become codes at once. A group of keys is complete only at its last token: until
then they wait in full precision. With ``residual`` the newest tokens, which attention looks at most, stay longer. Each
token is rounded once.

Source: Liu et al., "KIVI: A tuning-free asymmetric 2bit quantization for KV cache" (ICML 2024), section 3: axes, groups
and window, and tokens that arrive together (a prompt) meet each other as they are. There R keys (128, some groups) come
together and all become codes at once, so that the window of keys has 0 to R - 1; here it slides: it always has
``residual``, and up to a group less one wait behind it.

How it differs from ``models.llama.KVCache``: that holds the floats, and needs neither groups nor a window.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.quantized import QuantizedTensor
from qcourse.numerics.validation import check_finite, check_floating, check_quantizer

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
        ValueError: a granularity other than PerGroup, an unknown axis, a residual or max_tokens that is not as above.

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
        residual: Any = 0,
        max_tokens: Any = None,
    ) -> None:
        _check_quantizer("keys", keys, key_axis)
        _check_quantizer("values", values, value_axis)
        if type(residual) is not int or residual < 0:
            raise ValueError(
                f"residual={residual!r} must be a whole number (a Python int) of at least 0"
            )
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(
                f"max_tokens={max_tokens!r} must be a whole number (a Python int) of at least 1, or None"
            )
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
    ) -> tuple[
        Shaped[Tensor, "batch kv_heads all_tokens dim"],
        Shaped[Tensor, "batch kv_heads all_tokens dim"],
    ]:
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
                heads than before, do not suit a quantizer (or its parameters for one call those for the next), or there
                is no room left. This layer is as it was then; those that a model had updated before have grown.
        """
        if k.ndim != 4 or k.shape != v.shape:
            shapes = f"{tuple(k.shape)} and {tuple(v.shape)}"
            raise ValueError(
                f"k and v must be of one shape (batch, kv_heads, tokens, head_dim), got {shapes}"
            )
        pair = self.layers.get(layer) or (
            Held(k[:, :, :0], self.keys, self.key_axis, self.residual),
            Held(v[:, :, :0], self.values, self.value_axis, self.residual),
        )
        before, new = pair[0].length, k.shape[2]
        if self.max_tokens is not None and before + new > self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens}: the cache holds {before} tokens, no room for {new} more"
            )
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
        return self.window.shape[2] + (
            self.codes.codes.numel() // math.prod(self.sizes) if self.codes else 0
        )

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
        return replace(
            self, window=new.clone(), codes=_joined(self.codes, codes, dim)
        )  # a view would keep old alive

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
    """One tensor of both: parameters that are matrices join as the codes do, and those without an axis must agree."""
    if old is None:
        return new
    joined = {}
    for name in (field.name for field in fields(old.parameters)):
        both = getattr(old.parameters, name), getattr(new.parameters, name)
        if both[0].ndim:
            joined[name] = torch.cat(both, dim)
        elif not torch.equal(*both):
            raise ValueError(
                f"quantizer={old.quantizer!r} fits one {name} for all tokens, so tokens cannot be coded as they come:"
                f" {both[0].item():.3g} would have to become {both[1].item():.3g}"
            )
    return replace(
        old,
        codes=torch.cat([old.codes, new.codes], dim),
        parameters=replace(old.parameters, **joined),
    )


def _check_quantizer(name: str, quantizer: Any, axis: str) -> None:
    if axis not in AXES:
        raise ValueError(
            f"axis={axis!r} of the {name} must be one of {', '.join(AXES)}: what keeps its own scale"
        )
    if quantizer is not None:
        check_quantizer(quantizer, name)
    if quantizer and not isinstance(quantizer.granularity, PerGroup):
        raise ValueError(
            f"granularity={quantizer.granularity!r} of the {name} must be PerGroup(size)"
        )
