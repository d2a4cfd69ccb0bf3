"""JupyterLab over the course: the one command and environment that `qcourse lab` and tools/course.py start.

The idea: a learner's JupyterLab opens at the first lesson, listens on the loopback alone and asks the network for
nothing: no news, no updates, no list of extensions. What never varies lies in the folder jupyter/ beside this file, so
that an option on the command line wins over it (kernels have transport_encryption "auto" there, or each would warn that
its loopback is open); labconfig/ in it holds JupyterLab's settings, which would ask each new reader whether to fetch
news.

Source: Jupyter's documentation ("Config file and command line options"; JUPYTER_CONFIG_PATH), JupyterLab's ("Advanced
Usage": default_setting_overrides.json).

How it differs from `cli.py`: there the words of a command line are read; here they become a running server.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

from qcourse.course_files import FIRST_LESSON

SETTINGS = Path(__file__).parent / "jupyter"


def lab_command(
    root: Path, *, port: int = 0, browser: bool = False, more: tuple[str, ...] = ()
) -> list[str]:
    """JupyterLab over `root`; port 0 is a free one from 8888 up, and `more` are options of JupyterLab's own."""
    return [
        *(sys.executable, "-m", "jupyterlab", str(root)),
        f"--LabApp.default_url=/lab/tree/{FIRST_LESSON}",
        "--ServerApp.log_level=ERROR",  # said here, for it speaks before it reads its files
        *([f"--ServerApp.port={port}", "--ServerApp.port_retries=0"] if port else []),
        *([] if browser else ["--no-browser"]),
        *(
            ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        ),  # the only user of a container
        *more,
    ]


def lab_environment() -> dict[str, str]:
    """The environment of JupyterLab: our settings, and this Python's programs first on PATH, for its terminals."""
    first = {"JUPYTER_CONFIG_PATH": SETTINGS, "PATH": Path(sys.executable).parent}
    paths = {
        name: os.pathsep.join(filter(None, [str(path), os.environ.get(name)]))
        for name, path in first.items()
    }
    return {**os.environ, **paths}


def serve(root: Path, *, port: int = 0, browser: bool = True, more: tuple[str, ...] = ()) -> int:
    """Start JupyterLab and stay until it ends; where the system can, this process becomes JupyterLab.

    Raises:
        ModuleNotFoundError: JupyterLab is not installed.
        ValueError: the port is none.
        OSError: the port is in use.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} must be from 1 to 65535, or 0 for a free one")
    if importlib.util.find_spec("jupyterlab") is None:
        raise ModuleNotFoundError(name="jupyterlab")
    with socket.socket() as probe:
        if port and probe.connect_ex(("127.0.0.1", port)) == 0:
            raise OSError(
                f"Port {port} is in use: choose another one, or leave --port out and a free one is found."
            )
    command = lab_command(root, port=port, browser=browser and has_display(), more=more)
    print(
        "JupyterLab starts; Ctrl-C in this window ends it. Its address, if no browser opens by itself:",
        flush=True,
    )
    if (
        os.name == "posix"
    ):  # become JupyterLab, so that a signal sent to this command ends the server
        os.execve(command[0], command, lab_environment())
    return subprocess.run(command, env=lab_environment(), check=False).returncode


def has_display() -> bool:
    """Whether a browser opened here would be seen."""
    local_desktop = sys.platform in ("darwin", "win32") and "SSH_CONNECTION" not in os.environ
    return local_desktop or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
