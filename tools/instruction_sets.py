"""The environments of tools/portability.py: an instruction set and a number of threads each.

Environment variables choose the code that torch, oneDNN, MKL, OpenBLAS and NumPy have for older
processors. Two limits: MKL also looks at the processor's maker, so its AVX-512 code never runs on
AMD; and FBGEMM asks the processor directly, so it does not change. Before a run, a kernel is asked
which instruction set and how many threads it got.
"""

import itertools
import sys

import nbformat
import torch
from nbclient import NotebookClient
from numpy._core._multiarray_umath import __cpu_features__ as numpy_features

THREADS = (1, 2, 4)

# features of NumPy that are newer than an instruction set
NEWER = {
    "default": ("X86_V3", "X86_V4", "AVX512_ICL", "AVX512_SPR"),
    "avx2": ("X86_V4", "AVX512_ICL", "AVX512_SPR"),
}

# MKL_ENABLE_INSTRUCTIONS works on Intel only; MKL_CBWR=COMPATIBLE (SSE2) works everywhere
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

# these differ most from one another, so they run first
FIRST = ("default-1", "avx2-4", "avx2-1", "avx512-4")

QUESTION = """import torch
print(torch.backends.cpu.get_cpu_capability().lower(), torch.get_num_threads(), sep="-")"""


def environments() -> dict[str, dict[str, str]]:
    """Return the variables of every environment that this processor has, by name."""
    # the instruction sets from the oldest to the processor's own
    capabilities = list(LIBRARIES)
    best = torch.backends.cpu.get_cpu_capability().lower()
    newest = capabilities.index(best) if best in capabilities else 0

    found = {}
    for capability, threads in itertools.product(capabilities[: newest + 1], THREADS):
        found[f"{capability}-{threads}"] = settings(capability, str(threads))
    # the most different ones first, then the rest in their order
    order = [name for name in FIRST if name in found]
    order += [name for name in found if name not in FIRST]
    return {name: found[name] for name in order}


def settings(capability: str, threads: str) -> dict[str, str]:
    """Return the variables that choose an instruction set and a number of threads."""
    newer = NEWER.get(capability, ())
    hidden = [feature for feature in newer if numpy_features.get(feature)]
    return {
        "ATEN_CPU_CAPABILITY": capability,
        **LIBRARIES[capability],
        "NPY_DISABLE_CPU_FEATURES": " ".join(hidden),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # a waiting thread that spins takes the core of one that works, above all with 4 on 2 cores
        "OMP_WAIT_POLICY": "PASSIVE",
        # else MKL, and torch with it, uses no more threads than there are cores
        "MKL_DYNAMIC": "FALSE",
    }


def check_kernel(name: str, env: dict[str, str]) -> None:
    """Exit if a kernel in this environment has other capabilities or threads than its name says."""
    # a kernel gets its environment in the same way as a notebook's run
    cell = nbformat.v4.new_code_cell(QUESTION)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook).execute(env=env)
    found = cell.outputs[0].text.strip()
    if found != name:
        sys.exit(f"A kernel in the environment {name} reports {found}.")
