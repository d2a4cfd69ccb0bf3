"""Streaming through a plain cache is the model itself; a quantized cache shows what bits cost."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcourse import IntQuantizer, PerGroup
from qcourse.methods.kv_cache import QuantizedKVCache
from qcourse.models.evaluate import agreement, perplexity
from qcourse.models.llama import KVCache, Llama, load_weights, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.models.streaming import StreamingModel
from qcourse.models.tinylm import load_tinylm
from qcourse.numerics.metrics import kl_divergence
from qcourse.texts.corpus import encode_documents, stdlib_corpus

SIZES = LlamaConfig(96, 64, 112, 2, 8, 2, max_position_embeddings=64)
TOKENS = torch.randint(96, (83,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Llama:
    weights = random_llama(SIZES, seed=0).state_dict()
    return load_weights(SIZES, weights | {"lm_head.weight": 20 * weights["lm_head.weight"]})


@pytest.mark.parametrize("step", [1, 5, 16, 99])
def test_through_a_plain_cache_it_is_the_model(model: Llama, step: int) -> None:
    stream = StreamingModel(model, KVCache, step=step)
    expected = perplexity(model, TOKENS, 16).nll
    assert perplexity(stream, TOKENS, 16).nll == pytest.approx(expected, abs=1e-5)
    found = agreement(stream, model, TOKENS, 16)
    assert (found.top1, found.tokens) == (1, 82)
    assert found.kl == pytest.approx(0, abs=1e-6)


def test_each_window_has_a_new_cache_and_each_step_its_tokens(model: Llama) -> None:
    made = []
    read = []

    class Noted(KVCache):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    def note(module: Llama, args: tuple) -> None:
        ids, cache = args
        read.append((tuple(ids.shape), cache.length))

    hook = model.register_forward_pre_hook(note)
    perplexity(StreamingModel(model, Noted, step=3), TOKENS[:21], 8, batch_size=1)
    hook.remove()
    assert read == [((1, 3), 0), ((1, 3), 3), ((1, 2), 6)] * 2 + [((1, 3), 0), ((1, 1), 3)]
    assert [cache.length for cache in made] == [8, 8, 4]


def test_it_has_the_room_of_its_model(model: Llama) -> None:
    with pytest.raises(ValueError, match="within the model's 64 positions, got 65"):
        perplexity(StreamingModel(model, KVCache), TOKENS, 65)


def test_what_it_refuses(model: Llama) -> None:
    words = "model must be a Llama: only a Llama takes one of these caches, got Linear"
    with pytest.raises(TypeError, match=words):
        StreamingModel(torch.nn.Linear(2, 2), KVCache)
    words = "cache must be a function that makes an empty cache for each window, got <"
    with pytest.raises(TypeError, match=words):
        StreamingModel(model, KVCache())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step=0 must be at least 1 token"):
        StreamingModel(model, KVCache, step=0)


class Change(NamedTuple):
    perplexity: float  # relative to the model without a cache
    kl: float


@pytest.fixture(scope="module")
def changes() -> dict[str, Change]:
    """What each cache changes in the tiny language model, on 1,024 held-out tokens."""
    tinylm, tokenizer = load_tinylm()
    docs = [document for document in stdlib_corpus("held_out") if document.kind == "docs"]
    text = encode_documents(docs[::4], tokenizer)[:1025]
    ids = text[:-1].view(4, 256)
    targets = text[1:]
    exact = tinylm(ids)

    def nll(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets)

    def change(bits: int, **axes: str) -> Change:
        quantizer = IntQuantizer(
            bits, symmetric=False, granularity=PerGroup(32), scale_dtype=torch.float16
        )
        cache = partial(QuantizedKVCache, quantizer, quantizer, **axes)
        logits = StreamingModel(tinylm, cache, step=8)(ids)
        relative = float((nll(logits) - nll(exact)).expm1())
        return Change(relative, kl_divergence(exact, logits).mean().item())

    wrong = {"key_axis": "token", "value_axis": "channel"}
    right = {f"INT{bits}": change(bits) for bits in (8, 4, 2)}
    return right | {f"INT{bits} wrong": change(bits, **wrong) for bits in (4, 2)}


def test_eight_bits_keep_perplexity_within_a_fifth_of_a_percent(changes: dict[str, Change]) -> None:
    assert abs(changes["INT8"].perplexity) < 0.002
    assert changes["INT8"].kl < 1e-4


def test_four_bits_keep_it_within_two_percent(changes: dict[str, Change]) -> None:
    assert abs(changes["INT4"].perplexity) < 0.02
    assert changes["INT4"].kl > 20 * changes["INT8"].kl


def test_the_wrong_axes_show(changes: dict[str, Change]) -> None:
    assert changes["INT4 wrong"].kl > 2 * changes["INT4"].kl
    assert changes["INT2 wrong"].kl > 2 * changes["INT2"].kl
    assert changes["INT2 wrong"].perplexity > 2 * abs(changes["INT2"].perplexity)
