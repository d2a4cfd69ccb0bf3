"""How many GPU instructions each INT4 kernel needs per weight, counted without a GPU.

The idea: Triton compiles for a GPU that is not present, and its package includes NVIDIA's
disassembler. A kernel spends its time in the loop over K. The instructions of one iteration,
divided by the weights that a thread decodes in it, are the cost per weight. A process that runs
kernels in the interpreter cannot compile, so this file runs as a process of its own.

Source: NVIDIA's CUDA binary utilities (cuobjdump); Triton's ahead-of-time compiler.

How it differs from ``kernels/triton_int4.py``: that holds the kernels; this counts.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# the kernels, and the tile that one program of each computes
VERSIONS = ("naive", "planes", "tuned")
BLOCK_N = 64
BLOCK_M = 16
WARPS = {"naive": 4, "planes": 2, "tuned": 2}
THREADS_PER_WARP = 32

# the part of K that one iteration of the loop covers
DEPTH = {"naive": 32, "planes": 128, "tuned": 128}

# values for the kernels' compile-time constants
FIXED = {
    "BLOCK_N": BLOCK_N,
    "BLOCK_M": BLOCK_M,
    "GROUPS": 1,
    "blocks_per_group": 1,
    "HAS_ZERO": False,
    "EVEN_K": True,
    "STAGES": 4,
    "SPLIT": True,
    "PACKED": True,
    "SCALE_FIRST": False,
}

# the arguments that are pointers, in Triton's notation
POINTERS = {
    "words_ptr": "*i32",
    "scale_ptr": "*fp16",
    "zero_ptr": "*u8",
    "sums_ptr": "*fp32",
    "arrived_ptr": "*i32",
}

# arguments that are multiples of 16
ALIGNED = {*POINTERS, "x_ptr", "y_ptr", "N", "K", "stride_xm", "stride_wn"}

# the first letters of an instruction's name, by kind
KINDS = {
    "tensor core": ("HMMA", "HGMMA"),
    "conversion": ("I2F", "F2F"),
    "float arithmetic": ("HADD", "HFMA", "HMUL", "FFMA", "FMUL", "FADD"),
    "bits": ("LOP3", "SHF", "PRMT"),
    "memory": ("LD", "ST", "DEPBAR", "BAR", "WARPGROUP"),
}


def instructions() -> dict[str, dict[str, float]] | str:
    """Return instructions per weight by version and kind, for fp16 on an H100 or H200.

    Where this machine cannot compile, return the reason instead.
    """
    # a fresh cache, so that the process compiles and does not look up
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        command = [sys.executable, "-m", __name__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout)
    # the last line of a traceback names the error
    messages = done.stderr.strip().splitlines()
    return messages[-1] if messages else "the process was killed"


def kind(instruction: str) -> str:
    """Return the kind of an instruction, one of KINDS or "addresses and the rest".

    >>> kind("LOP3.LUT R1, R2, 0xf000f, R3, 0xf8, !PT"), kind("IMAD.MOV.U32 R1, RZ, RZ, R2")
    ('bits', 'addresses and the rest')
    """
    for name, starts in KINDS.items():
        if instruction.startswith(starts):
            return name
    return "addresses and the rest"


def loop_of(disassembly: str) -> list[str]:
    """Return the instructions of the longest loop that loads from memory, without predicates.

    Raises:
        ValueError: there is no such loop.
    """
    loading = []
    for loop in _loops(disassembly):
        if any(instruction.startswith("LDG") for instruction in loop):
            loading.append(loop)
    if not loading:
        raise ValueError("the machine code has no loop that loads from memory")
    return max(loading, key=len)


def _loops(disassembly: str) -> list[list[str]]:
    """Return the instructions of each loop: from the target of a backward branch to the branch."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", disassembly)
    lines = {int(address, 16): instruction for address, instruction in found}
    loops = []
    for end, branch in lines.items():
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", branch)
        if target is None:
            continue
        # a branch forward is an if, not a loop
        start = int(target[1], 16)
        if start < end:
            body = [lines[address] for address in lines if start <= address <= end]
            loops.append([_without_predicate(instruction) for instruction in body])
    return loops


def _without_predicate(instruction: str) -> str:
    """Return "BRA 0x20" for "@P0 BRA 0x20"."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction)


def compiled(
    version: str, fixed: dict[str, Any], *, dtype: str, warps: int, stages: int, target: Any
) -> Any:
    """Return a kernel compiled ahead of time, whose `asm` holds the machine code.

    Args:
        version: one of VERSIONS.
        fixed: constants by name; names that the kernel does not have are ignored.
        dtype: of x and y, in Triton's notation: "*fp16".
        target: a GPUTarget.
    """
    from triton import compile
    from triton.compiler import ASTSource

    from qcourse.kernels import triton_int4

    function = getattr(triton_int4, version)
    types = POINTERS | {"x_ptr": dtype, "y_ptr": dtype}
    if version == "tuned":
        # this kernel reads its codes as 16-bit words
        types["words_ptr"] = "*i16"

    constants = {}
    signature = {}
    attributes = {}
    for i, name in enumerate(function.arg_names):
        if name in fixed:
            constants[name] = fixed[name]
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name, "i32")
        # at a call, Triton would see by itself that 16 divides these
        if name in ALIGNED:
            attributes[(i,)] = [["tt.divisibility", 16]]

    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def disassembled(binary: Path, option: str = "-sass") -> str:
    """Return what NVIDIA's disassembler prints about a file of machine code.

    Raises:
        AttributeError, RuntimeError: Triton's package does not include the disassembler.
    """
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(folder: str) -> None:
    """Print the counts of all versions as JSON."""
    from triton.backends.compiler import GPUTarget

    h200 = GPUTarget("cuda", 90, THREADS_PER_WARP)
    counts = {}
    for version in VERSIONS:
        warps = WARPS[version]
        code = compiled(version, FIXED, dtype="*fp16", warps=warps, stages=4, target=h200)
        binary = Path(folder, f"{version}.cubin")
        binary.write_bytes(code.asm["cubin"])
        loop = loop_of(disassembled(binary))

        # the weights that one thread decodes in one iteration
        weights = BLOCK_N * DEPTH[version] / (THREADS_PER_WARP * warps)
        kinds = Counter(kind(instruction) for instruction in loop)
        counts[version] = {name: count / weights for name, count in kinds.items()}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1])
