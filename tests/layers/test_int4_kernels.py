"""A whole model on the INT4 kernels: the same outputs as with decoded weights, the same tokens."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcourse import IntQuantizer, PerChannel, PerGroup, load_tinylm, quantize_model
from qcourse.layers.int4_kernels import with_int4_kernels
from qcourse.layers.int4_linear import Int4Linear
from qcourse.layers.storage import save_quantized
from qcourse.methods.activations import Dynamic, WithActivations
from qcourse.methods.awq import Awq
from qcourse.methods.gptq import Gptq
from qcourse.models.generate import generate
from qcourse.numerics.codebook import CodebookQuantizer

INT4 = IntQuantizer(4, granularity=PerGroup(32), scale_dtype=torch.float16)


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32, bias=False))


@pytest.mark.parametrize("method", [INT4, Gptq(INT4, act_order=True), Awq(INT4)])
def test_the_same_outputs(method: object) -> None:
    model = small()
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 30  # AWQ has something to scale
    plain, report = quantize_model(model, method, calibration=[x], progress=False)
    fast, its_report = quantize_model(model, method, calibration=[x], kernel="int4", progress=False)
    assert [type(layer) for layer in fast] == [Int4Linear, nn.ReLU, Int4Linear]
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
    assert its_report == report


def test_the_tiny_lm_writes_the_same() -> None:
    tiny = load_tinylm()
    plain = quantize_model(tiny.model, INT4, progress=False).model
    fast = quantize_model(tiny.model, INT4, kernel="int4", progress=False).model
    prompt = torch.tensor(tiny.tokenizer.encode("Return the").ids)
    assert torch.equal(generate(fast, prompt, 12), generate(plain, prompt, 12))
    half = fast.bfloat16()(prompt[None])
    reference = plain(prompt[None])
    assert half.dtype == torch.bfloat16
    assert float((half.float() - reference).norm() / reference.norm()) < 0.03


def test_a_layer_in_two_places() -> None:
    model, _ = quantize_model(small(), INT4, progress=False)
    twice = nn.Sequential(model[0], nn.Linear(96, 64), model[0])
    with_int4_kernels(twice)
    assert isinstance(twice[0], Int4Linear)
    assert twice[0] is twice[2]


def test_what_cannot_be(tmp_path) -> None:
    model = small()
    with pytest.raises(ValueError, match="kernel='int2' must be \"int4\" or None"):
        quantize_model(model, INT4, kernel="int2", progress=False)
    no_layer = "must have a QuantizedLinear layer, and this Sequential has none"
    with pytest.raises(ValueError, match=no_layer):
        with_int4_kernels(model)
    fast = quantize_model(model, INT4, kernel="int4", progress=False).model
    with pytest.raises(ValueError, match="packed for this machine"):
        save_quantized(fast, tmp_path / "model.safetensors")


@dataclass(frozen=True)
class Unused(Awq):
    """A method that must be refused before it observes anything."""

    def observe(self, seen: Any, x: Tensor) -> Any:
        raise AssertionError("the calibration ran")


INT8 = IntQuantizer(8, granularity=PerChannel(0))
REFUSED = [
    (IntQuantizer(8), ValueError, "layer '0': q has 8 bits; an INT4 weight has 4"),
    (IntQuantizer(4), ValueError, r"layer '0': granularity=PerTensor\(\) must be"),
    (
        IntQuantizer(4, granularity=PerGroup(16)),
        ValueError,
        r"layer '0': granularity=PerGroup\(size=16\) must be PerGroup of 32, 64, 128 or",
    ),
    (CodebookQuantizer(granularity=PerGroup(32)), TypeError, "q must hold integer codes"),
]


@pytest.mark.parametrize(("quantizer", "error", "words"), REFUSED)
def test_what_the_kernels_refuse_is_refused_before_the_calibration(
    quantizer: Any, error: type[Exception], words: str
) -> None:
    model = small()
    options: dict[str, Any] = {"calibration": [torch.ones(2, 64)], "progress": False}
    with pytest.raises(error, match=words):
        quantize_model(model, Unused(quantizer), kernel="int4", **options)
    # The kernels themselves say the same.
    plain, _ = quantize_model(model, quantizer, progress=False)
    with pytest.raises(error, match=words):
        with_int4_kernels(plain)


@pytest.mark.parametrize("inputs", [INT8, Dynamic(INT8)])
def test_rounded_inputs_are_refused_before_the_calibration(inputs: Any) -> None:
    method = WithActivations(Unused(INT4), inputs)
    options: dict[str, Any] = {"calibration": [torch.ones(2, 64)], "progress": False}
    with pytest.raises(ValueError, match=r"layer '0': inputs=.* are rounded; the INT4 kernels"):
        quantize_model(small(), method, kernel="int4", **options)


def test_layers_quantized_before_are_refused_before_the_calibration() -> None:
    options: dict[str, Any] = {"calibration": [torch.ones(2, 64)], "progress": False}
    half, _ = quantize_model(small(), INT8, layers=["0"], progress=False)
    with pytest.raises(ValueError, match="layer '0': q has 8 bits"):
        quantize_model(half, Unused(INT4), kernel="int4", **options)


def test_nothing_changes_where_one_layer_cannot() -> None:
    model, _ = quantize_model(small(), INT4, progress=False)
    other, _ = quantize_model(small(), IntQuantizer(8), progress=False)
    mixed = nn.Sequential(model[0], other[2])
    before = list(mixed)
    with pytest.raises(ValueError, match="layer '1': q has 8 bits"):
        with_int4_kernels(mixed)
    assert list(mixed) == before


def test_a_layer_that_is_the_model() -> None:
    model, _ = quantize_model(small(), INT4, progress=False)
    assert isinstance(with_int4_kernels(model[0]), Int4Linear)
