"""The INT4 weight and product on this machine.

Codes come back, every backend equals float64, and bad input is refused.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcourse import IntQuantizer, PerChannel, PerGroup, PerTensor, quantize
from qcourse.kernels import backend_cpu, int4_cpu
from qcourse.kernels import crossover as crossing
from qcourse.kernels.backend_dense import STRIP
from qcourse.kernels.int4_backend import Int4Backend
from qcourse.kernels.int4_matmul import BACKENDS, int4_matmul, int4_unavailable_reason
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.layers.int4_linear import Int4Linear
from qcourse.numerics.codebook import CodebookQuantizer
from qcourse.numerics.granularity import Granularity
from qcourse.numerics.quantized import Parameters, QuantizedTensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
NO_CPU_KERNEL = int4_cpu.unavailable_reason()
LAYOUTS = ["planes"] if NO_CPU_KERNEL else ["planes", "cpu"]
HERE = ["dense", "reference"] if NO_CPU_KERNEL else ["dense", "reference", "cpu"]
needs_cpu_kernel = pytest.mark.skipif(NO_CPU_KERNEL is not None, reason=str(NO_CPU_KERNEL))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized(
    outputs: int,
    inputs: int,
    group: int | None = 128,
    *,
    symmetric: bool = True,
    seed: int = 0,
    scale_dtype=torch.float16,
) -> QuantizedTensor:
    granularity = PerChannel(0) if group is None else PerGroup(group)
    w = normal(outputs, inputs, seed=seed) + (0 if symmetric else 0.7)
    return quantize(w, 4, symmetric=symmetric, granularity=granularity, scale_dtype=scale_dtype)


def by_hand(x: Tensor, q: QuantizedTensor) -> Tensor:
    """Decode by the definition, multiply, in float64."""
    rows = len(q.codes)
    scale = q.scale.double().reshape(rows, -1, 1)
    zero_point = q.zero_point.double().reshape(rows, -1, 1)
    groups = q.codes.double().reshape(rows, scale.shape[1], -1)
    w_hat = (groups - zero_point) * scale
    return x.double() @ w_hat.reshape(q.shape).T


@pytest.fixture
def crossover_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda tokens: monkeypatch.setattr(backend_cpu, "crossover", lambda: tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"), [(1, 32, 32), (67, 192, 64), (130, 384, 128), (5, 77, None)]
)
def test_the_same_codes_come_back(
    outputs: int, inputs: int, group: int | None, symmetric: bool, layout: str
) -> None:
    q = quantized(outputs, inputs, group, symmetric=symmetric)
    back = Int4Weight.from_quantized(q, layout=layout).quantized()
    assert back.quantizer == q.quantizer
    for name in ("codes", "scale", "zero_point"):
        given_, got = getattr(q, name), getattr(back, name)
        assert got.dtype == given_.dtype, name
        assert torch.equal(got, given_), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_at_every_place(layout: str) -> None:
    codes = (torch.arange(64 * 128).reshape(64, 128) * 7 % 16).to(torch.uint8)
    parameters = Parameters(torch.ones(64, 1), torch.zeros(64, 1, dtype=torch.uint8))
    quantizer = IntQuantizer(4, symmetric=False, granularity=PerGroup(128))
    q = QuantizedTensor(codes, parameters, quantizer)
    w4 = Int4Weight.from_quantized(q, layout=layout)
    assert torch.equal(w4.codes(), codes)
    assert w4.zero_point is not None


def test_nothing_dense_is_held() -> None:
    w4 = Int4Weight.from_quantized(quantized(256, 512))
    held = [value for value in vars(w4).values() if isinstance(value, Tensor)] + list(w4.extras)
    assert w4.nbytes == sum(each.nbytes for each in held)
    assert w4.packed.nbytes == 256 * 512 // 2
    assert w4.nbytes <= 1.1 * (256 * 512 // 2)  # the scales, for decoding and for the kernel


@pytest.mark.parametrize("layout", LAYOUTS)
def test_repacking_and_back(layout: str) -> None:
    w4 = Int4Weight.from_quantized(quantized(70, 256, symmetric=False), layout=layout)
    there = w4.repacked(LAYOUTS[0])
    assert there.layout == LAYOUTS[0]
    assert torch.equal(there.repacked(layout).packed, w4.packed)
    assert w4.repacked(layout) is w4
    assert w4.to("cpu") is w4


@settings(max_examples=40)
@given(
    tokens=st.sampled_from([0, 1, 3, 17, 40]),
    outputs=st.integers(1, 200),
    groups=st.integers(1, 5),
    group=st.sampled_from([32, 64, 128, None]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    backend=st.sampled_from([*HERE, None]),
    seed=st.integers(0, 999),
)
def test_it_equals_float64(
    tokens: int,
    outputs: int,
    groups: int,
    group: int | None,
    symmetric: bool,
    dtype: Any,
    backend: Any,
    seed: int,
) -> None:
    inputs = groups * (group or 37)
    q = quantized(outputs, inputs, group, symmetric=symmetric, seed=seed)
    x = normal(tokens, inputs, seed=seed + 1, dtype=dtype)
    y = int4_matmul(x, Int4Weight.from_quantized(q), backend)
    expected = by_hand(x, q)
    assert (y.dtype, y.shape) == (dtype, expected.shape)
    w_hat = q.dequantize().double()
    # The size of a sum whose terms do not cancel.
    typical = x.double().norm() * w_hat.norm() / inputs**0.5
    size = max(expected.norm(), typical)
    assert float((y.double() - expected).norm()) <= TOLERANCE[dtype] * float(size)


@pytest.mark.parametrize("tokens", [1, 16, 257])
def test_both_sides_of_the_crossover(tokens: int, crossover_at: Callable[[int], None]) -> None:
    q = quantized(300, 1024, symmetric=False)
    x = normal(tokens, 1024, seed=1, dtype=torch.bfloat16)
    w4 = Int4Weight.from_quantized(q)
    expected = by_hand(x, q)
    for limit in (0, 10**6):
        crossover_at(limit)
        y = int4_matmul(x, w4)
        assert float((y.double() - expected).norm()) <= 1e-2 * float(expected.norm())


def test_a_weight_of_many_strips() -> None:
    outputs = 2 * STRIP // 8192 + 70
    q = quantized(outputs, 8192)
    x = normal(2, 8192, seed=1)
    expected = by_hand(x, q)
    for backend in ("dense", "reference"):
        y = int4_matmul(x, Int4Weight.from_quantized(q), backend)
        assert float((y.double() - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("symmetric", [True, False])
def test_whole_numbers_are_exact(symmetric: bool, dtype: torch.dtype, backend: str) -> None:
    codes = torch.randint(-8, 8, (96, 256), generator=torch.Generator().manual_seed(0)).float()
    low = 0 if symmetric else -3
    q = quantize(
        codes - low,
        4,
        symmetric=symmetric,
        granularity=PerGroup(64),
        scale=1.0,
        zero_point=0 if symmetric else 5,
    )
    x = torch.randint(-1, 2, (5, 256), generator=torch.Generator().manual_seed(1)).to(dtype)
    x[:, 20:] = 0  # sums up to 20 * 15: whole numbers that bfloat16 holds where they are below 256
    expected = by_hand(x, q)
    assert expected.abs().max() < 256
    assert torch.equal(int4_matmul(x, Int4Weight.from_quantized(q), backend).double(), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_same_bits_each_time(dtype: torch.dtype) -> None:
    w4 = Int4Weight.from_quantized(quantized(200, 512))
    x = normal(9, 512, seed=1, dtype=dtype)
    first = int4_matmul(x, w4)
    assert all(torch.equal(int4_matmul(x, w4), first) for _ in range(3))


def test_any_shape_of_batch() -> None:
    w4 = Int4Weight.from_quantized(quantized(40, 256))
    x = normal(2, 3, 5, 256, seed=1)
    y = int4_matmul(x, w4, "reference")
    assert y.shape == (2, 3, 5, 40)
    assert torch.equal(y[1, 2], int4_matmul(x[1, 2], w4, "reference"))
    assert int4_matmul(x[0, 0, 0], w4).shape == (40,)
    assert int4_matmul(x[:0], w4).shape == (0, 3, 5, 40)
    apart = x.transpose(0, 2)
    assert torch.equal(
        int4_matmul(apart, w4, "reference"), int4_matmul(apart.contiguous(), w4, "reference")
    )


@pytest.mark.parametrize("backend", HERE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_stays_in_its_row(backend: str, value: float) -> None:
    w4 = Int4Weight.from_quantized(quantized(40, 256))
    x = normal(4, 256, seed=1, dtype=torch.bfloat16)
    clean = int4_matmul(x, w4, backend)
    x[2, 100] = value
    y = int4_matmul(x, w4, backend)
    assert not torch.isfinite(y[2]).any()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


ROUND_TRIP = """
import torch
from qcourse import PerGroup, quantize
from qcourse.kernels import int4_cpu
from qcourse.kernels.int4_weight import Int4Weight

q = quantize(torch.randn(70, 192), 4, granularity=PerGroup(64))
assert torch.equal(Int4Weight.from_quantized(q, layout="cpu").quantized().codes, q.codes)
print(*int4_cpu._lanes())
"""


@needs_cpu_kernel
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_the_packings_of_other_processors_are_read(capability: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ROUND_TRIP],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def quantized_by(granularity: Granularity) -> QuantizedTensor:
    return quantize(normal(4, 64), 4, granularity=granularity)


BAD_WEIGHTS = {
    "8 bits; an INT4 weight has 4": lambda: quantize(normal(4, 64), 8, granularity=PerGroup(32)),
    r"granularity=PerTensor\(\) must be PerGroup of 32, 64, 128": lambda: quantized_by(PerTensor()),
    r"granularity=PerGroup\(size=16\)": lambda: quantized_by(PerGroup(16)),
    r"granularity=PerChannel\(axis=1\)": lambda: quantized_by(PerChannel(1)),
    r"shape \(2, 4, 64\) must be a matrix": lambda: quantize(
        normal(2, 4, 64), 4, granularity=PerGroup(32)
    ),
}


@pytest.mark.parametrize("words", BAD_WEIGHTS)
def test_weights_that_cannot_be_packed(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Int4Weight.from_quantized(BAD_WEIGHTS[words]())


@pytest.mark.usefixtures("unchecked")
def test_weights_that_are_not_integer_codes() -> None:
    codebook = CodebookQuantizer(granularity=PerGroup(32))
    for not_integers in (codebook(normal(4, 64)), normal(4, 64)):
        with pytest.raises(TypeError, match="must hold integer codes"):
            Int4Weight.from_quantized(not_integers)  # type: ignore[arg-type]


BAD_INPUTS = [
    (lambda x: x.int(), None, TypeError, "x of torch.int32 must be float16, bfloat16 or float32"),
    (lambda x: x.double(), None, TypeError, "x of torch.float64"),
    (lambda x: x.numpy(), None, TypeError, "x of ndarray"),
    (
        lambda x: x[:, :128],
        None,
        ValueError,
        r"x \(3, 128\) and w \(40, 256\) must have the same inputs",
    ),
    (lambda x: x[0, 0], None, ValueError, r"x \(\) and w"),
    (lambda x: x.to("meta"), None, ValueError, "x is on meta, w on cpu"),
    (
        lambda x: x,
        "marlin",
        ValueError,
        "backend='marlin' must be one of triton, cpu, dense, reference",
    ),
    (lambda x: x, "triton", RuntimeError, "backend='triton' cannot run here: "),
]


@pytest.mark.parametrize(("change", "backend", "kind", "words"), BAD_INPUTS)
@pytest.mark.usefixtures("unchecked")
def test_inputs_that_cannot_be(
    change: Callable, backend: str | None, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        int4_matmul(change(normal(3, 256)), Int4Weight.from_quantized(quantized(40, 256)), backend)


@pytest.mark.usefixtures("unchecked")
def test_w_must_be_packed() -> None:
    with pytest.raises(TypeError, match="w=Tensor must be an Int4Weight"):
        int4_matmul(normal(3, 256), normal(40, 256))  # type: ignore[arg-type]


def test_layouts_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantized(40, 256)
    with pytest.raises(ValueError, match="layout='rows' must be one of"):
        Int4Weight.from_quantized(q, layout="rows")
    planes = Int4Weight.from_quantized(q, layout="planes")
    with pytest.raises(RuntimeError, match="cannot run here"):
        int4_matmul(normal(3, 256), planes, "cpu")
    monkeypatch.setattr(int4_cpu, "unavailable_reason", lambda: "no such luck")
    with pytest.raises(ValueError, match="layout='cpu' is not available: no such luck"):
        Int4Weight.from_quantized(q, layout="cpu")
    elsewhere = Int4Weight.from_quantized(q)  # a machine without torch's product
    assert elsewhere.layout == "planes"
    x = normal(3, 256)
    assert torch.equal(int4_matmul(x, elsewhere), int4_matmul(x, elsewhere, "dense"))
    assert set(BACKENDS) == {"triton", "cpu", "dense", "reference"}


@pytest.mark.usefixtures("unchecked")
def test_a_backend_is_one_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = Int4Backend(
        multiply=lambda x, w: x.new_zeros(len(x), w.shape[0]),
        why_not_these=lambda x, w: "one token at most" if len(x) > 1 else None,
        why_not_here=lambda: "not on Mondays",
        is_first_choice_on=lambda device: True,
    )
    monkeypatch.setitem(BACKENDS, "zeros", zeros)
    monkeypatch.delitem(BACKENDS, "cpu")
    w4 = Int4Weight.from_quantized(quantized(40, 256))
    x = normal(2, 256)
    assert not int4_matmul(x[:1], w4).any()  # the first choice
    assert torch.equal(int4_matmul(x, w4), int4_matmul(x, w4, "dense"))  # where it refuses
    with pytest.raises(RuntimeError, match="backend='zeros' cannot run here: one token at most"):
        int4_matmul(x, w4, "zeros")
    assert int4_unavailable_reason("zeros") == "not on Mondays"
    assert int4_unavailable_reason("dense") is None


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: tmp_path / "cache")
    crossing._crossover.cache_clear()
    return tmp_path / "cache" / crossing.FILE


@needs_cpu_kernel
def test_the_crossover_is_that_of_the_times() -> None:
    # 0.2 per token, against 12 once and 0.1 per token.
    tokens = iter([16 * 0.2, 12 + 16 * 0.1, 12 + 64 * 0.1])
    assert crossing.measure(lambda call: next(tokens)) == 120
    # 1 / 16 per token, against 1 once and nothing per token.
    assert crossing.measure(lambda call: 1.0) == 16
    never = iter([1.6, 1.6, 6.4])
    assert crossing.measure(lambda call: next(never)) == crossing.MOST


@needs_cpu_kernel
@pytest.mark.parametrize(
    "kept", [None, "", "[1]", '{"other machine": 3}', '{"%s": "many"}', '{"%s": -1}']
)
def test_the_crossover_is_measured_once(
    cache: Path, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossing, "measure", lambda: 77)
    if kept is not None:
        cache.parent.mkdir()
        cache.write_text(kept.replace("%s", "m"), encoding="utf-8")
    assert crossing._crossover("m") == 77
    assert json.loads(cache.read_text(encoding="utf-8"))["m"] == 77
    monkeypatch.setattr(crossing, "measure", lambda: pytest.fail("measured again"))
    assert crossing._crossover("m") == 77
    crossing._crossover.cache_clear()
    assert crossing._crossover("m") == 77


def test_a_linear_layer() -> None:
    q = quantized(40, 256)
    bias = normal(40, seed=2)
    x = normal(3, 256, seed=3)
    layer = Int4Linear(Int4Weight.from_quantized(q), bias)
    expected = by_hand(x, q) + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert layer.nbytes == layer.weight.nbytes + bias.nbytes
    assert layer.bfloat16().scale.dtype == torch.float16  # never rounded again
    assert "PerGroup(size=128)" in repr(layer)


def test_a_layer_with_a_scale_and_an_order() -> None:
    q = quantized(40, 256)
    x = normal(3, 256, seed=3)
    scale = normal(256, seed=4).abs() + 0.5
    order = torch.randperm(256, generator=torch.Generator().manual_seed(5))
    layer = Int4Linear(Int4Weight.from_quantized(q), input_scale=scale, input_order=order)
    expected = by_hand((x / scale)[:, order], q)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_layer_through_its_state() -> None:
    first = Int4Linear(Int4Weight.from_quantized(quantized(40, 256, symmetric=False, seed=0)))
    second = Int4Linear(Int4Weight.from_quantized(quantized(40, 256, symmetric=False, seed=1)))
    x = normal(3, 256, seed=3)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


@needs_cpu_kernel
def test_a_state_is_packed_on_the_machine_that_loads_it() -> None:
    """Another device or processor wants another order, though in tensors of the same shape."""
    for symmetric in (True, False):
        q = quantized(64, 256, symmetric=symmetric)
        planes = Int4Linear(Int4Weight.from_quantized(q, layout="planes"))
        cpu = Int4Linear(Int4Weight.from_quantized(q, layout="cpu"))
        other_q = quantized(64, 256, symmetric=symmetric, seed=1)
        other = Int4Linear(Int4Weight.from_quantized(other_q, layout="cpu"))
        assert planes.state_dict().keys() == cpu.state_dict().keys()
        other.load_state_dict(planes.state_dict())
        assert torch.equal(other.packed, cpu.packed)
        assert torch.equal(other.extra_0, cpu.extra_0)
        cpu._hold(planes.weight)  # as after a move: no buffer of the old layout stays
        assert cpu.nbytes == planes.nbytes
        cpu._hold(other.weight)
        assert cpu.nbytes == other.nbytes


def test_codes_of_more_than_four_bits() -> None:
    q = quantized(40, 256, symmetric=False)
    q.codes[3, 7] = 16
    with pytest.raises(ValueError, match="q has codes from 0 to 16; 0 to 15 are 4 bits"):
        Int4Weight.from_quantized(q)


def test_a_layer_of_the_wrong_size() -> None:
    w4 = Int4Weight.from_quantized(quantized(40, 256))
    for name, length in {"bias": 256, "input_scale": 40, "input_order": 40}.items():
        with pytest.raises(ValueError, match=rf"{name} must have the shape"):
            Int4Linear(w4, **{name: torch.ones(length)})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("backend", ["triton", "dense", "reference", None])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_a_gpu(symmetric: bool, dtype: torch.dtype, backend: str | None) -> None:
    if backend == "triton" and dtype == torch.float32:
        pytest.skip("the kernel takes float16 and bfloat16")
    q = quantized(1030, 1152, symmetric=symmetric)
    x = normal(37, 1152, seed=1, dtype=dtype)
    w4 = Int4Weight.from_quantized(q).to("cuda")
    assert torch.equal(w4.quantized().codes.cpu(), q.codes)
    expected = by_hand(x, q)
    y = int4_matmul(x.cuda(), w4, backend).cpu()
    assert float((y.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())
    layer = Int4Linear(Int4Weight.from_quantized(q)).cuda()
    assert layer.packed.is_cuda
    if dtype != torch.float32:
        assert torch.equal(layer(x.cuda()).cpu(), int4_matmul(x.cuda(), w4).cpu())
