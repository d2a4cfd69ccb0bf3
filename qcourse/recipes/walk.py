"""The walk through a model that quantizing and pruning share: replace layers in order of use.

For each group of layers that read the same input, a recipe gets what its method observed of that
input and returns new layers. They replace the old ones in a copy of the model, so later groups are
observed on what the new layers produce (as in GPTQ, Frantar et al., ICLR 2023, section 4).
`trace/replay.py` observes the groups; this replaces their layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from qcourse.methods.method import Observer
from qcourse.trace.calibration_batches import Run
from qcourse.trace.model_copy import ModelCopy
from qcourse.trace.replay import Group, observed_groups

Make = Callable[[Group, Any], Mapping[str, nn.Module]]


@dataclass(frozen=True)
class Walk:
    """How to go through a model: the calibration, and the progress bar with its title."""

    title: str
    batches: Sequence[Any]
    run: Run
    sequential: bool = True
    one_pass: bool = True  # not if replacing a group changes a module before it: a folded scale
    progress: bool = True

    @torch.no_grad()
    def replace_layers(self, copy: ModelCopy, method: Observer, make: Make) -> list[str]:
        """Replace the copy's layers, group by group; return the names that no batch reaches.

        make(names, seen) returns the new layer for each name of a group. Unreached layers keep
        their floats. Raises ValueError if no batch reaches a layer, or the model cannot run a
        batch.
        """
        # Dropout would make what is observed random.
        copy.model.eval()
        count = len(copy.pending)
        options = {"sequential": self.sequential, "one_pass": self.one_pass}
        groups = observed_groups(method, copy, self.batches, self.run, **options)
        with tqdm(total=count, desc=self.title, unit="layer", disable=not self.progress) as bar:
            for names, seen in groups:
                # All layers of a group read one input, so they are replaced together.
                new = make(names, seen)
                for name in names:
                    copy.replace(name, new[name])
                    bar.update()

        # No batch reaches what is still pending: an expert of a mixture, say.
        unreached = list(copy.pending)
        if len(unreached) == count:
            raise ValueError(
                "no batch of calibration reaches a chosen layer:"
                " does run use the model that it is given?"
            )
        for name in unreached:
            copy.own(name)
        return unreached
