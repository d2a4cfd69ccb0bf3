"""Time, output error and memory of GPTQ on a layer whose Hessian is known.

The grid is that of the published code: 4 bits, groups of 128 (and of 32), 16 levels at a scale of
2 amax / 15. Ours is compared with two programs in this file. `algorithm_1` is the paper's Algorithm
1 in torch: a block of columns at a time, and an update of the whole block after every column.
`plain` is a loop over columns in float64 without blocks, the result both should reach. Errors are
relative, ||x (w - w_hat)^T|| / ||x w^T||.

If a group is smaller than a block, Algorithm 1 fits its scale on the weight as it was when the
block began; ours fits it on the updated weight. On this grid the two are about equally good: a
scale that is too small clips, and at 2 amax / 15 a little clipping does no harm. If scales are
searched ("mse"), the updated weight is better.

Inputs are Gaussian with low-rank correlations and uneven sizes. Memory is the peak resident set
(VmHWM in /proc/self/status, on Linux only) of a fresh process that makes a weight and a Hessian and
quantizes, minus that of a process that only makes them, over the bytes of the weight.
"""

import argparse
import subprocess
import sys
from functools import partial

import torch
from _stamp import peak_bytes, report, spread, timed_ms
from torch import Tensor

from qcourse import IntQuantizer, PerGroup
from qcourse.methods.gptq import gptq
from qcourse.methods.second_moment import SecondMoment, output_error

DAMP = 0.01
TARGET_S = {1024: 0.2, 4096: 2.2}
VARIANTS: dict[str, dict[str, bool]] = {
    "": {},
    ", act order": {"act_order": True},
    ", act order, static groups": {"act_order": True, "static_groups": True},
}


def layer(size: int) -> tuple[Tensor, SecondMoment]:
    """A weight (size, size) and the second moment of 2 size inputs to it."""
    generator = torch.Generator().manual_seed(size)
    rank = size // 4
    mix = torch.randn(rank, size, generator=generator) / rank**0.5
    sizes = torch.randn(size, generator=generator).mul(0.5).exp()

    hessian = SecondMoment()
    for _ in range(8):
        correlated = torch.randn(rank, rank, generator=generator) @ mix
        noise = torch.randn(rank, size, generator=generator)
        hessian.add((correlated + 0.3 * noise) * sizes)

    w = 0.02 * torch.randn(size, size, generator=generator)
    return w, hessian


def damped(h: Tensor) -> Tensor:
    """H with damping on its diagonal."""
    eye = torch.eye(len(h), dtype=h.dtype)
    return h + DAMP * h.diagonal().mean() * eye


def rounded(column: Tensor, scale: Tensor) -> Tensor:
    """The nearest of the 16 levels -8 to 7 times scale."""
    return scale * (column / scale).round().clamp(-8, 7)


def algorithm_1(w: Tensor, h: Tensor, group_size: int, *, block_size: int = 128) -> Tensor:
    """w_hat by the paper's Algorithm 1."""
    w = w.clone()
    w_hat = torch.empty_like(w)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(h)))
    u = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, w.shape[1], block_size):
        stop = start + block_size
        block = w[:, start:stop].clone()
        errors = torch.empty_like(w[:, start:stop])
        u_block = u[start:stop, start:stop]
        for j in range(block.shape[1]):
            column = start + j
            if column % group_size == 0:
                group = w[:, column : column + group_size]
                scale = group.abs().amax(dim=1) / 7.5
            w_hat[:, column] = rounded(block[:, j], scale)

            # The error of a column updates the rest of its block at once.
            errors[:, j] = (block[:, j] - w_hat[:, column]) / u_block[j, j]
            block[:, j:] -= errors[:, j : j + 1] @ u_block[j : j + 1, j:]

        # The errors of a block update all later blocks in one product.
        w[:, stop:] -= errors @ u[start:stop, stop:]
    return w_hat


def plain(w: Tensor, h: Tensor, group_size: int) -> Tensor:
    """w_hat column by column in float64; each error updates all later columns at once."""
    w = w.double()
    w_hat = torch.empty_like(w)
    inverse = torch.linalg.inv(damped(h.double()))
    u = torch.linalg.cholesky(inverse, upper=True)
    for j in range(w.shape[1]):
        if j % group_size == 0:
            scale = w[:, j : j + group_size].abs().amax(dim=1) / 7.5
        w_hat[:, j] = rounded(w[:, j], scale)
        error = (w[:, j] - w_hat[:, j]) / u[j, j]
        w[:, j + 1 :] -= torch.outer(error, u[j, j + 1 :])
    return w_hat


def quantizer(group_size: int, scale_rule: str = "full") -> IntQuantizer:
    """4 bits, by default on the published code's grid."""
    return IntQuantizer(4, granularity=PerGroup(group_size), scale_rule=scale_rule)


def row(what: str, unit: str, values: dict[str, float], target: float | None = None) -> dict:
    """One line of the table."""
    return {"what": what, "unit": unit, **values, "target": target}


def in_s(times_ms: dict[str, float]) -> dict[str, float]:
    """Times in seconds."""
    return {name: float(f"{value / 1000:.4g}") for name, value in times_ms.items()}


def times(size: int) -> list[dict]:
    """Ours and Algorithm 1, from the Hessian on."""
    w, hessian = layer(size)
    h = hessian.matrix
    repeats = 9 if size < 4096 else 5
    rows = []
    for name, options in VARIANTS.items():
        call = partial(gptq, w, hessian, quantizer(128), damp=DAMP, **options)
        target = None if options else TARGET_S.get(size)
        rows.append(row(f"{size}, g128{name}", "s", in_s(timed_ms(call, repeats=repeats)), target))
    ours = timed_ms(lambda: gptq(w, hessian, quantizer(32), damp=DAMP), repeats=3)
    rows.append(row(f"{size}, g32", "s", in_s(ours)))
    theirs = timed_ms(lambda: algorithm_1(w, h, 128), repeats=3)
    return [*rows, row(f"{size}, g128, Algorithm 1 as written", "s", in_s(theirs))]


def errors(size: int) -> list[dict]:
    """Errors of the outputs; in groups of 128 ours should equal Algorithm 1's to four digits."""
    w, hessian = layer(size)
    h = hessian.matrix

    def of(w_hat: Tensor) -> dict[str, float]:
        return spread([output_error(w, w_hat, h)])

    def ours(grid: IntQuantizer, **options: bool) -> dict[str, float]:
        result = gptq(w, hessian, grid, damp=DAMP, **options)
        order = slice(None) if result.input_order is None else result.input_order.argsort()
        return of(result.quantized.dequantize()[:, order])

    rows = []
    for group_size in (128, 32):
        name = f"{size}, g{group_size}"
        grid = quantizer(group_size)
        theirs = of(algorithm_1(w, h, group_size))
        rows += [
            row(f"{name}, to nearest", "error", of(grid(w).dequantize())),
            row(f"{name}, Algorithm 1 as written", "error", theirs),
        ]
        for variant, options in VARIANTS.items():
            target = theirs["min"] if group_size == 128 and not options else None
            rows.append(row(f"{name}{variant}", "error", ours(grid, **options), target))
        if size <= 1024:
            exact = of(plain(w, h, group_size))
            rows.append(row(f"{name}, column by column in float64", "error", exact))
    if size <= 1024:
        grid = quantizer(32, "mse")
        static = ours(grid, static_groups=True)
        rows.append(row(f"{size}, g32, mse", "error", ours(grid)))
        rows.append(row(f"{size}, g32, mse, static groups", "error", static))
    return rows


def memory(size: int) -> list[dict]:
    """Peak memory beyond the weight and the Hessian, over the weight's; empty without /proc."""
    if not peak_bytes():
        return []

    def fresh(inside: str) -> int:
        command = [sys.executable, __file__, "--inside", inside, str(size)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    over = [(fresh("gptq") - fresh("nothing")) / (4 * size**2) for _ in range(3)]
    return [row(f"{size}, peak memory over the weight's", "x", spread(over))]


def in_this_process(what: str, size: int) -> None:
    """Make a weight and a Hessian, quantize or not, print the peak in bytes."""
    w = torch.ones(size, size)
    h = torch.eye(size)
    gptq(w[:64, :64], h[:64, :64], quantizer(32))  # so that both processes import everything
    if what == "gptq":
        gptq(w, h, quantizer(128))
    print(peak_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    sizes_help = "inputs and outputs of the layer"
    parser.add_argument("sizes", type=int, nargs="*", default=[1024, 4096], help=sizes_help)
    parser.add_argument("--inside", choices=("gptq", "nothing"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        in_this_process(options.inside, options.sizes[0])
    else:
        lines = []
        for kind in (times, errors, memory):
            for size in options.sizes:
                lines += kind(size)
        report("gptq_cpu", lines)
