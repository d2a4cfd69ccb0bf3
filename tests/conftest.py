"""What every test relies on: no network, its own progress file, hypothesis without a deadline,
shapes enforced at a bounded cost, and the long files first.

The shapes of qcourse's signatures are enforced by jaxtyping's pytest plugin, which pyproject.toml
turns on: a plugin is there before any conftest, so also for the doctests inside the package.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

# At import: huggingface_hub reads its setting when it is first imported, and doctests of the
# package use no fixture.
scratch = tempfile.TemporaryDirectory(prefix="qcourse-tests-")
os.environ |= {"HF_HUB_OFFLINE": "1", "QCOURSE_PROGRESS": str(Path(scratch.name, "progress.json"))}

# A deadline would measure the machine, not the code: two workers share two cores with others.
hypothesis.settings.register_profile("qcourse", deadline=None)
hypothesis.settings.load_profile("qcourse")


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    scratch.cleanup()


# --- shapes --------------------------------------------------------------------------------------
#
# Enforcing one call costs up to 0.1 ms, and took half the time of all tests, most of it in loops
# that call one function thousands of times. So in each test the first calls of a function are
# checked, and after them one call in EVERY. This replaces jaxtyping's decorator, before qcourse is
# imported and decorated.

FIRST = 20
EVERY = 10
test_number = 0


def thinned(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """Return jaxtyping's decorator, which enforces all calls, as one that enforces some."""

    def decorator_for(function: Any = None, **options: Any) -> Any:
        # used without options, or as a context
        if function is not None:
            return jaxtyped(function, **options)

        def decorate(decorated: Any) -> Any:
            return enforce_some(decorated, jaxtyped(**options)(decorated))

        return decorate

    return decorator_for


def enforce_some(function: Any, enforced: Any) -> Any:
    """Return a function that calls `enforced` for the first calls of a test and some after them."""
    # a class; a property, whose calls are few
    if isinstance(function, type) or not callable(function):
        return enforced
    calls = 0
    counted_in = test_number

    @functools.wraps(function)
    def some(*args: Any, **options: Any) -> Any:
        nonlocal calls, counted_in
        if counted_in != test_number:
            counted_in = test_number
            calls = 0
        calls += 1
        if calls <= FIRST or calls % EVERY == 0:
            return enforced(*args, **options)
        return function(*args, **options)

    return some


jaxtyping.jaxtyped = thinned(jaxtyping.jaxtyped)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Count the tests, so that each enforces its own first calls."""
    global test_number
    test_number += 1
    return (yield)


# --- order ---------------------------------------------------------------------------------------
#
# A worker takes one file at a time. With the long files first, all workers end at about the same
# time.

LONGEST_FIRST = (
    "grading/test_hostile_class.py",
    "grading/test_whole_class.py",
    "checks/test_soundness.py",
    "checks/test_known_mistakes.py",
    "models/test_whole_model.py",
    "checks/test_references.py",
    "grading/test_dask_cluster.py",
    "grading/test_processes.py",
    "grading/sandbox/test_attacks.py",
    "grading/sandbox/test_sandbox.py",
    "grading/test_grade_submission.py",
    "models/test_tinylm.py",
    "models/test_heal.py",
    "grading/test_grade_command.py",
    "kernels/test_triton_int4.py",
    "models/test_remedies.py",
    "grading/book/test_gradebook.py",
    "test_exercises.py",
    "test_floors.py",
    "kernels/test_triton_compiled.py",
    "methods/test_calibration.py",
    "methods/test_gptq.py",
    "test_notebooks.py",
    "methods/test_awq.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first, and leave the others and the tests of a file in their order."""
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatures are not enforced, as for users: our own code then answers to a wrong type."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
