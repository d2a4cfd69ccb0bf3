"""Time and peak memory of RTN, GPTQ and AWQ over all 30 layers of SmolLM2-135M-Instruct.

Each method quantizes the linear layers of the model (the head stays in float32) to 4 bits, in
symmetric groups of 64, in a fresh process. GPTQ (act_order) and AWQ (scale and clip) are calibrated
on 8,192 tokens of the standard library's documentation, in windows of 512; each group of layers is
observed on what the quantized layers before it produce, and the report has the output errors. Time
is that of quantize_model alone. The processor time beside it, of all threads, also tells how busy
the machine was: two idle cores would take no less than half of it.

Memory is the peak resident set (VmHWM in /proc/self/status, on Linux alone), less the peak before
the call, over the bytes of the model: what quantizing needs besides the model itself.
"""

import argparse
import json
import pydoc
import subprocess
import sys
import time

import torch
from _stamp import peak_bytes, report, spread

from qcourse import IntQuantizer, PerGroup, load_smollm2
from qcourse.methods.awq import Awq
from qcourse.methods.gptq import Gptq
from qcourse.recipes.quantize import quantize_model
from qcourse.recipes.report import nbytes
from qcourse.trace.calibration_batches import windows

CONTEXT = 512
TOKENS = 8192
INT4 = IntQuantizer(4, granularity=PerGroup(64))
METHODS = {
    "RTN": INT4,
    "GPTQ": Gptq(INT4, act_order=True),
    "AWQ": Awq(INT4),
}
# The most seconds that each may take on two idle cores.
TARGETS = {"RTN": None, "GPTQ": 90, "AWQ": 180}
MODULES = ("argparse", "json", "asyncio", "typing", "logging", "collections", "email", "pathlib")


def documentation() -> str:
    """Documentation of a few modules of the standard library, in plain text."""
    pages = [pydoc.plain(pydoc.render_doc(module)) for module in MODULES]
    return "\n".join(page[:16000] for page in pages)


def in_this_process(name: str, layers: int) -> None:
    """Quantize the first layers of the model; print the seconds, the bytes and the mean error."""
    model, tokenizer = load_smollm2()
    ids = torch.tensor(tokenizer.encode(documentation()).ids)
    calibration = windows(ids[:TOKENS], CONTEXT, batch_size=4)
    before = peak_bytes()
    start = time.perf_counter()
    start_process = time.process_time()

    def chosen(name: str, layer: torch.nn.Module) -> bool:
        parts = name.split(".")
        return parts[:2] == ["model", "layers"] and int(parts[2]) < layers

    made = quantize_model(
        model,
        METHODS[name],
        calibration=None if name == "RTN" else calibration,
        layers=chosen,
        progress=False,
    )
    time_s = time.perf_counter() - start
    process_s = time.process_time() - start_process
    errors = [row.output_error for row in made.report.layers if row.output_error is not None]
    found = {
        "time_s": time_s,
        "process_s": process_s,
        "memory": (peak_bytes() - before) / nbytes(model),
        "error": sum(errors) / len(errors) if errors else None,
    }
    print(json.dumps(found))


def rows(name: str, layers: int) -> list[dict]:
    """Return the rows of one method, measured in a fresh process."""
    command = [sys.executable, __file__, f"--inside={name}", f"--layers={layers}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    what = f"{name}, {layers} layers"

    def row(what: str, unit: str, value: float, target: float | None = None) -> dict:
        return {"what": what, "unit": unit, **spread([value]), "target": target}

    target = TARGETS[name] if layers == 30 else None
    lines = [
        row(f"{what}: time", "s", found["time_s"], target),
        row(f"{what}: processor time", "s", found["process_s"]),
        row(f"{what}: memory besides the model", "x", found["memory"]),
    ]
    if found["error"] is not None:
        lines.append(row(f"{what}: mean output error", "", found["error"]))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30, help="how many of the 30 layers")
    parser.add_argument("--inside", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        in_this_process(options.inside, options.layers)
    else:
        lines = []
        for method in METHODS:
            lines += rows(method, options.layers)
        report("whole_model", lines)
