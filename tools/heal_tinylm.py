"""Heal the tiny language model at few bits, for lesson 13: the runs that are too long for a lesson.

    python tools/heal_tinylm.py                 all runs that are not in the log yet
    python tools/heal_tinylm.py "2 bits, QAT"   only these

The idea: for each grid, the same number of steps on the same batches, once on the text alone and
once with the original model as the teacher. Each result is measured on text that neither model has
seen, and stored with the loss of every step in notebooks/data/heal_tinylm.json, which the lesson
reads and plots.

Source: the recipe of ``qcourse.recipes.heal``; learned scales (LSQ) for integers, absmean and 8-bit
activations for ternary weights (BitNet b1.58).

How it differs from ``train_tinylm.py``: that starts from random weights; this from rounded ones.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcourse import IntQuantizer, PerChannel, PerGroup, load_tinylm, quantize_model
from qcourse.methods.gptq import Gptq
from qcourse.methods.ternary import TernaryQuantizer
from qcourse.models.evaluate import agreement
from qcourse.numerics.quantized import Quantizer
from qcourse.recipes.heal import heal
from qcourse.recipes.qat_model import convert_qat, prepare_qat
from qcourse.texts.corpus import encode_documents, stdlib_corpus
from qcourse.trace.calibration_batches import random_windows, windows

LOG = Path(__file__).resolve().parent.parent / "notebooks" / "data" / "heal_tinylm.json"
GROUP = PerGroup(32)
WAYS = ("PTQ", "GPTQ", "QAT", "QAT and teacher")

# of the calibration set
CALIBRATION_WINDOWS = 32
CALIBRATION_BATCH = 8

# of the text on which a model is evaluated
TEXT_WINDOWS = 32


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, beside its grid."""

    steps: int = 120
    batch_size: int = 4
    context: int = 256
    learning_rate: float = 5e-4
    seed: int = 0


@dataclass(frozen=True)
class Grid:
    """A quantizer of weights, and the options with which it is trained."""

    quantizer: Quantizer
    options: dict[str, Any]


def integers(bits: int) -> Grid:
    """Return a grid of integers with learned scales."""
    quantizer = IntQuantizer(bits, granularity=GROUP, scale_rule="mse", scale_dtype=torch.float16)
    return Grid(quantizer, {"learned_scale": True})


def ternary() -> Grid:
    """Return the grid -1, 0, 1, with 8-bit activations."""
    inputs = IntQuantizer(8, granularity=PerChannel(0))
    return Grid(TernaryQuantizer(GROUP, scale_dtype=torch.float16), {"inputs": inputs})


GRIDS = {"3 bits": integers(3), "2 bits": integers(2), "ternary": ternary()}


class Course:
    """The model, the text it learns from, and the text it is evaluated on."""

    def __init__(self, recipe: Recipe) -> None:
        tiny = load_tinylm()
        self.recipe = recipe
        self.model = tiny.model
        self.train = encode_documents(stdlib_corpus("train"), tiny.tokenizer)

        # a window predicts the token after it, hence one token more
        unseen = [document for document in stdlib_corpus("held_out") if document.kind == "docs"]
        length = TEXT_WINDOWS * recipe.context + 1
        self.text = encode_documents(unseen, tiny.tokenizer)[:length]

    def run(self, grid: Grid, way: str) -> dict[str, Any]:
        """Return one entry of the log."""
        started = time.monotonic()
        losses: tuple[float, ...] = ()
        if way == "PTQ":
            model = self.rounded(grid.quantizer)
        elif way == "GPTQ":
            model = self.rounded(Gptq(grid.quantizer, act_order=True))
        else:
            teacher = None if way == "QAT" else self.model
            model, losses = self.healed(grid, teacher)
        return {
            **self.evaluated(model),
            "losses": [round(loss, 4) for loss in losses],
            "minutes": (time.monotonic() - started) / 60,
        }

    def rounded(self, method: Any) -> nn.Module:
        """Return the model quantized without training."""
        result = quantize_model(self.model, method, calibration=self.calibration(), progress=False)
        return result.model

    def calibration(self) -> tuple[Tensor, ...]:
        """Return batches of windows, evenly spaced in the training text."""
        every = torch.cat(windows(self.train, self.recipe.context))
        spacing = len(every) // CALIBRATION_WINDOWS
        return every[::spacing][:CALIBRATION_WINDOWS].split(CALIBRATION_BATCH)

    def healed(self, grid: Grid, teacher: nn.Module | None) -> tuple[nn.Module, tuple[float, ...]]:
        """Return the model after quantization-aware training, and the loss of each step."""
        recipe = self.recipe
        batches = random_windows(
            self.train,
            recipe.context + 1,
            count=recipe.steps,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )
        # the student starts as the rounded model; its batches are the same for every grid
        student = prepare_qat(self.model, grid.quantizer, **grid.options)
        result = heal(student, batches, teacher=teacher, learning_rate=recipe.learning_rate)
        return convert_qat(student), result.losses

    def evaluated(self, model: nn.Module) -> dict[str, float]:
        """Return perplexity on unseen text, and the distance to the original's predictions."""
        found = agreement(model, self.model, self.text, self.recipe.context)
        return {"perplexity": found.perplexity, "kl": found.kl, "top1": found.top1}


def read_log(recipe: Recipe) -> dict[str, Any]:
    """Return the log of this recipe; exit if it belongs to another one."""
    if not LOG.exists():
        return {"recipe": asdict(recipe), "runs": {}}
    log = json.loads(LOG.read_text(encoding="utf-8"))
    if log["recipe"] != asdict(recipe):
        raise SystemExit(f"{LOG} has another recipe, {log['recipe']}: delete the file first")
    return log


def main(wanted: list[str]) -> None:
    """Do the runs that the log lacks, and store each when it ends."""
    # runs already in the log are not repeated
    recipe = Recipe()
    log = read_log(recipe)
    course = Course(recipe)
    log["original"] = course.evaluated(course.model)
    for grid_name, grid in GRIDS.items():
        for way in WAYS:
            name = f"{grid_name}, {way}"
            if name in log["runs"] or (wanted and name not in wanted):
                continue
            entry = course.run(grid, way)
            log["runs"][name] = entry
            log |= {"date": date.today().isoformat(), "torch": torch.__version__}
            LOG.parent.mkdir(exist_ok=True)
            LOG.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")

            # 120 losses are too many for a terminal
            shown = {key: value for key, value in entry.items() if key != "losses"}
            print(name, shown, flush=True)


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("runs", nargs="*", help='such as "2 bits, QAT"; by default all')
    main(parser.parse_args().runs)
