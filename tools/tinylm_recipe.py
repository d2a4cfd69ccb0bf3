"""The settings that decide the tiny language model's weights, and their command-line options.

Source: Kaplan et al. 2020 and Hoffmann et al. 2022 (sizes); Loshchilov and Hutter 2017 (cosine).

How it differs from ``train_tinylm.py``: these are the settings; that is the loop.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from qcourse.models.llama_config import LlamaConfig


@dataclass(frozen=True)
class Recipe:
    """The settings of a run, which ends after its steps or its minutes, whichever come first."""

    steps: int | None = None
    minutes: float | None = None
    seed: int = 0
    batch_size: int = 16
    context: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    # a larger share repeats the docs so often that the model memorizes them
    docs_share: float = 0.4
    device: str = "cpu"
    compile: bool = False
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4

    def __post_init__(self) -> None:
        for name in ("steps", "minutes", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    def llama(self) -> LlamaConfig:
        """Return the model's configuration; the output layer shares the embedding's weights."""
        # the fields that both classes have
        sizes = {}
        for name, value in asdict(self).items():
            if name in LlamaConfig.__dataclass_fields__:
                sizes[name] = value
        return LlamaConfig(**sizes, max_position_embeddings=self.context, tie_word_embeddings=True)

    def share_done(self, step: int, elapsed_s: float) -> float:
        """Return the share of the run that is done: the larger of steps and minutes."""
        # without a limit, its share stays 0
        of_steps = step / (self.steps or math.inf)
        of_minutes = elapsed_s / 60 / (self.minutes or math.inf)
        return max(of_steps, of_minutes)

    def learning_rate_at(self, step: int, elapsed_s: float) -> float:
        """Return the learning rate: linear warm-up, then half a cosine down to 2%."""
        done = min(1.0, self.share_done(step, elapsed_s))
        # from 1 at the start down to 0.02 at the end
        cosine = 0.51 + 0.49 * math.cos(math.pi * done)
        warmup = (step + 1) / self.warmup_steps
        return self.learning_rate * min(cosine, warmup)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per field of Recipe, with its default."""
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            switch = argparse.BooleanOptionalAction
            parser.add_argument(option, default=field.default, action=switch)
        else:
            parser.add_argument(option, default=field.default, type=_parser_of(field.type))


def _parser_of(annotation: Any) -> Callable[[str], Any]:
    # an option that is given is a number, also where the default is None
    optional = {int | None: int, float | None: float}
    return optional.get(annotation, annotation)
