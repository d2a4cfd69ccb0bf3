"""How long the fast Hadamard transform takes along the rows of 4096 x 4096 float32, beside the plain product with H.

4096 is two blocks of 64. 11,008, the width of a common MLP, is 32 x 344; there x has as many rows as keep it near 2^24
numbers.
"""

import math

import torch
from _stamp import report, timed_ms

from qcourse.methods.hadamard import hadamard, hadamard_transform

NUMBERS = 4096 * 4096
TARGET_MS = {4096: 100}


def rows() -> list[dict]:
    """Each in milliseconds."""
    found = []
    for n in (4096, 11_008):
        x = torch.randn(NUMBERS // n, n, generator=torch.Generator().manual_seed(0))
        h = hadamard(n) / math.sqrt(n)
        size = f"{len(x)} x {n}"
        for what, call, target in (
            (f"hadamard_transform, {size}", lambda x=x: hadamard_transform(x), TARGET_MS.get(n)),
            (f"x @ H, {size}", lambda x=x, h=h: x @ h, None),
        ):
            found.append(
                {"what": what, "unit": "ms", **timed_ms(call, repeats=5), "target": target}
            )
    return found


if __name__ == "__main__":
    report("hadamard_cpu", rows())
