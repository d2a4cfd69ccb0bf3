"""Time, output error, clips and memory of AWQ.

Times are of whole calls of awq on random float32 weights (in x in) and 512 tokens, with one channel
in 200 that is 15 times larger, to 4 bits in groups of 128: 21 exponents, 10 clips. The direct
search tries each clip of each group on the tokens in float64, as the published code does.

Memory is the peak resident set (VmHWM in /proc/self/status, on Linux only) of a fresh process that
quantizes, minus that of one that only makes weights and tokens, plus the weights themselves, over
the weights.
"""

import argparse
import subprocess
import sys
import time

import torch
from _stamp import peak_bytes, report, spread, timed_ms
from torch import Tensor

from qcourse import IntQuantizer, PerGroup
from qcourse.methods.awq import Awq, AWQResult, awq
from qcourse.methods.clip import SHRINKS

TOKENS = 512
SIZE = 128
INT4 = IntQuantizer(4, granularity=PerGroup(SIZE))


def layer(side: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """A weight and its inputs."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(side, side, generator=generator)
    x = torch.randn(tokens, side, generator=generator)
    x[:, ::200] *= 15
    return w, x


def row(what: str, unit: str, values: dict[str, float], target: float | None = None) -> dict:
    """One line of the table."""
    return {"what": what, "unit": unit, **values, "target": target}


def seconds(call: object, repeats: int) -> dict[str, float]:
    """The least and the median time of a call in s."""
    times_ms = timed_ms(call, repeats=repeats)  # type: ignore[arg-type]
    return {name: value / 1000 for name, value in times_ms.items()}


def times(side: int, target: float | None, repeats: int) -> list[dict]:
    """Both searches, the first alone, and both by x^T x of 8192 tokens."""
    w, x = layer(side)
    many = layer(side, 8192)[1]
    method = Awq(INT4)
    start = time.perf_counter()
    seen = method.observe(None, many)
    square_s = time.perf_counter() - start
    name = f"{side} x {side}"
    both_s = seconds(lambda: awq(w, x, INT4), repeats)
    scale_s = seconds(lambda: awq(w, x, INT4, clip=False), repeats)
    by_square_s = seconds(lambda: method.quantize({"w": w}, seen), min(repeats, 2))
    return [
        row(f"{name}: scale and clip", "s", both_s, target),
        row(f"{name}: scale alone", "s", scale_s),
        row(f"{name}: x^T x of 8192 tokens", "s", spread([square_s])),
        row(f"{name}: both, by x^T x", "s", by_square_s),
    ]


def errors(side: int) -> list[dict]:
    """The relative error of the outputs on the calibration data."""
    w, x = layer(side)
    y = x @ w.T
    to_nearest = float((x @ (INT4(w).dequantize() - w).T).norm() / y.norm())
    found = {
        "to nearest": to_nearest,
        "scaled": awq(w, x, INT4, clip=False).error,
        "scaled and clipped": awq(w, x, INT4).error,
    }
    return [row(f"{side} x {side}: error, {name}", "", spread([e])) for name, e in found.items()]


def direct_clips(ws: Tensor, x: Tensor) -> Tensor:
    """The clip of each row and group with the least ||x (ws - Q(ws))^T||, tried on all tokens."""
    ws = ws.double()
    x = x.double()
    losses = torch.empty(len(SHRINKS), len(ws), ws.shape[1] // SIZE)
    for i, share in enumerate(SHRINKS):
        d = INT4.nearest(ws, INT4.fit(share * ws))[1] - ws
        for g in range(losses.shape[2]):
            part = slice(g * SIZE, (g + 1) * SIZE)
            losses[i, :, g] = (x[:, part] @ d[:, part].T).square().sum(0)
    return torch.tensor(SHRINKS)[losses.argmin(0)]


def choices(side: int) -> list[dict]:
    """How many clips differ from a direct search's, and how long that takes."""
    w, x = layer(side)
    result: AWQResult = awq(w, x, INT4)
    assert result.input_scale is not None
    ws = w * result.input_scale
    xs = x / result.input_scale
    start = time.perf_counter()
    direct = direct_clips(ws, xs)
    time_s = time.perf_counter() - start
    # AWQ leaves the other rows unclipped, because clipping all their groups does not pay.
    searched = (result.shrink < 1).any(1)
    differ = int((result.shrink != direct)[searched].sum())
    name = f"{side} x {side}"
    return [
        row(f"{name}: clips other than by direct search", "", spread([differ]), 0),
        row(f"{name}: clips compared", "", spread([int(searched.sum()) * direct.shape[1]])),
        row(f"{name}: direct search of clips", "s", spread([time_s])),
    ]


def memory(side: int) -> list[dict]:
    """Peak memory of awq over the weights'; empty without /proc."""
    if not peak_bytes():
        return []

    def fresh(*options: str) -> float:
        command = [sys.executable, __file__, f"--inside={side}", *options]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    peaks = [1 + (fresh() - fresh("--idle")) / (side * side * 4) for _ in range(3)]
    return [row(f"{side} x {side}: peak memory, weights included", "x", spread(peaks))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        w, x = layer(options.inside)
        awq(w[:1], x, INT4) if options.idle else awq(w, x, INT4)
        print(peak_bytes())
    else:
        lines = times(4096, target=5, repeats=3)
        lines += times(1024, target=None, repeats=5)
        lines += errors(4096)
        lines += choices(512)
        lines += memory(4096)
        report("awq_cpu", lines)
