"""Decoding the weights of a quantized model once changes no output."""

import pytest
import torch
from torch import nn

from qcourse import IntQuantizer, PerGroup, WithActivations, quantize_model
from qcourse.lab import decode_weights
from qcourse.layers.quantized_linear import QuantizedLinear

INT4 = IntQuantizer(4, granularity=PerGroup(32))


def small_model() -> nn.Sequential:
    """Two linear layers, the first with a bias."""
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


def test_every_layer_becomes_a_float_layer_with_the_same_output() -> None:
    model, _ = quantize_model(small_model(), INT4, progress=False)
    x = torch.randn(5, 64)
    before = model(x)
    codes = [model[i].quantized.dequantize() for i in (0, 2)]
    assert decode_weights(model) is model
    assert torch.equal(model(x), before)
    assert [type(model[i]) for i in (0, 2)] == [nn.Linear, nn.Linear]
    assert all(torch.equal(model[i].weight, w) for i, w in zip((0, 2), codes, strict=True))
    assert model[2].bias is None
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_scale_and_order_of_the_inputs_are_undone_in_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 32, 64, generator=generator)
    scale = torch.linspace(0.5, 4, 64)
    order = torch.randperm(64, generator=generator)
    layer = QuantizedLinear(INT4(w), input_scale=scale, input_order=order)
    before = layer(x)
    # (x / s) w^T and x (w / s)^T round differently
    torch.testing.assert_close(decode_weights(layer)(x), before, rtol=1e-4, atol=1e-4)


def test_a_layer_of_two_names_stays_one_layer() -> None:
    shared = nn.Linear(64, 64)
    model, _ = quantize_model(nn.Sequential(shared, nn.ReLU(), shared), INT4, progress=False)
    assert model[0] is model[2]
    decode_weights(model)
    assert model[0] is model[2]


def test_a_model_that_is_one_layer() -> None:
    layer = QuantizedLinear(INT4(torch.randn(32, 64)))
    assert torch.equal(decode_weights(layer).weight, layer.weight)


def test_models_that_are_refused() -> None:
    with pytest.raises(ValueError, match="must have a QuantizedLinear layer, and this Sequential"):
        decode_weights(small_model())
    rounding = WithActivations(INT4, IntQuantizer(8))
    model, _ = quantize_model(
        small_model(), rounding, calibration=[torch.randn(8, 64)], progress=False
    )
    with pytest.raises(ValueError, match="layer '0' rounds its inputs"):
        decode_weights(model)
    assert isinstance(model[0], QuantizedLinear)
