"""Every number format through every method and into a file: a new grid needs no edit there."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcourse import PerChannel, PerGroup
from qcourse.layers.storage import load_quantized, save_quantized
from qcourse.methods.activations import WithActivations
from qcourse.methods.awq import Awq
from qcourse.methods.gptq import Gptq
from qcourse.numerics.codebook import NF4, CodebookQuantizer
from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.microscaling import NVFP4Quantizer, mx
from qcourse.numerics.minifloat import E2M1, E2M3, E4M3
from qcourse.numerics.quantized import Quantizer
from qcourse.recipes.quantize import quantize_model

FORMATS = {
    "FP8": FloatQuantizer(E4M3, PerChannel(0)),
    "FP4": FloatQuantizer(E2M1, PerGroup(32), "mse", torch.float16),
    "MXFP6": mx(E2M3),
    "MXFP4": mx(E2M1, "even"),
    "NVFP4": NVFP4Quantizer(),
    "NF4": CodebookQuantizer(NF4, PerGroup(64)),
}


@pytest.fixture(scope="module")
def layers() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).requires_grad_(False)
    for layer in (model[0], model[2]):
        layer.weight.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(512, 32, generator=generator) @ torch.randn(32, 128, generator=generator) / 6


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_holds_the_codes_and_a_file_keeps_them(
    layers: nn.Sequential, x: Tensor, name: str, tmp_path: Path
) -> None:
    quantizer = FORMATS[name]
    model, report = quantize_model(layers, quantizer, calibration=[x], progress=False)
    for place in (0, 2):
        q = quantizer(layers[place].weight)
        assert torch.equal(model[place].weight, q.dequantize())
        assert model[place].nbytes == q.nbytes + layers[place].bias.nbytes
    assert report.bits_per_weight < quantizer.bits + 1.1
    save_quantized(model, tmp_path / "a")
    assert torch.equal(load_quantized(tmp_path / "a", layers)(x), model(x))


@pytest.mark.parametrize("name", FORMATS)
def test_gptq_and_awq_take_it_as_it_is(layers: nn.Sequential, x: Tensor, name: str) -> None:
    def error(method: object) -> float:
        model, _ = quantize_model(layers[:1], method, calibration=[x], progress=False)
        return float((model(x) - layers[:1](x)).norm())

    nearest = error(FORMATS[name])
    assert error(Gptq(FORMATS[name], static_groups=True)) < 0.9 * nearest
    assert error(Awq(FORMATS[name])) <= nearest


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "NVFP4"])
def test_gptq_fits_groups_at_their_turn(layers: nn.Sequential, x: Tensor, name: str) -> None:
    _, report = quantize_model(layers[:1], Gptq(FORMATS[name]), calibration=[x], progress=False)
    _, nearest = quantize_model(layers[:1], FORMATS[name], calibration=[x], progress=False)
    assert report.layers[0].output_error < 0.9 * nearest.layers[0].output_error


def test_gptq_refuses_groups_that_share_a_scale_of_the_tensor(
    layers: nn.Sequential, x: Tensor
) -> None:
    with pytest.raises(ValueError, match="static_groups=True"):
        quantize_model(layers[:1], Gptq(NVFP4Quantizer()), calibration=[x], progress=False)


@pytest.mark.parametrize(
    "inputs", [FloatQuantizer(E4M3), FloatQuantizer(E4M3, PerChannel(0)), mx(E4M3), mx(E2M1)]
)
def test_inputs_may_be_floats_too(layers: nn.Sequential, x: Tensor, inputs: Quantizer) -> None:
    method = WithActivations(FloatQuantizer(E4M3, PerChannel(0)), inputs)
    model, _ = quantize_model(layers[:1], method, progress=False)
    w_hat = FloatQuantizer(E4M3, PerChannel(0))(layers[0].weight).dequantize()
    torch.testing.assert_close(model(x), inputs(x).dequantize() @ w_hat.T + layers[0].bias)


def test_a_static_range_for_fp8(layers: nn.Sequential, x: Tensor) -> None:
    method = WithActivations(FloatQuantizer(E4M3, PerChannel(0)), FloatQuantizer(E4M3), static=True)
    model, report = quantize_model(layers[:1], method, calibration=[x], progress=False)
    assert report.layers[0].note == "inputs in 8 bits, static"
    assert float((model(x) - layers[:1](x)).norm() / layers[:1](x).norm()) < 0.06
