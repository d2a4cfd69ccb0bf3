"""The bytes that weights and the KV cache take at a given number of bits.

The idea: a code takes bits / 8 bytes, and its scale and zero point are shared by a group. So a
"4-bit" weight takes 4.125 bits. GB is 10^9 bytes, GiB is 2^30.
How it differs from `QuantizedTensor.nbytes`: that counts a tensor that exists; this predicts.
"""


def bytes_per_parameter(
    bits: float,
    group_size: float | None = None,
    *,
    scale_bytes: float = 2,
    zero_bytes: float = 0,
) -> float:
    """Return bits / 8 + (scale_bytes + zero_bytes) / group_size; without groups, bits / 8.

    >>> bytes_per_parameter(4, 128)
    0.515625
    """
    _check_positive(bits=bits, group_size=1 if group_size is None else group_size)
    _check_not_negative(scale_bytes=scale_bytes, zero_bytes=zero_bytes)
    if group_size is None:
        return bits / 8
    return bits / 8 + (scale_bytes + zero_bytes) / group_size


def sparse_bytes_per_parameter(
    bits: float,
    keep: int,
    m: int,
    group_size: float | None = None,
    *,
    scale_bytes: float = 2,
) -> float:
    """Return (bits + ceil(log2 m)) / 8 * keep / m + scale_bytes / group_size: `keep` of `m` stay.

    >>> [8 * sparse_bytes_per_parameter(bits, 2, 4) for bits in (16, 4)]  # not 8, and not 2
    [9.0, 3.0]
    """
    if not 1 <= keep <= m:
        raise ValueError(f"keep={keep!r} of m={m!r} must be from 1 to m")
    dense = bytes_per_parameter(bits, group_size, scale_bytes=scale_bytes)
    # Groups are counted over all weights, pruned or not.
    scales = dense - bits / 8
    # A position among m weights takes ceil(log2 m) bits.
    position_bits = (m - 1).bit_length()
    return scales + keep / m * (bits + position_bits) / 8


def weight_bytes(
    count: int,
    bits: int,
    *,
    scales: int = 0,
    scale_bytes: float = 2,
    zero_bytes: float = 0,
) -> float:
    """Return ceil(count * bits / 8) + scales * (scale_bytes + zero_bytes); `scales` is a count.

    >>> weight_bytes(8192 * 4096, 8, scales=8192)
    33570816
    """
    _check_positive(bits=bits)
    _check_not_negative(count=count, scales=scales, scale_bytes=scale_bytes, zero_bytes=zero_bytes)
    # Codes are packed, and the last byte counts whole.
    code_bytes = -(-count * bits // 8)
    return code_bytes + scales * (scale_bytes + zero_bytes)


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
    """Return 2 layers kv_heads head_dim batch tokens bytes_per_parameter: keys and values.

    >>> kv_cache_bytes(32, 32, 128, tokens=4096) / 2**30  # Llama-2-7B, one full sequence, in GiB
    2.0
    """
    _check_positive(layers=layers, kv_heads=kv_heads, head_dim=head_dim)
    _check_not_negative(tokens=tokens, batch=batch, residual=residual)
    coded = bytes_per_parameter(bits, group_size, scale_bytes=scale_bytes, zero_bytes=zero_bytes)
    # Each token has one key and one value per layer, key-value head and channel; query heads have
    # none.
    numbers_per_token = 2 * layers * kv_heads * head_dim * batch
    # The last `residual` tokens of each sequence stay in 16 bits.
    in_16_bits = min(residual, tokens)
    return numbers_per_token * ((tokens - in_16_bits) * coded + in_16_bits * 2)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name}={value!r} must be 0 or more")
