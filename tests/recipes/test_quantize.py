"""Quantized models: the right codes, no shared memory, methods that plug in, refused arguments."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from qcourse import IntQuantizer, PerChannel, PerGroup, fake_quantize, quantize
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.methods.method import LayerCodes, RoundToNearest
from qcourse.models.evaluate import perplexity
from qcourse.models.llama import Llama, random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.models.minilm import load_minilm
from qcourse.recipes.quantize import quantize_model
from qcourse.recipes.report import nbytes
from qcourse.trace.calibration_batches import random_windows, windows
from qcourse.trace.linears import linears, map_weights

SIZES = LlamaConfig(96, 64, 96, 3, 4, 2)
INT4 = IntQuantizer(4, granularity=PerGroup(32))
TOKENS = torch.randint(96, (70,), generator=torch.Generator().manual_seed(1))
BATCHES = windows(TOKENS, 16, batch_size=2, count=3)  # the second batch is a smaller one


def llama(**changes: Any) -> Llama:
    """A Llama whose layers do something: weights five times as large as before training."""
    model = random_llama(replace(SIZES, **changes), seed=0).requires_grad_(False)
    for layer in linears(model).values():
        layer.weight *= 5
    return model


@dataclass(frozen=True)
class Spy:
    """Round-to-nearest that keeps all it is shown, in a list of its own making."""

    quantizer: IntQuantizer
    shown: list[tuple[tuple[str, ...], Tensor]]
    calibrated: bool = True

    def observe(self, seen: Tensor | None, x: Tensor) -> Tensor:
        return x if seen is None else torch.cat([seen, x])

    def quantize(self, weights: Mapping[str, Tensor], seen: Tensor) -> Mapping[str, Any]:
        self.shown.append((tuple(weights), seen))
        return {name: self.quantizer(w) for name, w in weights.items()}


@dataclass(frozen=True)
class Scaled(Spy):
    """Multiplies the columns of the weights that share an input with a scale in common."""

    def quantize(self, weights: Mapping[str, Tensor], seen: Tensor) -> Mapping[str, Any]:
        scale = 0.5 + seen.abs().mean(0) / seen.abs().mean()
        return {
            name: LayerCodes(self.quantizer(w * scale), input_scale=scale, note="hi")
            for name, w in weights.items()
        }


# The layer


def rounded(linear: nn.Linear, quantizer: IntQuantizer) -> QuantizedLinear:
    return QuantizedLinear(quantizer(linear.weight.detach()), linear.bias)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(16)])
def test_a_layer_holds_exactly_the_codes_and_counts_what_it_holds(
    bits: int, symmetric: bool, granularity: Any
) -> None:
    linear = nn.Linear(48, 10).requires_grad_(False)
    quantizer = IntQuantizer(bits, symmetric, granularity, scale_dtype=torch.float16)
    q = quantizer(linear.weight)
    layer = rounded(linear, quantizer)
    assert layer.quantized.codes.dtype == q.codes.dtype
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(layer.quantized, name), getattr(q, name))
    assert layer.nbytes == q.nbytes + linear.bias.nbytes
    x = torch.randn(3, 5, 48)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, q.dequantize(), linear.bias))


def test_no_tensor_of_a_layer_is_of_the_weights_size() -> None:
    layer = rounded(nn.Linear(256, 256), IntQuantizer(4))
    layer(torch.randn(2, 256))
    assert (
        max(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()]) == 256 * 256 // 2
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_layer_computes_in_the_dtype_of_x_and_keeps_its_own(dtype: torch.dtype) -> None:
    layer = rounded(nn.Linear(32, 8), INT4)
    before = layer.scale.clone()  # type: ignore[operator]
    assert layer(torch.randn(2, 32, dtype=dtype)).dtype == dtype
    layer.to(dtype).to("meta" if dtype == torch.float64 else "cpu")
    assert layer.scale.dtype == torch.float32
    scale: Any = layer.scale
    assert scale.is_meta or torch.equal(scale, before)


def test_an_input_scale_and_an_order_act_as_the_weight_says() -> None:
    w = torch.randn(6, 32)
    scale = torch.rand(32) + 0.5
    order = torch.randperm(32)
    q = IntQuantizer(8, granularity=PerGroup(8))((w * scale)[:, order])
    layer = QuantizedLinear(q, input_scale=scale, input_order=order)
    x = torch.randn(4, 32)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)
    torch.testing.assert_close(layer.weight, w, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (torch.zeros(4, dtype=torch.int8), "a matrix"),
        (torch.zeros(2, 2, dtype=torch.int32), "int8 or unsigned in uint8"),
        (torch.full((2, 2), 15, dtype=torch.int8), "up to 15"),
    ],
)
def test_codes_that_a_layer_cannot_hold(codes: Tensor, words: str) -> None:
    q = replace(quantize(torch.randn(2, 2), 4), codes=codes)
    with pytest.raises(ValueError, match=words):
        QuantizedLinear(q)


def test_a_bias_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"bias must have the shape \(2,\), got \(3,\)"):
        QuantizedLinear(quantize(torch.randn(2, 3), 4), torch.zeros(3))


# The model


@pytest.mark.parametrize("tied", [True, False])
def test_ours_equals_its_weights_rounded_and_leaves_the_original(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new, report = quantize_model(model, INT4, progress=False)
    body = {name: layer for name, layer in linears(model).items() if name != "lm_head"}
    assert [row.name for row in report.layers] == list(body)
    assert [(kept.name, kept.why) for kept in report.kept] == [("lm_head", "it is the head")]
    for name, layer in body.items():
        assert torch.equal(new.get_submodule(name).quantized.codes, INT4(layer.weight).codes)
    head = model.lm_head.weight
    rounded = map_weights(
        model,
        lambda w: w if w.shape == head.shape and torch.equal(w, head) else INT4(w).dequantize(),
    )
    torch.testing.assert_close(new(TOKENS[None]), rounded(TOKENS[None]), rtol=0, atol=1e-4)
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_theirs_gives_the_same_as_ours() -> None:
    ours = llama()
    theirs = LlamaForCausalLM(TheirConfig(**SIZES.to_transformers())).eval()
    theirs.load_state_dict(ours.state_dict())
    a, b = (
        quantize_model(model, INT4, calibration=BATCHES, progress=False) for model in (ours, theirs)
    )
    assert [row.name for row in a.report.layers] == [row.name for row in b.report.layers]
    assert a.report.bytes_after == pytest.approx(
        b.report.bytes_after, rel=0.01
    )  # theirs holds RoPE's frequencies
    left, right = (perplexity(each.model, TOKENS, 16).nll for each in (a, b))
    assert left == pytest.approx(right, abs=1e-4)


def memory_of(model: nn.Module) -> set[int]:
    return {
        tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]
    }


@pytest.mark.parametrize("method", [INT4, Spy(INT4, [])], ids=["rounding", "calibrated"])
def test_nothing_is_shared(method: object) -> None:
    model = nn.Sequential(
        nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 4, bias=False)
    )
    new = quantize_model(
        model, method, calibration=[torch.randn(3, 32)], layers=["0", "3"], progress=False
    ).model
    assert memory_of(new).isdisjoint(memory_of(model))
    assert not any(parameter.requires_grad for parameter in new.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert not new.training


def test_minilm() -> None:
    model = load_minilm()
    texts = ["a cat sat down", "the kitten was sitting", "interest rates rose"]
    int8 = IntQuantizer(8, granularity=PerChannel(0))
    new, report = quantize_model(
        model, int8, calibration=[texts], run=lambda m, batch: m.embed(batch), progress=False
    )
    assert len(report.layers) == 36
    assert not report.kept
    assert max(row.output_error for row in report.layers if row.output_error is not None) < 0.03
    assert (model.embed(texts) * new.embed(texts)).sum(1).min() > 0.99


def test_a_model_that_is_one_layer_itself() -> None:
    new, report = quantize_model(nn.Linear(32, 4), INT4, progress=False)
    assert isinstance(new, QuantizedLinear)
    assert "(the model)" in repr(report)


def test_one_layer_under_two_names_is_one_layer_still() -> None:
    layer = nn.Linear(32, 32)
    new, report = quantize_model(nn.Sequential(layer, nn.ReLU(), layer), INT4, progress=False)
    assert new[0] is new[2]  # type: ignore[index]
    assert len(report.layers) == 1


def test_a_model_can_be_quantized_in_turns() -> None:
    model = llama()
    last = [name for name in linears(model) if "layers.2" in name]
    int8 = IntQuantizer(8, granularity=PerGroup(32))
    half = quantize_model(
        model, INT4, layers=lambda name, layer: name not in last, progress=False
    ).model
    both = quantize_model(half, int8, layers=last, progress=False).model
    bits = [
        each.layout.quantizer.bits for each in both.modules() if isinstance(each, QuantizedLinear)
    ]
    assert bits == [4] * 14 + [8] * 7 + [4]  # the last is the head, which the predicate let in


def test_what_is_quantized_in_turns_counts_as_the_parameters_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 32), nn.Linear(32, 8, bias=False))
    int8 = IntQuantizer(8)
    half = quantize_model(model, int8, layers=["0", "2"], progress=False).model
    report = quantize_model(half, int8, progress=False).report
    assert report.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert (
        report.bits_per_parameter
        == quantize_model(model, int8, progress=False).report.bits_per_parameter
    )


class Lora(nn.Linear):
    """Adds a product of low rank to what a linear layer does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1, keepdim=True)


def test_layers_that_are_more_than_a_weight_are_kept() -> None:
    model = nn.Sequential(
        Lora(32, 32), nn.TransformerEncoderLayer(32, 2, 32, batch_first=True)
    ).eval()
    x = torch.randn(2, 5, 32)
    new, report = quantize_model(
        model, INT4, calibration=[x], layers=lambda name, layer: True, progress=False
    )
    assert [(kept.name, kept.why) for kept in report.kept] == [
        ("0", "a Lora computes more than a linear layer"),
        ("1.self_attn.out_proj", "its weight is used without calling it"),
    ]
    assert torch.equal(new[0](x), model[0](x))  # type: ignore[index]
    with pytest.raises(ValueError, match="no layer is left to quantize:\n- : a Lora computes more"):
        quantize_model(Lora(32, 32), INT4, layers=[""])


class Headed(nn.Module):
    """Has a head of whatever name, tied to its embedding or told by get_output_embeddings."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 32)
        self.body = nn.Linear(32, 32)
        self.out = nn.Linear(32, 5, bias=False)
        if tied:
            self.out.weight = self.embedding.weight
        else:
            self.get_output_embeddings = lambda: self.out


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_of_another_name_is_kept(tied: bool) -> None:
    report = quantize_model(Headed(tied=tied), INT4, progress=False).report
    assert [(kept.name, kept.why) for kept in report.kept] == [("out", "it is the head")]


def test_names_may_come_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 4), nn.Linear(32, 4))
    report = quantize_model(
        model, INT4, layers=(name for name in ("0", "2")), progress=False
    ).report
    assert [row.name for row in report.layers] == ["0", "2"]


# The report


def test_the_report_counts_every_byte() -> None:
    model = llama(tie_word_embeddings=True)
    new, report = quantize_model(model, INT4, progress=False)
    weights = sum(w.numel() for name, w in model.state_dict().items() if "proj" in name)
    rest = 4 * sum(
        w.numel()
        for name, w in model.state_dict().items()
        if "proj" not in name and name != "lm_head.weight"
    )
    assert report.bits_per_weight == 4 + 32 / 32
    assert report.bytes_before == 4 * weights + rest == nbytes(model)
    assert report.bytes_after == 5 * weights / 8 + rest == nbytes(new)
    assert report.bytes_unquantized == rest
    assert report.bits_per_parameter == 8 * report.bytes_after / (weights + rest / 4)


def test_errors_of_weights_and_outputs_are_what_they_say() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).requires_grad_(False)
    x = torch.randn(50, 32)
    quantizer = IntQuantizer(3, granularity=PerChannel(0))
    new, report = quantize_model(model, quantizer, calibration=x.split(20), progress=False)
    inputs = new[1](new[0](x))  # type: ignore[index]  # of the last layer in the quantized model
    w = model[2].weight
    lost = w - fake_quantize(w, 3, granularity=PerChannel(0))
    assert report.layers[1].weight_error == pytest.approx(float(lost.norm() / w.norm()), rel=1e-5)
    output_error = float((inputs @ lost.T).norm() / (inputs @ w.T).norm())
    assert report.layers[1].output_error == pytest.approx(output_error, rel=1e-5)
    assert quantize_model(model, quantizer, progress=False).report.layers[1].output_error is None
    unmeasured = quantize_model(
        model, quantizer, calibration=x.split(20), output_error=False, progress=False
    )
    assert unmeasured.report.layers[1].output_error is None


@pytest.mark.parametrize("bias", [0, 8])
def test_the_error_of_the_outputs_is_not_that_of_bfloat16(bias: float) -> None:
    model = nn.Linear(256, 64).bfloat16().requires_grad_(False)
    model.bias += bias
    x = torch.randn(50, 256).bfloat16()
    quantizer = IntQuantizer(8, granularity=PerGroup(32))
    report = quantize_model(model, quantizer, calibration=x.split(20), progress=False).report
    w = model.weight.double()
    lost = w - quantizer(model.weight).dequantize()
    expected = float((x.double() @ lost.T).norm() / (x.double() @ w.T).norm())
    assert report.layers[0].output_error == pytest.approx(expected, rel=1e-3)


def test_layers_that_are_kept_come_in_the_order_of_the_model() -> None:
    model = nn.Sequential(*(nn.Linear(32 if i % 8 else 8, 4) for i in range(17)))
    report = quantize_model(model, INT4, on_indivisible="keep", progress=False).report
    assert [kept.name for kept in report.kept] == ["0", "8", "16"]


def test_the_table() -> None:
    model = nn.Sequential(nn.Linear(64, 8, bias=False), nn.Linear(8, 64))
    report = quantize_model(model, INT4, on_indivisible="keep", progress=False).report
    first, kept = repr(report).splitlines()[1:3]
    assert re.fullmatch(r"0 +8 x 64 +5\.000 +2,048 +320 +0\.\d{4}", first)
    assert re.fullmatch(r"1 +64 x 8 +2,304 +2,304 +kept: group size=32 does not divide .*", kept)
    last_line = repr(report).splitlines()[-1]
    assert last_line.startswith("whole model: 4,352 bytes -> 2,624 (1.66 times smaller), 19.2")
    assert " bits per parameter; " in last_line


def test_a_layer_of_zeros_has_no_error() -> None:
    model = nn.Linear(32, 4)
    nn.init.zeros_(model.weight)
    report = quantize_model(model, INT4, calibration=[torch.ones(1, 32)], progress=False).report
    assert (report.layers[0].weight_error, report.layers[0].output_error) == (0, 0)


# Methods that plug in


def by_hand(model: nn.Module, order: list[tuple[str, ...]], run: Any) -> list[Tensor]:
    """The input of each group, from a whole run of a copy with the groups before it rounded."""
    wanted = set[str]()
    inputs = []
    for group in order:
        done = {id(linears(model)[name].weight) for name in wanted}
        partial = map_weights(
            model, lambda w, done=done: INT4(w).dequantize() if id_of(w, model) in done else w
        )
        got: list[Tensor] = []
        layer = linears(partial)[group[0]]
        with layer.register_forward_pre_hook(
            lambda layer, args, got=got: got.append(args[0].flatten(0, -2))
        ):
            run(partial)
        inputs.append(torch.cat(got))
        wanted |= set(group)
    return inputs


def id_of(w: Tensor, model: nn.Module) -> int:
    return next(id(p) for p in model.parameters() if torch.equal(p, w))


LLAMA_GROUPS = [
    tuple(f"model.layers.{i}.{name}" for name in group)
    for i in range(3)
    for group in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
]


@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "transformers"])
def test_each_group_is_shown_what_the_quantized_layers_before_it_give(theirs: bool) -> None:
    model: nn.Module = llama()
    if theirs:
        model = (
            LlamaForCausalLM(TheirConfig(**SIZES.to_transformers())).eval().requires_grad_(False)
        )
        model.load_state_dict(llama().state_dict())
    spy = Spy(INT4, [])
    new = quantize_model(model, spy, calibration=BATCHES, progress=False).model
    assert [group for group, _ in spy.shown] == LLAMA_GROUPS
    expected = by_hand(model, LLAMA_GROUPS, lambda m: [m(batch) for batch in BATCHES])
    for (_, seen), x in zip(spy.shown, expected, strict=True):
        torch.testing.assert_close(seen, x, rtol=1e-4, atol=1e-4)
    rounded = quantize_model(model, INT4, progress=False).model
    assert all(torch.equal(a, b) for a, b in zip(new.buffers(), rounded.buffers(), strict=True))


@pytest.mark.parametrize(("passes", "expected"), [(1, 3), (2, 2 + 1 + 1 + 2 + 2 + 2 + 2)])
def test_finished_blocks_are_not_computed_again(passes: int, expected: int) -> None:
    model = llama()
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(0))
    run = lambda m, batch: [m(batch) for _ in range(passes)]  # noqa: E731
    new = quantize_model(
        model, Spy(INT4, []), calibration=BATCHES[:1], run=run, progress=False
    ).model
    # A single pass per batch: one finds the groups, one observes all of them on its way, and one
    # computes the errors. Two: one run finds the groups, one observes each of the four (the last
    # pass for the first two ends before the MLP), one stores the outputs, one computes the errors.
    assert len(calls) == expected
    assert "forward" not in vars(new.model.layers[0])


class Routed(nn.Module):
    """Two experts, of which a gate takes one; the gate's sign changes once it is rounded."""

    def __init__(self, *, empty: bool) -> None:
        super().__init__()
        self.gate, self.left, self.right = (nn.Linear(32, out, bias=False) for out in (1, 32, 32))
        self.empty = empty
        nn.init.constant_(self.gate.weight, -0.4)
        self.gate.weight.data[0, 0] = 7  # so that the scale is 1, and all others round to 0

    def forward(self, x: Tensor) -> Tensor:
        expert, other = (
            (self.left, self.right) if self.gate(x).sum() > 0 else (self.right, self.left)
        )
        y = expert(x + 1)
        return y + other(x[:0]).sum() if self.empty else y


@pytest.mark.parametrize(("empty", "reached"), [(True, ["left"]), (False, [])])
def test_an_expert_that_gets_no_token_is_kept(empty: bool, reached: list[str]) -> None:
    model = Routed(empty=empty)
    report = quantize_model(
        model, Spy(INT4, []), calibration=[torch.ones(2, 32)], progress=False
    ).report
    assert [row.name for row in report.layers] == ["gate", *reached]
    assert [kept.name for kept in report.kept] == [
        name for name in ("left", "right") if name not in reached
    ]
    assert {kept.why for kept in report.kept} == {"no calibration batch reaches it"}
    options: dict[str, Any] = {
        "calibration": [torch.ones(2, 32)],
        "sequential": False,
        "progress": False,
    }
    report = quantize_model(model, Spy(INT4, []), **options).report
    assert [row.name for row in report.layers] == ["gate", "right"]


@pytest.mark.parametrize("method", [INT4, Spy(INT4, [])], ids=["rounding", "calibrated"])
def test_a_run_that_uses_another_model_is_noticed(method: object) -> None:
    model = nn.Linear(32, 4)
    other = nn.Linear(32, 4)
    run = lambda m, x: other(x)  # noqa: E731
    if isinstance(method, Spy):
        with pytest.raises(ValueError, match="no batch of calibration reaches a chosen layer"):
            quantize_model(model, method, calibration=[torch.ones(1, 32)], run=run, progress=False)
    else:
        report = quantize_model(
            model, method, calibration=[torch.ones(1, 32)], run=run, progress=False
        ).report
        assert report.layers[0].output_error is None


def test_a_layer_whose_input_comes_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(input=x)

    x = torch.randn(3, 32)
    spy = Spy(INT4, [])
    new, report = quantize_model(Named(), spy, calibration=[x], progress=False)
    assert torch.equal(spy.shown[0][1], x)
    assert new(x).shape == (3, 4)
    assert report.layers[0].output_error is not None


def test_several_passes_a_batch_are_all_seen() -> None:
    model = load_minilm()
    spy = Spy(IntQuantizer(8), [])
    texts = ["a cat sat down", "the kitten was sitting still", "interest rates rose"]
    quantize_model(
        model,
        spy,
        calibration=[texts],
        run=lambda m, batch: m.embed(batch, batch_size=1),
        progress=False,
    )
    assert {len(seen) for _, seen in spy.shown} == {
        sum(len(each.ids) for each in model.tokenizer.encode_batch(texts))
    }
    assert spy.shown[0][0] == ("layers.0.query", "layers.0.key", "layers.0.value")


def test_on_the_original_every_layer_sees_what_the_original_gives() -> None:
    model = llama()
    spy = Spy(INT4, [])
    quantize_model(model, spy, calibration=BATCHES, sequential=False, progress=False)
    got: list[Tensor] = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(
        lambda layer, args: got.append(args[0].flatten(0, 1))
    )
    for batch in BATCHES:
        model(batch)
    torch.testing.assert_close(spy.shown[-1][1], torch.cat(got))


def test_an_input_scale_stays_with_the_layer_where_it_cannot_be_folded() -> None:
    model = llama()
    method = Scaled(IntQuantizer(8, granularity=PerGroup(32)), [])
    new, report = quantize_model(model, method, calibration=BATCHES, progress=False)
    assert {row.note for row in report.layers} == {"input scale at run time; hi"}
    assert max(row.weight_error for row in report.layers) < 0.02
    assert (
        report.layers[0].bits_per_weight == 8 + 1 + 32 / 64
    )  # a float32 for each of 64 inputs over 64 outputs
    torch.testing.assert_close(new(TOKENS[None]), model(TOKENS[None]), atol=0.3, rtol=0)


def fold(model: nn.Module, names: tuple[str, ...], scale: Tensor) -> str | None:
    """Into the norm before q, k, v and before gate and up."""
    layer = model.get_submodule(names[0].rsplit(".", 2)[0])
    norms = {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm"}
    norm = norms.get(names[0].rpartition(".")[2])
    if norm:
        weight = layer.get_submodule(norm).weight
        divided: Any = weight / scale  # type: ignore[operator]
        layer.get_submodule(norm).weight = nn.Parameter(divided, requires_grad=False)
    return norm


@pytest.mark.parametrize("sequential", [True, False])
def test_an_input_scale_is_folded_where_it_can_be(sequential: bool) -> None:
    model = llama()
    method = Scaled(IntQuantizer(8, granularity=PerGroup(32)), [])
    options: dict[str, Any] = {"calibration": BATCHES, "sequential": sequential, "progress": False}
    folded = quantize_model(model, method, fold=fold, **options)
    at_run_time = quantize_model(model, method, **options)
    torch.testing.assert_close(
        folded.model(TOKENS[None]), at_run_time.model(TOKENS[None]), atol=1e-3, rtol=1e-3
    )
    notes = [row.note for row in folded.report.layers[:7]]
    assert notes == [
        f"input scale {where}; hi"
        for where in ["folded"] * 3 + ["at run time"] + ["folded"] * 2 + ["at run time"]
    ]
    for a, b in zip(folded.report.layers, at_run_time.report.layers, strict=True):
        assert a.output_error == pytest.approx(b.output_error, rel=0.02)
        assert a.weight_error == pytest.approx(b.weight_error, rel=0.02)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, torch.ones(64))


@dataclass(frozen=True)
class ScaledAlone(Spy):
    """Like Scaled, but each layer has a scale of its own, or the first has none."""

    some: bool = False

    def quantize(self, weights: Mapping[str, Tensor], seen: Tensor) -> Mapping[str, Any]:
        scales = [
            None if self.some and not i else torch.full((w.shape[1],), 2.0**i)
            for i, w in enumerate(weights.values())
        ]
        return {
            name: LayerCodes(self.quantizer(w if s is None else w * s), input_scale=s)
            for (name, w), s in zip(weights.items(), scales, strict=True)
        }


@pytest.mark.parametrize("some", [True, False])
def test_scales_that_a_group_does_not_share_are_not_folded(some: bool) -> None:
    model = llama()
    method = ScaledAlone(IntQuantizer(8, granularity=PerGroup(32)), [], some=some)
    new, report = quantize_model(model, method, calibration=BATCHES, fold=fold, progress=False)
    notes = {row.name.rpartition(".")[2]: row.note for row in report.layers}
    assert notes["v_proj"] == notes["up_proj"] == "input scale at run time"
    torch.testing.assert_close(new(TOKENS[None]), model(TOKENS[None]), atol=0.3, rtol=0)


def test_a_layer_that_no_batch_reaches_is_kept_and_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(32, 32), "idle": nn.Linear(32, 32)})
    run = lambda m, x: m["used"](x)  # noqa: E731
    new, report = quantize_model(
        model, Spy(INT4, []), calibration=[torch.randn(2, 32)], run=run, progress=False
    )
    assert [(kept.name, kept.why) for kept in report.kept] == [
        ("idle", "no calibration batch reaches it")
    ]
    assert memory_of(new).isdisjoint(memory_of(model))
    assert torch.equal(new["idle"].weight, model["idle"].weight)  # type: ignore[index]


class Routes(nn.Module):
    """Wide batches pass two layers that share an input, long ones share it with a third layer."""

    def __init__(self) -> None:
        super().__init__()
        for name in "abc":
            self.add_module(name, nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        names = "ab" if len(x) == 2 else "bc"
        return sum(self.get_submodule(name)(x) for name in names)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_layer_that_joins_later_on_the_input_of_another_group_is_quantized(
    sequential: bool,
) -> None:
    batches = [torch.randn(2, 32), torch.randn(3, 32)]
    spy = Spy(INT4, [])
    options: dict[str, Any] = {"sequential": sequential, "progress": False}
    report = quantize_model(Routes(), spy, calibration=batches, **options).report
    assert not report.kept
    assert [row.name for row in report.layers] == ["a", "b", "c"]
    assert [names for names, _ in spy.shown] == [("a", "b"), ("c",)]
    assert torch.equal(spy.shown[0][1], batches[0])  # of a, which leads the first group
    assert torch.equal(spy.shown[1][1], batches[1])


# What is refused


@pytest.mark.parametrize(
    ("method", "shown"),
    [("gptq", "'gptq'"), (IntQuantizer, "IntQuantizer"), (None, "None"), (RoundToNearest, "Round")],
)
def test_an_unknown_method(method: object, shown: str) -> None:
    with pytest.raises(
        TypeError, match=f"method=.*{shown}.* must be a quantizer such as IntQuantizer"
    ):
        quantize_model(nn.Linear(32, 4), method)


def test_a_model_without_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"must have an nn\.Linear layer, and this ReLU has none"):
        quantize_model(nn.ReLU(), INT4)


def test_a_width_that_the_group_does_not_divide() -> None:
    model = nn.Sequential(nn.Linear(64, 40), nn.Linear(40, 48), nn.Linear(48, 4))
    with pytest.raises(
        ValueError, match=r"(?s)on_indivisible='keep'.*- 1: group size=32 .*- 2: group size=32"
    ):
        quantize_model(model, INT4)
    report = quantize_model(model, INT4, on_indivisible="keep", progress=False).report
    assert ([row.name for row in report.layers], [kept.name for kept in report.kept]) == (
        ["0"],
        ["1", "2"],
    )
    with pytest.raises(ValueError, match="no layer is left to quantize"):
        quantize_model(model[1:], INT4, on_indivisible="keep")
    with pytest.raises(ValueError, match="on_indivisible='pad' must be 'refuse' or 'keep'"):
        quantize_model(model, INT4, on_indivisible="pad")


def test_names_that_are_none() -> None:
    model = llama()
    with pytest.raises(
        ValueError, match=r"'q_proj', which is no linear layer .*for example, \['.*q_proj'"
    ):
        quantize_model(model, INT4, layers=["q_proj"])
    with pytest.raises(TypeError, match=r"got the string 'lm_head': write \['lm_head'\]"):
        quantize_model(model, INT4, layers="lm_head")
    with pytest.raises(ValueError, match="no layer is left"):
        quantize_model(model, INT4, layers=[])


def test_a_tied_head_that_is_chosen_is_untied() -> None:
    model = llama(tie_word_embeddings=True)
    new, report = quantize_model(model, INT4, layers=["lm_head"], progress=False)
    assert report.layers[0].note == "untied from model.embed_tokens.weight"
    assert torch.equal(new.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert memory_of(new).isdisjoint(memory_of(model))
    assert (
        report.bytes_after == report.bytes_before + new.lm_head.nbytes
    )  # what it costs: both are there
    assert model.lm_head.weight is model.model.embed_tokens.weight


class Shared(nn.Module):
    """Two linear layers and two embeddings that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.first, self.second = (nn.Embedding(32, 32) for _ in range(2))
        self.two.weight = self.first.weight = self.second.weight = self.one.weight


def test_layers_that_share_a_weight_get_codes_each_and_a_note() -> None:
    model = Shared()
    new, report = quantize_model(model, INT4, layers=["one", "two"], progress=False)
    assert [row.note for row in report.layers] == [
        f"untied from {other}.weight; untied from first.weight; untied from second.weight"
        for other in ("two", "one")
    ]
    assert new.first.weight is new.second.weight


def test_layers_that_share_a_weight_and_are_kept_share_it_still() -> None:
    run = lambda m, x: m.one(x)  # noqa: E731
    new, report = quantize_model(
        nn.ModuleDict({"one": nn.Linear(32, 32), "rest": Shared()}),
        Spy(INT4, []),
        calibration=[torch.ones(1, 32)],
        run=run,
        layers=lambda name, layer: True,
        progress=False,
    )
    assert [kept.name for kept in report.kept] == ["rest.one", "rest.two"]
    rest = new.rest
    assert rest.one.weight is rest.two.weight is rest.first.weight is rest.second.weight


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight[0, 3] = torch.nan
    with pytest.raises(
        ValueError, match=r"layer 'model\.layers\.1\.mlp\.up_proj': x has 1 NaN or infinite"
    ):
        quantize_model(model, INT4, progress=False)


METHODS = {"rounding": INT4, "calibrated": Spy(INT4, [])}


def test_a_calibrated_method_without_calibration() -> None:
    with pytest.raises(ValueError, match="calibration=None, but the method"):
        quantize_model(llama(), Spy(INT4, []), progress=False)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    ("calibration", "error", "words"),
    [
        ([], ValueError, "calibration has no batch"),
        (
            TOKENS,
            TypeError,
            r"got a single Tensor: for a row of token ids write windows\(tokens, context\)",
        ),
        ({"ids": TOKENS}, TypeError, "got a single dict: .* for one batch"),
        ([{"ids": TOKENS}], ValueError, r"cannot run batch 0 of calibration \(dict\)"),
        ([BATCHES[0], torch.zeros(1, 8)], ValueError, "cannot run batch 1 of calibration"),
        (
            [torch.zeros(1, 8)],
            ValueError,
            r"cannot run batch 0 of calibration \(torch\.float32 of shape \(1, 8\)\)",
        ),
        ([torch.full((1, 8), 96)], ValueError, "cannot run batch 0 of calibration"),
    ],
)
def test_calibration_data_that_cannot_be(
    calibration: Any, error: type[Exception], words: str, method: object, sequential: bool
) -> None:
    with pytest.raises(error, match=words):
        quantize_model(
            llama(), method, calibration=calibration, sequential=sequential, progress=False
        )


@pytest.mark.parametrize(
    "error",
    [KeyError("a"), IndexError("a"), TypeError("a"), AttributeError("a"), RuntimeError("a")],
)
@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_run_that_fails_names_the_batch(
    method: object, sequential: bool, error: Exception
) -> None:
    def run(model: nn.Module, batch: Tensor) -> None:
        raise error

    with pytest.raises(ValueError, match=r"cannot run batch 0 of calibration .*\('a'\)"):
        quantize_model(
            nn.Linear(32, 4),
            method,
            calibration=[TOKENS],
            run=run,
            sequential=sequential,
            progress=False,
        )


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("method", [INT4, Spy(INT4, [])], ids=METHODS)
def test_calibration_data_that_are_not_finite(method: object, sequential: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    x = torch.full((1, 32), torch.nan)
    with pytest.raises(ValueError, match="NaN or infinity into layer '0'"):
        quantize_model(model, method, calibration=[x], sequential=sequential, progress=False)
    assert not getattr(method, "shown", [])


@pytest.mark.parametrize(
    ("tokens", "options", "error", "words"),
    [
        (torch.arange(0), {}, ValueError, "at least 4, got the shape"),
        (torch.arange(3), {}, ValueError, "at least 4, got the shape"),
        (torch.zeros(9), {}, TypeError, "must be integers"),
        (torch.arange(9), {"count": 0}, ValueError, "count=0 must be a whole number"),
        (torch.arange(9), {"batch_size": 0}, ValueError, "batch_size=0 must be a whole number"),
        (torch.arange(9), {"count": 2.0}, ValueError, "count=2.0 must be a whole number"),
        (torch.arange(9), {"context": 2.5}, ValueError, "context=2.5 must be a whole number"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_windows_that_cannot_be(
    tokens: Tensor, options: dict, error: type[Exception], words: str
) -> None:
    options = {"context": 4, **options}
    with pytest.raises(error, match=words):
        windows(tokens, **options)
    with pytest.raises(error, match=words):
        random_windows(tokens, **{"count": 1, **options})


def test_the_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    quantize_model(nn.Linear(32, 4), INT4)
    assert "1/1" in capfd.readouterr().err
    quantize_model(nn.Linear(32, 4), INT4, progress=False)
    assert capfd.readouterr().err == ""
