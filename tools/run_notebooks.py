"""Execute notebooks in place, so that each lesson ships with its outputs and its widgets show without a kernel.

    python tools/run_notebooks.py [notebooks/01_quantizer.ipynb ...]      default: all of notebooks/ and solutions/

Every notebook gets a fresh kernel in its own folder, offline, with a throwaway progress file. What differs from run to
run and helps nobody is taken out (timings, the interpreter's version, the random names of widgets), so that a second
run changes a file only where an output changed. A notebook that fails keeps the file it had. nbval does the opposite:
it compares outputs and writes nothing. Source: nbclient's documentation ("Executing notebooks").
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
    """Run every cell of a notebook in a fresh kernel and return it with its outputs; the file stays as it is.

    Raises:
        RuntimeError: a cell failed; the message names the notebook, the cell and the error.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    started = []
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,  # else what is printed at once arrives in one piece or in several, by chance
        extra_arguments=[
            "--IPKernelApp.log_level=ERROR"
        ],  # else each kernel warns that its loopback is not encrypted
        on_cell_start=lambda cell, cell_index: started.append(cell_index),
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"HF_HUB_OFFLINE": "1", "QCOURSE_PROGRESS": str(Path(folder, "progress.json"))}
        try:
            client.execute(env=os.environ | settings)
        except (
            CellControlSignal,
            DeadKernelError,
        ) as error:  # a failed cell or a timeout; a kernel that died
            words = (
                f"{error.ename}: {error.evalue}" if hasattr(error, "ename") else str(error).strip()
            )
            raise RuntimeError(f"{path.name}, cell {started[-1] + 1}: {words}") from error
    return notebook


def tidy(notebook: nbformat.NotebookNode) -> str:
    """The text of a notebook's file, without what differs between two equal runs."""
    kept = {
        key: notebook.metadata[key]
        for key in ("language_info", "widgets")
        if key in notebook.metadata
    }
    kept.get("language_info", {}).pop("version", None)
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, **kept})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    text = nbformat.writes(notebook)
    for number, model in enumerate(
        notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    ):
        text = text.replace(model, f"{number:032x}")
    return nbformat.writes(nbformat.reads(text, as_version=4)) + "\n"  # sorted by the new names


def run(path: Path) -> None:
    """Execute one notebook in place; the old file stays until the new one is whole."""
    print(f"{path.parent.name}/{path.name:32}", end=" ", flush=True)
    started = time.monotonic()
    text = tidy(execute(path))
    aside = path.with_suffix(".ipynb.new")
    aside.write_text(text, encoding="utf-8", newline="\n")
    aside.replace(path)
    print(f"{time.monotonic() - started:6.1f} s  {len(text.encode()) / 1000:6.0f} KB", flush=True)


def main() -> int:
    """Execute the notebooks named on the command line, or all; returns the number that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path)
    everything = [
        path
        for folder in ("notebooks", "solutions")
        for path in sorted((ROOT / folder).glob("*.ipynb"))
    ]
    failures = 0
    for path in parser.parse_args().paths or everything:
        try:
            run(path.resolve())
        except (RuntimeError, OSError) as error:
            failures += 1
            print(f"FAILED\n  {error}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
