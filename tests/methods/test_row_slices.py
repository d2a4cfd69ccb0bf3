"""Several weights quantized as one give what each gives alone."""

import pytest
import torch

from qcourse import FloatQuantizer, IntQuantizer, PerChannel, PerGroup, PerTensor
from qcourse.methods.gptq import Gptq
from qcourse.methods.row_slices import rows_are_alone, split_rows
from qcourse.numerics.minifloat import E4M3
from qcourse.numerics.quantized import Quantizer

ALONE = [
    IntQuantizer(4, granularity=PerGroup(16)),
    IntQuantizer(4, symmetric=False, granularity=PerGroup(16)),
    IntQuantizer(4, granularity=PerChannel(0)),
    FloatQuantizer(E4M3, granularity=PerChannel(0)),
]
SHARED = [IntQuantizer(4), IntQuantizer(4, granularity=PerChannel(1))]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("quantizer", ALONE)
def test_the_parts_of_a_weight_are_the_weights_of_its_parts(quantizer: Quantizer) -> None:
    assert rows_are_alone(quantizer, 64)
    whole = normal(9, 64)
    counts = [2, 4, 3]
    parts = split_rows(quantizer(whole), counts)
    for part, w in zip(parts, whole.split(counts), strict=True):
        assert torch.equal(part.codes, quantizer(w).codes)
        assert torch.equal(part.dequantize(), quantizer(w).dequantize())


def test_rows_that_share_a_scale_are_not_alone() -> None:
    for quantizer in (*SHARED, IntQuantizer(4, granularity=PerTensor())):
        assert not rows_are_alone(quantizer, 64)


@pytest.mark.parametrize("quantizer", [*ALONE, *SHARED])
@pytest.mark.parametrize("static", [False, True])
def test_layers_of_one_input_get_what_each_gets_alone(quantizer: Quantizer, static: bool) -> None:
    method = Gptq(quantizer, act_order=True, static_groups=static)
    x = normal(300, 64) @ normal(64, 64)
    weights = {"q": normal(32, 64), "k": normal(8, 64), "v": normal(7, 64)}
    seen = method.observe(None, x)
    together = method.quantize(weights, seen)
    for name, w in weights.items():
        alone = method.quantize({name: w}, seen)[name]
        assert torch.equal(together[name].quantized.codes, alone.quantized.codes)
        assert together[name].error == pytest.approx(alone.error, rel=1e-3)
        assert together[name].quantized.nbytes == alone.quantized.nbytes
