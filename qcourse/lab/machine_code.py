"""What a weight costs each INT4 kernel in instructions of a GPU, counted on a machine that has none.

The idea: Triton compiles for a GPU that is not there, and its package brings NVIDIA's disassembler. The loop over K is
what a kernel does all the time; its instructions, by the weights that a thread decodes in one turn of it, are what a
weight costs. A process that runs kernels in the interpreter cannot compile, so another one does: this file, run.

Source: NVIDIA's CUDA binary utilities (cuobjdump); Triton's ahead-of-time compiler.

How it differs from ``kernels/triton_int4.py``: that is compiled; here is only counted.
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

VERSIONS = ("naive", "planes", "tuned")
BLOCK_N, BLOCK_M = 64, 16
WARPS = {"naive": 4, "planes": 2, "tuned": 2}
DEPTH = {"naive": 32, "planes": 128, "tuned": 128}  # of K, in one turn of the loop
FIXED = {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "GROUPS": 1, "blocks_a_group": 1}
FIXED |= {
    "HAS_ZERO": False,
    "EVEN_K": True,
    "STAGES": 4,
    "SPLIT": True,
    "PACKED": True,
    "SCALE_FIRST": False,
}
POINTERS = {
    "words_ptr": "*i32",
    "scale_ptr": "*fp16",
    "zero_ptr": "*u8",
    "sums_ptr": "*fp32",
    "arrived_ptr": "*i32",
}
ALIGNED = {*POINTERS, "x_ptr", "y_ptr", "N", "K", "stride_xm", "stride_wn"}  # 16 divides them
KINDS = {  # what an instruction's name begins with
    "tensor core": ("HMMA", "HGMMA"),
    "conversion": ("I2F", "F2F"),
    "float arithmetic": ("HADD", "HFMA", "HMUL", "FFMA", "FMUL", "FADD"),
    "bits": ("LOP3", "SHF", "PRMT"),
    "memory": ("LD", "ST", "DEPBAR", "BAR", "WARPGROUP"),
}


def instructions() -> dict[str, dict[str, float]] | str:
    """By version: how many instructions of each kind a weight costs, fp16 on an H100 or H200; or why nobody knows."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        environment["TRITON_CACHE_DIR"] = folder
        command = [sys.executable, "-m", __name__, folder]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout)
    return (done.stderr.strip().splitlines() or ["it was ended"])[-1]


def kind(instruction: str) -> str:
    """What sort of instruction it is.

    >>> kind("LOP3.LUT R1, R2, 0xf000f, R3, 0xf8, !PT"), kind("IMAD.MOV.U32 R1, RZ, RZ, R2")
    ('bits', 'addresses and the rest')
    """
    found = (name for name, starts in KINDS.items() if instruction.startswith(starts))
    return next(found, "addresses and the rest")


def loop_of(disassembly: str) -> list[str]:
    """The instructions of the longest loop that loads from memory, without their predicates.

    Raises:
        ValueError: there is no such loop.
    """
    lines = {
        int(at, 16): what
        for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", disassembly)
    }
    loops = []
    for at, what in lines.items():
        back = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", what)
        if back and (start := int(back[1], 16)) < at:
            loops.append(
                [
                    re.sub(r"^@!?U?P\w+\s+", "", each)
                    for i, each in lines.items()
                    if start <= i <= at
                ]
            )
    loading = [loop for loop in loops if any(each.startswith("LDG") for each in loop)]
    if not loading:
        raise ValueError("the machine code has no loop that loads")
    return max(loading, key=len)


def compiled(
    version: str, fixed: dict[str, Any], *, dtype: str, warps: int, stages: int, target: Any
) -> Any:
    """By Triton's ahead-of-time way, with what it would know of pointers and sizes when called: 16 divides them.

    Args:
        version: one of VERSIONS.
        fixed: constants by name, of which a kernel takes those that it has.
        dtype: of x and y, as Triton writes it: "*fp16".
        target: a GPUTarget.

    Returns:
        Triton's kernel, whose `asm` holds the machine code.
    """
    from triton import compile
    from triton.compiler import ASTSource

    from qcourse.kernels import triton_int4

    function = getattr(triton_int4, version)
    names, types = function.arg_names, POINTERS | {"x_ptr": dtype, "y_ptr": dtype}
    types |= {"words_ptr": "*i16"} if version == "tuned" else {}
    fixed = {name: value for name, value in fixed.items() if name in names}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in ALIGNED - {*fixed}
    }
    source = ASTSource(fn=function, signature=signature, constexprs=fixed, attrs=aligned)
    return compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def disassembled(binary: Path, option: str = "-sass") -> str:
    """What NVIDIA's disassembler says of a file of machine code.

    Raises:
        AttributeError, RuntimeError: Triton's package brings none.
    """
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(folder: str) -> None:
    """Print the count of each version as JSON."""
    from triton.backends.compiler import GPUTarget

    counts, h200 = {}, GPUTarget("cuda", 90, 32)
    for version in VERSIONS:
        binary, warps = Path(folder, f"{version}.cubin"), WARPS[version]
        code = compiled(version, FIXED, dtype="*fp16", warps=warps, stages=4, target=h200)
        binary.write_bytes(code.asm["cubin"])
        weights = BLOCK_N * DEPTH[version] / (32 * warps)  # of one thread, in one turn
        kinds = Counter(map(kind, loop_of(disassembled(binary))))
        counts[version] = {name: count / weights for name, count in kinds.items()}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1])
