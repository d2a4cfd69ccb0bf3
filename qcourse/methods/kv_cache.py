"""The KV cache as codes: key scales per channel, value scales per token.

Keys have a few channels that are large at every token, so a channel has one scale per group of
tokens. The newest keys wait in floats until their group is complete. Values have few outlier
channels, so each token has its own scales and becomes codes at once.
Source: Liu et al., "KIVI" (ICML 2024), section 3. KIVI encodes R keys at once; this window slides.
`models.llama.KVCache` holds the same tokens as floats.
"""

from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from qcourse.methods.cached_tokens import CachedTokens
from qcourse.numerics.granularity import PerGroup
from qcourse.numerics.validation import check_quantizer
from qcourse.numerics.whole import check_whole

AXES = ("channel", "token")


class QuantizedKVCache:
    """Keys and values of each layer as codes, except the newest; for ``generate(..., cache=...)``.

    Args:
        keys, values: quantizers of granularity PerGroup(g), or None for floats. A group is g tokens
            of one channel of a head (axis "channel") or g channels of one token ("token").
        residual: the newest tokens that stay in floats; with axis "channel" up to g - 1 more wait.

    Raises TypeError or ValueError for an argument that is not as above, or max_tokens below 1.

    >>> import torch
    >>> from qcourse import IntQuantizer
    >>> int4 = IntQuantizer(4, granularity=PerGroup(32), scale_dtype=torch.float16)
    >>> cache = QuantizedKVCache(int4, int4)
    >>> k, v = torch.randn(2, 1, 2, 64, 32)  # both (batch 1, kv_heads 2, tokens 64, head_dim 32)
    >>> all_k, all_v = cache.update(0, k, v)
    >>> cache.length, cache.nbytes  # 8192 codes of 4 bits, 256 scales of 2 bytes
    (64, 4608)
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
        # Refuse what update could not do.
        _check_quantizer("keys", keys, key_axis)
        _check_quantizer("values", values, value_axis)
        _check_counts(residual, max_tokens)
        self.keys = keys
        self.values = values
        self.key_axis = key_axis
        self.value_axis = value_axis
        self.residual = residual
        self.max_tokens = max_tokens
        self.layers: dict[int, tuple[CachedTokens, CachedTokens]] = {}

    @property
    def length(self) -> int:
        """The number of tokens in the first layer."""
        return self.layers[0][0].length if 0 in self.layers else 0

    @property
    def nbytes(self) -> int:
        """Bytes in storage: packed codes, scales and zero points, and the tokens in floats."""
        total = 0
        for keys, values in self.layers.values():
            total += keys.nbytes + values.nbytes
        return total

    def update(
        self, layer: int, k: Shaped[Tensor, "..."], v: Shaped[Tensor, "..."]
    ) -> tuple[
        Shaped[Tensor, "batch kv_heads all_tokens dim"],
        Shaped[Tensor, "batch kv_heads all_tokens dim"],
    ]:
        """Append k and v (batch, kv_heads, tokens, head_dim), both after RoPE; return all tokens.

        They are oldest first: earlier tokens as stored, the tokens of this call unrounded. Raises
        TypeError or ValueError, and leaves this layer as it was, for tokens that do not fit.
        """
        if k.ndim != 4 or k.shape != v.shape:
            raise ValueError(
                "k and v must be of one shape (batch, kv_heads, tokens, head_dim),"
                f" got {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if layer in self.layers:
            keys, values = self.layers[layer]
        else:
            # A new layer starts with empty windows of k's and v's sizes and dtypes.
            keys = CachedTokens(k[:, :, :0], self.keys, self.key_axis, self.residual)
            values = CachedTokens(v[:, :, :0], self.values, self.value_axis, self.residual)
        self._check_capacity(keys.length, k.shape[2])

        # Attention reads the new tokens before they are rounded; the cache stores them after.
        keys = keys.append("k", k)
        values = values.append("v", v)
        self.layers[layer] = (keys.encode_old(), values.encode_old())
        return keys.all_tokens(), values.all_tokens()

    def _check_capacity(self, length: int, new: int) -> None:
        if self.max_tokens is not None and length + new > self.max_tokens:
            raise ValueError(
                f"max_tokens={self.max_tokens}: the cache holds {length} tokens,"
                f" no room for {new} more"
            )


def _check_counts(residual: Any, max_tokens: Any) -> None:
    check_whole("residual", residual, least=0)
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(
            f"max_tokens={max_tokens!r} must be a whole number (a Python int) of at least 1,"
            " or None"
        )


def _check_quantizer(name: str, quantizer: Any, axis: str) -> None:
    # None keeps the tokens in floats, but its axis must be valid too.
    if axis not in AXES:
        allowed = ", ".join(AXES)
        raise ValueError(
            f"axis={axis!r} of the {name} must be one of {allowed}: what keeps its own scale"
        )
    if quantizer is None:
        return
    check_quantizer(quantizer, name)
    if not isinstance(quantizer.granularity, PerGroup):
        raise ValueError(
            f"granularity={quantizer.granularity!r} of the {name} must be PerGroup(size)"
        )
