"""What the sandbox is built of: a read-only system in which Python, torch, NumPy and Triton are all there is.

The idea: a list of what is there, not of what is hidden. The system's libraries, the interpreter with its standard
library, and the packages that these need (Triton only where it is installed), each by itself: so qcourse with its
checks, solutions/, other submissions and the gradebook are absent, whatever they are called and wherever they lie.

Root first becomes an unprivileged user, since limits on processes do not hold for root; what that user could not
read, as an interpreter below /root, is mounted for it where it can. `host.py` runs the command; bubblewrap's
manual says what the options mean.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

NOBODY = "65534"
PYTHON, SITE = "/python", "/site"  # where they are inside
LIBRARIES = (
    "torch",
    "numpy",
    *(name for name in ("triton",) if importlib.util.find_spec(name)),
)  # for sheet 11
SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
ENVIRONMENT = {"LC_ALL": "C.UTF-8", "HOME": "/tmp", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
ENVIRONMENT["TRITON_INTERPRET"] = (
    "1"  # from the start: Triton's own functions look at it when they are imported
)
LOST = "the sandbox has ended"
INSTALL = "install bubblewrap (apt-get install bubblewrap), or pass --unsafe for submissions that you trust"


class SandboxError(OSError):
    """There is no sandbox to be had; one sentence says why and what to do."""


def libraries() -> dict[str, Path]:
    """The packages and modules that LIBRARIES consist of and need, by their name in site-packages."""
    found: dict[str, Path] = {}
    for name in _with_requirements(LIBRARIES):
        distribution = importlib.metadata.distribution(name)
        for top in {
            file.parts[0]
            for file in distribution.files or []
            if len(file.parts) > 1 or file.suffix == ".py"
        }:
            if top not in ("..", "__pycache__", "bin"):
                found[top] = Path(str(distribution.locate_file(top))).resolve()
    return found


def _with_requirements(names: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    left = [*names]
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.append(name)
            left += [
                re.split(r"[^\w.-]", line, maxsplit=1)[0]
                for line in requires
                if "extra ==" not in line
            ]
    return found


def bubblewrap() -> list[str]:
    """The command that starts Python in the sandbox; its arguments are to follow.

    Raises:
        SandboxError: bubblewrap is missing, or this is no Linux.
    """
    bwrap = shutil.which("bwrap")
    if not sys.platform.startswith("linux") or bwrap is None:
        here = "this is no Linux" if not sys.platform.startswith("linux") else "bwrap is not here"
        raise SandboxError(f"no sandbox: {here}; {INSTALL}")
    mounts = dict(_mounts())
    first: list[str] = []
    if os.getuid() == 0:
        first, mounts = _as_nobody(bwrap, mounts)
    flat = [word for place, source in mounts.items() for word in ("--ro-bind", source, place)]
    links = [
        word
        for path in SYSTEM
        if os.path.islink(path)
        for word in ("--symlink", os.readlink(path), path)
    ]
    hidden = [word for place in _hidden() for word in ("--tmpfs", place, "--remount-ro", place)]
    return [
        *(
            *first,
            bwrap,
            "--unshare-all",
            "--unshare-user",
            "--uid",
            NOBODY,
            "--gid",
            NOBODY,
            "--die-with-parent",
        ),
        *("--new-session", "--clearenv", *_set(ENVIRONMENT), *flat, *links, *hidden),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/tmp"),
        *(
            "--remount-ro",
            "/tmp",
            "--remount-ro",
            "/dev",
            "--remount-ro",
            "/",
            "--",
            f"{PYTHON}/bin/python3",
        ),
    ]


def _set(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        yield from ("--setenv", name, value)


def _mounts() -> Iterator[tuple[str, str]]:
    """Where in the sandbox, and what."""
    for path in SYSTEM:
        if os.path.exists(path) and not os.path.islink(path):
            yield path, path
    yield f"{PYTHON}/bin/python3", os.path.realpath(sys.executable)
    for folder in ("lib", "lib64"):
        if os.path.isdir(os.path.join(sys.base_prefix, folder)):
            yield f"{PYTHON}/{folder}", os.path.realpath(os.path.join(sys.base_prefix, folder))
    for name, source in libraries().items():
        yield f"{SITE}/{name}", str(source)


def _hidden() -> Iterator[str]:
    """Folders inside what is mounted that hold other people's packages, of which qcourse may be one."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for name in ("site-packages", "dist-packages"):
        if (stdlib / name).is_dir():
            yield f"{PYTHON}/{(stdlib / name).relative_to(sys.base_prefix)}"
    yield from map(str, Path("/usr/lib").glob("python3*/*-packages"))


def _as_nobody(bwrap: str, mounts: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """What root runs first: as an unprivileged user, where all that is to be mounted can be read."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise SandboxError(
            "no sandbox: setpriv is not here; install util-linux, or run this as an unprivileged user"
        )
    moved = {place: f"/tmp/{number}" for number, place in enumerate(mounts)}
    binds = [
        word for place, source in mounts.items() for word in ("--ro-bind", source, moved[place])
    ]
    whole = [
        bwrap,
        "--dev-bind",
        "/",
        "/",
        "--tmpfs",
        "/tmp",
        *binds,
        "--unshare-pid",
        "--die-with-parent",
        "--",
    ]
    user = [
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ]
    return [*whole, setpriv, *user], moved
