"""Scales move into the module before only where the model computes the same; planted outliers."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, LlamaForCausalLM, OPTConfig, OPTForCausalLM
from transformers import LlamaConfig as TheirConfig

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.awq import Awq
from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.models.minilm import load_minilm
from qcourse.numerics.microscaling import NVFP4Quantizer, mx
from qcourse.numerics.minifloat import E2M1
from qcourse.recipes.block_probe import blocks
from qcourse.recipes.fold import fold
from qcourse.recipes.outliers import plant_outliers
from qcourse.recipes.quantize import quantize_model
from qcourse.trace.calibration_batches import windows
from qcourse.trace.linears import linears, record_inputs

TOKENS = torch.randint(96, (66,), generator=torch.Generator().manual_seed(1))
INT8 = IntQuantizer(8, granularity=PerGroup(32))
GROUPS = {
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.up_proj": ["mlp.down_proj"],
    "self_attn.v_proj": ["self_attn.o_proj"],
}


def llama(kv_heads: int = 2, **changes: Any) -> Llama:
    """A Llama whose layers do something, and whose gains are not all 1."""
    config = LlamaConfig(96, 64, 96, 2, 4, kv_heads, **changes)
    model = random_llama(config, seed=0).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter *= 5
        elif "norm" in name:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def theirs(model: Llama) -> LlamaForCausalLM:
    """The same in transformers."""
    config = TheirConfig(**model.config.to_transformers())
    other = LlamaForCausalLM(config).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    return other


def logits(model: Any) -> Tensor:
    output = model(TOKENS[None])
    return output if isinstance(output, Tensor) else output.logits


def scale_of(size: int, seed: int = 3) -> Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(seed)))


def multiply_columns(model: nn.Module, names: list[str], scale: Tensor) -> None:
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layer.weight = nn.Parameter(layer.weight * scale, requires_grad=False)


# What can be folded


@pytest.mark.parametrize(
    "make", [lambda: llama(4), lambda: theirs(llama(4))], ids=["ours", "transformers"]
)
@pytest.mark.parametrize("place", GROUPS)
def test_a_folded_model_is_what_it_was(make: Any, place: str) -> None:
    model = make()
    before = logits(model)
    kept = {name: w.clone() for name, w in model.state_dict().items()}
    old = dict(model.named_parameters())
    names = [f"model.layers.1.{name}" for name in GROUPS[place]]
    scale = scale_of(linears(model)[names[0]].in_features)
    assert fold(model, names, scale) == f"model.layers.1.{place}"
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, kept[name])]
    assert changed == [f"model.layers.1.{place}.weight"]
    assert all(torch.equal(w, kept[name]) for name, w in old.items())  # none was written into
    assert float((logits(model) - before).abs().max()) > 0.01
    multiply_columns(model, names, scale)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_all_of_a_model_at_once() -> None:
    model = llama(4)
    before = logits(model)
    for layer in range(2):
        for place, members in GROUPS.items():
            names = [f"model.layers.{layer}.{name}" for name in members]
            scale = scale_of(linears(model)[names[0]].in_features, seed=layer)
            assert fold(model, names, scale) == f"model.layers.{layer}.{place}"
            multiply_columns(model, names, scale)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("granularity", [PerGroup(32), PerChannel(0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_into_a_layer_that_is_quantized_already(
    granularity: Any, symmetric: bool, dtype: torch.dtype
) -> None:
    int8 = IntQuantizer(8, symmetric, granularity, scale_dtype=dtype)
    model: Any = quantize_model(
        llama(), int8, layers=lambda name, layer: "down" not in name, progress=False
    ).model
    before = logits(model)
    up = model.model.layers[0].mlp.up_proj
    assert isinstance(up, QuantizedLinear)
    stored = up.scale
    codes = up.packed
    name = "model.layers.0.mlp.down_proj"
    scale = scale_of(96)
    assert fold(model, [name], scale) == "model.layers.0.mlp.up_proj"
    assert up.packed is codes
    assert up.scale is not stored
    assert up.scale.dtype == dtype  # type: ignore[union-attr]
    multiply_columns(model, [name], scale)
    torch.testing.assert_close(
        logits(model), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-3
    )


def test_biases_are_divided_too_and_a_relu_is_no_obstacle() -> None:
    config = OPTConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=64,
        num_attention_heads=4,
        word_embed_proj_dim=32,
    )
    model = OPTForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    before = logits(model)
    layer = "model.decoder.layers.1"
    for place, members in {
        "self_attn_layer_norm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.v_proj": ["self_attn.out_proj"],
        "fc1": ["fc2"],
    }.items():
        names = [f"{layer}.{name}" for name in members]
        scale = scale_of(linears(model)[names[0]].in_features)
        assert fold(model, names, scale) == f"{layer}.{place}"
        multiply_columns(model, names, scale)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-4)


def test_half_precision_and_what_was_trained_still_is() -> None:
    model = llama().bfloat16()
    norm = model.model.layers[0].post_attention_layernorm
    norm.weight.requires_grad_()
    assert fold(model, ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"], scale_of(64))
    assert (norm.weight.dtype, norm.weight.requires_grad) == (torch.bfloat16, True)


# What cannot


class Block(nn.Module):
    """A block with one norm and two layers, put together in one of several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(16, elementwise_affine=kind != "no gain")
        self.a = nn.Linear(16, 16)
        self.b = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        match self.kind:
            case "to a and b" | "no gain":
                return x + self.a(y) * torch.tanh(self.b(y))
            case "to a and the residual":
                return y + self.a(y)
            case "to a and an attention of its own":
                return x + self.a(y) * y.mean(-1, keepdim=True)
            case "to a and, a little, the residual":
                return x + self.a(y) + 1e-4 * y
            case "to a and what sets tokens apart":
                return x + self.a(y) + y - y.mean(1, keepdim=True)
            case "no float64":
                return x + self.a(y.float())
            case "gelu between":
                return x + self.b(nn.functional.gelu(self.a(x)))
            case "relu between":
                return x + self.b(torch.relu(self.a(x)))
            case "mixed between":
                return x + self.b(self.a(x).flip(-1))
        raise ValueError(self.kind)


class Chain(nn.Module):
    """An embedding and two blocks."""

    def __init__(self, kind: str, *, shared: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Block(kind), Block(kind)])
        if shared:
            setattr(self.blocks[1], shared, getattr(self.blocks[0], shared))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 0.3, generator)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("kind", "names", "place"),
    [
        ("to a and b", ["a", "b"], "norm"),
        ("to a and b", ["b", "a"], "norm"),
        ("to a and b", ["a"], None),
        ("no gain", ["a", "b"], None),
        ("to a and the residual", ["a"], None),
        ("to a and an attention of its own", ["a"], None),
        ("to a and, a little, the residual", ["a"], None),
        ("to a and what sets tokens apart", ["a"], None),
        ("no float64", ["a"], None),
        ("gelu between", ["b"], None),
        ("relu between", ["b"], "a"),
        ("mixed between", ["b"], None),
    ],
)
def test_only_where_nothing_else_minds(kind: str, names: list[str], place: str | None) -> None:
    model = Chain(kind).requires_grad_(False)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    found = fold(model, [f"blocks.1.{name}" for name in names], scale_of(16))
    assert found == (place and f"blocks.1.{place}")
    if place is None:
        assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def quiet(dtype: torch.dtype) -> Llama:
    """A Llama whose layers add next to nothing."""
    model = random_llama(LlamaConfig(96, 64, 96, 2, 4, 4), seed=0).requires_grad_(False).eval()
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter *= 0.1
    return model.to(dtype)


MODELS = {
    "loud": lambda: llama(4),
    "quiet": lambda: quiet(torch.float32),
    "in bfloat16": lambda: quiet(torch.bfloat16),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", GROUPS)
def test_however_little_a_branch_adds_it_is_known_what_precedes(kind: str, place: str) -> None:
    model = MODELS[kind]()
    names = [f"model.layers.0.{name}" for name in GROUPS[place]]
    size = linears(model)[names[0]].in_features
    assert fold(model, names, scale_of(size)) == f"model.layers.0.{place}"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "names",
    [
        ["attn.v"],
        ["attn.k"],
        ["attn.q", "attn.k"],
        ["attn.k", "attn.v"],
        ["mlp.gate"],
        ["mlp.up"],
        ["mlp.gate", "attn.q"],
    ],
)
def test_a_norm_that_other_layers_read_too_is_left_alone(kind: str, names: list[str]) -> None:
    full = [f"model.layers.0.{name.replace('attn', 'self_attn')}_proj" for name in names]
    assert fold(MODELS[kind](), full, scale_of(64)) is None


def test_a_layer_whose_input_makes_no_difference_reads_it_all_the_same() -> None:
    model: Any = llama(4)
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        layer.weight.zero_()
    names = [f"model.layers.0.{name}" for name in GROUPS["input_layernorm"]]
    assert fold(model, names[2:], scale_of(64)) is None
    assert fold(model, names, scale_of(64)) == "model.layers.0.input_layernorm"


@pytest.mark.parametrize("names", [*GROUPS.values(), ["mlp.gate_proj"], ["self_attn.v_proj"]])
def test_where_an_input_makes_no_difference_nothing_is_known(names: list[str]) -> None:
    model: Any = llama(4)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    full = [f"model.layers.0.{name}" for name in names]
    assert fold(model, full, scale_of(linears(model)[full[0]].in_features)) is None


@pytest.mark.parametrize("names", [["a", "b"], ["b"]])
def test_a_weight_that_is_made_of_others_cannot_be_divided(names: list[str]) -> None:
    model = Chain("to a and b" if len(names) == 2 else "relu between").requires_grad_(False)
    nn.utils.parametrizations.weight_norm(
        model.blocks[0].norm if len(names) == 2 else model.blocks[0].a
    )
    assert fold(model, [f"blocks.0.{name}" for name in names], scale_of(16)) is None


def test_what_two_blocks_share_is_left_alone() -> None:
    for shared in ("norm", "a"):
        assert (
            fold(Chain("to a and b", shared=shared), ["blocks.1.a", "blocks.1.b"], scale_of(16))
            is None
        )
    assert fold(Chain("to a and b"), ["blocks.0.a", "blocks.1.b"], scale_of(16)) is None


def test_grouped_queries_have_too_few_rows() -> None:
    assert fold(llama(2), ["model.layers.0.self_attn.o_proj"], scale_of(64)) is None


def test_the_head_is_in_no_block() -> None:
    assert fold(llama(), ["lm_head"], scale_of(64)) is None


def test_a_gain_that_counts_from_1_cannot_be_divided() -> None:
    config = GemmaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
    )
    model = GemmaForCausalLM(config).eval()
    assert blocks(model)
    assert (
        fold(model, ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"], scale_of(32))
        is None
    )
    assert (
        fold(model, ["model.layers.0.mlp.down_proj"], scale_of(64)) == "model.layers.0.mlp.up_proj"
    )
    with pytest.raises(
        ValueError, match="no norm of this GemmaForCausalLM feeds linear layers alone"
    ):
        plant_outliers(model, [3], 8.0)


@pytest.mark.parametrize("name", ["query", "key", "value", "out", "up", "down"])
def test_a_post_norm_model_is_left_alone(name: str) -> None:
    model = load_minilm()
    size = linears(model)[f"layers.0.{name}"].in_features
    assert fold(model, [f"layers.0.{name}"], scale_of(size)) is None


@pytest.mark.parametrize(
    ("quantizer", "scale"),
    [
        (IntQuantizer(8, granularity=PerTensor()), 2.0),
        (IntQuantizer(8, granularity=PerChannel(1)), 2.0),
        (IntQuantizer(8, granularity=PerGroup(32), scale_dtype=torch.float16), 1e6),
    ],
)
def test_scales_that_cannot_hold_it(quantizer: IntQuantizer, scale: float) -> None:
    model = quantize_model(
        llama(), quantizer, layers=lambda name, layer: "down" not in name, progress=False
    ).model
    before = {name: w.clone() for name, w in model.state_dict().items()}
    assert fold(model, ["model.layers.0.mlp.down_proj"], scale * scale_of(96)) is None
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("quantizer", [mx(E2M1), NVFP4Quantizer()], ids=["MXFP4", "NVFP4"])
@pytest.mark.parametrize("factor", [2.0, 1.3])
def test_scales_of_one_byte_are_left_alone_and_a_norm_before_them_is_divided(
    quantizer: Any, factor: float
) -> None:
    model: Any = quantize_model(
        llama(), quantizer, layers=lambda name, layer: "gate" not in name, progress=False
    ).model
    up = model.model.layers[0].mlp.up_proj
    stored = up.scale
    before = logits(model)
    # E8M0 and E4M3 hold half of a scale, but not its quotient by most numbers.
    assert fold(model, ["model.layers.0.mlp.down_proj"], torch.full((96,), factor)) is None
    assert up.scale is stored
    assert torch.equal(logits(model), before)
    names = [f"model.layers.0.{name}" for name in GROUPS["post_attention_layernorm"]]
    assert fold(model, names, scale_of(64)) == "model.layers.0.post_attention_layernorm"


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (torch.ones(63), r"input_scale of shape \(63,\) must have the shape \(64,\)"),
        (torch.ones(64, 1), r"input_scale of shape \(64, 1\)"),
        (torch.zeros(64), "scale=0 must be positive and finite"),
        (torch.full((64,), torch.inf), "scale=inf must be positive"),
    ],
)
def test_scales_that_cannot_be(scale: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fold(llama(), ["model.layers.0.mlp.gate_proj"], scale)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "names is empty; it must name the linear layers that read the input"),
        (
            ["model.layers.0.mlp.gate"],
            "names has 'model.layers.0.mlp.gate', which is no linear layer of this Llama",
        ),
        (["model.norm"], "names has 'model.norm', which is no linear layer"),
        (
            ["model.layers.0.mlp.gate_proj", "lm_hea"],
            "names has 'lm_hea', which is no linear layer",
        ),
        ("lm_head", "names has 'l', which is no linear layer"),
        (
            ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"],
            "input_scale of shape (64,) must have the shape (96,), one number per input of"
            " model.layers.0.mlp.down_proj",
        ),
    ],
)
def test_names_that_cannot_be(names: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        fold(llama(), names, torch.ones(64))


# A whole model, by AWQ


def batches() -> Iterator[Tensor]:
    yield from windows(TOKENS, 11, batch_size=3)


@pytest.mark.parametrize(("sequential", "kv_heads"), [(True, 2), (False, 4)])
def test_awq_folded_is_awq_at_run_time(sequential: bool, kv_heads: int) -> None:
    model = plant_outliers(llama(kv_heads), [5, 40], 16.0)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    method = Awq(IntQuantizer(4, granularity=PerGroup(32)), grid=5)
    options: dict[str, Any] = {
        "calibration": batches(),
        "sequential": sequential,
        "progress": False,
    }
    folded = quantize_model(model, method, fold=fold, **options)
    options["calibration"] = batches()
    at_run_time = quantize_model(model, method, **options)
    torch.testing.assert_close(logits(folded.model), logits(at_run_time.model), rtol=0, atol=1e-4)
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())
    for a, b in zip(folded.report.layers, at_run_time.report.layers, strict=True):
        where = "at run time" if kv_heads == 2 and "o_proj" in a.name else "folded"
        assert re.fullmatch(rf"input scale {where}; alpha 0\.\d\d, \d+% of scales clipped", a.note)
        assert b.note.startswith("input scale at run time; alpha 0.")
        assert a.output_error == pytest.approx(b.output_error, rel=1e-3)
        assert a.weight_error == pytest.approx(b.weight_error, rel=1e-5)
        assert a.bytes_after <= b.bytes_after
    to_nearest = quantize_model(
        model, method.quantizer, calibration=list(batches()), progress=False
    )
    errors = [
        sum(row.output_error or 0 for row in each.report.layers) for each in (folded, to_nearest)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_awq_on_a_post_norm_model_divides_at_run_time() -> None:
    model = load_minilm()
    texts = ["a cat sat down", "the kitten was sitting", "interest rates rose"]
    int4 = IntQuantizer(4, granularity=PerGroup(64))
    options: dict[str, Any] = {
        "calibration": [texts],
        "run": lambda m, batch: m.embed(batch),
        "progress": False,
    }
    options["layers"] = lambda name, layer: name.startswith("layers.0")
    report = quantize_model(model, Awq(int4, grid=4), fold=fold, **options).report
    to_nearest = quantize_model(model, int4, **options).report
    assert {row.note.partition(";")[0] for row in report.layers} == {"input scale at run time"}
    for row, other in zip(report.layers, to_nearest.layers, strict=True):
        assert (row.output_error or 0) < 0.9 * (other.output_error or 0)


# Outliers


@pytest.mark.parametrize("make", [llama, lambda: theirs(llama())], ids=["ours", "transformers"])
@pytest.mark.parametrize("where", ["activations", "weights"])
@pytest.mark.parametrize("factor", [16.0, 10.0])
def test_planted_outliers_change_the_channels_and_not_the_model(
    make: Any, where: str, factor: float
) -> None:
    model = make()
    before = logits(model)
    kept = {name: w.clone() for name, w in model.state_dict().items()}
    planted = plant_outliers(model, [5, 40], factor, where=where)
    torch.testing.assert_close(logits(planted), before, rtol=0, atol=1e-4)
    assert torch.equal(logits(planted), before) or factor == 10
    assert type(planted) is type(model)
    assert all(torch.equal(w, kept[name]) for name, w in model.state_dict().items())
    old, new = (record_inputs(each, lambda each=each: logits(each)) for each in (model, planted))
    expected = torch.ones(64)
    expected[[5, 40]] = factor if where == "activations" else 1 / factor
    for name, x in new.items():
        gain = expected if re.search("[qkv]_proj|gate|up", name) else torch.ones(x.shape[1])
        torch.testing.assert_close(x, old[name] * gain, rtol=1e-4, atol=1e-4)
        w = linears(planted)[name].weight
        torch.testing.assert_close(w, linears(model)[name].weight / gain)


def test_channels_can_be_drawn() -> None:
    model = llama()

    def drawn(seed: int) -> list[int]:
        norms = [
            layer.input_layernorm.weight
            for layer in plant_outliers(model, 3, 64.0, seed=seed).model.layers
        ]
        ratios = [
            norm / layer.input_layernorm.weight
            for norm, layer in zip(norms, model.model.layers, strict=True)
        ]
        assert torch.equal(ratios[0], ratios[1])
        return (ratios[0] == 64).nonzero().flatten().tolist()

    assert len(drawn(0)) == 3
    assert drawn(0) == drawn(0) != drawn(1)


def test_what_is_planted_can_be_trained_and_stays_tied() -> None:
    model = random_llama(LlamaConfig(96, 64, 96, 2, 4, 2, tie_word_embeddings=True), seed=0)
    planted = plant_outliers(model, [1], 4.0)
    assert all(parameter.requires_grad for parameter in planted.parameters())
    assert planted.training
    assert planted.lm_head.weight is planted.model.embed_tokens.weight
    assert planted.lm_head.weight is not model.lm_head.weight


@pytest.mark.parametrize(
    ("channels", "factor", "where", "words"),
    [
        ([64], 2.0, "activations", r"channels=\[64\] must be from 0 to 63"),
        ([-1], 2.0, "activations", r"channels=\[-1\] must be from 0 to 63"),
        ([], 2.0, "activations", r"channels=\[\] must be"),
        ([1.5], 2.0, "activations", r"channels=\[1\.5\] must be"),
        ([1, True], 2.0, "activations", r"channels=\[1, True\] must be"),
        (True, 2.0, "activations", "channels=True must be"),
        (1.0, 2.0, "activations", "channels=1.0 must be"),
        (0, 2.0, "activations", "channels=0 must be"),
        (65, 2.0, "activations", "channels=65 must be"),
        ([1], 0.0, "activations", r"factor=0\.0 must be positive and finite"),
        ([1], float("nan"), "activations", "factor=nan must be positive and finite"),
        ([1], 2.0, "outputs", "where='outputs' must be 'activations' or 'weights'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_outliers_that_cannot_be(channels: Any, factor: float, where: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plant_outliers(llama(), channels, factor, where=where)


def test_a_model_without_blocks_has_no_place_for_outliers() -> None:
    for model in (nn.Linear(4, 4), Chain("to a and the residual"), load_minilm()):
        with pytest.raises(
            ValueError, match=f"no norm of this {type(model).__name__} feeds linear layers alone"
        ):
            plant_outliers(model, [1], 4.0)
