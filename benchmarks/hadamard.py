"""Time the fast Hadamard transform of 4096 x 4096 float32, and the plain product with H.

4096 is two blocks of 64. 11,008, the width of a common MLP, is 32 x 344; its x has about as many
values, 2^24.
"""

import math
from functools import partial

import torch
from _stamp import report, timed_ms

from qcourse.methods.hadamard import hadamard, hadamard_transform

NUMBERS = 4096 * 4096
TARGET_MS = {4096: 100}


def rows() -> list[dict]:
    """Return one row per measurement, in milliseconds."""
    found = []
    for n in (4096, 11_008):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(NUMBERS // n, n, generator=generator)
        h = hadamard(n) / math.sqrt(n)
        size = f"{len(x)} x {n}"

        fast = timed_ms(partial(hadamard_transform, x), repeats=5)
        name = f"hadamard_transform, {size}"
        found.append({"what": name, "unit": "ms", **fast, "target": TARGET_MS.get(n)})

        plain = timed_ms(partial(torch.matmul, x, h), repeats=5)
        found.append({"what": f"x @ H, {size}", "unit": "ms", **plain, "target": None})
    return found


if __name__ == "__main__":
    report("hadamard_cpu", rows())
