"""How fast low-bit floats are encoded and decoded, and how much memory that takes: 4096 x 4096 float32.

`encode` is from the bits of the format alone, with a stated policy on overflow; quantizers clamp first and then let
torch cast where it has the format. Beside them run the casts of torch and ml_dtypes, which differ beyond the largest.

Memory is the peak resident set (VmHWM in /proc/self/status, so on Linux alone) of a fresh process that makes x and
quantizes it, less that of one that only makes it, plus x itself, over x.
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
    """A weight of deviation 0.02."""
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).mul_(0.02)


def times() -> list[dict]:
    """Each in milliseconds."""
    w = weights()
    codes, numpy_w = encode(w, E4M3), w.numpy()
    work = {
        "encode E4M3": lambda: encode(w, E4M3),
        "encode E5M2": lambda: encode(w, E5M2),
        "encode E2M1": lambda: encode(w, E2M1),
        "decode E4M3": lambda: decode(codes, E4M3),
        "torch's cast to E4M3": lambda: w.to(torch.float8_e4m3fn),
        "ml_dtypes' cast to E4M3": lambda: numpy_w.astype(ml_dtypes.float8_e4m3fn),
        **{name: lambda each=each: each(w) for name, each in QUANTIZERS.items()},
    }
    rows = [
        {"what": name, "unit": "ms", **timed_ms(each, repeats=5), "target": TARGET_MS.get(name)}
        for name, each in work.items()
    ]
    for name, each in QUANTIZERS.items():
        q = each(w)
        rows.append(
            {
                "what": f"{name}, dequantize",
                "unit": "ms",
                **timed_ms(q.dequantize, repeats=5),
                "target": None,
            }
        )
    return rows


def memory() -> list[dict]:
    """Peak memory over x's; nothing where /proc does not tell."""
    if not peak_bytes():
        return []

    def fresh(inside: str) -> int:
        command = [sys.executable, __file__, "--inside", inside]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    size = 4 * SIZE**2
    rows = []
    for name in QUANTIZERS:
        over = [1 + (fresh(name) - fresh("nothing")) / size for _ in range(3)]
        rows.append(
            {"what": f"{name}, peak memory", "unit": "x", **spread(over), "target": TARGET_MEMORY}
        )
    return rows


def in_this_process(what: str) -> None:
    """Make x, quantize it or not, print the peak in bytes."""
    w = weights()
    for quantizer in QUANTIZERS.values():
        quantizer(w[:64, :64])  # all is imported in both
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
