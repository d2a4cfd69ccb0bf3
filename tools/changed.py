"""What was changed since the branch left its base, and which tests that concerns.

The idea: tests/ has the shape of qcourse/, so the name of a changed file names its tests. The base
is the commit where this branch left its upstream branch; without an upstream, where it left `main`;
and on a `main` without an upstream, the commit before the last. What is not committed counts as
changed too. Standard library only.
"""

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

# The files that say what is installed and run have their tests in tests/test_course.py and beside.
ABOUT_THE_PROJECT = ("tests/test_course.py", "tests/test_metadata.py")
ABOUT_IMPORTS = ("tests/test_public_face.py", "tests/test_floors.py")


@dataclass
class Concerned:
    """What to run: the paths for pytest, the sheets by their number, the notebooks for nbval."""

    tests: set = field(default_factory=set)
    sheets: set = field(default_factory=set)
    notebooks: set = field(default_factory=set)


def git(root: Path, *arguments: str) -> str:
    """What git says, without the newline at the end; empty where it fails."""
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def find_base(root: Path) -> str:
    """The commit to compare with; empty where the folder has no history."""
    upstream = git(root, "rev-parse", "--abbrev-ref", "--symbolic-full-name", "@{upstream}")
    if upstream:
        return git(root, "merge-base", "HEAD", upstream)
    branch = git(root, "rev-parse", "--abbrev-ref", "HEAD")
    if branch != "main":
        base = git(root, "merge-base", "HEAD", "main")
        if base:
            return base
    return git(root, "rev-parse", "--verify", "HEAD~1") or git(root, "rev-parse", "HEAD")


def changed_files(root: Path, base: str) -> list:
    """The paths that differ from the base and still exist, new ones included."""
    differing = git(root, "diff", "--name-only", base).splitlines()
    untracked = git(root, "ls-files", "--others", "--exclude-standard").splitlines()
    return sorted(name for name in {*differing, *untracked} if (root / name).is_file())


def concerned(root: Path, names: list) -> Concerned:
    """Find what to run for the changed files."""
    found = Concerned()
    for name in names:
        path = Path(name)
        folder = path.parts[0]
        sheet = re.fullmatch(r"(?:sheet|answers)_(\d\d)", path.stem)
        if path.suffix == ".ipynb":
            if folder in ("notebooks", "solutions"):
                found.notebooks.add(name)
        elif sheet:
            found.sheets.add(sheet[1])
        elif path.name.startswith("test_"):
            found.tests.add(name)
        elif path.name == "__init__.py":
            found.tests |= {test for test in ABOUT_IMPORTS if (root / test).is_file()}
        elif len(path.parts) == 1:
            found.tests |= {test for test in ABOUT_THE_PROJECT if (root / test).is_file()}
        elif folder in ("qcourse", "tools", "tests"):
            found.tests |= tests_of(root, path)
    return found


def tests_of(root: Path, path: Path) -> set:
    """The tests of a file that is no test itself: its doctests, and the tests named after it.

    Where no test is named after it, those that import it.
    """
    text = (root / path).read_text(encoding="utf-8") if path.suffix == ".py" else ""
    inside = {path.as_posix()} if path.parts[0] == "qcourse" and ">>> " in text else set()
    mirrored = root / "tests" / Path(*path.parent.parts[1:])
    named = [*mirrored.glob(f"test_{path.stem}.py"), *mirrored.glob(f"test_{path.stem}_*.py")]
    if not named:
        imports = re.compile(rf"^ *(?:from|import) .*\b{re.escape(path.stem)}\b", re.MULTILINE)
        tests = (root / "tests").rglob("test_*.py")
        named = [test for test in tests if imports.search(test.read_text(encoding="utf-8"))]
    return inside | {
        test.relative_to(root).as_posix() for test in named if "browser" not in test.parts
    }
