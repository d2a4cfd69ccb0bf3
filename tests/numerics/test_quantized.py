"""The bytes of a quantized tensor, against packed bytes and against the predictions of `cost`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor, QuantizedTensor, pack, quantize
from qcourse.cost.memory import bytes_per_parameter, weight_bytes
from qcourse.numerics.granularity import Granularity
from qcourse.numerics.quantized import Quantizer

X = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([PerTensor(), PerChannel(0), PerChannel(1), PerGroup(5), PerGroup(40)]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.integers(1, 6),
)
def test_nbytes_are_the_bytes_in_storage(
    bits: int, symmetric: bool, granularity: Granularity, scale_dtype: torch.dtype, rows: int
) -> None:
    q = quantize(
        X[:rows], bits, symmetric=symmetric, granularity=granularity, scale_dtype=scale_dtype
    )
    stored = [pack(q.codes, bits), q.scale.reshape(-1).view(torch.uint8)]
    if not symmetric:
        stored.append(pack(q.zero_point, bits))
    assert q.nbytes == sum(len(piece) for piece in stored)
    assert q.bits_per_weight == 8 * q.nbytes / X[:rows].numel()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_prediction_of_cost_comes_true(symmetric: bool) -> None:
    x = torch.ones(128, 1024)
    q = quantize(x, 4, symmetric=symmetric, granularity=PerGroup(128), scale_dtype=torch.float16)
    zero_bytes = 0 if symmetric else 4 / 8
    assert q.nbytes == weight_bytes(x.numel(), 4, scales=q.scale.numel(), zero_bytes=zero_bytes)
    assert q.nbytes == bytes_per_parameter(4, 128, zero_bytes=zero_bytes) * x.numel()
    # Claim 16; a zero point takes 4 bits more per group.
    assert q.bits_per_weight == (4.125 if symmetric else 4.15625)


def test_a_quantized_tensor_says_what_it_is() -> None:
    quantizer = IntQuantizer(4, symmetric=False, granularity=PerGroup(8))
    q = quantizer(X)
    assert (q.bits, q.granularity, q.shape) == (4, PerGroup(8), X.shape)
    assert q.scale.shape == q.zero_point.shape == (6, 5)
    assert q.scale is q.parameters.scale
    assert torch.equal(q.dequantize(), quantizer.decode(q.codes, q.parameters))


def test_quantize_is_the_quantizer_called() -> None:
    options = {"symmetric": False, "granularity": PerGroup(8), "scale_dtype": torch.float16}
    ours = quantize(X, 4, **options)
    called = IntQuantizer(4, **options)(X)
    assert torch.equal(ours.codes, called.codes)
    assert ours.quantizer == called.quantizer


class SignQuantizer:
    """One bit, with the mean magnitude as the scale; it shares no base class with IntQuantizer."""

    bits = 1
    granularity = PerTensor()

    def __call__(self, x: torch.Tensor) -> QuantizedTensor:
        parameters = self.fit(x)
        return QuantizedTensor(self.encode(x, parameters), parameters, self)

    def fit(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().mean()

    def encode(self, x: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return (x > 0).to(torch.uint8)

    def decode(self, codes: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
        return (2.0 * codes - 1) * parameters

    def nearest(
        self, x: torch.Tensor, parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codes = self.encode(x, parameters)
        return codes, self.decode(codes, parameters)

    def parameter_nbytes(self, parameters: torch.Tensor) -> int:
        return parameters.element_size()


def test_any_quantizer_fills_a_quantized_tensor() -> None:
    quantizer = SignQuantizer()
    x = torch.tensor([3.0, -1.0, -2.0])
    q = quantizer(x)
    assert isinstance(quantizer, Quantizer)
    assert q.dequantize().tolist() == [2, -2, -2]
    assert q.nbytes == 1 + np.dtype(np.float32).itemsize
