"""The Llama equals transformers' on the same weights, both ways, with and without a cache."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from qcourse.models.llama import KVCache, Llama, load_weights, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.trace.linears import linears, map_weights

GROUPED = LlamaConfig(
    96, 64, 112, 3, 8, 2, max_position_embeddings=64, rope_theta=500.0, tie_word_embeddings=True
)
SHAPES = {
    "grouped, tied": GROUPED,
    "grouped": replace(GROUPED, tie_word_embeddings=False),
    "one key-value head": replace(GROUPED, num_key_value_heads=1, rms_norm_eps=1e-5),
    "a key-value head each": replace(GROUPED, num_key_value_heads=8, rope_theta=10000.0),
}
IDS = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def config(request: pytest.FixtureRequest) -> LlamaConfig:
    return request.param


def noisy(model: Llama) -> Llama:
    """Change every weight, those of the norms too, so that an error in any of them shows."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.eval().requires_grad_(False)


def theirs_for(config: LlamaConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(TheirConfig(**config.to_transformers())).eval().requires_grad_(False)


def test_theirs_loads_ours(config: LlamaConfig) -> None:
    ours = noisy(random_llama(config, seed=0))
    theirs = theirs_for(config)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


def test_ours_loads_theirs(config: LlamaConfig) -> None:
    theirs = theirs_for(config)
    noisy(theirs)  # type: ignore[arg-type]
    ours = load_weights(LlamaConfig.from_transformers(theirs.config.to_dict()), theirs.state_dict())
    assert ours.config == config
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


def test_a_folder_that_transformers_wrote_loads(config: LlamaConfig, tmp_path: Path) -> None:
    theirs = theirs_for(config)
    theirs.save_pretrained(tmp_path)
    read = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    weights = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) != config.tie_word_embeddings
    ours = load_weights(LlamaConfig.from_transformers(read), weights)
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pieces", [[17], [16, 1], [5, 1, 1, 7, 3], [1] * 17], ids=str)
def test_the_cache_changes_nothing(config: LlamaConfig, pieces: list[int]) -> None:
    ours = noisy(random_llama(config, seed=0))
    theirs = theirs_for(config)
    theirs.load_state_dict(ours.state_dict())
    cache = KVCache()
    past = None
    logits = []
    their_logits = []
    for ids in IDS.split(pieces, dim=1):
        logits.append(ours(ids, cache))
        out = theirs(ids, past_key_values=past, use_cache=True)
        past = out.past_key_values
        their_logits.append(out.logits)
    assert cache.length == 17
    found = torch.cat(logits, dim=1)
    torch.testing.assert_close(found, ours(IDS), atol=1e-4, rtol=0)
    torch.testing.assert_close(found, torch.cat(their_logits, dim=1), atol=1e-4, rtol=0)


def test_the_cache_holds_the_key_value_heads_alone() -> None:
    cache = KVCache()
    random_llama(GROUPED, seed=0)(IDS, cache)
    assert list(cache.layers) == [0, 1, 2]
    assert {tensor.shape for pair in cache.layers.values() for tensor in pair} == {(2, 2, 17, 8)}


def test_another_cache_can_replace_it() -> None:
    class Halved:
        """Keeps keys and values in half precision: the simplest quantized cache."""

        def __init__(self) -> None:
            self.kept: dict[int, tuple[Tensor, Tensor]] = {}

        @property
        def length(self) -> int:
            return self.kept[0][0].shape[2] if self.kept else 0

        def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            all_k = k.half()
            all_v = v.half()
            if layer in self.kept:
                past_k, past_v = self.kept[layer]
                all_k = torch.cat([past_k, all_k], dim=2)
                all_v = torch.cat([past_v, all_v], dim=2)
            self.kept[layer] = (all_k, all_v)
            return all_k.to(k.dtype), all_v.to(v.dtype)

    model = noisy(random_llama(GROUPED, seed=0))
    halved = Halved()
    logits = torch.cat([model(ids, halved) for ids in IDS.split([9, 8], dim=1)], dim=1)
    assert halved.length == 17
    assert not torch.equal(logits, model(IDS))
    torch.testing.assert_close(logits, model(IDS), atol=0.05, rtol=0)


def test_a_token_sees_none_after_it() -> None:
    model = noisy(random_llama(GROUPED, seed=0))
    changed = IDS.clone()
    changed[:, 10:] = 0
    torch.testing.assert_close(model(changed)[:, :10], model(IDS)[:, :10], atol=1e-6, rtol=0)
    assert not torch.allclose(model(changed)[:, 10:], model(IDS)[:, 10:])


def test_only_the_distance_of_two_positions_counts() -> None:
    model = noisy(random_llama(GROUPED, seed=0))
    # All tokens are equal, so attention is a mean of equal values at any position.
    repeated = torch.full((1, 12), 7)
    torch.testing.assert_close(model(repeated)[0, 0], model(repeated)[0, -1], atol=1e-4, rtol=0)


def test_a_tied_head_stays_the_embedding() -> None:
    for model in (
        random_llama(GROUPED, seed=0),
        load_weights(GROUPED, random_llama(GROUPED, seed=1).state_dict()),
    ):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        copied = copy.deepcopy(model)
        assert copied.lm_head.weight is copied.model.embed_tokens.weight


def test_all_that_is_quantized_is_linear() -> None:
    model = random_llama(GROUPED, seed=0)
    others = set(dict(model.named_parameters())) - {f"{name}.weight" for name in linears(model)}
    assert {name.rpartition("layernorm")[1] or name for name in others} == {
        "layernorm",
        "model.norm.weight",
        "model.embed_tokens.weight",
    }
    assert len(linears(model)) == 7 * GROUPED.num_hidden_layers + 1
    replaced = map_weights(model, torch.zeros_like)
    torch.testing.assert_close(replaced(IDS), torch.zeros(2, 17, 96))  # each is used, the head too


def test_another_module_can_replace_a_linear_layer() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    model = random_llama(GROUPED, seed=0)
    before = model(IDS)
    model.lm_head = Doubled(model.lm_head)  # type: ignore[assignment]
    torch.testing.assert_close(model(IDS), 2 * before)


def test_the_seed_alone_decides_and_the_global_generator_stays() -> None:
    state = torch.get_rng_state()
    first = random_llama(GROUPED, seed=0)
    again = random_llama(GROUPED, seed=0)
    other = random_llama(GROUPED, seed=1)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    load_weights(GROUPED, first.state_dict())
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_that_do_not_fit_are_named() -> None:
    weights = random_llama(GROUPED, seed=0).state_dict()
    missing = {name: w for name, w in weights.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"Missing key.*model\.norm\.weight"):
        load_weights(GROUPED, missing)
    with pytest.raises(ValueError, match=r"Unexpected key.*extra"):
        load_weights(GROUPED, {**weights, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="size mismatch"):
        load_weights(GROUPED, {**weights, "model.norm.weight": torch.ones(3)})
    with pytest.raises(ValueError, match=r"Missing key.*embed_tokens"):
        load_weights(GROUPED, {})


def test_configs_of_transformers_4_and_5_are_read() -> None:
    new = GROUPED.to_transformers()
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    assert LlamaConfig.from_transformers(new) == LlamaConfig.from_transformers(old) == GROUPED
    for file in (old, new):
        assert TheirConfig(**file).rope_parameters["rope_theta"] == 500
    for plain in ({"rope_type": "default"}, {"type": "default"}):
        assert LlamaConfig.from_transformers({**old, "rope_scaling": plain}) == GROUPED
    ungrouped = LlamaConfig.from_transformers({**old, "num_key_value_heads": None})
    assert ungrouped.num_key_value_heads == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'llama'"),
        ({"attention_bias": True}, "attention_bias = False"),
        ({"mlp_bias": True}, "mlp_bias = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'silu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling = None"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "rope_scaling = None",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}, "rope_scaling = None"),
        ({"head_dim": 16}, "head_dim = 8"),
        ({"vocab_size": None}, "vocab_size"),
    ],
    ids=str,
)
def test_a_config_that_means_another_function_is_refused(
    change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaConfig.from_transformers(GROUPED.to_transformers() | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_attention_heads": 7},
            "hidden_size must be a multiple of 2 x num_attention_heads.* got 64 and 7",
        ),
        (
            {"hidden_size": 56},
            "hidden_size must be a multiple of 2 x num_attention_heads.* got 56 and 8",
        ),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads must be at least 1, got -2"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads must divide num_attention_heads, got 3 and 8",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(GROUPED, **change)
