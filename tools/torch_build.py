"""Which build of PyTorch is installed: the CPU build, or the one with CUDA.

On Linux, PyPI's wheel of PyTorch brings NVIDIA's CUDA libraries along: 2.5 GB that a machine
without an NVIDIA GPU cannot use. PyTorch's own index has a CPU build of 0.2 GB. So where there is
no such GPU, torch alone comes from that index, and everything else from the default index. Where
the CPU index cannot be reached, torch comes from the default index too. On macOS and Windows the
default index has the CPU build already.

Source: the selector on pytorch.org; pip's user guide. Standard library only, as venv_setup.py.
"""

import platform
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REACH_S = 4.0  # how long the CPU index may take to answer
CHOICES = ("auto", "cpu", "cuda")

# MB that are loaded and MB on the disk, measured: the wheels of constraints.txt for Python 3.11.
TORCH_MB = {"Linux": (192, 790), "Darwin": (111, 471), "Windows": (122, 466)}
CUDA_MB = (2533, 4000)  # torch with CUDA, and NVIDIA's libraries
TRITON_MB = (198, 725)
OTHERS_MB = {"lab": (258, 730), "dev": (382, 1365)}
LINE_MB_PER_S = 6.0  # 50 Mbit/s
UNPACK_MB_PER_S = 30.0  # on two cores, compiling to bytecode included


def check_choice(asked: str) -> None:
    """Stop with a sentence at a choice that this system does not have."""
    if asked not in CHOICES:
        sys.exit(f"TORCH={asked} is unknown: choose cpu, cuda or auto.")
    if asked == "cuda" and platform.system() != "Linux":
        sys.exit("TORCH=cuda needs Linux: elsewhere the package index has no build with CUDA.")


def has_nvidia_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU that its driver knows."""
    if Path("/dev/nvidia0").exists():
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        asked = subprocess.run([program], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def pinned_version(root: Path) -> str:
    """The version of torch in constraints.txt, such as 2.13.0."""
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    return re.search(r"^torch==(\S+)$", constraints, re.MULTILINE).group(1)


def installed_version(venv: Path) -> str:
    """The version of torch in an environment, such as 2.13.0+cpu; empty where there is none."""
    for libraries in ("lib/python*/site-packages", "Lib/site-packages"):
        for folder in venv.glob(f"{libraries}/torch-*.dist-info"):
            return folder.name[len("torch-") : -len(".dist-info")]
    return ""


def has_build(asked: str, venv: Path) -> bool:
    """Whether the environment holds the build that was asked for."""
    if asked == "auto" or platform.system() != "Linux":
        return True
    return installed_version(venv).endswith("+cpu") == (asked == "cpu")


def build_to_install(asked: str, installed: str) -> str:
    """Decide for "cpu" or "cuda": what was asked for, else what is there, else what the GPU says."""
    if platform.system() != "Linux":
        return "cpu"
    if asked != "auto":
        return asked
    if installed:
        return "cpu" if installed.endswith("+cpu") else "cuda"
    return "cuda" if has_nvidia_gpu() else "cpu"


def pip_arguments(build: str, installed: str, version: str) -> list:
    """What `pip install` is told before all else is installed; nothing where torch needs no care."""
    if platform.system() != "Linux":
        return []
    if build == "cpu" and installed != f"{version}+cpu":
        return ["--no-deps", "--index-url", CPU_INDEX, f"torch=={version}+cpu"]
    if build == "cuda" and installed.endswith("+cpu"):  # to pip, 2.13.0+cpu is a 2.13.0
        return ["--no-deps", "--force-reinstall", f"torch=={version}"]
    return []


def cpu_index_answers() -> bool:
    """Whether the CPU index answers within REACH_S; finding its address counts as well."""
    statuses = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=REACH_S) as page:
                statuses.append(page.status)
        except (OSError, HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_S)
    return bool(statuses)


def installation_sizes_mb(extra: str, build: str) -> tuple:
    """How much a first installation loads, and how much it takes on the disk, in MB."""
    system = platform.system()
    parts = [OTHERS_MB[extra]]
    parts.append(CUDA_MB if build == "cuda" else TORCH_MB.get(system, TORCH_MB["Linux"]))
    if system == "Linux" and platform.machine() == "x86_64":
        parts.append(TRITON_MB)
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def announcement(extra: str, build: str) -> str:
    """Say how much a first installation loads, and how long that takes."""
    load_mb, disk_mb = installation_sizes_mb(extra, build)
    minutes = (load_mb / LINE_MB_PER_S + disk_mb / UNPACK_MB_PER_S) / 60
    kind = "with CUDA" if build == "cuda" else "for the CPU"
    return (
        f"It loads {load_mb / 1000:.1f} GB (PyTorch {kind}) and takes {disk_mb / 1000:.1f} GB "
        f"on the disk: about {minutes:.0f} minutes at 50 Mbit/s."
    )
