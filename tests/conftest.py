"""What every test relies on: no network, a progress file of its own, hypothesis without a deadline.

The shapes of qcourse's signatures are enforced by jaxtyping's pytest plugin, which pyproject.toml turns on: a plugin is
there before any conftest, so also for the doctests inside the package.
"""

import os
import tempfile
from pathlib import Path

import hypothesis
import jaxtyping
import pytest

# At import: huggingface_hub reads its setting when it is first imported, and doctests of the package use no fixture.
scratch = tempfile.TemporaryDirectory(prefix="qcourse-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "QCOURSE_PROGRESS": str(Path(scratch.name, "progress.json"))}

# A deadline would measure the machine, not the code: two workers share two cores with whatever else runs there.
hypothesis.settings.register_profile("qcourse", deadline=None)
hypothesis.settings.load_profile("qcourse")


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    scratch.cleanup()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures unenforced, as users run the package: the answer to a wrong type is then our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
