"""Which files have changed since the branch left its base, and which tests belong to them.

The idea: tests/ has the structure of qcourse/, so the name of a changed file gives its tests. The
base is the commit where this branch left its upstream branch; without an upstream, where it left
`main`; and on a `main` without an upstream, the commit before the last. A change that is not
committed counts. Standard library only.
"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

# the tests of files in the root folder: packages, versions, commands
ABOUT_THE_PROJECT = ("tests/test_course.py", "tests/test_metadata.py")
# the tests of an __init__.py
ABOUT_IMPORTS = ("tests/test_public_face.py", "tests/test_floors.py")


@dataclass
class Concerned:
    """What to run: the paths for pytest, the sheets by their number, the notebooks for nbval."""

    tests: set = field(default_factory=set)
    sheets: set = field(default_factory=set)
    notebooks: set = field(default_factory=set)


def git(root: Path, *arguments: str) -> str:
    """Return what git prints, without the newline at the end; empty if it fails."""
    # -C: the folder may not be the current one
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def find_base(root: Path) -> str:
    """Return the commit to compare with; empty if the folder has no history."""
    # the branch that `git pull` merges from
    upstream = git(root, "rev-parse", "--abbrev-ref", "--symbolic-full-name", "@{upstream}")
    if upstream:
        return git(root, "merge-base", "HEAD", upstream)
    branch = git(root, "rev-parse", "--abbrev-ref", "HEAD")
    if branch != "main":
        base = git(root, "merge-base", "HEAD", "main")
        if base:
            return base
    # on main; the first commit has none before it
    before_last = git(root, "rev-parse", "--verify", "HEAD~1")
    return before_last or git(root, "rev-parse", "HEAD")


def changed_files(root: Path, base: str) -> list:
    """Return the paths that differ from the base, new files included, deleted ones not."""
    differing = git(root, "diff", "--name-only", base).splitlines()
    untracked = git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    names = {*differing, *untracked}
    return sorted(name for name in names if (root / name).is_file())


def concerned(root: Path, names: list) -> Concerned:
    """Return what to run for the changed files."""
    found = Concerned()
    for name in names:
        path = Path(name)
        folder = path.parts[0]
        # a check and its answers carry the number of their sheet
        sheet = re.fullmatch(r"(?:sheet|answers)_(\d\d)", path.stem)
        if path.suffix == ".ipynb":
            if folder in ("notebooks", "solutions"):
                found.notebooks.add(name)
        elif sheet:
            found.sheets.add(sheet[1])
        elif path.name.startswith("test_"):
            found.tests.add(name)
        elif path.name == "__init__.py":
            found.tests |= existing(root, ABOUT_IMPORTS)
        elif len(path.parts) == 1:
            found.tests |= existing(root, ABOUT_THE_PROJECT)
        elif folder in ("qcourse", "tools", "tests"):
            found.tests |= tests_of(root, path)
    return found


def existing(root: Path, names: tuple) -> set:
    """Return the names of files that exist."""
    return {name for name in names if (root / name).is_file()}


def tests_of(root: Path, path: Path) -> set:
    """Return the tests of a file that is no test: its doctests, and the tests named after it.

    If no test is named after it, return those that import it.
    """
    # qcourse/methods/gptq.py has its tests in tests/methods/test_gptq.py or test_gptq_*.py
    mirrored = root / "tests" / Path(*path.parent.parts[1:])
    tests = [*mirrored.glob(f"test_{path.stem}.py"), *mirrored.glob(f"test_{path.stem}_*.py")]
    if not tests:
        tests = tests_that_import(root, path.stem)

    found = set()
    if has_doctests(root, path):
        found.add(path.as_posix())
    for test in tests:
        # these need a browser and run as a step of their own
        if "browser" not in test.parts:
            found.add(test.relative_to(root).as_posix())
    return found


def has_doctests(root: Path, path: Path) -> bool:
    """Return whether pytest finds doctests in a file: it looks in the package only."""
    if path.parts[0] != "qcourse" or path.suffix != ".py":
        return False
    return ">>> " in (root / path).read_text(encoding="utf-8")


def tests_that_import(root: Path, module: str) -> list:
    """Return the test files that import a module of this name."""
    imports = re.compile(rf"^ *(?:from|import) .*\b{re.escape(module)}\b", re.MULTILINE)
    tests = (root / "tests").rglob("test_*.py")
    return [test for test in tests if imports.search(test.read_text(encoding="utf-8"))]
