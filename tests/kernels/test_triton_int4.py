"""The INT4 kernels against float64: on a GPU where there is one, and in triton's interpreter, in a process of its own.

TRITON_INTERPRET must be set before triton is first imported and changes it for good, so `test_in_the_interpreter`
starts pytest on this file again with it set. The interpreter reckons bf16 wrongly and knows no assembly: those are for
a GPU (and for ``test_triton_compiled.py``, which reads the assembly).
"""

import os
import re
import subprocess
import sys
from dataclasses import astuple
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcourse.kernels import triton_int4_configs, triton_int4_counters
from qcourse.kernels import triton_int4_launch as launch
from qcourse.kernels.int4_planes import pack_planes, prepare, takes
from qcourse.kernels.triton_int4_configs import (
    BATCHES,
    TileConfig,
    choose,
    frozen,
    table,
    tile_by_rule,
)
from qcourse.kernels.triton_int4_counters import COUNTERS
from qcourse.kernels.triton_int4_launch import (
    VERSIONS,
    unavailable_reason,
    decode,
    int4_mm,
    interpreted,
)

DEVICE = "cpu" if interpreted() else "cuda"
needs_kernels = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"{unavailable_reason()}: see test_in_the_interpreter"
)
needs_gpu = pytest.mark.skipif(
    unavailable_reason() is not None or interpreted(), reason="no GPU that runs the kernels"
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SMALL = TileConfig(block_n=64, block_m=16, splits=1, warps=2, stages=3)
SPLIT = TileConfig(block_n=64, block_m=8, splits=3, warps=2, stages=2)


def weight(
    N: int, K: int, group_size: int, *, zeros: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points; the zero points anything but 8 where there are any."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(N, K // group_size, generator=generator) * 0.02 + 0.001).half()
    zero_point = torch.randint(0, 15, scale.shape, generator=generator)
    return codes, scale, zero_point + (zero_point >= 8) if zeros else None


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """w_hat in float64."""
    groups = codes.reshape(*scale.shape, -1).double() - (
        8 if zero_point is None else zero_point.unsqueeze(-1)
    )
    return (groups * scale.double().unsqueeze(-1)).flatten(1)


def product(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, **options: object
) -> Tensor:
    """The kernel's, on the CPU again."""
    group_size = codes.shape[1] // scale.shape[1]
    scale_rows, zero_rows = prepare(scale, zero_point, group_size=group_size)
    zero_rows = zero_rows if zero_rows is None else zero_rows.to(DEVICE)
    given = x.to(DEVICE), pack_planes(codes).to(DEVICE), scale_rows.to(DEVICE), zero_rows
    return int4_mm(*given, group_size=group_size, **options).cpu()  # type: ignore[arg-type]


def activations(M: int, K: int, dtype: torch.dtype = torch.float16, seed: int = 1) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.skipif(interpreted(), reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    if "is not installed" in (unavailable_reason() or ""):
        pytest.skip(str(unavailable_reason()))
    old = [tuple(map(int, installed(name).split(".")[:2])) for name in ("triton", "numpy")]
    if old[0] < (3, 7) and old[1] >= (2, 4):
        pytest.skip("the interpreter of triton before 3.7 does not run with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1] if passed else 0) >= 40, done.stdout[-2000:]


SHAPES = [  # M, N, K, group_size: two blocks of 128 and more, K not a multiple of a block, odd M and N
    (1, 65, 256, 32),
    (3, 33, 416, 32),
    (17, 63, 320, 64),
    (3, 65, 384, 128),
    (17, 31, 512, 256),
    (5, 33, 768, 384),
    (1, 7, 77, 77),
    (3, 65, 300, 300),
    (2, 1, 64, 32),
]


@needs_kernels
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_product_with_w_hat(shape: tuple[int, int, int, int], zeros: bool) -> None:
    M, N, K, group_size = shape
    w = weight(N, K, group_size, zeros=zeros)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = activations(M, K, dtype)
        exact = x.double() @ dequantized(*w).T
        for version, config in (("naive", None), ("planes", SMALL), ("tuned", SPLIT)):
            if (dtype == torch.bfloat16 and interpreted()) or (
                dtype == torch.float32 and version != "naive"
            ):
                continue
            y = product(x, *w, version=version, config=config)
            assert y.dtype == dtype
            error, size = (y.double() - exact), exact.square().mean().sqrt()
            assert error.square().mean().sqrt() < TOLERANCE[dtype] * size, f"{version} {dtype}"
            assert error.abs().max() < 5 * TOLERANCE[dtype] * size, (
                f"{version} {dtype}: one hides among many"
            )


@needs_kernels
@pytest.mark.parametrize("splits", [1, 2, 16])
def test_whole_numbers_are_exact(splits: int) -> None:
    N, K = 33, 384
    codes, scale, zero_point = weight(N, K, 64, zeros=True)
    scale = torch.where(scale > scale.median(), 1.0, 0.5).half()
    x = torch.randint(-1, 2, (17, K), generator=torch.Generator().manual_seed(2)).half()
    exact = x.double() @ dequantized(codes, scale, zero_point).T
    assert torch.equal(exact.half().double(), exact)  # what is to be told is an fp16 number
    for version in VERSIONS:
        config = TileConfig(block_n=32, block_m=16, splits=splits, warps=2, stages=2)
        y = product(x, codes, scale, zero_point, version=version, config=config)
        assert torch.equal(y.double(), exact), version


@needs_kernels
@pytest.mark.parametrize(
    ("M", "config"),
    [
        (1, None),
        (257, None),
        (40, TileConfig(block_n=32, block_m=32, splits=2, warps=2, stages=2)),
        (70, TileConfig(block_n=128, block_m=64, splits=2, warps=4, stages=3)),
        (130, TileConfig(block_n=128, block_m=128, splits=1, warps=8, stages=2)),
    ],
)
def test_batches_and_tiles(M: int, config: TileConfig | None) -> None:
    w = weight(37, 256, 32, zeros=True)
    x = activations(M, 256)
    exact = x.double() @ dequantized(*w).T
    for version in ("planes", "tuned"):
        y = product(x, *w, version=version, config=config)
        assert (y.double() - exact).norm() / exact.norm() < 2e-3


@needs_kernels
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    "shape", [(65, 416, 32), (70, 320, 64), (3, 300, 300), (9, 768, 384)], ids=str
)
def test_w_hat_written_out(shape: tuple[int, int, int], zeros: bool) -> None:
    N, K, group_size = shape
    codes, scale, zero_point = weight(N, K, group_size, zeros=zeros)
    scale_rows, zero_rows = prepare(scale, zero_point, group_size=group_size)
    zero_rows = zero_rows if zero_rows is None else zero_rows.to(DEVICE)
    given = pack_planes(codes).to(DEVICE), scale_rows.to(DEVICE), zero_rows
    exact = dequantized(
        codes, scale, zero_point
    ).half()  # codes times fp16 scales are exact in float32
    for start, stop in ((0, None), (1, N - 1), (N // 2, N + 64), (N, None)):
        w_hat = decode(
            *given, group_size=group_size, inputs=K, dtype=torch.float16, start=start, stop=stop
        )
        assert torch.equal(w_hat.cpu(), exact[start:stop])


@needs_kernels
@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # the interpreter's, of 0 times infinity
@pytest.mark.parametrize("version", VERSIONS)
def test_nan_and_inf_stay_in_their_rows(version: str) -> None:
    w = weight(33, 256, 64, zeros=True)
    x = activations(5, 256)
    clean = product(x, *w, version=version, config=SPLIT)
    x[1, 200], x[3, 3] = torch.nan, torch.inf
    y = product(x, *w, version=version, config=SPLIT)
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


@needs_kernels
def test_what_lies_beyond_k_does_not_count() -> None:
    codes, scale, _ = weight(3, 160, 32, zeros=False)
    words, (rows, _) = pack_planes(codes), prepare(scale, group_size=32)
    x = activations(2, 192)
    x[:, 160:] = torch.nan
    words[:, 16:] |= ~0x000F000F  # the second block's planes 1 to 3: past K
    exact = x[:, :160].double() @ dequantized(codes, scale, None).T
    for version in VERSIONS:
        given = x.to(DEVICE)[:, :160], words.to(DEVICE), rows.to(DEVICE)
        y = int4_mm(*given, group_size=32, version=version, config=SMALL).cpu()
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)


@needs_kernels
def test_the_same_bits_and_counters_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(launch, "counters_at_0", lambda device: counters)
    w, x = weight(70, 640, 128, zeros=False), activations(9, 640)
    first, again = (product(x, *w, config=SPLIT) for _ in range(2))
    assert torch.equal(first, again)
    assert not counters.any()


@needs_kernels
def test_x_of_any_stride_and_no_rows() -> None:
    w = weight(33, 256, 64, zeros=False)
    x = activations(3, 256)
    y = product(x, *w)
    codes, scale, _ = w
    words, (rows, _) = pack_planes(codes).to(DEVICE), prepare(scale, group_size=64)
    wide = torch.cat((x, x), dim=1).to(DEVICE)
    for same in (x.T.contiguous().T.to(DEVICE), wide[:, :256], wide[:, 256:]):
        assert torch.equal(int4_mm(same, words, rows.to(DEVICE), group_size=64).cpu(), y)
    expanded = x[:1].to(DEVICE).expand(3, 256)
    assert torch.equal(
        int4_mm(expanded, words, rows.to(DEVICE), group_size=64).cpu(), y[:1].expand(3, 33)
    )
    assert product(x[:0], *w).shape == (0, 33)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("the interpreter reckons bf16 wrongly")
    codes, scale, zero_point = weight(33, 256, 64, zeros=True)
    scale, x = (
        scale.to(dtype) * 1e-5,
        activations(3, 256) * 1000,
    )  # scales that fp16 would not hold well
    exact = x.double() @ dequantized(codes, scale, zero_point).T
    for config in (None, TileConfig(block_n=128, block_m=64, splits=1, warps=4, stages=2)):
        y = product(x, codes, scale, zero_point, config=config)
        assert (y.double() - exact).norm() / exact.norm() < 2e-3


@needs_kernels
@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"version": "fast"}, ValueError, "version='fast' must be one of naive, planes, tuned"),
        (
            {"x": torch.ones(2, 256)},
            TypeError,
            "x has dtype torch.float32; version='tuned' takes torch.float16",
        ),
        (
            {"x": torch.ones(2, 320).half()},
            ValueError,
            r"words of shape \(3, 32\) .* must be of shape \(3, 48\)",
        ),
        (
            {"group_size": 48},
            ValueError,
            "group_size=48 with K=256 must be 32, 64 or a multiple of 128",
        ),
        ({"group_size": 32}, ValueError, r"scale of shape \(4, 3\) .* must be of shape \(8, 3\)"),
        (
            {"zero_point": torch.zeros(3, 4, dtype=torch.uint8).T},
            ValueError,
            "zero_point of shape .* contiguous",
        ),
        ({"scale": torch.ones(3, 4).half().T}, ValueError, "scale .* contiguous"),
    ],
)
def test_what_is_refused(change: dict, kind: type[Exception], says: str) -> None:
    codes, scale, _ = weight(3, 256, 64, zeros=False)
    given = {
        "x": activations(2, 256),
        "words": pack_planes(codes),
        "scale": prepare(scale, group_size=64)[0],
    }
    given = {name: value.to(DEVICE) for name, value in given.items()} | {"group_size": 64}
    change = {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in change.items()
    }
    with pytest.raises(kind, match=says):
        int4_mm(**(given | change))


@pytest.mark.skipif(not interpreted(), reason="not in the interpreter")
def test_the_interpreter_s_bf16_is_refused() -> None:
    with pytest.raises(
        TypeError,
        match=r"x has dtype torch.bfloat16; version='naive' takes .*float16.*float32 here",
    ):
        product(
            activations(2, 64, torch.bfloat16), *weight(3, 64, 32, zeros=False), version="naive"
        )


@needs_gpu
@pytest.mark.parametrize("warm", [False, True])
def test_a_captured_graph_gives_the_same_bits(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_int4_counters, "_kept", {})
    monkeypatch.setattr(triton_int4_counters, "_places", {})
    codes, scale, _ = weight(200, 1024, 128, zeros=False)
    given = (
        activations(4, 1024).cuda(),
        pack_planes(codes).cuda(),
        prepare(scale, group_size=128)[0].cuda(),
    )
    call = lambda: int4_mm(*given, group_size=128, config=SPLIT)  # noqa: E731
    eager = call()
    if not warm:
        triton_int4_counters._kept.clear()
        triton_int4_counters._places.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, eager)
    assert torch.equal(call(), eager)


@needs_gpu
def test_two_streams_at_one_time() -> None:
    codes, scale, _ = weight(2048, 2048, 128, zeros=False)
    given = (
        activations(4, 2048).cuda(),
        pack_planes(codes).cuda(),
        prepare(scale, group_size=128)[0].cuda(),
    )
    expected = int4_mm(*given, group_size=128, config=SPLIT)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(4)], []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(int4_mm(*given, group_size=128, config=SPLIT))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@needs_gpu
@pytest.mark.parametrize("batch", BATCHES)
def test_every_frozen_configuration_runs(batch: int) -> None:
    codes, scale, _ = weight(300, 2048, 128, zeros=False)
    x = activations(batch, 2048)
    exact = x.double() @ dequantized(codes, scale, None).T
    for config in {
        TileConfig(*entries[str(batch)])
        for entries in table()["configs"].values()
        if str(batch) in entries
    }:
        y = product(x, codes, scale, None, config=config)
        assert (y.double() - exact).norm() / exact.norm() < 2e-3, config


def test_the_table_holds_configurations() -> None:
    assert table()["multiprocessors"] > 0
    assert table()["source"]
    for shape, entries in table()["configs"].items():
        assert re.fullmatch(r"\d+x\d+", shape)
        for batch, entry in entries.items():
            config = TileConfig(*entry)
            assert int(batch) in BATCHES
            assert all(
                value & (value - 1) == 0 for value in (config.block_n, config.block_m, config.warps)
            )
            assert config.block_m >= 8
            assert min(astuple(config)) >= 1
            assert config.shared_nbytes <= 227 * 1024


def test_a_batch_takes_the_entry_of_the_next_size(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {str(batch): [64, 8, batch, 2, 4] for batch in BATCHES}  # told apart by their splits
    monkeypatch.setattr(
        triton_int4_configs, "table", lambda: {"configs": {"64x96": entries, "64x128": {}}}
    )
    for M, bucket in ((1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (256, 256)):
        assert frozen(M, 64, 96) == TileConfig(64, 8, bucket, 2, 4)
    assert frozen(1, 96, 64) is None
    assert frozen(1, 64, 128) is None
    assert frozen(257, 64, 96) is None  # its rule cuts K for fewer tiles


def test_the_rule_fills_the_gpu_and_leaves_each_program_work() -> None:
    for M in (1, 5, 16, 33, 64, 300):
        for N, K in ((8192, 8192), (57344, 8192), (1024, 28672), (100, 77)):
            config = tile_by_rule(M, N, K, multiprocessors=132)
            tiles = -(-N // config.block_n) * -(-M // config.block_m)
            blocks = -(-K // 128)
            assert config.splits == 1 or blocks >= 4 * config.splits
            assert (
                config.splits in (1, 16)
                or tiles * config.splits >= 2 * 132
                or blocks < 4 * (config.splits + 1)
            )
    assert choose(1, 100, 256, torch.device("cpu")).splits == 1


@pytest.mark.parametrize(
    ("group_size", "inputs", "answer"),
    [
        (32, 96, True),
        (64, 96, False),
        (128, 4096, True),
        (256, 4096, True),
        (384, 512, False),
        (96, 192, False),
        (16, 256, False),
        (16, 16, True),
        (100, 100, True),
    ],
)
def test_the_groups_that_the_kernels_take(group_size: int, inputs: int, answer: bool) -> None:
    assert takes(group_size, inputs) is answer
