"""The quantized KV cache equals rounding by hand, token for token, for any sizes of its calls."""

from functools import partial
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from qcourse import IntQuantizer, PerChannel, PerGroup
from qcourse.cost.memory import kv_cache_bytes
from qcourse.methods.kv_cache import QuantizedKVCache
from qcourse.models.generate import generate
from qcourse.models.llama import KVCache, Llama, load_weights, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.models.streaming import StreamingModel
from qcourse.numerics.microscaling import E2M1, NVFP4Quantizer, mx

# 8 query heads on 2 kv heads, head_dim 8.
SIZES = LlamaConfig(96, 64, 112, 2, 8, 2, max_position_embeddings=64)
INT4 = IntQuantizer(4, granularity=PerGroup(4))
UINT3 = IntQuantizer(3, symmetric=False, granularity=PerGroup(4))
CALLS = [(1,) * 30, (9, 1, 1, 1, 8, 1, 9), (30,), (4, 4, 1, 21), (3, 27)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose channels and tokens differ in size, so that the axes can be told apart."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.linspace(1, 9, shape[-1]) * torch.linspace(1, 3, shape[-2])[:, None]


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random, with a head large enough for its predictions to differ from token to token."""
    weights = random_llama(SIZES, seed=0).state_dict()
    return load_weights(SIZES, weights | {"lm_head.weight": 20 * weights["lm_head.weight"]})


def rounded(x: np.ndarray, quantizer: IntQuantizer) -> np.ndarray:
    """The numbers of one group on the grid of their own range."""
    levels = 2**quantizer.bits - 1
    if quantizer.symmetric:
        scale = np.float32(np.abs(x).max() / (levels // 2))
        return np.clip(np.rint(x / scale), -(levels // 2) - 1, levels // 2) * scale
    low = min(x.min(), 0)
    high = max(x.max(), 0)
    scale = np.float32((high - low) / levels)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(x / scale) + zero, 0, levels) - zero) * scale


def by_hand(x: Tensor, coded: int, quantizer: IntQuantizer, axis: str) -> Tensor:
    """x with its first tokens rounded group by group: g tokens of a channel, or g channels."""
    out = x.double().numpy().copy()
    size = quantizer.granularity.size  # type: ignore[attr-defined]
    steps = (size, 1) if axis == "channel" else (1, size)
    for text in range(x.shape[0]):
        for head in range(x.shape[1]):
            for t in range(0, coded, steps[0]):
                for c in range(0, x.shape[3], steps[1]):
                    part = text, head, slice(t, t + steps[0]), slice(c, c + steps[1])
                    out[part] = rounded(out[part], quantizer)
    return torch.from_numpy(out)


def coded_after(tokens: int, quantizer: IntQuantizer, axis: str, residual: int) -> int:
    """How many tokens have left the window: whole groups if a channel keeps its scale."""
    coded = 0
    step = quantizer.granularity.size if axis == "channel" else 1  # type: ignore[attr-defined]
    while tokens - coded - residual >= step:
        coded += step
    return coded


@pytest.mark.parametrize("calls", CALLS, ids=str)
@pytest.mark.parametrize(
    ("axes", "residual"),
    [(("channel", "token"), 0), (("token", "channel"), 0), (("channel", "token"), 5)],
)
def test_each_call_returns_what_a_rounding_by_hand_gives(
    calls: tuple[int, ...], axes: tuple[str, str], residual: int
) -> None:
    k = normal(3, 2, 30, 8)
    v = normal(3, 2, 30, 8, seed=1)
    cache = QuantizedKVCache(INT4, UINT3, key_axis=axes[0], value_axis=axes[1], residual=residual)
    for end, count in zip(accumulate(calls), calls, strict=True):
        found = cache.update(0, k[:, :, end - count : end], v[:, :, end - count : end])
        for got, x, quantizer, axis in zip(found, (k, v), (INT4, UINT3), axes, strict=True):
            coded = coded_after(end - count, quantizer, axis, residual)
            expected = by_hand(x[:, :, :end], coded, quantizer, axis)
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert cache.length == end


def test_what_the_grid_holds_comes_back_exactly_and_in_order() -> None:
    """Whole numbers with a 127 in each group lie on the INT8 grid, so a misplaced token shows."""
    x = torch.arange(2 * 2 * 24 * 8).remainder(127).float().view(2, 2, 24, 8)
    x[:, :, ::4] = 127  # once in each group of 4 tokens; and so, below, in each group of 4 channels
    other = x.clone()
    other[..., ::4] = 127
    int8 = IntQuantizer(8, granularity=PerGroup(4))
    cache = QuantizedKVCache(int8, int8)
    for t in range(24):
        k, v = cache.update(0, x[:, :, t : t + 1], other[:, :, t : t + 1])
    assert torch.equal(k, x)
    assert torch.equal(v, other)


@pytest.mark.parametrize(
    "cache",
    [
        partial(QuantizedKVCache, None, None),
        partial(QuantizedKVCache, INT4, INT4, residual=20),
        partial(QuantizedKVCache, IntQuantizer(2, granularity=PerGroup(32)), None),
    ],
    ids=["no quantizers", "a long window", "no group is complete"],
)
def test_where_nothing_is_coded_it_is_the_plain_cache(model: Llama, cache: partial) -> None:
    ids = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    for step in (1, 7):
        torch.testing.assert_close(
            StreamingModel(model, cache, step=step)(ids),
            StreamingModel(model, KVCache, step=step)(ids),
        )
    generated = generate(model, ids[0], 12, cache=cache(max_tokens=40))
    assert torch.equal(generated, generate(model, ids[0], 12))


def test_streaming_a_generated_sequence_predicts_it(model: Llama) -> None:
    """The tokens that `generate` chose with a cache are the argmax when the cache streams them."""
    make = partial(QuantizedKVCache, UINT3, UINT3)
    cache = make()
    text = generate(model, torch.tensor([5]), 40, cache=cache)
    assert cache.length == 40
    assert torch.equal(StreamingModel(model, make)(text[None, :-1])[0].argmax(-1), text[1:])
    # Three bits have changed something.
    assert not torch.equal(text, generate(model, torch.tensor([5]), 40))


def test_no_token_sees_a_later_token_or_another_sequence(model: Llama) -> None:
    ids = torch.randint(96, (3, 20), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[:, 13:] = 95 - ids[:, 13:]
    changed[1] = 95 - ids[1]
    for step in (1, 4):
        stream = StreamingModel(model, partial(QuantizedKVCache, INT4, INT4, residual=2), step=step)
        before = stream(ids)
        after = stream(changed)
        torch.testing.assert_close(after[[0, 2], :13], before[[0, 2], :13])
        assert not torch.isclose(after[:, 13:], before[:, 13:]).all(-1).any()


def test_each_bit_fewer_changes_more(model: Llama) -> None:
    ids = torch.randint(96, (3, 40), generator=torch.Generator().manual_seed(1))
    exact = model(ids)
    moved = []
    for bits in (8, 4, 2):
        quantizer = IntQuantizer(bits, granularity=PerGroup(4))
        logits = StreamingModel(model, partial(QuantizedKVCache, quantizer, quantizer))(ids)
        moved.append(float((logits - exact).norm() / exact.norm()))
    assert 0 < 4 * moved[0] < moved[1] < 0.1
    assert 4 * moved[1] < moved[2]


def test_its_bytes() -> None:
    half = IntQuantizer(4, granularity=PerGroup(16), scale_dtype=torch.float16)
    zeros = IntQuantizer(2, symmetric=False, granularity=PerGroup(8), scale_dtype=torch.float16)
    cache = QuantizedKVCache(half, zeros, residual=3)
    for layer in range(2):
        cache.update(layer, *normal(2, 3, 5, 5, 16).half())
        cache.update(layer, *normal(2, 3, 5, 31, 16).half())
    assert cache.length == 36
    # Keys: two groups of 16 tokens per channel; four tokens wait.
    keys = 15 * (32 * 16 // 2 + 16 * 2 * 2 + 4 * 16 * 2)
    # Values: 33 tokens, with packed zero points of 2 bits; three tokens wait.
    zero_points = (15 * 33 * 2 * 2 + 7) // 8
    values = 15 * (33 * 16 // 4 + 33 * 2 * 2 + 3 * 16 * 2) + zero_points
    assert cache.nbytes == 2 * (keys + values)


def test_its_bytes_are_those_that_were_predicted() -> None:
    int4 = IntQuantizer(4, granularity=PerGroup(8), scale_dtype=torch.float16)
    cache = QuantizedKVCache(int4, int4, residual=8)
    for layer in range(3):
        cache.update(layer, *normal(2, 5, 2, 40, 16).bfloat16())
    assert cache.nbytes == kv_cache_bytes(3, 2, 16, 40, batch=5, bits=4, group_size=8, residual=8)
    # The memory of the windows holds no encoded token.
    tokens = [each for pair in cache.layers.values() for each in pair]
    held = sum(each.window.untyped_storage().nbytes() for each in tokens)
    assert held == 3 * 2 * 5 * 2 * 8 * 16 * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    x = normal(1, 2, 9, 8).to(dtype)
    cache = QuantizedKVCache(INT4, INT4)
    cache.update(0, x, x)
    k, v = cache.update(0, x[:, :, :1], x[:, :, :1])
    assert k.dtype == v.dtype == dtype
    expected = by_hand(torch.cat([x, x[:, :, :1]], dim=2), 8, INT4, "channel")
    torch.testing.assert_close(k.double(), expected, rtol=0, atol=0.01 * x.abs().max().item())


def test_past_its_length() -> None:
    x = normal(1, 2, 9, 8)
    cache = QuantizedKVCache(INT4, INT4, max_tokens=10)
    cache.update(0, x, x)
    words = "max_tokens=10: the cache holds 9 tokens, no room for 2 more"
    with pytest.raises(ValueError, match=words):
        cache.update(0, x[:, :, :2], x[:, :, :2])
    assert cache.length == 9
    cache.update(0, x[:, :, :1], x[:, :, :1])
    assert cache.length == 10
    with pytest.raises(ValueError, match="holds 10 tokens, no room for 1 more"):
        cache.update(0, x[:, :, :1], x[:, :, :1])
    with pytest.raises(ValueError, match="holds 0 tokens, no room for 9 more"):
        QuantizedKVCache(INT4, INT4, max_tokens=8).update(0, x, x)


def test_generating_past_the_capacity_is_refused(model: Llama) -> None:
    with pytest.raises(ValueError, match="max_tokens=10: the cache holds 10 tokens"):
        generate(model, torch.arange(5), 12, cache=QuantizedKVCache(INT4, INT4, max_tokens=10))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_refused_at_once_and_leaves_the_cache_as_it_was(bad: float, place: int) -> None:
    pair = normal(2, 1, 2, 6, 8)
    cache = QuantizedKVCache(INT4, INT4, residual=30)  # nothing would be coded for long
    cache.update(0, *pair)
    damaged = pair[:, :, :, :1].clone()
    damaged[place, 0, 1, 0, 3] = bad
    words = f"{'kv'[place]} has 1 NaN or infinite values of 16, the first at flat index"
    with pytest.raises(ValueError, match=words):
        cache.update(0, *damaged)
    with pytest.raises(ValueError, match="NaN or infinite"):
        QuantizedKVCache(None, None).update(0, *damaged)
    k, v = cache.update(0, *pair[:, :, :, :1])
    assert k.isfinite().all()
    assert v.isfinite().all()
    assert cache.length == k.shape[2] == v.shape[2] == 7


def test_what_does_not_continue_is_refused() -> None:
    x = normal(2, 2, 6, 8)
    cache = QuantizedKVCache(INT4, INT4)
    cache.update(0, x, x)
    for other in (x[:1], x[:, :1], x[..., :4], x.half()):
        with pytest.raises(ValueError, match=r"does not continue .* \(2, 2, 8\) and torch.float32"):
            cache.update(0, other, other)
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 2, 6, 8\) and \(2, 2, 5, 8\)"):
        cache.update(0, x, x[:, :, :5])
    with pytest.raises(ValueError, match=r"got \(2, 6, 8\)"):
        cache.update(0, x[0], x[0])
    with pytest.raises(TypeError, match=r"k has dtype torch\.int64"):
        cache.update(0, x.long(), x.long())
    with pytest.raises(ValueError, match="k is empty"):
        cache.update(0, x[:, :, :0], x[:, :, :0])
    assert cache.length == 6


def test_a_scale_that_cannot_be_stored_is_refused_and_leaves_the_cache_as_it_was() -> None:
    half = IntQuantizer(8, granularity=PerGroup(4), scale_dtype=torch.float16)
    x = normal(1, 2, 3, 8)
    cache = QuantizedKVCache(half, half)
    cache.update(0, x, x)
    with pytest.raises(ValueError, match="use a wider scale_dtype"):
        cache.update(0, x[:, :, :1], 1e-7 * x[:, :, :1])  # the keys alone could be coded
    assert cache.length == 3
    all_keys, _ = cache.update(0, x[:, :, :1], x[:, :, :1])
    assert torch.equal(all_keys, torch.cat([x, x[:, :, :1]], dim=2))


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_a_scale_for_the_whole_tensor_is_refused_when_it_changes(axis: str) -> None:
    x = normal(1, 2, 16, 16)
    nvfp4 = NVFP4Quantizer()
    cache = QuantizedKVCache(nvfp4, nvfp4, key_axis=axis, value_axis=axis)
    cache.update(0, x, x)
    words = "fits one tensor_scale for all tokens, so tokens cannot be coded as they"
    with pytest.raises(ValueError, match=words):
        cache.update(0, 2 * x, 2 * x)
    assert cache.length == 16
    cache.update(0, x, x)  # the same range, and so the same scale
    assert cache.length == 32


def test_formats_whose_scales_are_small_floats_take_tokens_as_they_come() -> None:
    x = normal(1, 2, 32, 32)
    blocks = NVFP4Quantizer(per_tensor=False)
    for quantizer in (mx(E2M1), blocks):
        cache = QuantizedKVCache(quantizer, quantizer)
        for t in range(32):
            cache.update(0, x[:, :, t : t + 1], x[:, :, t : t + 1])
        keys, values = cache.layers[0]
        by_channel = quantizer(x.mT.contiguous()).dequantize().mT
        assert torch.equal(keys.all_tokens(), by_channel)
        assert torch.equal(values.all_tokens(), quantizer(x).dequantize())


def test_where_a_deep_layer_refuses_those_above_it_have_grown() -> None:
    x = normal(1, 2, 5, 8)
    cache = QuantizedKVCache(INT4, INT4)
    for layer in (0, 1):
        cache.update(layer, x, x)
    cache.update(0, x, x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        cache.update(1, x / 0, x)
    assert [pair[0].length for pair in cache.layers.values()] == [10, 5]


def test_a_group_that_does_not_divide_the_head_is_refused_at_the_first_token() -> None:
    x = normal(1, 2, 1, 8)
    by_five = IntQuantizer(4, granularity=PerGroup(5))
    with pytest.raises(ValueError, match="group size=5 does not divide the last axis"):
        QuantizedKVCache(INT4, by_five, residual=9).update(0, x, x)
    # Along the tokens any group size will do: any number of tokens may wait.
    QuantizedKVCache(by_five, INT4).update(0, x, x)


NO_CAPACITY = "max_tokens=0 must be a whole number .* of at least 1, or None"
PER_TENSOR = IntQuantizer(4)
NOT_PER_GROUP = r"granularity=PerTensor\(\) of the keys must be PerGroup\(size\)"
PER_CHANNEL = IntQuantizer(4, granularity=PerChannel(0))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"keys": 4}, TypeError, "keys=4 must be a quantizer such as IntQuantizer"),
        ({"values": IntQuantizer}, TypeError, "values=<class .* must be a quantizer"),
        ({"keys": PER_TENSOR}, ValueError, NOT_PER_GROUP),
        ({"values": PER_CHANNEL}, ValueError, "of the values must be PerGroup"),
        ({"key_axis": "head"}, ValueError, "axis='head' of the keys must be one of channel, token"),
        ({"value_axis": ""}, ValueError, "axis='' of the values must be one of"),
        (
            {"residual": -1},
            ValueError,
            r"residual=-1 must be a whole number \(a Python int\) of at least 0",
        ),
        ({"residual": 2.5}, ValueError, "residual=2.5 must be a whole number"),
        (
            {"max_tokens": 0},
            ValueError,
            NO_CAPACITY,
        ),
        ({"max_tokens": 8.0}, ValueError, "max_tokens=8.0 must be a whole number"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        QuantizedKVCache(**{"keys": INT4, "values": INT4} | arguments)
