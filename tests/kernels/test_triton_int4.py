"""The INT4 kernels against float64, on a GPU if there is one and in Triton's interpreter.

TRITON_INTERPRET must be set before triton is first imported and changes it for good, so
`test_in_the_interpreter` runs pytest on this file again in a process where it is set. The
interpreter computes bf16 wrongly and has no assembly: those need a GPU. ``test_triton_compiled.py``
reads the assembly.
"""

import os
import re
import shutil
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
from qcourse.kernels.int4_planes import pack_planes, scale_and_zero_rows, supports_group_size
from qcourse.kernels.triton_available import interpreted, unavailable_reason
from qcourse.kernels.triton_int4_configs import (
    BATCHES,
    FILE,
    TileConfig,
    choose_config,
    load_table,
    save_table,
    stored_config,
    tile_by_rule,
)
from qcourse.kernels.triton_int4_counters import COUNTERS
from qcourse.kernels.triton_int4_launch import decode, int4_mm
from qcourse.kernels.triton_int4_operands import VERSIONS

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
    """Random codes, scales and, if asked for, zero points, none of which is 8."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(N, K // group_size, generator=generator) * 0.02 + 0.001).half()
    zero_point = torch.randint(0, 15, scale.shape, generator=generator)
    if not zeros:
        return codes, scale, None
    return codes, scale, zero_point + (zero_point >= 8)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """w_hat in float64."""
    groups = codes.reshape(*scale.shape, -1).double()
    zero = 8 if zero_point is None else zero_point.unsqueeze(-1)
    w_hat = (groups - zero) * scale.double().unsqueeze(-1)
    return w_hat.flatten(1)


def packed(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, ...]:
    """Words, scales and, if there are any, zero points on the kernels' device."""
    group_size = codes.shape[1] // scale.shape[1]
    scale_rows, zero_rows = scale_and_zero_rows(scale, zero_point, group_size=group_size)
    words = pack_planes(codes).to(DEVICE)
    if zero_rows is None:
        return words, scale_rows.to(DEVICE)
    return words, scale_rows.to(DEVICE), zero_rows.to(DEVICE)


def product(
    x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, **options: object
) -> Tensor:
    """The product by a kernel, moved to the CPU."""
    group_size = codes.shape[1] // scale.shape[1]
    weight_tensors = packed(codes, scale, zero_point)
    y = int4_mm(x.to(DEVICE), *weight_tensors, group_size=group_size, **options)
    return y.cpu()


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


# M, N, K, group_size: two blocks of 128 and more, K not a multiple of a block, odd M and N.
SHAPES = [
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
            error = y.double() - exact
            size = exact.square().mean().sqrt()
            assert error.square().mean().sqrt() < TOLERANCE[dtype] * size, f"{version} {dtype}"
            # One wrong entry among many barely changes the mean.
            assert error.abs().max() < 5 * TOLERANCE[dtype] * size, f"{version} {dtype}"


@needs_kernels
@pytest.mark.parametrize("splits", [1, 2, 16])
def test_whole_numbers_are_exact(splits: int) -> None:
    N, K = 33, 384
    codes, scale, zero_point = weight(N, K, 64, zeros=True)
    scale = torch.where(scale > scale.median(), 1.0, 0.5).half()
    x = torch.randint(-1, 2, (17, K), generator=torch.Generator().manual_seed(2)).half()
    exact = x.double() @ dequantized(codes, scale, zero_point).T
    assert torch.equal(exact.half().double(), exact)  # fp16 holds the results
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
    w = weight(N, K, group_size, zeros=zeros)
    options = {"group_size": group_size, "inputs": K, "dtype": torch.float16}
    exact = dequantized(*w).half()  # codes times fp16 scales are exact in float32
    for start, stop in ((0, None), (1, N - 1), (N // 2, N + 64), (N, None)):
        w_hat = decode(*packed(*w), start=start, stop=stop, **options)
        assert torch.equal(w_hat.cpu(), exact[start:stop])


@needs_kernels  # the interpreter warns of 0 times infinity
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("version", VERSIONS)
def test_nan_and_inf_stay_in_their_rows(version: str) -> None:
    w = weight(33, 256, 64, zeros=True)
    x = activations(5, 256)
    clean = product(x, *w, version=version, config=SPLIT)
    x[1, 200] = torch.nan
    x[3, 3] = torch.inf
    y = product(x, *w, version=version, config=SPLIT)
    assert y[1].isnan().all()
    assert not y[3].isfinite().any()
    assert torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


@needs_kernels
def test_what_lies_beyond_k_does_not_count() -> None:
    w = weight(3, 160, 32, zeros=False)
    words, scale_rows = packed(*w)
    x = activations(2, 192)
    x[:, 160:] = torch.nan
    words[:, 16:] |= ~0x000F000F  # the second block's planes 1 to 3: past K
    x_view = x.to(DEVICE)[:, :160]
    exact = x[:, :160].double() @ dequantized(*w).T
    for version in VERSIONS:
        y = int4_mm(x_view, words, scale_rows, group_size=32, version=version, config=SMALL).cpu()
        torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)


@needs_kernels
def test_the_same_bits_and_counters_at_0(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(COUNTERS, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(launch, "zero_counters", lambda device: counters)
    w = weight(70, 640, 128, zeros=False)
    x = activations(9, 640)
    first = product(x, *w, config=SPLIT)
    again = product(x, *w, config=SPLIT)
    assert torch.equal(first, again)
    assert not counters.any()


@needs_kernels
def test_x_of_any_stride_and_no_rows() -> None:
    w = weight(33, 256, 64, zeros=False)
    x = activations(3, 256)
    y = product(x, *w)
    words, scale_rows = packed(*w)
    wide = torch.cat((x, x), dim=1).to(DEVICE)
    for same in (x.T.contiguous().T.to(DEVICE), wide[:, :256], wide[:, 256:]):
        assert torch.equal(int4_mm(same, words, scale_rows, group_size=64).cpu(), y)
    expanded = x[:1].to(DEVICE).expand(3, 256)
    y_expanded = int4_mm(expanded, words, scale_rows, group_size=64).cpu()
    assert torch.equal(y_expanded, y[:1].expand(3, 33))
    assert product(x[:0], *w).shape == (0, 33)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_other_dtypes(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and interpreted():
        pytest.skip("the interpreter computes bf16 wrongly")
    codes, scale, zero_point = weight(33, 256, 64, zeros=True)
    scale = scale.to(dtype) * 1e-5  # fp16 would hold such scales with a large error
    x = activations(3, 256) * 1000
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
    words, scale_rows = packed(*weight(3, 256, 64, zeros=False))
    arguments: dict = {"x": activations(2, 256), "words": words, "scale": scale_rows}
    arguments |= {"group_size": 64} | change
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = value.to(DEVICE)
    with pytest.raises(kind, match=says):
        int4_mm(**arguments)


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
    words, scale_rows = packed(*weight(200, 1024, 128, zeros=False))
    x = activations(4, 1024).cuda()

    def call() -> Tensor:
        return int4_mm(x, words, scale_rows, group_size=128, config=SPLIT)

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
    words, scale_rows = packed(*weight(2048, 2048, 128, zeros=False))
    x = activations(4, 2048).cuda()
    expected = int4_mm(x, words, scale_rows, group_size=128, config=SPLIT)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(int4_mm(x, words, scale_rows, group_size=128, config=SPLIT))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@needs_gpu
@pytest.mark.parametrize("batch", BATCHES)
def test_every_frozen_configuration_runs(batch: int) -> None:
    codes, scale, _ = weight(300, 2048, 128, zeros=False)
    x = activations(batch, 2048)
    exact = x.double() @ dequantized(codes, scale, None).T
    tables = load_table()["configs"].values()
    for config in {TileConfig(*table[str(batch)]) for table in tables if str(batch) in table}:
        y = product(x, codes, scale, None, config=config)
        assert (y.double() - exact).norm() / exact.norm() < 2e-3, config


def test_the_table_holds_configurations() -> None:
    assert load_table()["multiprocessors"] > 0
    assert load_table()["source"]
    for shape, entries in load_table()["configs"].items():
        assert re.fullmatch(r"\d+x\d+", shape)
        for batch, entry in entries.items():
            config = TileConfig(*entry)
            assert int(batch) in BATCHES
            for power_of_2 in (config.block_n, config.block_m, config.warps):
                assert power_of_2 & (power_of_2 - 1) == 0
            assert config.block_m >= 8
            assert min(astuple(config)) >= 1
            assert config.shared_nbytes <= 227 * 1024


def test_a_batch_takes_the_entry_of_the_next_size(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {str(batch): [64, 8, batch, 2, 4] for batch in BATCHES}
    table = {"configs": {"64x96": entries, "64x128": {}}}
    monkeypatch.setattr(triton_int4_configs, "load_table", lambda: table)
    for M, bucket in ((1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (256, 256)):
        assert stored_config(M, 64, 96) == TileConfig(64, 8, bucket, 2, 4)
    assert stored_config(1, 96, 64) is None
    assert stored_config(1, 64, 128) is None
    assert stored_config(257, 64, 96) is None  # left to the rule


def test_saving_the_table_gives_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_int4_configs, "FILE", tmp_path / "configs.json")
    shutil.copy(FILE, tmp_path / "configs.json")
    load_table.cache_clear()
    table = load_table()
    configs = {
        shape: {batch: TileConfig(*entry) for batch, entry in entries.items()}
        for shape, entries in table.pop("configs").items()
    }
    save_table(configs, **table)
    saved = (tmp_path / "configs.json").read_text(encoding="utf-8")
    load_table.cache_clear()
    assert saved == FILE.read_text(encoding="utf-8")


def test_the_rule_fills_the_gpu_and_leaves_each_program_work() -> None:
    for M in (1, 5, 16, 33, 64, 300):
        for N, K in ((8192, 8192), (57344, 8192), (1024, 28672), (100, 77)):
            config = tile_by_rule(M, N, K, multiprocessors=132)
            tiles = -(-N // config.block_n) * -(-M // config.block_m)
            blocks = -(-K // 128)
            assert config.splits == 1 or blocks >= 4 * config.splits
            enough_programs = tiles * config.splits >= 2 * 132
            one_more_is_too_many = blocks < 4 * (config.splits + 1)
            assert config.splits in (1, 16) or enough_programs or one_more_is_too_many
    assert choose_config(1, 100, 256, torch.device("cpu")).splits == 1


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
    assert supports_group_size(group_size, inputs) is answer
