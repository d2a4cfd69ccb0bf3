"""Execute notebooks in place, so that each lesson ships with its outputs and its widgets.

    python tools/run_notebooks.py [notebooks/01_quantizer.ipynb ...]

Without arguments: all of notebooks/ and solutions/. Every notebook gets a fresh kernel in its own
folder, offline, with a temporary progress file. What differs between two equal runs is removed
(timings, the interpreter's version, the random names of widgets), so that a second run changes a
file only if an output has changed. A notebook that fails keeps its old file.

Source: nbclient's documentation ("Executing notebooks").

How it differs from nbval: that compares outputs and writes nothing.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
TIMEOUT_S = 600
WIDGETS = "application/vnd.jupyter.widget-state+json"


def execute(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a fresh kernel; the file does not change.

    Raises:
        RuntimeError: a cell failed; the message names the notebook, the cell and the error.
    """
    notebook = nbformat.read(path, as_version=4)
    # the state of widgets of an earlier run
    notebook.metadata.pop("widgets", None)
    started = []
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        # else printed text arrives in one piece or in several, by chance
        coalesce_streams=True,
        # else each kernel warns that its loopback is not encrypted
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
        on_cell_start=lambda cell, cell_index: started.append(cell_index),
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"HF_HUB_OFFLINE": "1", "QCOURSE_PROGRESS": str(Path(folder, "progress.json"))}
        try:
            client.execute(env=os.environ | settings)
        # a failed cell or a timeout; a kernel that died
        except (CellControlSignal, DeadKernelError) as error:
            cell = started[-1] + 1
            raise RuntimeError(f"{path.name}, cell {cell}: {_reason(error)}") from error
    return notebook


def _reason(error: Exception) -> str:
    # only the error of a cell has a name and a value
    if hasattr(error, "ename"):
        return f"{error.ename}: {error.evalue}"
    return str(error).strip()


def tidy(notebook: nbformat.NotebookNode) -> str:
    """Return the text of a notebook's file, without what differs between two equal runs."""
    kept = {"kernelspec": KERNEL}
    for key in ("language_info", "widgets"):
        if key in notebook.metadata:
            kept[key] = notebook.metadata[key]
    kept.get("language_info", {}).pop("version", None)
    notebook.metadata = nbformat.from_dict(kept)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)

    # number the widgets in place of their random names
    text = nbformat.writes(notebook)
    widgets = notebook.metadata.get("widgets", {}).get(WIDGETS, {})
    for number, model in enumerate(widgets.get("state", {})):
        text = text.replace(model, f"{number:032x}")

    # read and write once more, so that keys are sorted by the new names
    renamed = nbformat.reads(text, as_version=4)
    return nbformat.writes(renamed) + "\n"


def run(path: Path) -> None:
    """Execute one notebook in place; the old file stays until the new one is complete."""
    print(f"{path.parent.name}/{path.name:32}", end=" ", flush=True)
    started = time.monotonic()
    text = tidy(execute(path))
    # a rename is atomic
    aside = path.with_suffix(".ipynb.new")
    aside.write_text(text, encoding="utf-8", newline="\n")
    aside.replace(path)
    time_s = time.monotonic() - started
    size_kb = len(text.encode()) / 1000
    print(f"{time_s:6.1f} s  {size_kb:6.0f} KB", flush=True)


def main() -> int:
    """Execute the notebooks of the command line, or all; return the number that failed."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("paths", nargs="*", type=Path)
    paths = parser.parse_args().paths
    if not paths:
        for folder in ("notebooks", "solutions"):
            paths += sorted((ROOT / folder).glob("*.ipynb"))

    failures = 0
    for path in paths:
        try:
            run(path.resolve())
        except (RuntimeError, OSError) as error:
            failures += 1
            print(f"FAILED\n  {error}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
