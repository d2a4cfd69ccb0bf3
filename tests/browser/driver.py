"""A JupyterLab to test against, and a notebook in it that is driven by menus and keys.

The server is the one that `qcourse lab` starts, with its own settings, so that the reader's do not
change. The fixtures are in conftest.py.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

TOKEN = "browser-test"
# JupyterLab takes cells that are out of sight out of the page, where a test would not find them.
SHOW_ALL_CELLS = '{"windowingMode": "none"}'
# The placeholder of a collapsed cell has a prompt that stays empty.
PROMPT = ".jp-CodeCell .jp-InputPrompt:not(.jp-Placeholder-prompt)"
ERROR = '[data-mime-type="application/vnd.jupyter.error"]'
FINISHED = """([prompt, error]) => document.querySelector(error) !== null ||
    [...document.querySelectorAll(prompt)].every(shown => /\\[\\d+\\]/.test(shown.innerText))"""
PIXELS = """image => { const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.toDataURL(); }"""
REDRAWN = f"""([image, before]) => image.complete && image.naturalWidth > 0 &&
    ({PIXELS})(image) !== before"""


@dataclass(frozen=True)
class Server:
    """A running JupyterLab: its address, and the folder it shows."""

    url: str
    folder: Path

    def has_idle_kernel(self, name: str) -> bool:
        """Return whether the notebook has a kernel that is idle and connected to its page."""
        with urllib.request.urlopen(f"{self.url}/api/sessions?token={TOKEN}", timeout=5) as answer:
            sessions = json.load(answer)
        for session in sessions:
            kernel = session["kernel"]
            is_ready = kernel["connections"] and kernel["execution_state"] == "idle"
            if session["path"] == name and is_ready:
                return True
        return False


@contextmanager
def serving(folder: Path, settings: Path) -> Iterator[Server]:
    """Start JupyterLab over a folder on a free loopback port, and end it afterwards."""
    user_settings = settings / "config/lab/user-settings/@jupyterlab"
    tracker = user_settings / "notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(SHOW_ALL_CELLS, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--no-browser", f"--port={port}", f"--IdentityProvider.token={TOKEN}")
    command = [sys.executable, "-m", "qcourse.cli", "lab", *options]
    own = {f"JUPYTER_{kind.upper()}_DIR": str(settings / kind) for kind in ("config", "data")}
    env = {**os.environ, **own, "IPYTHONDIR": str(settings / "ipython")}
    server = subprocess.Popen(command, env=env, cwd=folder)
    try:
        wait_for("JupyterLab answers", lambda: answers(f"http://127.0.0.1:{port}/api"))
        yield Server(f"http://127.0.0.1:{port}", folder)
    finally:
        server.terminate()
        server.wait(timeout=20)


def wait_for(what: str, happened: Callable[[], bool], patience_s: float = 60) -> None:
    """Return when something has happened; raise TimeoutError if it takes too long."""
    until = time.monotonic() + patience_s
    while not happened():
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not within {patience_s} s")
        time.sleep(0.2)


def answers(url: str) -> bool:
    """Return whether a server answers."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True


class Notebook:
    """A notebook open in JupyterLab, driven by menus and keys."""

    def __init__(self, page: Page, server: Server, name: str) -> None:
        self.page = page
        page.goto(f"{server.url}/lab/tree/{name}?reset&token={TOKEN}")
        page.locator(".jp-Notebook").wait_for()
        # Cells that are run before there is a kernel are not run at all.
        wait_for(f"{name} has a kernel", lambda: server.has_idle_kernel(name))

    def menu(self, name: str, item: str) -> None:
        """Choose an item of the menu bar."""
        self.page.get_by_role("menuitem", name=name, exact=True).click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()

    def run_all(self) -> None:
        """Clear the outputs, run all cells and wait for them; an error fails the test."""
        self.menu("Edit", "Clear Outputs of All Cells")
        self.menu("Run", "Run All Cells")
        self.page.wait_for_function(FINISHED, arg=[PROMPT, ERROR], timeout=120_000)
        assert self.errors() == []

    def errors(self) -> list[str]:
        """Return the visible error outputs."""
        return self.page.locator(ERROR).all_inner_texts()

    def cell(self, words: str) -> Locator:
        """Return the first code cell whose source or output contains these words."""
        return self.page.locator(".jp-CodeCell", has_text=words).first

    def rewrite(self, cell: Locator, source: str) -> None:
        """Replace the source of a cell."""
        cell.locator(".cm-content").click()
        self.page.keyboard.press("ControlOrMeta+a")
        self.page.keyboard.insert_text(source)

    def run(self, cell: Locator) -> None:
        """Run one cell and wait until it has run."""
        prompt = cell.locator(".jp-InputPrompt")
        before = prompt.inner_text()
        prompt.click()
        self.page.keyboard.press("ControlOrMeta+Enter")
        expect(prompt).not_to_have_text(before)
        expect(prompt).to_have_text(re.compile(r"\[\d+\]"))

    def press_on_slider(self, cell: Locator, key: str, times: int = 1, slider: int = 0) -> None:
        """Move a slider of the cell's widget by keys."""
        cell.locator(".noUi-handle").nth(slider).focus()
        for _ in range(times):
            self.page.keyboard.press(key)

    def picture(self, cell: Locator) -> str:
        """Return the pixels of the picture that a cell's widget shows, as text."""
        return cell.locator("img").first.evaluate(PIXELS)

    def wait_for_another_picture(self, cell: Locator, before: str) -> None:
        """Wait until the cell's widget shows a picture that differs from `before`."""
        image = cell.locator("img").first.element_handle()
        self.page.wait_for_function(REDRAWN, arg=[image, before])
