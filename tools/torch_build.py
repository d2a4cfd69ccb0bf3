"""Which build of PyTorch is installed: the CPU build, or the one with CUDA.

On Linux, PyPI's wheel of PyTorch depends on NVIDIA's CUDA libraries: 2.5 GB that a machine without
an NVIDIA GPU cannot use. PyTorch's own index has a CPU build of 0.2 GB. A machine without such a
GPU gets torch from that index, and everything else from the default index. If the CPU index does
not answer, torch comes from the default index too. On macOS and Windows the default index already
has the CPU build.

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
CHOICES = ("auto", "cpu", "cuda")

# seconds in which the CPU index must answer
REACH_S = 4.0

# (MB of download, MB on disk), measured: the wheels of constraints.txt for Python 3.11
TORCH_MB = {"Linux": (192, 790), "Darwin": (111, 471), "Windows": (122, 466)}
# torch with CUDA, and NVIDIA's libraries
CUDA_MB = (2533, 4000)
TRITON_MB = (198, 725)
OTHERS_MB = {"lab": (258, 730), "dev": (382, 1365)}

# a connection of 50 Mbit/s
LINE_MB_PER_S = 6.0
# on two cores, including compilation to bytecode
UNPACK_MB_PER_S = 30.0


def check_choice(asked: str) -> None:
    """Stop with a sentence if this system does not have the chosen build."""
    if asked not in CHOICES:
        sys.exit(f"TORCH={asked} is unknown: choose cpu, cuda or auto.")
    if asked == "cuda" and platform.system() != "Linux":
        sys.exit("TORCH=cuda needs Linux: elsewhere the package index has no build with CUDA.")


def has_nvidia_gpu() -> bool:
    """Return whether this machine has an NVIDIA GPU with a driver."""
    # the device file of the first GPU on Linux
    if Path("/dev/nvidia0").exists():
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    # elsewhere, and in some containers, the driver's program knows
    try:
        asked = subprocess.run([program], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def pinned_version(root: Path) -> str:
    """Return the version of torch in constraints.txt, such as 2.13.0."""
    constraints = (root / "constraints.txt").read_text(encoding="utf-8")
    return re.search(r"^torch==(\S+)$", constraints, re.MULTILINE).group(1)


def installed_version(venv: Path) -> str:
    """Return the version of torch in an environment, such as 2.13.0+cpu, or an empty string."""
    # without importing torch, which takes seconds
    for libraries in ("lib/python*/site-packages", "Lib/site-packages"):
        for folder in venv.glob(f"{libraries}/torch-*.dist-info"):
            return folder.name[len("torch-") : -len(".dist-info")]
    return ""


def has_build(asked: str, venv: Path) -> bool:
    """Return whether the environment has the build that was asked for."""
    if asked == "auto" or platform.system() != "Linux":
        return True
    has_cpu_build = installed_version(venv).endswith("+cpu")
    return has_cpu_build == (asked == "cpu")


def build_to_install(asked: str, installed: str) -> str:
    """Return "cpu" or "cuda": the build asked for, else the installed one, else by the GPU."""
    if platform.system() != "Linux":
        return "cpu"
    if asked != "auto":
        return asked
    if installed:
        return "cpu" if installed.endswith("+cpu") else "cuda"
    return "cuda" if has_nvidia_gpu() else "cpu"


def pip_arguments(build: str, installed: str, version: str) -> list:
    """Return arguments of a first `pip install`, for torch only; empty if none is needed."""
    if platform.system() != "Linux":
        return []
    if build == "cpu" and installed != f"{version}+cpu":
        return ["--no-deps", "--index-url", CPU_INDEX, f"torch=={version}+cpu"]
    # pip takes 2.13.0+cpu for a 2.13.0 and would keep it
    if build == "cuda" and installed.endswith("+cpu"):
        return ["--no-deps", "--force-reinstall", f"torch=={version}"]
    return []


def cpu_index_answers() -> bool:
    """Return whether the CPU index answers within REACH_S."""
    statuses = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=REACH_S) as page:
                statuses.append(page.status)
        except (OSError, HTTPException):
            pass

    # in a thread, because urlopen's timeout does not limit the look-up of the address
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACH_S)
    return bool(statuses)


def installation_sizes_mb(extra: str, build: str) -> tuple:
    """Return the download and the disk space of a first installation in MB."""
    system = platform.system()
    cpu_mb = TORCH_MB.get(system, TORCH_MB["Linux"])
    parts = [OTHERS_MB[extra]]
    parts.append(CUDA_MB if build == "cuda" else cpu_mb)
    if system == "Linux" and platform.machine() == "x86_64":
        parts.append(TRITON_MB)
    load_mb = sum(load for load, _ in parts)
    disk_mb = sum(disk for _, disk in parts)
    return load_mb, disk_mb


def announcement(extra: str, build: str) -> str:
    """Return a sentence on the size of a first installation and how long it takes."""
    load_mb, disk_mb = installation_sizes_mb(extra, build)
    load_s = load_mb / LINE_MB_PER_S
    unpack_s = disk_mb / UNPACK_MB_PER_S
    minutes = (load_s + unpack_s) / 60
    kind = "with CUDA" if build == "cuda" else "for the CPU"
    return (
        f"It loads {load_mb / 1000:.1f} GB (PyTorch {kind}) and takes {disk_mb / 1000:.1f} GB "
        f"on the disk: about {minutes:.0f} minutes at 50 Mbit/s."
    )
