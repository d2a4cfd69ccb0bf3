"""The environments in which tools/portability.py runs notebooks: an instruction set and a number of threads each.

Environment variables choose the code that torch, oneDNN, MKL, OpenBLAS and NumPy have for older processors. Two limits:
MKL picks its code by the processor's maker, so on AMD's its AVX-512 code is never run; and what a library asks the
processor for by itself (FBGEMM) stays as it is. A kernel is asked for what it got before anything is run.
"""

import itertools
import sys

import nbformat
import torch
from nbclient import NotebookClient
from numpy._core._multiarray_umath import __cpu_features__ as numpy_features

THREADS = (1, 2, 4)
NEWER = {
    "default": ("X86_V3", "X86_V4", "AVX512_ICL", "AVX512_SPR"),
    "avx2": ("X86_V4", "AVX512_ICL", "AVX512_SPR"),
}

# MKL_ENABLE_INSTRUCTIONS is obeyed on Intel's processors alone; MKL_CBWR=COMPATIBLE (SSE2) everywhere
LIBRARIES = {
    "default": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "ALL",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
}
MOST_DIFFERENT_FIRST = ("default-1", "avx2-4", "avx2-1", "avx512-4")


def environments() -> dict[str, dict[str, str]]:
    """The settings of every environment that this processor has, by name."""
    best = torch.backends.cpu.get_cpu_capability().lower()
    capabilities = (
        list(LIBRARIES)[: list(LIBRARIES).index(best) + 1] if best in LIBRARIES else ["default"]
    )
    names = [
        f"{capability}-{threads}"
        for capability, threads in itertools.product(capabilities, THREADS)
    ]
    ordered = sorted(names, key=lambda name: (*MOST_DIFFERENT_FIRST, *names).index(name))
    return {name: settings(*name.split("-")) for name in ordered}


def settings(capability: str, threads: str) -> dict[str, str]:
    """The variables that choose one instruction set and a number of threads."""
    hidden = [feature for feature in NEWER.get(capability, ()) if numpy_features.get(feature)]
    pools = {f"{name}_NUM_THREADS": threads for name in ("OMP", "MKL", "OPENBLAS")}
    return {
        "ATEN_CPU_CAPABILITY": capability,
        **LIBRARIES[capability],
        "NPY_DISABLE_CPU_FEATURES": " ".join(hidden),
        **pools,
        "MKL_DYNAMIC": "FALSE",  # else MKL, and torch after it, takes no more threads than there are cores
    }


def check_kernel(name: str, env: dict[str, str]) -> None:
    """Ask a kernel in this environment for its capability and threads; stop where they are not those of the name."""
    question = "import torch\nprint(torch.backends.cpu.get_cpu_capability().lower(), torch.get_num_threads(), sep='-')"
    cell = nbformat.v4.new_code_cell(question)
    NotebookClient(nbformat.v4.new_notebook(cells=[cell])).execute(env=env)
    answer = cell.outputs[0].text.strip()
    if answer != name:
        sys.exit(f"A kernel of the environment {name} says that it is {answer}.")
