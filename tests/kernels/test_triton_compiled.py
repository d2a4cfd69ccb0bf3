"""The INT4 kernels as machine code, compiled without a GPU.

Triton compiles for a GPU that is not there, and its package includes NVIDIA's disassembler. These
tests guard what makes the kernel fast: no spills, wide loads of words, few instructions per weight.
``test_triton_int4.py`` tests the results, except for the packed assembly, which the interpreter
cannot run: here it is computed step by step.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcourse.kernels.triton_available import interpreted
from qcourse.kernels.triton_int4_configs import (
    TileConfig,
    stored_config,
    tile_by_rule,
    tile_widths,
)
from qcourse.kernels.triton_int4_launch import WIDE
from qcourse.lab import machine_code as lab

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing")

MOST_PER_WEIGHT = 3.5  # instructions; an H200 that reads 4.3 TB/s has time for no more
ARCHITECTURES = (80, 90, 100)
SMALL, MIDDLE, WIDEST = (tile_by_rule(M, 8192, 8192, multiprocessors=132) for M in (1, 16, 256))


@dataclass(frozen=True)
class Kernel:
    """What to compile: a version for an architecture (NVIDIA's, or "gfx942")."""

    version: str
    architecture: int | str
    dtype: str
    has_zero: bool
    config: TileConfig

    @property
    def weights_per_thread(self) -> float:
        """In one iteration of the loop."""
        depth = 32 if self.version == "naive" else 128
        return self.config.block_n * depth / (32 * self.config.warps)


@dataclass(frozen=True)
class Machine:
    """A kernel's loop in machine code, and the resources of the whole kernel."""

    loop: list[str]
    registers: int
    stack: int
    spills: int

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, each) is not None for each in self.loop)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(kernel: Kernel) -> object:
    """As `lab/machine_code.py` does it, for any kernel."""
    from triton.backends.compiler import GPUTarget

    config = kernel.config
    nvidia = kernel.architecture in ARCHITECTURES
    fixed = lab.FIXED | {
        "HAS_ZERO": kernel.has_zero,
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "STAGES": config.stages,
        "PACKED": nvidia,
        "SCALE_FIRST": config.block_m >= WIDE,
    }
    if nvidia:
        target = GPUTarget("cuda", kernel.architecture, 32)
    else:
        target = GPUTarget("hip", kernel.architecture, 64)
    options = {"dtype": kernel.dtype, "warps": config.warps, "stages": config.stages}
    return lab.compiled(kernel.version, fixed, target=target, **options)


@cache
def machine_code(kernel: Kernel) -> Machine:
    """The loop that loads the words, disassembled."""
    binary = Path(triton.knobs.cache.dir, f"kernel-{abs(hash(kernel))}.cubin")
    binary.write_bytes(compiled(kernel).asm["cubin"])  # type: ignore[attr-defined]
    try:
        text = lab.disassembled(binary, "-sass")
        usage = lab.disassembled(binary, "-res-usage")
    except (AttributeError, RuntimeError):
        pytest.skip("triton's package includes no disassembler here")
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    stack = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return Machine(lab.loop_of(text), registers, stack, spills)


TUNED = []
for architecture in ARCHITECTURES:
    TUNED += [
        Kernel("tuned", architecture, "*fp16", has_zero=False, config=SMALL),
        Kernel("tuned", architecture, "*fp16", has_zero=True, config=MIDDLE),
        Kernel("tuned", architecture, "*bf16", has_zero=False, config=MIDDLE),
    ]
for M in (1, 16):
    stored = stored_config(M, 8192, 8192)
    if stored:
        TUNED.append(Kernel("tuned", 90, "*fp16", has_zero=False, config=stored))
TUNED = list(dict.fromkeys(TUNED))  # a stored configuration may be that of the rule


def kernel_name(kernel: Kernel) -> str:
    return f"sm_{kernel.architecture}-{kernel.dtype[1:]}-{kernel.config.block_m}"


@pytest.mark.parametrize("kernel", TUNED, ids=kernel_name)
def test_the_tuned_kernel_needs_few_instructions_per_weight(kernel: Kernel) -> None:
    code = machine_code(kernel)
    config = kernel.config
    assert code.stack == code.spills == 0
    assert len(code.loop) <= MOST_PER_WEIGHT * kernel.weights_per_thread
    # A block's words and, where a thread's share of a plane fills 16 bytes, x: all in wide loads.
    threads = 32 * config.warps
    x_nbytes = 256 * config.block_m
    words_loads = config.block_n * 64 // 16 // threads
    x_loads = x_nbytes // 16 // threads if x_nbytes // 4 // threads >= 16 else 0
    assert code.count(r"LDGSTS.*\.128") == words_loads + x_loads
    assert code.count(r"(HMMA|HGMMA)") > 0
    assert 16 * 32 * code.registers <= 65_536  # 16 warps at once on a multiprocessor


@pytest.mark.parametrize("architecture", [80, 90])
def test_a_wide_tile_spills_nothing(architecture: int) -> None:
    code = machine_code(Kernel("tuned", architecture, "*fp16", True, WIDEST))
    assert code.stack == code.spills == 0
    assert code.count(r"(HMMA|HGMMA)") > 0


def test_on_blackwell_the_rule_keeps_to_tiles_of_two_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    limits = tile_widths(torch.device("cuda", 0))
    config = tile_by_rule(256, 8192, 8192, multiprocessors=148, widths=limits)
    assert config.warps == 2
    code = machine_code(Kernel("tuned", 100, "*fp16", False, config))
    assert code.count("HMMA") > 0  # tensor cores that work on registers


def test_each_version_costs_less_than_the_one_before() -> None:
    naive = machine_code(Kernel("naive", 90, "*fp16", False, TileConfig(64, 16, 1, 4, 3)))
    planes = machine_code(Kernel("planes", 90, "*fp16", False, MIDDLE))
    tuned = machine_code(Kernel("tuned", 90, "*fp16", False, MIDDLE))
    weights = MIDDLE.block_n * 128 / (32 * MIDDLE.warps)
    assert naive.stack == planes.stack == 0
    assert len(naive.loop) / 16 > 10
    assert 2.5 < len(planes.loop) / weights < 4
    assert len(tuned.loop) < 0.8 * len(planes.loop)
    assert naive.count("I2F") >= 16  # a conversion each; the others have none
    assert planes.count("I2F") == tuned.count("I2F") == 0


def test_amd_s_compiler_takes_it() -> None:
    try:
        code = compiled(Kernel("tuned", "gfx942", "*fp16", True, TileConfig(128, 16, 1, 4, 2)))
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"triton's package does not compile for AMD here: {error}")
    text = code.asm["amdgcn"]  # type: ignore[attr-defined]
    assert re.search(r"\.vgpr_spill_count: *0\b", text)
    assert "global_load_dwordx4" in text
    assert "v_mfma_f32" in text
    assert "v_pk_add_f16" in text  # two weights at a time without our assembly


def computed(
    assembly: str, word: Tensor, offsets: list[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The four results of the packed assembly, for 32-bit words (as int64) and pairs of floats."""
    values = {"$4": word} | {f"${5 + i}": offset for i, offset in enumerate(offsets)}

    def value(name: str) -> Tensor:
        return torch.tensor(int(name, 16)) if name.startswith("0x") else values[name]

    def halves(bits: Tensor) -> Tensor:
        both = torch.stack((bits & 0xFFFF, bits >> 16), -1).expand(*word.shape, 2)
        return both.to(torch.uint16).view(dtype).double()

    for line in assembly.strip(" {}\n").splitlines():
        operation, _, rest = line.strip(" ;").partition(" ")
        result, *names = rest.split(", ")
        if operation == "mov.b32":
            values[result] = value(names[0])
        elif operation == "shr.u32":
            values[result] = value(names[0]) >> int(names[1])
        elif operation == "lop3.b32":
            a, b, c = map(value, names[:3])
            assert names[3] == "0xea"  # the table of (a & b) | c
            values[result] = (a & b) | c
        elif operation.startswith("fma.rn"):
            operands = [value(name) for name in names]
            a, b, c = (each if each.is_floating_point() else halves(each) for each in operands)
            values[result] = (a * b + c).to(dtype).double()  # rounded once, as fma does
        else:
            assert operation == ".reg"
    return [values[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(("dtype", "base"), [(torch.float16, 1024), (torch.bfloat16, 128)])
def test_the_assembly_decodes_every_word(dtype: torch.dtype, base: int) -> None:
    from qcourse.kernels import triton_int4_decoding

    is_fp16 = dtype == torch.float16
    assembly = triton_int4_decoding.FP16_PLANES if is_fp16 else triton_int4_decoding.BF16_PLANES
    low = torch.arange(1 << 16)
    high = low.flip(0)  # another number in the other half, so that a leak would show
    for zero in (0, 1, 7, 8, 15):
        odd = 64 if is_fp16 else base  # the odd planes of fp16 read as 64 + code
        offsets = [
            torch.full((len(low), 2), -float(start + zero), dtype=dtype).double()
            for start in (base, odd, base, odd)
        ]
        results = computed(assembly.value, low | high << 16, offsets, dtype)
        for plane, found in enumerate(results):
            codes = torch.stack((low, high), -1) >> 4 * plane & 15
            assert torch.equal(found, (codes - zero).double()), f"plane {plane}, zero point {zero}"
