"""What ``int4_matmul`` asks of a backend.

The idea: a backend has one function that multiplies and a few that say where it can. Each has its
own file and takes one line in the table of ``int4_matmul.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcourse.kernels.int4_weight import Int4Weight


def _no_objection_to(x: Tensor, w: Int4Weight) -> None:
    return None


def _no_objection() -> None:
    return None


def _never_first(device: torch.device) -> bool:
    return False


@dataclass(frozen=True)
class Int4Backend:
    """One way to compute x w_hat^T; the defaults describe one that works on any machine."""

    # x (tokens, in) and w (out, in) to (tokens, out), in x's dtype.
    multiply: Callable[[Tensor, Int4Weight], Tensor]
    # Why it cannot multiply this x and w, or None.
    why_not_these: Callable[[Tensor, Int4Weight], str | None] = _no_objection_to
    # Why it cannot run on this machine, or None.
    why_not_here: Callable[[], str | None] = _no_objection
    # Whether it is tried first for tensors on a device.
    is_first_choice_on: Callable[[torch.device], bool] = _never_first
