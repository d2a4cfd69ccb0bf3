"""Heal the tiny language model at few bits, for lesson 13: the runs that are too long to do in a lesson.

    python tools/heal_tinylm.py                 all runs; one that is in the log already is passed over
    python tools/heal_tinylm.py "2 bits, QAT"   only these

The idea: for each grid, the same number of steps on the same batches, once on the text alone and once with the model
itself as the teacher. What comes out is measured on text that neither has seen, and written with the losses of every
step to notebooks/data/heal_tinylm.json, which the lesson reads and plots.

Source: the recipe is ``qcourse.recipes.heal``'s; learned scales (LSQ) for integers, absmean and 8-bit activations for
ternary weights (BitNet b1.58).

How it differs from ``train_tinylm.py``: there a model is trained from nothing, here one that was rounded.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcourse import IntQuantizer, PerChannel, PerGroup, load_tinylm, quantize_model
from qcourse.methods.gptq import Gptq
from qcourse.methods.ternary import TernaryQuantizer
from qcourse.models.evaluate import agreement
from qcourse.numerics.quantized import Quantizer
from qcourse.recipes.heal import convert_qat, heal, prepare_qat
from qcourse.texts.corpus import encode_documents, stdlib_corpus
from qcourse.trace.batches import random_windows, windows

LOG = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "heal_tinylm.json"
GROUP = PerGroup(32)


@dataclass(frozen=True)
class Recipe:
    """What decides a run, beside its grid."""

    steps: int = 120
    batch_size: int = 4
    context: int = 256
    learning_rate: float = 5e-4
    seed: int = 0


GRIDS: dict[str, tuple[Quantizer, dict[str, Any]]] = {
    "3 bits": (
        IntQuantizer(3, granularity=GROUP, scale_rule="mse", scale_dtype=torch.float16),
        {"learned_scale": True},
    ),
    "2 bits": (
        IntQuantizer(2, granularity=GROUP, scale_rule="mse", scale_dtype=torch.float16),
        {"learned_scale": True},
    ),
    "ternary": (
        TernaryQuantizer(GROUP, scale_dtype=torch.float16),
        {"inputs": IntQuantizer(8, granularity=PerChannel(0))},
    ),
}
WAYS = ("PTQ", "GPTQ", "QAT", "QAT and teacher")


class Course:
    """The model, the text that it learns from, and the text that it is judged on."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, tiny = recipe, load_tinylm()
        self.model = tiny.model
        self.train = encode_documents(stdlib_corpus("train"), tiny.tokenizer)
        unseen = [document for document in stdlib_corpus("held_out") if document.kind == "docs"]
        self.text = encode_documents(unseen, tiny.tokenizer)[: 32 * recipe.context + 1]

    def run(self, grid: str, way: str) -> dict[str, Any]:
        """One line of the log."""
        start, (quantizer, options), recipe = time.monotonic(), GRIDS[grid], self.recipe
        losses: tuple[float, ...] = ()
        if way in ("PTQ", "GPTQ"):
            every = torch.cat(windows(self.train, recipe.context))
            calibration = every[:: len(every) // 32][:32].split(8)
            method = quantizer if way == "PTQ" else Gptq(quantizer, act_order=True)
            model = quantize_model(
                self.model, method, calibration=calibration, progress=False
            ).model
        else:
            student = prepare_qat(self.model, quantizer, **options)
            losses = heal(
                student,
                random_windows(
                    self.train,
                    recipe.context + 1,
                    count=recipe.steps,
                    batch_size=recipe.batch_size,
                    seed=recipe.seed,
                ),
                teacher=None if way == "QAT" else self.model,
                learning_rate=recipe.learning_rate,
            ).losses
            model = convert_qat(student)
        return {
            **self.judged(model),
            "losses": [round(x, 4) for x in losses],
            "minutes": (time.monotonic() - start) / 60,
        }

    def judged(self, model: nn.Module) -> dict[str, float]:
        """Perplexity on the unseen text, and the distance to the original's predictions."""
        found = agreement(model, self.model, self.text, self.recipe.context)
        return {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}


def main(wanted: list[str]) -> None:
    """Do what the log lacks, one run after another, and write each as it ends."""
    recipe = Recipe()
    log = (
        json.loads(LOG.read_text(encoding="utf-8"))
        if LOG.exists()
        else {"recipe": asdict(recipe), "runs": {}}
    )
    if log["recipe"] != asdict(recipe):
        raise SystemExit(f"{LOG} is of another recipe: {log['recipe']}; delete it first")
    names = [(f"{grid}, {way}", grid, way) for grid in GRIDS for way in WAYS]
    todo = [
        each for each in names if each[0] not in log["runs"] and (not wanted or each[0] in wanted)
    ]
    course = Course(recipe)
    log["original"] = course.judged(course.model)
    for name, grid, way in todo:
        log["runs"][name] = course.run(grid, way)
        log |= {"date": date.today().isoformat(), "torch": torch.__version__}
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
        print(
            name,
            {key: value for key, value in log["runs"][name].items() if key != "losses"},
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", help='such as "2 bits, QAT"; by default all')
    main(parser.parse_args().runs)
