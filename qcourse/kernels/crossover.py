"""The batch size from which decoding a 4-bit weight first is faster, measured once per machine.

The idea: torch's INT4 product decodes the weight for every token, which takes a (tokens). Decoding
first takes d, and then a dense product c (tokens). The two are equal at d / (a - c) tokens. All
three grow with the size of the weight, so one matrix stands for the others. The result is stored in
the user's cache folder, by processor, threads and version of torch, so that the same call always
takes the same path.

How it differs from ``cost/roofline.py``: that predicts from data sheets, which do not list the cost
of decoding.
"""

import contextlib
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import platformdirs
import torch

from qcourse.kernels import backend_dense
from qcourse.kernels.int4_cpu import multiply, native_group
from qcourse.kernels.int4_weight import Int4Weight
from qcourse.machine import least_time_s, processor, write_whole
from qcourse.numerics.affine import quantize
from qcourse.numerics.granularity import PerGroup

SIDE = 2048
GROUP = 128
FEW = 16  # tokens
MANY = 64
MOST = 4096  # the result where torch's product is always faster
FILE = "int4_crossover.json"


def crossover() -> int:
    """Return the most tokens for which torch's INT4 product on the CPU beats decoding first."""
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return _crossover(machine)


@cache
def _crossover(machine: str) -> int:
    path = platformdirs.user_cache_path("qcourse", appauthor=False) / FILE
    stored = _stored_results(path)
    tokens = stored.get(machine)
    if type(tokens) is int and tokens >= 0:
        return tokens
    tokens = measure()
    text = json.dumps({**stored, machine: tokens}, indent=2) + "\n"
    # If the folder cannot be written to, the next process measures again.
    with contextlib.suppress(OSError):
        write_whole(path, text)
    return tokens


def _stored_results(path: Path) -> dict[str, object]:
    """What the file holds, by machine; nothing where it is missing or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError):
        return {}


def measure(time_s: Callable[[Callable[[], object]], float] | None = None) -> int:
    """Return the tokens d / (a - c) at which both ways take the same time; at most 4096.

    Args:
        time_s: returns the seconds that a call takes; None measures it.
    """
    time_s = time_s or partial(least_time_s, repeats=7)
    q = quantize(torch.ones(SIDE, SIDE), 4, granularity=PerGroup(GROUP))
    w = Int4Weight.from_quantized(q, layout="cpu")
    group_size = native_group(GROUP, SIDE)
    few = torch.ones(FEW, SIDE, dtype=torch.bfloat16)
    many = torch.ones(MANY, SIDE, dtype=torch.bfloat16)
    product = partial(multiply, few, w.packed, *w.extras, group_size=group_size, outputs=SIDE)
    packed_s = time_s(product)
    dense_few_s = time_s(partial(backend_dense.multiply, few, w))
    dense_many_s = time_s(partial(backend_dense.multiply, many, w))

    # a: the packed product per token. c: the dense product per token. d: decoding, once.
    packed_per_token = packed_s / FEW
    dense_per_token = max(dense_many_s - dense_few_s, 0) / (MANY - FEW)
    decoding = dense_few_s - FEW * dense_per_token
    if packed_per_token <= dense_per_token:
        return MOST
    tokens = round(decoding / (packed_per_token - dense_per_token))
    return min(MOST, max(0, tokens))
