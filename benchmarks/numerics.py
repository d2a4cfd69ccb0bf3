"""How long floor 1 takes on 4096 x 4096 float32, how much memory, and how long the package takes to import.

Each time is the least and the median of several calls in one process; the least is held against the target. Memory and
imports are measured in fresh processes. Memory is the peak resident set (VmHWM in /proc/self/status, so on Linux alone)
of a process that makes the tensor and quantizes it, less that of a process that only makes the tensor, plus the tensor
itself, over the tensor.
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


def row(what: str, unit: str, values: dict[str, float], target: float | None = None) -> dict:
    """One line of the table."""
    return {"what": what, "unit": unit, **values, "target": target}


def fresh(code: str) -> float:
    """The number that `code` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def quantizing() -> list[dict]:
    """quantize (its look for NaN and infinity included) and dequantize, by granularity."""
    x = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, bits, options, target in (
        ("groups of 128, 4 bits", 4, {"granularity": PerGroup(128)}, 60),
        (
            "groups of 128, 4 bits, asymmetric",
            4,
            {"granularity": PerGroup(128), "symmetric": False},
            None,
        ),
        ("groups of 32, 4 bits", 4, {"granularity": PerGroup(32)}, None),
        ("channels (rows), 8 bits", 8, {"granularity": PerChannel(0)}, None),
        ("channels (columns), 8 bits", 8, {"granularity": PerChannel(1)}, None),
        ("tensor, 8 bits", 8, {"granularity": PerTensor()}, None),
    ):
        q = quantize(x, bits, **options)
        rows.append(
            row(
                f"quantize, {name}",
                "ms",
                timed_ms(lambda b=bits, o=options: quantize(x, b, **o)),
                target,
            )
        )
        rows.append(row(f"dequantize, {name}", "ms", timed_ms(q.dequantize)))
    strip = x[: SIDE // 16]
    options = {"granularity": PerGroup(128), "scale_rule": "mse"}
    rows.append(
        row(
            "quantize, mse, 256 rows alone",
            "ms",
            timed_ms(lambda: quantize(strip, 4, **options), repeats=3),
        )
    )
    return rows


def packing() -> list[dict]:
    """pack and unpack at each width."""
    rows = []
    for bits in range(2, 9):
        half = 1 << bits - 1
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(-half, half, (SIDE, SIDE), generator=generator, dtype=torch.int8)
        packed, count, target = pack(codes, bits), codes.numel(), 25 if bits == 4 else None
        rows.append(
            row(f"pack, {bits} bits", "ms", timed_ms(lambda c=codes, b=bits: pack(c, b)), target)
        )
        unpacking = timed_ms(lambda p=packed, b=bits, n=count: unpack(p, b, n))
        rows.append(row(f"unpack, {bits} bits", "ms", unpacking, target))
        if bits == 4:
            words = pack_int32(codes, bits)
            rows.append(row("pack_int32, 4 bits", "ms", timed_ms(lambda c=codes: pack_int32(c, 4))))
            rows.append(
                row("unpack_int32, 4 bits", "ms", timed_ms(lambda w=words: unpack_int32(w, 4)))
            )
    return rows


def memory() -> list[dict]:
    """Peak memory of quantize, over the input's; nothing where /proc does not tell."""
    if not Path("/proc/self/status").exists():
        return []
    size_kib = SIDE * SIDE * 4 / 1024
    idle = f"{MAKE}; import qcourse; qcourse.quantize"  # all is imported in both
    peaks = [
        1 + (fresh(f"{MAKE}; {QUANTIZE}; {PEAK}") - fresh(f"{idle}; {PEAK}")) / size_kib
        for _ in range(3)
    ]
    return [row("peak memory of quantize, input included", "x", spread(peaks), 3)]


def imports() -> list[dict]:
    """Import times, each in a fresh process."""
    return [
        row(what, "ms", spread([fresh(code) for _ in range(5)]), target)
        for what, code, target in (
            ("import qcourse", CLOCK.format("import qcourse"), None),
            ("import qcourse.cost.memory", CLOCK.format("import qcourse.cost.memory"), None),
            (
                "qcourse.quantize beyond torch",
                "import torch; " + CLOCK.format("from qcourse import quantize"),
                200,
            ),
        )
    ]


if __name__ == "__main__":
    report("numerics_cpu", [*quantizing(), *packing(), *memory(), *imports()])
