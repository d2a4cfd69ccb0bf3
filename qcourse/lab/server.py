"""JupyterLab over the course: the command and environment that `qcourse lab` and `make` start.

The idea: JupyterLab opens at the first lesson, listens on the loopback interface only and asks the
network for nothing: no news, no updates, no list of extensions. The fixed settings are files in
jupyter/ beside this module, so that an option on the command line overrides them. One of them is
transport_encryption "auto": without it each kernel warns that its loopback is not encrypted.

Source: Jupyter's documentation ("Config file and command line options"; JUPYTER_CONFIG_PATH),
JupyterLab's ("Advanced Usage": default_setting_overrides.json).

How it differs from `cli.py`: that parses the command line; this starts the server.
"""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

from qcourse.course_files import FIRST_LESSON

SETTINGS = Path(__file__).parent / "jupyter"
# reachable from this machine only
LOOPBACK = "127.0.0.1"


def lab_command(
    root: Path, *, port: int = 0, browser: bool = False, more: tuple[str, ...] = ()
) -> list[str]:
    """Return the command that starts JupyterLab over `root`.

    Args:
        port: 0 for a free one from 8888 up.
        more: further options of JupyterLab.
    """
    command = [sys.executable, "-m", "jupyterlab", str(root)]
    command.append(f"--LabApp.default_url=/lab/tree/{FIRST_LESSON}")
    # not in the settings files: JupyterLab logs before it reads them
    command.append("--ServerApp.log_level=ERROR")
    if port:
        command += [f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
    if not browser:
        command.append("--no-browser")
    # in a container, root is often the only user
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")
    return [*command, *more]


def lab_environment() -> dict[str, str]:
    """Return the environment of JupyterLab: our settings and this Python's programs come first."""
    environment = dict(os.environ)
    _put_first(environment, "JUPYTER_CONFIG_PATH", SETTINGS)
    # JupyterLab's terminals find `qcourse` and `python` here
    _put_first(environment, "PATH", Path(sys.executable).parent)
    return environment


def _put_first(environment: dict[str, str], name: str, folder: Path) -> None:
    """Put a folder at the front of a variable that lists folders."""
    rest = environment.get(name)
    environment[name] = f"{folder}{os.pathsep}{rest}" if rest else str(folder)


def serve(root: Path, *, port: int = 0, browser: bool = True, more: tuple[str, ...] = ()) -> int:
    """Start JupyterLab, wait until it ends, and return its exit code.

    On POSIX systems JupyterLab replaces this process, so this function does not return.

    Raises:
        ModuleNotFoundError: JupyterLab is not installed.
        ValueError: the port is outside 0 to 65535.
        OSError: the port is in use.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} must be from 1 to 65535, or 0 for a free one")
    if importlib.util.find_spec("jupyterlab") is None:
        raise ModuleNotFoundError(name="jupyterlab")
    if port and _is_in_use(port):
        raise OSError(f"Port {port} is in use: choose another one, or omit --port for a free one.")

    opens_browser = browser and has_display()
    command = lab_command(root, port=port, browser=opens_browser, more=more)
    environment = lab_environment()
    print("JupyterLab is starting. Press Ctrl-C in this window to stop it.")
    print("If no browser opens, open this address:", flush=True)

    # as the same process, JupyterLab gets the signals that are sent to this command
    if os.name == "posix":
        os.execve(command[0], command, environment)
    return subprocess.run(command, env=environment, check=False).returncode


def _is_in_use(port: int) -> bool:
    """Return whether a server on this machine accepts connections at a port."""
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def has_display() -> bool:
    """Return whether a browser opened here has a screen to appear on."""
    # macOS and Windows have one unless this is a remote shell
    if sys.platform in ("darwin", "win32") and "SSH_CONNECTION" not in os.environ:
        return True
    # Linux names it in the environment
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
