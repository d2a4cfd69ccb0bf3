"""Layers with quantized inputs: the product, static ranges, wrapped methods, files, refusals."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor
from qcourse.kernels.int8_matmul import quantized_matmul
from qcourse.layers.quantized_linear import QuantizedLinear
from qcourse.layers.storage import load_quantized, save_quantized
from qcourse.methods.activations import Static, WithActivations
from qcourse.methods.awq import Awq
from qcourse.methods.gptq import Gptq
from qcourse.methods.method import LayerCodes, choose_codes
from qcourse.models.evaluate import agreement
from qcourse.models.tinylm import load_tinylm
from qcourse.recipes.fold import fold
from qcourse.recipes.quantize import quantize_model
from qcourse.trace.calibration_batches import windows

BY_ROW = IntQuantizer(8, granularity=PerChannel(0))  # one scale per token of x, per output of w
BY_TENSOR = IntQuantizer(8)


@dataclass(frozen=True, eq=False)
class Dividing:
    """Divides the inputs by a scale that it is given."""

    quantizer: IntQuantizer
    scale: Tensor
    calibrated: bool = False

    def observe(self, seen: None, x: Tensor) -> None:
        raise AssertionError("not calibrated")

    def quantize(self, weights: Any, seen: None) -> dict[str, LayerCodes]:
        assert seen is None
        results = {}
        for name, w in weights.items():
            q = self.quantizer(w * self.scale)
            results[name] = LayerCodes(q, input_scale=self.scale, note="as told")
        return results


def linear(outputs: int = 6, inputs: int = 16) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    layer.weight.normal_(generator=generator)
    layer.bias.normal_(generator=generator)
    return layer


def tokens(count: int = 5, size: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def made(layer: nn.Linear, method: WithActivations, x: Tensor | None = None) -> QuantizedLinear:
    model, _ = quantize_model(layer, method, calibration=None if x is None else [x], progress=False)
    assert isinstance(model, QuantizedLinear)
    return model


@pytest.mark.parametrize(
    "inputs", [BY_ROW, BY_TENSOR, IntQuantizer(4, symmetric=False), IntQuantizer(8, False)]
)
def test_a_layer_multiplies_what_the_codes_stand_for(inputs: IntQuantizer) -> None:
    layer = linear()
    x = tokens()
    quantized = made(layer, WithActivations(BY_ROW, inputs))
    expected = inputs(x).dequantize() @ BY_ROW(layer.weight).dequantize().T + layer.bias
    torch.testing.assert_close(quantized(x), expected)
    assert not torch.allclose(expected, layer(x))
    product = quantized_matmul(inputs(x), BY_ROW(layer.weight)) + layer.bias
    torch.testing.assert_close(quantized(x), product, rtol=1e-5, atol=1e-5)


def test_groups_of_channels_have_scales_of_their_own() -> None:
    layer = linear()
    x = tokens()
    inputs = IntQuantizer(4, granularity=PerGroup(8))
    expected = inputs(x).dequantize() @ BY_ROW(layer.weight).dequantize().T + layer.bias
    torch.testing.assert_close(made(layer, WithActivations(BY_ROW, inputs))(x), expected)


def test_leading_axes_are_tokens_and_none_of_them_is_no_error() -> None:
    quantized = made(linear(), WithActivations(BY_ROW, BY_ROW))
    x = tokens(12)
    assert torch.equal(quantized(x.reshape(3, 4, 16)), quantized(x).reshape(3, 4, 6))
    torch.testing.assert_close(quantized(x[0]), quantized(x)[0])
    assert quantized(x[:0]).shape == (0, 6)


def test_the_dtype_of_the_input_stays() -> None:
    quantized = made(linear(), WithActivations(BY_ROW, BY_ROW))
    x = tokens()
    assert quantized(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(quantized(x.bfloat16()).float(), quantized(x), rtol=0.1, atol=0.1)


def test_nan_is_refused_at_run_time() -> None:
    x = tokens()
    x[2, 3] = torch.nan
    for method, data in (
        (WithActivations(BY_ROW, BY_ROW), None),
        (WithActivations(BY_ROW, BY_TENSOR, True), tokens()),
    ):
        with pytest.raises(ValueError, match="NaN"):
            made(linear(), method, data)(x)


# A fixed range


def test_a_static_range_is_that_of_calibration_and_clips_beyond() -> None:
    layer = linear()
    batches = [tokens(seed=1), 3 * tokens(seed=2), tokens(seed=3)]
    model, report = quantize_model(
        layer, WithActivations(BY_ROW, BY_TENSOR, True), calibration=batches, progress=False
    )
    seen = torch.cat(batches)
    assert model.inputs == Static(BY_TENSOR, float(seen.min()), float(seen.max()))
    assert report.layers[0].note == "inputs in 8 bits, static"
    largest = seen.abs().max()
    wild = torch.full((1, 16), 10.0) * largest
    torch.testing.assert_close(model(wild), model(wild.clamp(max=largest)))


def test_a_range_is_not_narrowed_by_a_batch_of_fewer_bits() -> None:
    method = WithActivations(BY_ROW, BY_TENSOR, static=True)
    seen = method.observe(None, torch.tensor([[70_000.0, 2.3089]]))
    seen = method.observe(seen, torch.tensor([[1.0, -1.0]], dtype=torch.float16))
    assert torch.equal(seen.ends, torch.tensor([[1.0, -1.0], [70_000.0, 2.3089]]))


def test_an_asymmetric_range_keeps_both_ends() -> None:
    x = tokens().abs() - 0.25
    model = made(linear(), WithActivations(BY_ROW, IntQuantizer(8, False), True), x)
    assert (model.inputs.low, model.inputs.high) == (float(x.min()), float(x.max()))


def test_what_is_rounded_is_the_input_after_its_division() -> None:
    layer = linear()
    x = tokens()
    x[:, 3] *= 100
    scale = x.abs().amax(dim=0)
    model, report = quantize_model(
        layer,
        WithActivations(Dividing(BY_ROW, scale), BY_TENSOR, True),
        calibration=[x],
        progress=False,
    )
    assert report.layers[0].note == "input scale at run time; as told; inputs in 8 bits, static"
    low = float((x / scale).min())
    high = float((x / scale).max())
    assert (model.inputs.low, model.inputs.high) == (low, high)
    x_hat = Static(BY_TENSOR, low, high)(x / scale)
    w_hat = BY_ROW(layer.weight * scale).dequantize()
    expected = x_hat @ w_hat.T + layer.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model.rounded(x) @ model.weight.T + layer.bias, expected)


# Methods inside


@pytest.mark.parametrize("method", [Gptq(BY_ROW), Awq(BY_ROW)])
@pytest.mark.parametrize("static", [False, True])
def test_a_calibrated_method_sees_what_it_would_see_alone(method: Any, static: bool) -> None:
    layer = linear()
    batches = [tokens(40), tokens(30, seed=2)]
    alone, _ = quantize_model(layer, method, calibration=batches, progress=False)
    both, _ = quantize_model(
        layer, WithActivations(method, BY_TENSOR, static), calibration=batches, progress=False
    )
    assert torch.equal(both.quantized.codes, alone.quantized.codes)
    assert (both.input_scale is None) == (alone.input_scale is None)


def test_the_report_counts_the_rounding_of_inputs() -> None:
    layer = linear()
    x = tokens(30)
    coarse = IntQuantizer(3)
    model, report = quantize_model(
        layer, WithActivations(BY_ROW, coarse), calibration=[x], progress=False
    )
    y = model(x) - layer.bias
    plain = x @ layer.weight.T
    row = report.layers[0]
    error = float((y - plain).norm() / plain.norm())
    assert row.output_error == pytest.approx(error, rel=1e-5)
    assert row.output_error > 10 * row.weight_error


def test_a_whole_model_in_8_bits_stays_itself_and_in_4_does_not() -> None:
    model, tokenizer = load_tinylm()
    text = torch.tensor(
        tokenizer.encode("Return a list of the names of all the keys in the mapping. " * 40).ids
    )[:257]
    kl = {}
    for bits in (8, 4):
        grid = IntQuantizer(bits, granularity=PerChannel(0))
        quantized, _ = quantize_model(model, WithActivations(grid, grid), progress=False)
        kl[bits] = agreement(quantized, model, text, context=128).kl
    assert kl[8] < 0.02 < kl[4]


def test_a_folded_scale_and_rounded_inputs() -> None:
    model, tokenizer = load_tinylm()
    text = torch.tensor(tokenizer.encode("Raise an error if the file does not exist. " * 60).ids)
    method = WithActivations(Awq(BY_ROW), BY_ROW)
    _, report = quantize_model(
        model,
        method,
        calibration=windows(text, 128, count=2),
        fold=fold,
        layers=["model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"],
        progress=False,
    )
    for row in report.layers:
        assert row.note.startswith("input scale folded; alpha")
        assert row.note.endswith("; inputs in 8 bits, dynamic")
    assert all(row.output_error < 0.03 for row in report.layers)


# Files


@pytest.mark.parametrize(
    ("inputs", "static"),
    [(BY_ROW, False), (BY_TENSOR, True), (IntQuantizer(4, False, PerTensor()), True)],
)
def test_there_and_back(tmp_path: Path, inputs: IntQuantizer, static: bool) -> None:
    x = tokens()
    model, _ = quantize_model(
        nn.Sequential(linear()),
        WithActivations(BY_ROW, inputs, static),
        calibration=[x],
        progress=False,
    )
    save_quantized(model, tmp_path / "a")
    back = load_quantized(tmp_path / "a", nn.Sequential(linear()))
    assert torch.equal(back(x), model(x))
    assert back[0].inputs == model[0].inputs


# What is refused


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((BY_ROW, "int8"), TypeError, "inputs='int8' must be a quantizer such as"),
        ((BY_ROW, IntQuantizer), TypeError, "must be a quantizer such as"),
        (("gptq", BY_ROW), TypeError, "method='gptq' must be a quantizer"),
        (
            (BY_ROW, IntQuantizer(8, granularity=PerChannel(1))),
            ValueError,
            r"PerChannel\(axis=1\): a scale for each",
        ),
        (
            (BY_ROW, BY_ROW, True),
            ValueError,
            r"static=True needs one scale for all inputs of a layer, PerTensor\(\)",
        ),
    ],
)
def test_what_cannot_be(arguments: tuple[Any, ...], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        WithActivations(*arguments)


def test_a_static_range_needs_calibration() -> None:
    with pytest.raises(
        ValueError, match="calibration=None, but the method chooses codes by a layer's inputs"
    ):
        quantize_model(linear(), WithActivations(BY_ROW, BY_TENSOR, True), progress=False)


@dataclass(frozen=True)
class Returning:
    """Returns one result for every layer."""

    result: object
    quantizer: IntQuantizer = BY_TENSOR
    calibrated: bool = False

    def observe(self, seen: None, x: Tensor) -> None:
        raise AssertionError("not calibrated")

    def quantize(self, weights: Any, seen: None) -> dict[str, Any]:
        return dict.fromkeys(weights, self.result)


def test_a_bare_quantized_tensor_becomes_layer_codes() -> None:
    q = BY_TENSOR(torch.ones(2, 4))
    codes = choose_codes(Returning(q), {"a": q.codes}, None)["a"]
    assert type(codes) is LayerCodes
    assert codes.quantized is q
    assert (codes.input_scale, codes.input_order, codes.inputs, codes.note) == (None,) * 3 + ("",)
    # Codes pass through as they are, with the fields of a subclass.
    assert choose_codes(Returning(codes), {"a": q.codes}, None)["a"] is codes


@pytest.mark.parametrize("result", [None, torch.ones(2, 4), SimpleNamespace(quantized=None)])
@pytest.mark.parametrize("wrap", [False, True])
def test_a_result_of_another_type_is_refused(result: object, wrap: bool) -> None:
    method: Any = Returning(result)
    words = f"returned a {type(result).__name__} for layer '0'; .* LayerCodes"
    with pytest.raises(TypeError, match=words):
        quantize_model(
            nn.Sequential(linear()),
            WithActivations(method, BY_ROW) if wrap else method,
            progress=False,
        )


def test_a_misspelled_field_is_refused() -> None:
    with pytest.raises(TypeError, match="input_scales"):
        LayerCodes(BY_TENSOR(torch.ones(2, 4)), input_scales=torch.ones(4))  # type: ignore[call-arg]
