"""Whether the Triton kernels can run here: on a GPU, or on the CPU in Triton's interpreter.

The idea: TRITON_INTERPRET=1, set before triton is first imported, runs kernels on the CPU. That is
slow and meant for tests and lessons.

How it differs from ``triton_int4.py``: that imports triton; this only asks whether it is there.
"""

import functools
import importlib.util
import os
from importlib import metadata

import torch

OLDEST_CAPABILITY = (8, 0)


@functools.cache
def unavailable_reason() -> str | None:
    """Return why the kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        if _release("triton") >= (3, 7) or _release("numpy") < (2, 4):
            return None
        return "the interpreter of triton before 3.7 does not run with numpy 2.4 or later"
    if not torch.cuda.is_available():
        return (
            "there is no GPU that torch can use"
            " (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
        )
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and (major, minor) < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}; the kernels need 8.0"
    return None


def interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_packed_assembly() -> bool:
    """Return whether the kernels can use NVIDIA's packed assembly."""
    return not interpreted() and torch.version.hip is None


def _release(package: str) -> tuple[int, int]:
    major, minor, *_ = metadata.version(package).split(".")
    return int(major), int(minor)
