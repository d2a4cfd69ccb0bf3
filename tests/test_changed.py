"""Which tests `make check` runs for which change, in a small repository."""

import subprocess
from pathlib import Path

import changed
import pytest

FILES = {
    "qcourse/methods/gptq.py": '"""\n>>> 1\n1\n"""\n',
    "qcourse/methods/ranges.py": "",
    "qcourse/checks/sheet_06.py": "",
    "tests/methods/test_gptq.py": "",
    "tests/methods/test_gptq_fast.py": "",
    "tests/methods/test_gptqx.py": "",
    "tests/methods/test_calibration.py": "from qcourse.methods.ranges import amax\n",
    "tests/methods/inputs.py": "",
    "tests/models/test_fold.py": "import inputs\n",
    "tests/browser/test_lab.py": "import inputs\n",
    "tests/test_course.py": "import course\n",
    "tools/course.py": "",
    "notebooks/06_gptq.ipynb": "",
    "exercises/06_gptq.ipynb": "",
    "README.md": "",
}


# its doctests, and the tests named after it
GPTQ_TESTS = {
    "qcourse/methods/gptq.py",
    "tests/methods/test_gptq.py",
    "tests/methods/test_gptq_fast.py",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository on `main` with one commit."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    run_git(tmp_path, "init", "-q", "-b", "main")
    commit(tmp_path)
    return tmp_path


def run_git(root: Path, *arguments: str) -> str:
    names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(root), *names, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(root: Path) -> str:
    """Commit everything; the commit's name."""
    run_git(root, "add", "-A")
    run_git(root, "commit", "-q", "--allow-empty", "-m", "one")
    return run_git(root, "rev-parse", "HEAD")


@pytest.mark.parametrize(
    ("name", "tests"),
    [
        ("qcourse/methods/gptq.py", GPTQ_TESTS),
        ("qcourse/methods/ranges.py", {"tests/methods/test_calibration.py"}),
        ("tests/methods/test_gptq.py", {"tests/methods/test_gptq.py"}),
        ("tests/methods/inputs.py", {"tests/models/test_fold.py"}),
        ("tools/course.py", {"tests/test_course.py"}),
        ("README.md", {"tests/test_course.py"}),
        ("exercises/06_gptq.ipynb", set()),
    ],
)
def test_the_tests_of_a_file(name: str, tests: set[str], root: Path) -> None:
    assert changed.concerned(root, [name]) == changed.Concerned(tests=tests)


def test_sheets_and_notebooks(root: Path) -> None:
    names = ["qcourse/checks/sheet_06.py", "tests/checks/answers_07.py", "notebooks/06_gptq.ipynb"]
    found = changed.concerned(root, names)
    assert found == changed.Concerned(sheets={"06", "07"}, notebooks={"notebooks/06_gptq.ipynb"})


def test_on_main_the_last_commit_counts_and_what_is_not_committed(root: Path) -> None:
    assert changed.changed_files(root, changed.find_base(root)) == []  # one commit only
    (root / "README.md").write_text("more", encoding="utf-8")
    commit(root)
    (root / "tools" / "course.py").write_text("more", encoding="utf-8")
    (root / "tools" / "new.py").touch()
    (root / "tests" / "methods" / "inputs.py").unlink()
    base = changed.find_base(root)
    assert changed.changed_files(root, base) == ["README.md", "tools/course.py", "tools/new.py"]


def test_on_a_branch_all_since_main(root: Path) -> None:
    first = run_git(root, "rev-parse", "HEAD")
    run_git(root, "checkout", "-q", "-b", "other")
    for text in ("one", "two"):
        (root / "README.md").write_text(text, encoding="utf-8")
        commit(root)
    assert changed.find_base(root) == first


def test_with_an_upstream_all_since_it(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    clone = tmp_path_factory.mktemp("clone")
    run_git(root, "clone", "-q", str(root), str(clone))
    upstream = run_git(clone, "rev-parse", "HEAD")
    commit(clone)
    commit(clone)
    assert changed.find_base(clone) == upstream


def test_without_any_history(tmp_path: Path) -> None:
    assert changed.find_base(tmp_path) == ""
    assert changed.changed_files(tmp_path, "") == []
