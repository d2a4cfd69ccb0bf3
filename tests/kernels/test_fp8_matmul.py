"""The FP8 product: exact sums against fractions, torch's own product beside it, and what is refused."""

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
    return (
        torch.randn(rows, columns, generator=generator)
        * torch.randn(rows, columns, generator=generator).mul(2).exp()
    )


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_it_is_the_product_of_what_the_codes_stand_for(
    format: FloatFormat, granularity: Granularity
) -> None:
    x, w = (FloatQuantizer(format, granularity)(wild(rows, 70, rows)) for rows in (5, 9))
    y = fp8_matmul(x, w)
    assert y.dtype == torch.float32
    exact = x.dequantize().double() @ w.dequantize().double().T
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))


def test_the_sum_is_exact_whatever_its_order() -> None:
    unit = FloatQuantizer(E4M3, scale_rule="unit")  # every scale 1: what is left is the sum
    x, w = wild(3, 4096, 0) * 10, wild(2, 4096, 1) * 10
    x[0, :2], w[0, :2] = 448.0, torch.tensor([448.0, -448.0])
    q_x, q_w = unit(x), unit(w)
    y, shuffled = (
        fp8_matmul(q_x, q_w),
        torch.randperm(4096, generator=torch.Generator().manual_seed(2)),
    )
    for m in range(3):
        for n in range(2):
            pairs = zip(q_x.dequantize()[m].tolist(), q_w.dequantize()[n].tolist(), strict=True)
            total = sum(Fraction(a) * Fraction(b) for a, b in pairs)
            assert y[m, n] == torch.tensor(float(total), dtype=torch.float64).float()
    assert torch.equal(fp8_matmul(unit(x[:, shuffled]), unit(w[:, shuffled])), y)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_torch_s_own_product_is_near(granularity: Granularity) -> None:
    x, w = (FloatQuantizer(E4M3, granularity)(wild(rows, 64, rows)) for rows in (8, 48))
    y = fp8_matmul(x, w)
    torch.testing.assert_close(
        fp8_matmul(x, w, backend="torch"), y, rtol=1e-4, atol=1e-4 * float(y.abs().max())
    )


@needs_gpu
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_on_a_gpu(granularity: Granularity) -> None:
    x, w = (FloatQuantizer(E4M3, granularity)(wild(rows, 256, rows)) for rows in (32, 64))
    y = fp8_matmul(x, w)
    on_gpu = (FloatQuantizer(E4M3, granularity)(wild(rows, 256, rows).cuda()) for rows in (32, 64))
    found = fp8_matmul(*on_gpu).cpu()
    torch.testing.assert_close(found, y, rtol=2e-2, atol=1e-2 * float(y.abs().max()))


EIGHT = FloatQuantizer(E4M3)


@pytest.mark.parametrize(
    ("x", "w", "backend", "kind", "words"),
    [
        (
            IntQuantizer(8),
            EIGHT,
            None,
            TypeError,
            r"x is in IntQuantizer\(.*; FP8 is FloatQuantizer",
        ),
        (EIGHT, FloatQuantizer(E2M1), None, TypeError, "w is in FloatQuantizer"),
        (
            FloatQuantizer(E4M3, PerGroup(8)),
            EIGHT,
            None,
            ValueError,
            "a scale that changes along K",
        ),
        (
            EIGHT,
            FloatQuantizer(E4M3, PerChannel(1)),
            None,
            ValueError,
            "a scale that changes along K",
        ),
        (EIGHT, EIGHT, "cuda", ValueError, "backend='cuda' must be one of exact, torch, or None"),
        (EIGHT, EIGHT, "torch", ValueError, "needs K and N to be multiples of 16, got K=8, N=3"),
    ],
)
def test_what_is_refused(
    x: object, w: object, backend: str | None, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        fp8_matmul(x(torch.ones(2, 8)), w(torch.ones(3, 8)), backend=backend)  # type: ignore[operator]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x \(2, 8\) and w \(3, 9\) must have the same K"):
        fp8_matmul(EIGHT(torch.ones(2, 8)), EIGHT(torch.ones(3, 9)))
    with pytest.raises(ValueError, match=r"x of shape \(8,\) must be a matrix"):
        fp8_matmul(EIGHT(torch.ones(8)), EIGHT(torch.ones(3, 8)))
