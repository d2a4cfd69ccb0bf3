"""The fixtures of browser tests: a server over a copy of the course, a browser, a page, a notebook.

A picture of how each test ended is left in artifacts/, which git ignores.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import make_exercises
import pytest
from driver import Notebook, Server, serving
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "msedge",
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# for a loaded machine; a test continues as soon as it can
TIMEOUT_MS = 30_000


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """JupyterLab over a copy of the lessons and over fresh sheets without answers."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    make_exercises.write(ROOT / "solutions", folder / "exercises")
    with serving(folder, tmp_path_factory.mktemp("settings")) as server:
        yield server


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The Chromium of this machine."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(
            "no Chromium or Chrome on this machine, so JupyterLab was not tried in a browser"
        )
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh page; after the test it is photographed, and must have used this machine only."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(TIMEOUT_MS)
    expect.set_options(timeout=TIMEOUT_MS)
    # the addresses of all requests
    asked = set()
    page.on("request", lambda sent: asked.add(urlsplit(sent.url)))
    yield page
    (ROOT / "artifacts").mkdir(exist_ok=True)
    page.screenshot(path=ROOT / "artifacts" / f"{request.node.name}.png")
    page.close()
    hosts = {url.hostname for url in asked if url.scheme.startswith(("http", "ws"))}
    assert hosts <= {"127.0.0.1"}


@pytest.fixture
def open_notebook(page: Page, lab: Server) -> Callable[[str], Notebook]:
    """Open a notebook by its path, as in open_notebook("notebooks/01_quantizer.ipynb")."""

    def open_by_path(path: str) -> Notebook:
        return Notebook(page, lab, path)

    return open_by_path
