"""The FP8 product: exact sums against fractions, torch's own product, and refused inputs."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor
from qcourse.kernels.fp8_matmul import fp8_matmul
from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.granularity import Granularity
from qcourse.numerics.minifloat import E2M1, E4M3, E5M2, FloatFormat

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: the FP8 product of tensor cores"
)


def wild(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    sizes = torch.randn(rows, columns, generator=generator).mul(2).exp()
    return normal * sizes


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_it_is_the_product_of_what_the_codes_stand_for(
    format: FloatFormat, granularity: Granularity
) -> None:
    quantizer = FloatQuantizer(format, granularity)
    x = quantizer(wild(5, 70, seed=5))
    w = quantizer(wild(9, 70, seed=9))
    y = fp8_matmul(x, w)
    assert y.dtype == torch.float32
    exact = x.dequantize().double() @ w.dequantize().double().T
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_the_sum_is_exact_whatever_its_order() -> None:
    unit = FloatQuantizer(E4M3, scale_rule="unit")  # every scale is 1
    x = wild(3, 4096, seed=0) * 10
    w = wild(2, 4096, seed=1) * 10
    # The largest products, which cancel.
    x[0, :2] = 448.0
    w[0, :2] = torch.tensor([448.0, -448.0])
    q_x = unit(x)
    q_w = unit(w)
    y = fp8_matmul(q_x, q_w)
    for m in range(3):
        for n in range(2):
            pairs = zip(q_x.dequantize()[m].tolist(), q_w.dequantize()[n].tolist(), strict=True)
            total = sum(Fraction(a) * Fraction(b) for a, b in pairs)
            assert y[m, n] == torch.tensor(float(total), dtype=torch.float64).float()
    shuffled = torch.randperm(4096, generator=torch.Generator().manual_seed(2))
    assert torch.equal(fp8_matmul(unit(x[:, shuffled]), unit(w[:, shuffled])), y)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_torch_s_own_product_is_near(granularity: Granularity) -> None:
    quantizer = FloatQuantizer(E4M3, granularity)
    x = quantizer(wild(8, 64, seed=8))
    w = quantizer(wild(48, 64, seed=48))
    y = fp8_matmul(x, w)
    by_torch = fp8_matmul(x, w, backend="torch")
    torch.testing.assert_close(by_torch, y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))


@needs_gpu
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_on_a_gpu(granularity: Granularity) -> None:
    quantizer = FloatQuantizer(E4M3, granularity)
    x = wild(32, 256, seed=32)
    w = wild(64, 256, seed=64)
    y = fp8_matmul(quantizer(x), quantizer(w))
    found = fp8_matmul(quantizer(x.cuda()), quantizer(w.cuda())).cpu()
    torch.testing.assert_close(found, y, rtol=2e-2, atol=1e-2 * float(y.abs().max()))


EIGHT = FloatQuantizer(E4M3)
ALONG_K = "a scale that changes along K"


@pytest.mark.parametrize(
    ("x", "w", "backend", "kind", "words"),
    [
        (IntQuantizer(8), EIGHT, None, TypeError, r"x is in IntQuantizer\(.*; FP8 is FloatQuant"),
        (EIGHT, FloatQuantizer(E2M1), None, TypeError, "w is in FloatQuantizer"),
        (FloatQuantizer(E4M3, PerGroup(8)), EIGHT, None, ValueError, ALONG_K),
        (EIGHT, FloatQuantizer(E4M3, PerChannel(1)), None, ValueError, ALONG_K),
        (EIGHT, EIGHT, "cuda", ValueError, "backend='cuda' must be one of exact, torch, or None"),
        (EIGHT, EIGHT, "torch", ValueError, "needs K and N to be multiples of 16, got K=8, N=3"),
    ],
)
def test_what_is_refused(
    x: object, w: object, backend: str | None, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        fp8_matmul(x(torch.ones(2, 8)), w(torch.ones(3, 8)), backend=backend)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 8\) and w \(3, 9\) must have the same K"):
        fp8_matmul(EIGHT(torch.ones(2, 8)), EIGHT(torch.ones(3, 9)))
    with pytest.raises(ValueError, match=r"x of shape \(8,\) must be a matrix"):
        fp8_matmul(EIGHT(torch.ones(8)), EIGHT(torch.ones(3, 8)))
