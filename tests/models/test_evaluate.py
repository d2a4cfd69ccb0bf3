"""Perplexity and agreement equal a computation by hand; generation equals transformers'."""

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from qcourse.models.evaluate import agreement, perplexity
from qcourse.models.evaluation_results import Agreement, Perplexity
from qcourse.models.generate import generate
from qcourse.models.llama import KVCache, Llama, load_weights, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.trace.linears import map_weights

SIZES = LlamaConfig(96, 64, 112, 2, 8, 2, max_position_embeddings=64)
TOKENS = torch.randint(96, (83,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model() -> Llama:
    """Random, with a head large enough for its predictions to differ from token to token."""
    weights = random_llama(SIZES, seed=0).state_dict()
    return load_weights(SIZES, weights | {"lm_head.weight": 20 * weights["lm_head.weight"]})


@pytest.fixture(scope="module")
def theirs(model: Llama) -> LlamaForCausalLM:
    theirs = LlamaForCausalLM(TheirConfig(**SIZES.to_transformers())).eval().requires_grad_(False)
    theirs.load_state_dict(model.state_dict())
    return theirs


def by_hand(model: Llama, tokens: list[int], context: int, stride: int) -> list[float]:
    """-log p of each token but the first: from the window that is the first to reach it."""
    losses = []
    for target in range(1, len(tokens)):
        # A window predicts the tokens start + 1 ... start + context.
        start = 0
        while start + context < target:
            start += stride
        logits = model(torch.tensor([tokens[start:target]]))[0, -1].double()
        losses.append(float(logits.logsumexp(0) - logits[tokens[target]]))
    return losses


@pytest.mark.parametrize(
    ("context", "stride", "length"),
    [
        (8, None, 83),
        (8, 3, 83),
        (8, 1, 83),
        (8, 8, 17),
        (8, 8, 16),
        (8, 5, 9),
        (64, 64, 20),
        (1, 1, 83),
        (64, 7, 2),
    ],
)
def test_perplexity_equals_the_hand_computation(
    model: Llama, context: int, stride: int | None, length: int
) -> None:
    losses = by_hand(model, TOKENS[:length].tolist(), context, stride or context)
    found = perplexity(model, TOKENS[:length], context, stride=stride)
    assert (found.tokens, found.context, found.stride) == (length - 1, context, stride or context)
    assert found.nll == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_neither_batches_nor_the_kind_of_model_change_it(
    model: Llama, theirs: LlamaForCausalLM
) -> None:
    expected = perplexity(model, TOKENS, 8, stride=3, batch_size=1)
    for found in (
        perplexity(model, TOKENS, 8, stride=3, batch_size=100),
        perplexity(theirs, TOKENS, 8, stride=3),
        perplexity(lambda ids: model(ids, KVCache()), TOKENS.int(), 8, stride=3),
    ):
        assert found.nll == pytest.approx(expected.nll, abs=1e-5)
        assert found.tokens == expected.tokens


def test_no_batch_is_larger_than_asked() -> None:
    seen = []

    def uniform(ids: Tensor) -> Tensor:
        seen.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, 96)

    assert perplexity(uniform, TOKENS, 8, batch_size=4).perplexity == pytest.approx(96)
    assert seen == [(4, 8), (4, 8), (2, 8), (1, 2)]


def test_bits_per_byte() -> None:
    found = Perplexity(nll=2 * math.log(2), tokens=30, context=8, stride=8)
    assert found.bits_per_byte(120) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="size_bytes must be at least 1, got 0"):
        Perplexity(nll=1.0, tokens=30, context=8, stride=8).bits_per_byte(0)


def test_agreement_equals_the_hand_computation(model: Llama) -> None:
    rounded = map_weights(model, lambda w: (w * 20).round() / 20)
    kl = []
    equal = []
    for start in range(0, len(TOKENS) - 1, 8):
        ids = TOKENS[None, start : min(start + 8, len(TOKENS) - 1)]
        p = model(ids)[0].double().softmax(-1)
        q = rounded(ids)[0].double().softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
        equal += (p.argmax(-1) == q.argmax(-1)).tolist()
    found = agreement(rounded, model, TOKENS, 8)
    assert found.tokens == len(kl) == 82
    assert found.kl == pytest.approx(sum(kl) / 82, rel=1e-4)
    assert found.top1 == sum(equal) / 82
    assert found.perplexity == pytest.approx(perplexity(rounded, TOKENS, 8).perplexity, rel=1e-5)
    assert 0.1 < found.top1 < 0.9
    # KL has a direction.
    assert agreement(model, rounded, TOKENS, 8).kl != pytest.approx(found.kl, rel=1e-3)
    one_by_one = agreement(model, rounded, TOKENS, 8, batch_size=1)
    at_once = agreement(model, rounded, TOKENS, 8, batch_size=100)
    assert one_by_one.kl == pytest.approx(at_once.kl, rel=1e-5)


def test_a_model_agrees_with_itself_and_with_transformers(
    model: Llama, theirs: LlamaForCausalLM
) -> None:
    found = agreement(model, model, TOKENS, 16)
    assert found == Agreement(kl=0.0, top1=1.0, tokens=82, nll=found.nll)
    found = agreement(theirs, model, TOKENS, 16)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1


def test_another_vocabulary_is_refused(model: Llama) -> None:
    with pytest.raises(ValueError, match=r"one vocabulary.*\(2, 40, 50\) and \(2, 40, 96\)"):
        agreement(lambda ids: torch.zeros(*ids.shape, 50), model, TOKENS[:81], 40)


@pytest.mark.parametrize(
    "evaluate",
    [perplexity, lambda m, *args, **more: agreement(m, m, *args, **more)],
    ids=["alone", "to another"],
)
def test_bad_tokens_are_refused(model: Llama, evaluate: object) -> None:
    for tokens, error, message in [
        (TOKENS.float(), TypeError, "tokens must be integers.*float32"),
        (TOKENS > 5, TypeError, "tokens must be integers.*bool"),
        (TOKENS[None], ValueError, r"one row of at least 2, got the shape \(1, 83\)"),
        (TOKENS[:1], ValueError, r"one row of at least 2, got the shape \(1,\)"),
        (TOKENS[:0], ValueError, "one row of at least 2"),
    ]:
        with pytest.raises(error, match=message):
            evaluate(model, tokens, 8)  # type: ignore[operator]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        evaluate(model, TOKENS, 8, batch_size=0)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"context must be at least 1, .* got 0"):
        evaluate(model, TOKENS, 0)  # type: ignore[operator]


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_that_skips_tokens_is_refused(model: Llama, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"stride must be from 1 to context \(8\).*got {stride}"):
        perplexity(model, TOKENS, 8, stride=stride)


def test_a_context_that_the_model_has_no_positions_for_is_refused(model: Llama) -> None:
    with pytest.raises(ValueError, match="within the model's 64 positions, got 65"):
        perplexity(model, TOKENS, 65)
    for pair in ((model, lambda ids: model(ids)), (lambda ids: model(ids), model)):
        with pytest.raises(ValueError, match="within the model's 64 positions, got 65"):
            agreement(*pair, TOKENS, 65)
    assert perplexity(model, TOKENS, 64).tokens == 82


def test_a_perplexity_beyond_all_floats_is_infinite() -> None:
    def sure_and_wrong(ids: Tensor) -> Tensor:
        return 2000 * torch.nn.functional.one_hot((ids + 1) % 96, 96)

    found = perplexity(sure_and_wrong, torch.zeros(20, dtype=torch.long), 16)
    assert found.nll == pytest.approx(2000)
    assert found.perplexity == math.inf


def greedy_without_cache(model: Llama, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat([ids, model(ids[None])[0, -1].argmax(keepdim=True)])
    return ids


def test_greedy_decoding_equals_the_model_without_a_cache_and_transformers(
    model: Llama, theirs: LlamaForCausalLM
) -> None:
    expected = greedy_without_cache(model, TOKENS[:5], 12)
    assert torch.equal(generate(model, TOKENS[:5], 12), expected)
    assert torch.equal(generate(theirs, TOKENS[:5], 12), expected)
    own = theirs.generate(
        TOKENS[None, :5],
        attention_mask=torch.ones(1, 5, dtype=torch.long),
        max_new_tokens=12,
        do_sample=False,
    )
    assert torch.equal(own[0][: len(expected)], expected)


def test_a_step_reads_one_token(model: Llama) -> None:
    cache = KVCache()
    read = []
    hook = model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    generate(model, TOKENS[:5], 4, cache=cache)
    hook.remove()
    assert read == [5, 1, 1, 1]
    assert cache.length == 8


def test_draws_depend_on_seed_and_temperature(model: Llama) -> None:
    def drawn(temperature: float, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        text = generate(model, TOKENS[:5], 12, temperature=temperature, generator=generator)
        return text.tolist()

    assert drawn(1.0, seed=0) == drawn(1.0, seed=0)
    assert len({tuple(drawn(1.0, seed)) for seed in range(5)}) == 5
    assert drawn(1e-4, seed=0) == generate(model, TOKENS[:5], 12).tolist()


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])

    def fixed(ids: Tensor, **_: object) -> object:
        return type("Out", (), {"logits": logits.expand(*ids.shape, 3), "past_key_values": None})

    generator = torch.Generator().manual_seed(0)
    text = generate(fixed, torch.tensor([0]), 3000, temperature=2.0, generator=generator)[1:]
    shares = text.bincount(minlength=3) / 3000
    # 0.03 is three standard deviations of a share.
    torch.testing.assert_close(shares, (logits / 2).softmax(0), atol=0.03, rtol=0)


def test_stop_ends_the_text(model: Llama) -> None:
    whole = generate(model, TOKENS[:5], 12)
    stop = int(whole[8])
    ended = generate(model, TOKENS[:5], 12, stop=stop)
    assert torch.equal(ended, whole[: 5 + whole[5:].tolist().index(stop) + 1])


def test_what_generate_refuses(model: Llama, theirs: LlamaForCausalLM) -> None:
    words = "cache must be None for a LlamaForCausalLM: only a Llama takes one"
    with pytest.raises(ValueError, match=words):
        generate(theirs, TOKENS[:5], 4, cache=KVCache())
    with pytest.raises(ValueError, match=r"max_new_tokens must be at least 0 .* got -1 after 5"):
        generate(model, TOKENS[:5], -1)
    with pytest.raises(ValueError, match="the model's 64 positions, got 60 after 5"):
        generate(model, TOKENS[:5], 60)
    cache = KVCache()
    generate(model, TOKENS[:5], 4, cache=cache)
    with pytest.raises(ValueError, match="the model's 64 positions, got 56 after 9"):
        generate(model, TOKENS[:1], 56, cache=cache)
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        generate(model, TOKENS[:5], 5, temperature=-1)
    with pytest.raises(ValueError, match="ids must be one row of at least 1"):
        generate(model, TOKENS[:0], 5)
    with pytest.raises(TypeError, match="ids must be integers"):
        generate(model, TOKENS[:5].float(), 5)
