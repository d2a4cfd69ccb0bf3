"""How much memory quantize_model needs for a large Llama, and how long it takes for a small one.

Memory is the peak resident set (VmHWM in /proc/self/status, on Linux alone) of a fresh process that
makes a model with random float32 weights and quantizes it to 4 bits, divided by the bytes of the
model. The memory of the process without any model is included, and printed beside it. The shape is
TinyLlama's (1.1 billion parameters); `--layers 3 --vocabulary 4500` makes it small, with the same
share of embedding and head. Time is that of a model of the tiny language model's size. Both round
to nearest, in groups of 128 with float16 scales.
"""

import argparse
import subprocess
import sys
import time

import torch
from _stamp import peak_bytes, report, spread, timed_ms

from qcourse import IntQuantizer, PerGroup
from qcourse.models.llama import random_llama
from qcourse.models.llama_config import LlamaConfig
from qcourse.recipes.quantize import quantize_model
from qcourse.recipes.report import nbytes

SMALL = LlamaConfig(4096, 256, 768, 6, 8, 4)
METHOD = IntQuantizer(4, granularity=PerGroup(128), scale_dtype=torch.float16)


def in_this_process(layers: int, vocabulary: int) -> None:
    """Quantize a new model; print the peaks before, with it, at the end, the bytes, the time."""
    empty = peak_bytes()
    config = LlamaConfig(vocabulary, 2048, 5632, layers, 32, 4)
    model = random_llama(config, seed=0)
    made = peak_bytes()
    start = time.perf_counter()
    quantized = quantize_model(model, METHOD, progress=False)
    time_s = time.perf_counter() - start
    print(empty, made, peak_bytes(), nbytes(model), quantized.report.bytes_after, time_s)


def memory(layers: int, vocabulary: int) -> list[dict]:
    """Return rows of the peak memory over the model's own, in a fresh process."""
    arguments = ["--inside", f"--layers={layers}", f"--vocabulary={vocabulary}"]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    empty, made, peak, size, after, time_s = map(float, done.stdout.split())
    what = f"{layers} layers, {size / 4e9:.2f} billion"

    def row(name: str, unit: str, value: float, target: float | None = None) -> dict:
        return {"what": f"{what}: {name}", "unit": unit, **spread([value]), "target": target}

    return [
        row("peak", "x", peak / size, 1.35),
        row("peak, less no model", "x", (peak - empty) / size),
        row("peak, model alone", "x", made / size),
        row("no model", "x", empty / size),
        row("quantized", "x", after / size),
        row("time", "s", time_s),
    ]


def small() -> list[dict]:
    """Return a row of the time for a small model, all linear layers but the head."""
    model = random_llama(SMALL, seed=0)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6

    def quantize() -> None:
        quantize_model(model, METHOD, progress=False)

    times = timed_ms(quantize, repeats=5)
    return [{"what": f"{millions:.1f} million, to nearest", "unit": "ms", **times, "target": 3000}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layers", type=int, default=22, help="22 are TinyLlama's, 1.1 billion parameters"
    )
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=32000,
        help="the embedding and the head, which stay in float32",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        in_this_process(options.layers, options.vocabulary)
    else:
        report("quantize_model_cpu", [*memory(options.layers, options.vocabulary), *small()])
