"""What quantization costs a real language model: SmolLM2, by method and by format.

Each row is one model against the original, on the same held-out text and the same questions: KL
divergence, perplexity and its paired change, equal top-1 tokens, accuracy on multiple-choice
questions, each with its standard error, the bits per weight, and the seconds to make it.
"The original" is what the codes of the file decode to, in float32.

Calibration reads training documents of the standard library, never the held-out ones. A row is
stored as soon as it is measured; another call measures what is missing, and `--again` all.

    python benchmarks/smollm2.py [--only "INT4 g64"] [--again]
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _smollm2_activations import ACTIVATIONS
from _smollm2_caches import CACHES, bits_per_number
from _stamp import RESULTS, stamp
from torch import Tensor

from qcourse import (
    Awq,
    Gptq,
    IntQuantizer,
    PerChannel,
    PerGroup,
    PerTensor,
    accuracy,
    agreement,
    encode_documents,
    load_smollm2,
    perplexity_change,
    quantize_model,
    random_windows,
    record_logits,
    stdlib_corpus,
    stdlib_questions,
)

PATH = RESULTS / "smollm2.json"
TOKENS = 4096  # evaluated, in windows of CONTEXT
CONTEXT = 512
QUESTIONS = 100
CALIBRATION_TOKENS = {"GPTQ": 8192, "AWQ": 2048}


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    model: Any
    tokenizer: Any
    tokens: Tensor  # held out
    training: Tensor  # to calibrate on
    questions: list
    reference: Callable[[Tensor], Tensor]
    original: Any  # the Agreement of the original with itself

    def calibration(self, count: int) -> list[Tensor]:
        """Return `count` tokens of training documents, as batches of windows."""
        batches = count // CONTEXT // 4
        return random_windows(self.training, CONTEXT, count=batches, batch_size=4, seed=0)


def integers(bits: int, granularity: Any) -> IntQuantizer:
    """Return symmetric integers with float16 scales."""
    return IntQuantizer(bits, granularity=granularity, scale_dtype=torch.float16)


# Questions cost as much as the text does, so among quantized activations these are asked.
ASKED = (
    "the original",
    "W8A8 per tensor",
    "W8A8 per token and channel",
    "W8A8 LLM.int8()",
)

WEIGHTS: dict[str, Any] = {
    "INT8 per channel": integers(8, PerChannel()),
    "INT4 per tensor": integers(4, PerTensor()),
    "INT4 per channel": integers(4, PerChannel()),
    "INT4 g64, RTN": integers(4, PerGroup(64)),
    "INT4 g32, RTN": integers(4, PerGroup(32)),
    "INT3 g64, RTN": integers(3, PerGroup(64)),
    "INT4 g64, GPTQ": Gptq(integers(4, PerGroup(64)), act_order=True),
    "INT4 g64, AWQ": Awq(integers(4, PerGroup(64))),
    "INT3 g64, GPTQ": Gptq(integers(3, PerGroup(64)), act_order=True),
    "INT3 g64, AWQ": Awq(integers(3, PerGroup(64))),
}


def make(what: str, setting: Setting) -> tuple[Any, float]:
    """Return the model of a row, and its bits per weight (per number of a cache)."""
    if what == "the original":
        return setting.model, 32.0
    if what in CACHES:
        bits = int(what.split()[2])
        return CACHES[what](setting.model), bits_per_number(bits, CONTEXT)
    if what in ACTIVATIONS:
        calibration = setting.calibration(CALIBRATION_TOKENS["AWQ"])
        return ACTIVATIONS[what](setting.model, calibration)

    method = WEIGHTS[what]
    count = CALIBRATION_TOKENS.get(what.split()[-1])
    calibration = None if count is None else setting.calibration(count)
    model, report = quantize_model(
        setting.model, method, calibration=calibration, output_error=False, progress=False
    )
    return model, report.bits_per_weight


def measure(what: str, setting: Setting) -> dict[str, Any]:
    """Return the row of one model."""
    start = time.perf_counter()
    model, bits_per_weight = make(what, setting)
    seconds = time.perf_counter() - start
    found = setting.original
    if what != "the original":
        found = agreement(model, setting.reference, setting.tokens, CONTEXT)
    change = perplexity_change(found, setting.original)
    asked = what in WEIGHTS or what in ASKED
    task = accuracy(model, setting.tokenizer, setting.questions) if asked else None
    return {
        "what": what,
        "kl": found.kl,
        "kl_error": found.kl_error,
        "perplexity": found.perplexity,
        "perplexity_error": found.perplexity_error,
        "change": change.mean,
        "change_error": change.error,
        "top1": found.top1,
        "top1_error": found.top1_error,
        "task": None if task is None else task.accuracy,
        "task_error": None if task is None else task.error,
        "bits_per_weight": bits_per_weight,
        "seconds": round(seconds, 1),
        "kl_per_window": [round(value, 6) for value in found.kl_per_window.tolist()],
        "nll_per_window": [round(value, 6) for value in found.nll_per_window.tolist()],
    }


def read_setting() -> Setting:
    """Load the model and the texts, and run the original once."""
    model, tokenizer = load_smollm2()
    held_out = [document for document in stdlib_corpus("held_out") if document.kind == "docs"]
    training = [document for document in stdlib_corpus("train") if document.kind == "docs"]
    tokens = encode_documents(held_out, tokenizer)[: TOKENS + 1]
    reference = record_logits(model)
    return Setting(
        model,
        tokenizer,
        tokens,
        encode_documents(training, tokenizer),
        stdlib_questions(QUESTIONS),
        reference,
        agreement(reference, reference, tokens, CONTEXT),
    )


def store(rows: list[dict[str, Any]], setting: Setting) -> None:
    """Write all rows, in the order of the table."""
    order = ["the original", *WEIGHTS, *ACTIVATIONS, *CACHES]
    rows.sort(key=lambda row: order.index(row["what"]))
    text = {
        "tokens": len(setting.tokens) - 1,
        "context": CONTEXT,
        "windows": len(setting.original.kl_per_window),
        "questions": len(setting.questions),
        "calibration_tokens": CALIBRATION_TOKENS,
    }
    stored = {"stamp": stamp(), "text": text, "results": rows}
    PATH.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def line(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
    kl = f"{row['kl']:8.4f} ± {row['kl_error']:.4f}"
    change = f"{row['change']:+10.1f} ± {row['change_error']:.1f}%"
    task = "" if row["task"] is None else f"task {row['task']:6.1%} ± {row['task_error']:.1%}"
    return f"{row['what']:26} KL {kl}   perplexity {change}   {row['seconds']:6.1f} s   {task}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure the rows whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure also what is stored")
    options = parser.parse_args()

    rows = []
    if PATH.is_file():
        rows = json.loads(PATH.read_text(encoding="utf-8"))["results"]
    setting = read_setting()
    for what in ["the original", *WEIGHTS, *ACTIVATIONS, *CACHES]:
        stored = any(row["what"] == what for row in rows)
        if options.only not in what or (stored and not options.again):
            continue
        rows = [row for row in rows if row["what"] != what]
        rows.append(measure(what, setting))
        print(line(rows[-1]), flush=True)
        store(rows, setting)


if __name__ == "__main__":
    main()
