"""What the sandbox is built of: a read-only system with only Python, torch, NumPy and Triton.

The idea: a list of what is there, not of what is hidden. The system's libraries, the interpreter
with its standard library, and the packages that these need (Triton only if it is installed), each
by itself. So qcourse with its checks, solutions/, other submissions and the gradebook are absent,
whatever they are called and wherever they are.

Root first becomes an unprivileged user, since limits on processes do not hold for root. Files that
this user could not read, such as an interpreter below /root, are mounted for it where it can.

Source: the manual of bubblewrap, bwrap(1). `host.py` runs the command that this file builds.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

NOBODY = "65534"
# Where Python and its packages are inside the sandbox.
PYTHON = "/python"
SITE = "/site"
OPTIONAL = [name for name in ("triton",) if importlib.util.find_spec(name)]  # for sheet 11
LIBRARIES = ("torch", "numpy", *OPTIONAL)
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
ENVIRONMENT = {
    "LC_ALL": "C.UTF-8",
    "HOME": "/tmp",
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # From the start: Triton's own functions look at it when they are imported.
    "TRITON_INTERPRET": "1",
}
LOST = "the sandbox has ended"
INSTALL = (
    "install bubblewrap (apt-get install bubblewrap), "
    "or pass --unsafe for submissions that you trust"
)

# Its own network, processes, users, and so on; it ends with the process that starts it.
SEPARATE = ["--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY]
SEPARATE += ["--die-with-parent", "--new-session", "--clearenv"]
# Folders that programs expect. They are read-only, because each worker mounts its own /tmp.
FRESH = ["--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"]
FRESH += ["--remount-ro", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/"]


class SandboxError(OSError):
    """No sandbox can be started; one sentence says why and what to do."""


def libraries() -> dict[str, Path]:
    """Return the packages that LIBRARIES consist of and need, by their name in site-packages."""
    found: dict[str, Path] = {}
    for name in _with_requirements(LIBRARIES):
        distribution = importlib.metadata.distribution(name)
        for top in _top_level(distribution.files or []):
            found[top] = Path(str(distribution.locate_file(top))).resolve()
    return found


def bubblewrap() -> list[str]:
    """Return the command that starts Python in the sandbox; append Python's own arguments.

    Raises:
        SandboxError: bubblewrap is missing, or this is not Linux.
    """
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"no sandbox: this is not Linux; {INSTALL}")
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError(f"no sandbox: bwrap is not here; {INSTALL}")
    before: list[str] = []
    mounts = dict(_mounts())
    if os.getuid() == 0:
        before, mounts = _as_nobody(bwrap, mounts)

    command = [*before, bwrap, *SEPARATE]
    for name, value in ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += _binds(mounts)
    # The system's own links, such as /lib to usr/lib, lead to the mounts above.
    for path in SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
    for place in _hidden():
        command += ["--tmpfs", place, "--remount-ro", place]
    return [*command, *FRESH, "--", f"{PYTHON}/bin/python3"]


def _with_requirements(names: tuple[str, ...]) -> list[str]:
    """Return the distributions of these names, and all that they require."""
    found: list[str] = []
    left = [*names]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name in found:
            continue
        found.append(name)
        for line in requires:
            # A line is "name >= version; condition".
            if "extra ==" not in line:
                left.append(re.split(r"[^\w.-]", line, maxsplit=1)[0])
    return found


def _top_level(files: Iterable[PurePosixPath]) -> set[str]:
    """Return the folders and modules that a distribution's files are in, below site-packages."""
    found: set[str] = set()
    for file in files:
        if len(file.parts) > 1 or file.suffix == ".py":
            found.add(file.parts[0])
    return found - {"..", "__pycache__", "bin"}


def _binds(mounts: Mapping[str, str]) -> list[str]:
    """Return the options that mount each source at its place, read-only."""
    words: list[str] = []
    for place, source in mounts.items():
        words += ["--ro-bind", source, place]
    return words


def _mounts() -> Iterator[tuple[str, str]]:
    """Yield the place in the sandbox, and the source, of all that is mounted."""
    for path in SYSTEM:
        if os.path.exists(path) and not os.path.islink(path):
            yield path, path
    yield f"{PYTHON}/bin/python3", os.path.realpath(sys.executable)
    for name in ("lib", "lib64"):
        folder = os.path.join(sys.base_prefix, name)
        if os.path.isdir(folder):
            yield f"{PYTHON}/{name}", os.path.realpath(folder)
    for name, source in libraries().items():
        yield f"{SITE}/{name}", str(source)


def _hidden() -> Iterator[str]:
    """Yield folders inside the mounts that hold other packages, of which qcourse may be one."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("site-packages", "dist-packages"):
        folder = stdlib / name
        if folder.is_dir():
            yield f"{PYTHON}/{folder.relative_to(sys.base_prefix)}"
    yield from map(str, Path("/usr/lib").glob("python3*/*-packages"))


def _as_nobody(bwrap: str, mounts: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return what root runs first to become an unprivileged user, and the mounts to use then."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError(
            "no sandbox: setpriv is not here; "
            "install util-linux, or run this as an unprivileged user"
        )
    # Every source is mounted below /tmp, where the unprivileged user can read it.
    moved = {place: f"/tmp/{number}" for number, place in enumerate(mounts)}
    command = [bwrap, "--dev-bind", "/", "/", "--tmpfs", "/tmp"]
    command += _binds({moved[place]: source for place, source in mounts.items()})
    command += ["--unshare-pid", "--die-with-parent", "--"]
    command += [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    command += ["--inh-caps=-all", "--bounding-set=-all"]
    return command, moved
