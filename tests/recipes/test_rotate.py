"""Rotated models compute the same, for every rotation; others are left alone, with a reason."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers import LlamaConfig as TheirConfig

from qcourse import IntQuantizer, PerChannel
from qcourse.layers.storage import load_quantized, save_quantized
from qcourse.methods.activations import WithActivations
from qcourse.methods.rotation import Rotation, cayley_descent, random_hadamard
from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.models.minilm import load_minilm
from qcourse.models.tinylm import load_tinylm
from qcourse.recipes.outliers import plant_outliers
from qcourse.recipes.quantize import quantize_model
from qcourse.recipes.rotate import rotate_model
from qcourse.recipes.rotated_weights import rotated_weights
from qcourse.recipes.run_time_rotation import rotate_at_run_time
from qcourse.trace.linears import linears, record_inputs

TOKENS = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(1))
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
INT4 = IntQuantizer(4, granularity=PerChannel(0))


def lively(model: Any) -> Any:
    """With weights large enough that layers matter, and gains and biases of many sizes."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.requires_grad_(False).eval().named_parameters():
        if "norm" in name or "bias" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        elif "proj" in name:
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def llama(kv_heads: int = 2, **changes: Any) -> Llama:
    return lively(random_llama(LlamaConfig(96, 64, 96, 2, 4, kv_heads, **changes), seed=0))


def theirs(**changes: Any) -> LlamaForCausalLM:
    config = TheirConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True, **changes)
    return lively(LlamaForCausalLM(config))


def qwen(**changes: Any) -> Qwen2ForCausalLM:
    """Its q, k and v have biases."""
    return lively(Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, **changes)))


def opt() -> OPTForCausalLM:
    """Its norms are LayerNorms."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return lively(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=64)))


def logits(model: Any, ids: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


MODELS = {
    "ours": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "no groups": lambda: llama(4),
    "transformers": theirs,
    "biases everywhere": lambda: theirs(attention_bias=True, mlp_bias=True),
    "qwen": qwen,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_model_is_what_it_was(name: str) -> None:
    model = MODELS[name]()
    kept = {key: w.clone() for key, w in model.state_dict().items()}
    before = logits(model)
    for options in (
        {},
        {"seed": 3, "heads": False, "down": False},
        {"rotation": torch.linalg.qr(torch.randn(64, 64)).Q},
    ):
        rotated, report = rotate_model(model, **options)
        torch.testing.assert_close(logits(rotated), before, rtol=1e-4, atol=1e-4)
        assert rotated is not model
        assert not report.left
        assert len(report.fused) == 21
        assert len(report.at_run_time) == 2 * options.get("down", True)
        mine = {w.data_ptr() for w in rotated.state_dict().values()}
        assert not mine & {w.data_ptr() for w in model.state_dict().values()}
    assert all(torch.equal(w, kept[key]) for key, w in model.state_dict().items())
    assert torch.equal(logits(model), before)


def test_ours_is_no_longer_tied() -> None:
    model = llama(tie_word_embeddings=True)
    rotated: Any = rotate_model(model).model
    assert (model.config.tie_word_embeddings, rotated.config.tie_word_embeddings) == (True, False)
    assert rotated.lm_head.weight is not rotated.model.embed_tokens.weight


def test_every_part_has_changed_and_gains_are_1() -> None:
    model = theirs(attention_bias=True, mlp_bias=True)
    rotated = rotate_model(model, down=False).model
    old, new = (dict(each.named_parameters()) for each in (model, rotated))
    for name, weight in new.items():
        if "norm" in name:
            assert (weight == 1).all()
        elif re.search(r"(q|k|gate|up)_proj\.bias", name):
            assert torch.equal(weight, old[name])
        else:
            assert (
                float((weight - old.get(name, old["model.embed_tokens.weight"])).abs().max()) > 0.01
            ), name
    assert new["lm_head.weight"] is not new["model.embed_tokens.weight"]
    assert (model.config.tie_word_embeddings, rotated.config.tie_word_embeddings) == (True, False)


def test_the_stream_is_rotated_and_so_is_what_enters_down_and_o() -> None:
    model = llama(4)
    q = random_hadamard(64, seed=0)
    before = record_inputs(model, lambda: logits(model))
    rotated: Any = rotate_model(model).model
    after = record_inputs(rotated, lambda: logits(rotated))
    gain = model.model.layers[1].input_layernorm.weight
    close = {"rtol": 1e-4, "atol": 1e-4}
    here = "model.layers.1"
    torch.testing.assert_close(
        after[f"{here}.self_attn.q_proj"], before[f"{here}.self_attn.q_proj"] / gain @ q, **close
    )
    torch.testing.assert_close(
        after[f"{here}.mlp.down_proj.1"], Rotation(96)(before[f"{here}.mlp.down_proj"]), **close
    )
    heads = before[f"{here}.self_attn.o_proj"].unflatten(1, (4, 16))
    torch.testing.assert_close(
        after[f"{here}.self_attn.o_proj"], Rotation(16)(heads).flatten(1), **close
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    rotated, report = rotate_model(model)
    assert not report.left
    assert {p.dtype for p in rotated.parameters()} == {dtype}
    exact = logits(llama().double())
    assert float((logits(rotated).double() - exact).norm() / exact.norm()) < {
        torch.float64: 1e-6
    }.get(dtype, 0.05)


def test_the_tiny_language_model() -> None:
    model, _ = load_tinylm()
    ids = torch.randint(
        model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0)
    )
    rotated, report = rotate_model(model)
    assert float((logits(rotated, ids) - logits(model, ids)).abs().max()) < 1e-4
    assert len(report.at_run_time) == 6


def test_it_is_quantized_like_any_other_and_outliers_no_longer_hurt() -> None:
    model = plant_outliers(llama(), [3, 40], 64.0)
    exact = logits(model)

    def lost(model: nn.Module) -> float:
        method = WithActivations(INT4, INT4)
        quantized, report = quantize_model(model, method, progress=False)
        assert len(report.layers) == 14
        return float((logits(quantized) - exact).norm() / exact.norm())

    plain = lost(model)
    turned = [lost(rotate_model(model, seed=seed).model) for seed in range(3)]
    assert max(turned) < 0.6 * plain


def test_quantized_it_can_be_stored(tmp_path: Path) -> None:
    quantized = quantize_model(
        rotate_model(llama(), seed=3).model, WithActivations(INT4, INT4), progress=False
    ).model
    save_quantized(quantized, tmp_path / "model.safetensors")
    loaded = load_quantized(tmp_path / "model.safetensors", rotate_model(llama(), seed=4).model)
    assert torch.equal(logits(loaded), logits(quantized))


def test_gradients_reach_the_rotation_and_descent_lowers_a_loss() -> None:
    model = plant_outliers(llama(), [3, 40], 64.0)
    inputs: list[Tensor] = []

    def spread(r: Tensor) -> Tensor:
        """The fourth power of what enters q: large where a channel stands out."""
        inputs.clear()
        weights = rotated_weights(model, lambda w: w @ r)
        torch.func.functional_call(model, weights, (TOKENS,))
        return inputs[0].pow(4).mean()

    start = torch.linalg.qr(
        torch.eye(64) + 0.1 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    ).Q
    with model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda layer, x: inputs.append(x[0])
    ):
        r, losses = cayley_descent(spread, start, steps=20, lr=0.5)
    assert losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(
        logits(rotate_model(model, r).model), logits(model), rtol=1e-3, atol=1e-3
    )


# What is left as it was


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (load_minilm, "it has no model.layers, as a Llama would"),
        (lambda: nn.Linear(4, 4), "it has no model.layers"),
        (lambda: opt(), "it has no model."),
        (
            lambda: lively(
                GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=16))
            ),  # gain 1 + w
            "rotated, it computes something else",
        ),
        (
            lambda: quantize_model(llama(), INT4, progress=False).model,
            "is no nn.Linear but a QuantizedLinear",
        ),
    ],
)
def test_models_without_foldable_norms(make: Any, words: str) -> None:
    model = make()
    rotated, report = rotate_model(model)
    assert rotated is model
    assert words in report.left[0][1]
    assert not report.fused
    assert "the model is left as it was: " in str(report)


def test_one_percent_off_is_another_model() -> None:
    model: Any = llama()
    was = model.lm_head.weight.clone()
    model.lm_head.register_forward_hook(
        lambda layer, args, out: out * (1 if torch.equal(layer.weight, was) else 1.01)
    )
    rotated, report = rotate_model(model)
    assert rotated is model
    assert "rotated, it computes something else" in str(report)


@pytest.mark.parametrize("training", [True, False])
def test_what_the_layers_are_set_to_stays(training: bool) -> None:
    model = llama().requires_grad_(False).train(training)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
    rotated: Any = rotate_model(model).model
    assert {module.training for module in rotated.modules()} == {training}
    kept = [layer.mlp.down_proj[1].weight.requires_grad for layer in rotated.model.layers]
    assert kept == [False, True]
    layer = nn.Linear(8, 4).train(training)
    layer.bias.requires_grad_(False)
    turned: Any = rotate_at_run_time(nn.Sequential(layer)).model
    assert (turned[0].training, turned[0][1].training) == (training, training)
    assert (turned[0][1].weight.requires_grad, turned[0][1].bias.requires_grad) == (True, False)


def test_a_layer_norm_with_the_name_of_another() -> None:
    model: Any = llama()
    model.model.layers[1].input_layernorm = nn.LayerNorm(64)
    assert "model.layers.1.input_layernorm is a LayerNorm" in rotate_model(model).report.left[0][1]


@pytest.mark.parametrize(
    ("sizes", "words", "options"),
    [
        ((96, 92, 96, 1, 2, 2), "the residual stream of width 92", {"rotation": torch.eye(92)}),
        ((96, 96, 92, 1, 4, 2), "the input of down_proj of width 92", {"down": False}),
        ((96, 120, 96, 1, 4, 2), "a head of width 30", {"heads": False}),
    ],
)
def test_widths_without_a_construction(
    sizes: tuple[int, ...], words: str, options: dict[str, Any]
) -> None:
    model = lively(random_llama(LlamaConfig(*sizes), seed=0))
    others = {"heads": False} if sizes[1] == 92 else {}  # heads of 46
    (way_out,) = options
    message = rf"no Hadamard matrix for {words} \(sizes are 1, 2, .*\); pass {way_out}="
    with pytest.raises(ValueError, match=message):
        rotate_model(model, **others)
    rotated, report = rotate_model(model, **options, **others)
    assert not report.left
    torch.testing.assert_close(logits(rotated), logits(model), rtol=1e-4, atol=1e-4)


def test_widths_that_differ_by_layer() -> None:
    model: Any = llama()
    mlp = model.model.layers[1].mlp
    mlp.gate_proj = nn.Linear(64, 92)
    mlp.up_proj = nn.Linear(64, 92)
    mlp.down_proj = nn.Linear(92, 64)
    with pytest.raises(ValueError, match="input of down_proj of width 92"):
        rotate_model(model)
    assert not rotate_model(model, down=False).report.left


@pytest.mark.parametrize(
    ("rotation", "error", "words"),
    [
        (torch.eye(32), ValueError, "rotation of shape (32, 32) must be (64, 64)"),
        (
            torch.ones(64, 64),
            ValueError,
            "rotation rotation^T = I to 1e-4, and is off by 64",
        ),
        (torch.ones(64), ValueError, "rotation of shape (64,) must be square"),
        (torch.eye(64).int(), TypeError, "rotation has dtype torch.int32"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_rotation(rotation: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        rotate_model(llama(), rotation)


# At run time


def test_minilm_rotates_at_run_time() -> None:
    model = load_minilm()
    texts = ["a cat sat down", "interest rates rose", ""]
    rotated, report = rotate_at_run_time(model, seed=4)
    assert isinstance(rotated, type(model))
    assert len(report.at_run_time) == 36
    assert report.left == ()
    assert float((rotated.embed(texts) - model.embed(texts)).abs().max()) < 1e-5
    assert not torch.equal(rotated.layers[0].up[1].weight, model.layers[0].up.weight)
    # Each layer's input is the other's, rotated.
    x, turned = (
        record_inputs(each, lambda each=each: each.embed(texts)) for each in (model, rotated)
    )
    torch.testing.assert_close(
        turned["layers.2.down.1"], Rotation(1536, seed=4)(x["layers.2.down"]), rtol=1e-3, atol=1e-3
    )


def test_it_is_a_copy_and_only_what_is_chosen_is_rotated() -> None:
    model = nn.Sequential(nn.Linear(8, 24, bias=False), nn.ReLU(), nn.Linear(24, 8))
    model.requires_grad_(False).eval()
    kept = {key: w.clone() for key, w in model.state_dict().items()}
    x = torch.randn(5, 8)
    rotated, report = rotate_at_run_time(model, layers=["2"])
    torch.testing.assert_close(rotated(x), model(x))
    assert (report.at_run_time, report.left) == (("2",), (("0", "not chosen"),))
    rotated[0].weight.zero_()
    rotated[2][1].bias.zero_()
    assert all(torch.equal(w, kept[key]) for key, w in model.state_dict().items())
    assert list(linears(rotated)) == ["0", "2.1"]


def test_widths_that_do_not_fit_are_left_or_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 4))
    report = rotate_at_run_time(model).report
    assert report.at_run_time == ("0",)
    assert dict(report.left)["1"].startswith("n=10 has no Hadamard matrix here")
    assert "1 is left as it was: n=10" in str(report)
    with pytest.raises(ValueError, match=r"no layer can be rotated:\n- : n=10 has no Hadamard"):
        rotate_at_run_time(nn.Linear(10, 4))
