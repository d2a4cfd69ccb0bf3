"""Time and memory of quantizing and packing 4096 x 4096 float32, and the time of imports.

A time is the least and the median of several calls in one process; the least is compared with the
target. Peak memory (VmHWM, Linux only) and imports are measured in fresh processes. Peak memory is
that of a process that makes a tensor and quantizes it, less that of one that only makes it, plus
the tensor, over the tensor.
"""

import subprocess
import sys
from pathlib import Path

import torch
from _stamp import report, spread, timed_ms

from qcourse import PerChannel, PerGroup, PerTensor, pack, quantize, unpack
from qcourse.numerics.packing import pack_int32, unpack_int32

SIDE = 4096
MAKE = f"import torch; x = torch.ones({SIDE}, {SIDE})"
QUANTIZE = "from qcourse import PerGroup, quantize; quantize(x, 4, granularity=PerGroup(128))"
PEAK = r"import re; print(re.search(r'VmHWM:\s+(\d+) kB', open('/proc/self/status').read())[1])"
CLOCK = "import time; start = time.perf_counter(); {}; print(1000 * (time.perf_counter() - start))"

GROUPS = {"granularity": PerGroup(128)}
ASYMMETRIC = {"granularity": PerGroup(128), "symmetric": False}

# A name, bits, options of `quantize`, and the target in ms.
CASES = (
    ("groups of 128, 4 bits", 4, GROUPS, 60),
    ("groups of 128, 4 bits, asymmetric", 4, ASYMMETRIC, None),
    ("groups of 32, 4 bits", 4, {"granularity": PerGroup(32)}, None),
    ("channels (rows), 8 bits", 8, {"granularity": PerChannel(0)}, None),
    ("channels (columns), 8 bits", 8, {"granularity": PerChannel(1)}, None),
    ("tensor, 8 bits", 8, {"granularity": PerTensor()}, None),
)


def row(what: str, unit: str, values: dict[str, float], target: float | None = None) -> dict:
    """Return one row of results."""
    return {"what": what, "unit": unit, **values, "target": target}


def fresh(code: str) -> float:
    """Return the number that `code` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def quantizing() -> list[dict]:
    """Time quantize (with its checks) and dequantize, by granularity."""
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, bits, options, target in CASES:
        q = quantize(x, bits, **options)
        encoding = timed_ms(lambda b=bits, o=options: quantize(x, b, **o))
        rows.append(row(f"quantize, {name}", "ms", encoding, target))
        decoding = timed_ms(q.dequantize)
        rows.append(row(f"dequantize, {name}", "ms", decoding))
    strip = x[: SIDE // 16]
    searching = timed_ms(lambda: quantize(strip, 4, **GROUPS, scale_rule="mse"), repeats=3)
    rows.append(row("quantize, mse, 256 rows alone", "ms", searching))
    return rows


def packing() -> list[dict]:
    """Time pack and unpack at each width, and int32 words at 4 bits."""
    rows = []
    for bits in range(2, 9):
        half = 1 << bits - 1
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(-half, half, (SIDE, SIDE), generator=generator, dtype=torch.int8)
        packed = pack(codes, bits)
        count = codes.numel()
        target = 25 if bits == 4 else None
        folding = timed_ms(lambda c=codes, b=bits: pack(c, b))
        rows.append(row(f"pack, {bits} bits", "ms", folding, target))
        unfolding = timed_ms(lambda p=packed, b=bits, n=count: unpack(p, b, n))
        rows.append(row(f"unpack, {bits} bits", "ms", unfolding, target))
        if bits == 4:
            rows += packing_int32(codes)
    return rows


def packing_int32(codes: torch.Tensor) -> list[dict]:
    """Time the int32 words of 4-bit codes."""
    words = pack_int32(codes, 4)
    return [
        row("pack_int32, 4 bits", "ms", timed_ms(lambda: pack_int32(codes, 4))),
        row("unpack_int32, 4 bits", "ms", timed_ms(lambda: unpack_int32(words, 4))),
    ]


def memory() -> list[dict]:
    """Measure the peak memory of quantize over its input's; nothing where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return []
    size_kib = SIDE * SIDE * 4 / 1024
    only_makes_x = f"{MAKE}; import qcourse; qcourse.quantize; {PEAK}"  # with the same imports
    quantizes_x = f"{MAKE}; {QUANTIZE}; {PEAK}"
    peaks = []
    for _ in range(3):
        added_kib = fresh(quantizes_x) - fresh(only_makes_x)
        peaks.append(1 + added_kib / size_kib)
    return [row("peak memory of quantize, input included", "x", spread(peaks), 3)]


def imports() -> list[dict]:
    """Time imports, each in a fresh process."""
    package = CLOCK.format("import qcourse")
    module = CLOCK.format("import qcourse.cost.memory")
    beyond_torch = "import torch; " + CLOCK.format("from qcourse import quantize")
    return [
        row("import qcourse", "ms", import_ms(package)),
        row("import qcourse.cost.memory", "ms", import_ms(module)),
        row("qcourse.quantize beyond torch", "ms", import_ms(beyond_torch), 200),
    ]


def import_ms(code: str) -> dict[str, float]:
    """Return the least and the median of five runs."""
    return spread([fresh(code) for _ in range(5)])


if __name__ == "__main__":
    report("numerics_cpu", [*quantizing(), *packing(), *memory(), *imports()])
