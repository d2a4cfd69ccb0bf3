"""How many bytes weights and the KV cache take at a given number of bits.

The idea: codes cost bits / 8 bytes each; every scale, and when asymmetric every zero point, comes on top. That is all,
and it is enough to see why a "4-bit" weight takes 4.125 bits. Weights are there once; the cache is there for every
token of every text that is being written.

Sizes are in bytes; GB is 10^9 bytes, GiB is 2^30. `QuantizedTensor.nbytes` counts a tensor that exists; this file
predicts.
"""


def bytes_per_parameter(
    bits: float, group_size: float | None = None, *, scale_bytes: float = 2, zero_bytes: float = 0
) -> float:
    """bits / 8 + (scale_bytes + zero_bytes) / group_size.

    Args:
        bits: bits a code.
        group_size: parameters that share a scale; None counts no scales at all.
        scale_bytes: bytes a scale (2 is float16).
        zero_bytes: bytes a zero point (0 is symmetric; bits / 8 is packed like a code).

    Raises:
        ValueError: bits or group_size not above 0, scale_bytes or zero_bytes below 0.

    >>> bytes_per_parameter(4, 128)
    0.515625
    """
    _check_positive(bits=bits, group_size=1 if group_size is None else group_size)
    _check_not_negative(scale_bytes=scale_bytes, zero_bytes=zero_bytes)
    return bits / 8 + (0 if group_size is None else (scale_bytes + zero_bytes) / group_size)


def sparse_bytes_per_parameter(
    bits: float, keep: int, m: int, group_size: float | None = None, *, scale_bytes: float = 2
) -> float:
    """(bits + ceil(log2 m)) / 8 keep / m + scale_bytes / group_size: keep of every m weights stay, with their position.

    Args:
        bits: bits a kept weight.
        keep, m: the pattern, 2 and 4 for 2:4.
        group_size, scale_bytes: as in `bytes_per_parameter`; a group is counted over all weights, pruned or not.

    Raises:
        ValueError: not 1 <= keep <= m; what `bytes_per_parameter` refuses.

    >>> [8 * sparse_bytes_per_parameter(bits, 2, 4) for bits in (16, 4)]  # not 8, and not 2
    [9.0, 3.0]
    """
    if not 1 <= keep <= m:
        raise ValueError(f"keep={keep!r} of m={m!r} must be from 1 to m")
    scales = bytes_per_parameter(bits, group_size, scale_bytes=scale_bytes) - bits / 8
    return scales + keep / m * (bits + (m - 1).bit_length()) / 8


def weight_bytes(
    count: int, bits: int, *, scales: int = 0, scale_bytes: float = 2, zero_bytes: float = 0
) -> float:
    """ceil(count * bits / 8) + scales * (scale_bytes + zero_bytes): the size of `count` codes with their scales.

    Args:
        count: how many weights.
        scales: how many scales (1 a tensor, `out` for one a channel, count / group_size for groups).
        bits, scale_bytes, zero_bytes: as in `bytes_per_parameter`.

    Raises:
        ValueError: bits not above 0, another argument below 0.

    >>> weight_bytes(8192 * 4096, 8, scales=8192)
    33570816
    """
    _check_positive(bits=bits)
    _check_not_negative(count=count, scales=scales, scale_bytes=scale_bytes, zero_bytes=zero_bytes)
    return -(-count * bits // 8) + scales * (scale_bytes + zero_bytes)


def kv_cache_bytes(
    layers: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    *,
    batch: int = 1,
    bits: float = 16,
    group_size: float | None = None,
    scale_bytes: float = 2,
    zero_bytes: float = 0,
    residual: int = 0,
) -> float:
    """2 layers kv_heads head_dim batch (coded bytes_per_parameter + 2 residual), coded + residual being tokens.

    The 2 in front is for keys and values. Attention may have more query heads than kv_heads: they take no memory here.

    Args:
        layers: of the model.
        kv_heads: key-value heads a layer.
        head_dim: channels a head.
        tokens: of each text, prompt and answer together.
        batch: texts at a time.
        bits: bits a number.
        group_size: numbers that share a scale; None counts no scales at all.
        residual: how many of each text's tokens stay in 16 bits.
        scale_bytes, zero_bytes: as in `bytes_per_parameter`.

    Raises:
        ValueError: layers, kv_heads, head_dim, bits or group_size not above 0, another argument below 0.

    >>> kv_cache_bytes(32, 32, 128, tokens=4096) / 2**30  # Llama-2-7B, one text of full length, in GiB
    2.0
    """
    _check_positive(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    _check_not_negative(tokens=tokens, batch=batch, residual=residual)
    coded = bytes_per_parameter(bits, group_size, scale_bytes=scale_bytes, zero_bytes=zero_bytes)
    kept = min(residual, tokens)
    return 2 * layers * kv_heads * head_dim * batch * ((tokens - kept) * coded + kept * 2)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r} must be 0 or more")
