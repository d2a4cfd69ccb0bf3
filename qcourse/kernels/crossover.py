"""From which batch on it is faster to decode a 4-bit weight first: measured on this machine, once, and kept.

The idea: torch's INT4 product decodes for every token anew, which is why its time grows as a x (tokens). Decoding first
costs d once, and then a dense product of c x (tokens). The two are equal at d / (a - c) tokens. All three are times a
weight, so what one matrix shows holds for others, and a few milliseconds tell. The answer is kept in the user's cache
folder, by processor, threads and version of torch: the same call always goes the same way.

How it differs from ``cost/roofline.py``: that predicts from data sheets; no data sheet tells what decoding costs.
"""

import contextlib
import json
from collections.abc import Callable
from functools import cache, partial

import platformdirs
import torch

from qcourse.kernels.int4_cpu import multiply, native_group
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.kernels.reference import dense
from qcourse.machine import least_time_s, processor, write_whole
from qcourse.numerics.affine import quantize
from qcourse.numerics.granularity import PerGroup

SIDE, GROUP = 2048, 128
MOST = 4096  # where torch's product is never slower, or so it seems
FILE = "int4_crossover.json"


def crossover() -> int:
    """The most tokens for which torch's INT4 product on the CPU beats decoding first."""
    return _crossover(
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


@cache
def _crossover(machine: str) -> int:
    path = platformdirs.user_cache_path("qcourse", appauthor=False) / FILE
    known: dict[str, int] = {}
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # no file yet, or one that was cut short
        known = dict(json.loads(path.read_text(encoding="utf-8")).items())
    found = known.get(machine)
    if type(found) is int and found >= 0:
        return found
    found = measure()
    with contextlib.suppress(
        OSError
    ):  # a folder that cannot be written to: measured again next time
        write_whole(path, json.dumps({**known, machine: found}, indent=2) + "\n")
    return found


def measure(time_s: Callable[[Callable[[], object]], float] | None = None) -> int:
    """The tokens d / (a - c) at which both ways take the same time, rounded; at most 4096.

    Args:
        time_s: seconds that a call takes; None times it.
    """
    time_s = time_s or partial(least_time_s, repeats=7)
    few, many = 16, 64
    w = Int4Weight.from_quantized(
        quantize(torch.ones(SIDE, SIDE), 4, granularity=PerGroup(GROUP)), layout="cpu"
    )
    x = torch.ones(many, SIDE, dtype=torch.bfloat16)
    group = native_group(GROUP, SIDE)
    packed = (
        time_s(lambda: multiply(x[:few], w.packed, *w.extras, group_size=group, outputs=SIDE)) / few
    )
    less, more = (time_s(lambda tokens=tokens: dense(x[:tokens], w)) for tokens in (few, many))  # type: ignore[misc]
    each = max(more - less, 0) / (many - few)
    once = less - few * each
    return MOST if packed <= each else min(MOST, max(0, round(once / (packed - each))))
