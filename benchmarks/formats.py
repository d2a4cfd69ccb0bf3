"""Time and memory of encoding and decoding low-bit floats: 4096 x 4096 float32.

`encode` works from the bits of the format and has a policy on overflow. Quantizers clamp first, and
then let torch cast if it has the format. The casts of torch and ml_dtypes are timed beside them.

Peak memory (VmHWM, Linux only) is that of a fresh process that makes x and quantizes it, less that
of one that only makes it, plus x, over x.
"""

import argparse
import subprocess
import sys

import ml_dtypes
import torch
from _stamp import peak_bytes, report, spread, timed_ms

from qcourse import PerChannel, PerGroup
from qcourse.numerics.codebook import CodebookQuantizer
from qcourse.numerics.float_quantizer import FloatQuantizer
from qcourse.numerics.microscaling import NVFP4Quantizer, mx
from qcourse.numerics.minifloat import E2M1, E4M3, E5M2, decode
from qcourse.numerics.minifloat_encoding import encode

SIZE = 4096
QUANTIZERS = {
    "FP8 by channel": FloatQuantizer(E4M3, PerChannel(0)),
    "MXFP8": mx(E4M3),
    "MXFP4": mx(E2M1),
    "NVFP4": NVFP4Quantizer(),
    "NF4 g64": CodebookQuantizer(granularity=PerGroup(64)),
}
TARGET_MS = {"encode E4M3": 100, "NF4 g64": 200, "MXFP4": 200, "NVFP4": 200}
TARGET_MEMORY = 4


def weights() -> torch.Tensor:
    """Return a weight matrix with standard deviation 0.02."""
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).mul_(0.02)


def times() -> list[dict]:
    """Time each function and quantizer in ms."""
    w = weights()
    codes = encode(w, E4M3)
    numpy_w = w.numpy()
    work = {
        "encode E4M3": lambda: encode(w, E4M3),
        "encode E5M2": lambda: encode(w, E5M2),
        "encode E2M1": lambda: encode(w, E2M1),
        "decode E4M3": lambda: decode(codes, E4M3),
        "torch's cast to E4M3": lambda: w.to(torch.float8_e4m3fn),
        "ml_dtypes' cast to E4M3": lambda: numpy_w.astype(ml_dtypes.float8_e4m3fn),
    }
    for name, quantizer in QUANTIZERS.items():
        work[name] = lambda quantizer=quantizer: quantizer(w)
    for name, quantizer in QUANTIZERS.items():
        work[f"{name}, dequantize"] = quantizer(w).dequantize
    rows = []
    for name, call in work.items():
        time_ms = timed_ms(call, repeats=5)
        rows.append({"what": name, "unit": "ms", **time_ms, "target": TARGET_MS.get(name)})
    return rows


def memory() -> list[dict]:
    """Measure the peak memory of each quantizer over x's; nothing where there is no /proc."""
    if not peak_bytes():
        return []
    size = 4 * SIZE**2
    rows = []
    for name in QUANTIZERS:
        peaks = []
        for _ in range(3):
            added = fresh_peak_bytes(name) - fresh_peak_bytes("nothing")
            peaks.append(1 + added / size)
        values = spread(peaks)
        rows.append(
            {"what": f"{name}, peak memory", "unit": "x", **values, "target": TARGET_MEMORY}
        )
    return rows


def fresh_peak_bytes(inside: str) -> int:
    """Return the peak memory of a fresh process that quantizes with one quantizer, or none."""
    command = [sys.executable, __file__, "--inside", inside]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def in_this_process(what: str) -> None:
    """Make x, quantize it or not, and print the peak in bytes."""
    w = weights()
    # So that both processes import the same.
    for quantizer in QUANTIZERS.values():
        quantizer(w[:64, :64])
    if what in QUANTIZERS:
        QUANTIZERS[what](w)
    print(peak_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inside", choices=(*QUANTIZERS, "nothing"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        in_this_process(options.inside)
    else:
        report("formats_cpu", [*times(), *memory()])
