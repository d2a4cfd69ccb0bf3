"""What the tests of floor 1 share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures unenforced, as users run the package: the answer to a wrong type is then our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
