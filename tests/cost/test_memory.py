"""Bytes of weights: the figures of the literature, recomputed."""

import pytest

from qcourse.cost.memory import bytes_per_parameter, kv_cache_bytes, weight_bytes

MIB = 2**20
GIB = 2**30

# Layers, key-value heads, head_dim.
LLAMA_2_7B = (32, 32, 128)
LLAMA_2_70B = (80, 8, 128)


def test_a_group_of_128_with_a_16_bit_scale() -> None:  # claims 16, 18
    assert 8 * bytes_per_parameter(4, 128) == 4.125
    overhead = bytes_per_parameter(4, 128) / bytes_per_parameter(4) - 1
    assert overhead == pytest.approx(0.03, abs=0.002)
    assert 8 * bytes_per_parameter(4, 32) == 4.5
    assert bytes_per_parameter(4, 128) == 0.515625
    assert 70e9 * bytes_per_parameter(4, 128) == pytest.approx(36.1e9, abs=0.05e9)
    scales = bytes_per_parameter(4, 128) - bytes_per_parameter(4)
    assert 70e9 * scales == pytest.approx(1.09e9, abs=0.005e9)


def test_4096_squared() -> None:  # claim 19
    count = 4096**2
    assert weight_bytes(count, 16) == 32 * MIB
    assert weight_bytes(count, 4) == 8 * MIB
    assert count // 128 == 131_072
    assert weight_bytes(count, 4, scales=131_072) - weight_bytes(count, 4) == 256 * 1024


def test_8192_by_4096() -> None:  # claim 20
    count = 8192 * 4096
    assert weight_bytes(count, 16) == 67_108_864
    int8 = weight_bytes(count, 8, scales=8192)
    assert int8 == 33_570_816
    assert int8 / MIB == pytest.approx(32.02, abs=0.005)
    assert weight_bytes(count, 4, scales=count // 128) == 17_301_504 == 16.5 * MIB


@pytest.mark.parametrize(("bits", "size"), [(32, 28), (16, 14), (8, 7), (4, 3.5), (2, 1.75)])
def test_seven_billion_before_scales(bits: int, size: float) -> None:  # claim 21
    assert 7 * bytes_per_parameter(bits) == size


def test_seventy_billion_before_scales() -> None:  # claim 23
    assert (70 * bytes_per_parameter(16), 70 * bytes_per_parameter(4)) == (140, 35)


def test_512_squared() -> None:  # claim 14
    count = 512**2
    assert weight_bytes(count, 16) == 512 * 1024
    for bits, without, with_scales in ((8, 256, 258), (4, 128, 130)):
        assert weight_bytes(count, bits, scale_bytes=4) == without * 1024
        assert weight_bytes(count, bits, scales=512, scale_bytes=4) == with_scales * 1024


def test_zero_points_are_counted() -> None:
    assert bytes_per_parameter(4, 64, zero_bytes=0.5) == 0.5 + 2.5 / 64
    assert weight_bytes(64, 4, scales=2, zero_bytes=0.5) == 32 + 2 * 2.5


def test_the_last_byte_counts_whole() -> None:
    assert [weight_bytes(count, 3) for count in (0, 1, 2, 3, 8)] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 0}, "bits=0 must be above 0"),
        ({"bits": float("nan")}, "bits=nan must be above 0"),
        ({"bits": 4, "group_size": 0}, "group_size=0 must be above 0"),
        ({"bits": 4, "group_size": -1}, "group_size=-1 must be above 0"),
        ({"bits": 4, "scale_bytes": -2}, "scale_bytes=-2 must be 0 or more"),
        ({"bits": 4, "zero_bytes": -2}, "zero_bytes=-2 must be 0 or more"),
    ],
)
def test_bytes_per_parameter_refuses(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bytes_per_parameter(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": -1, "bits": 4}, "count=-1 must be 0 or more"),
        ({"count": 8, "bits": 0}, "bits=0 must be above 0"),
        ({"count": 8, "bits": 4, "scales": -1}, "scales=-1 must be 0 or more"),
        ({"count": 8, "bits": 4, "scale_bytes": -1}, "scale_bytes=-1 must be 0 or more"),
        ({"count": 8, "bits": 4, "zero_bytes": -1}, "zero_bytes=-1 must be 0 or more"),
    ],
)
def test_weight_bytes_refuses(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weight_bytes(**arguments)


def test_the_cache_of_a_token() -> None:
    # 2 x 32 layers x 4,096 channels x 2 bytes.
    assert kv_cache_bytes(*LLAMA_2_7B, tokens=1) == 512 * 1024
    # Ten times the weights, but a smaller cache: 8 of 64 heads.
    assert kv_cache_bytes(*LLAMA_2_70B, tokens=1) == 320 * 1024
    assert kv_cache_bytes(80, 64, 128, tokens=1) == 2560 * 1024


def test_the_cache_grows_with_tokens_and_batch() -> None:
    assert kv_cache_bytes(*LLAMA_2_7B, tokens=4096, batch=16) == 32 * GIB
    assert kv_cache_bytes(*LLAMA_2_70B, tokens=131_072) == 40 * GIB
    assert kv_cache_bytes(*LLAMA_2_7B, tokens=0) == 0
    assert kv_cache_bytes(*LLAMA_2_7B, tokens=9, batch=0) == 0


def test_the_cache_in_codes() -> None:  # claim 42
    whole = kv_cache_bytes(*LLAMA_2_7B, tokens=4096)
    assert kv_cache_bytes(*LLAMA_2_7B, tokens=4096, bits=8) == whole / 2
    assert kv_cache_bytes(*LLAMA_2_7B, tokens=4096, bits=8, group_size=32) == whole * 8.5 / 16
    asymmetric = kv_cache_bytes(*LLAMA_2_7B, tokens=4096, bits=2, group_size=32, zero_bytes=2 / 8)
    assert asymmetric == whole * (2 + 18 / 32) / 16
    window = kv_cache_bytes(*LLAMA_2_7B, tokens=4096, bits=4, group_size=32, residual=128)
    assert window == whole * (3968 * 4.5 + 128 * 16) / (4096 * 16)
    all_in_16_bits = kv_cache_bytes(*LLAMA_2_7B, tokens=100, bits=4, residual=128)
    assert all_in_16_bits == kv_cache_bytes(*LLAMA_2_7B, tokens=100)


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim", "bits", "group_size"])
def test_kv_cache_bytes_refuses_zero(name: str) -> None:
    sizes = {"layers": 2, "kv_heads": 2, "head_dim": 8, "tokens": 4, "group_size": 4}
    with pytest.raises(ValueError, match=f"{name}=0 must be above 0"):
        kv_cache_bytes(**sizes | {name: 0})


@pytest.mark.parametrize("name", ["tokens", "batch", "residual", "scale_bytes", "zero_bytes"])
def test_kv_cache_bytes_refuses_negative_numbers(name: str) -> None:
    sizes = {"layers": 2, "kv_heads": 2, "head_dim": 8, "tokens": 4}
    with pytest.raises(ValueError, match=f"{name}=-1 must be 0 or more"):
        kv_cache_bytes(**sizes | {name: -1})
