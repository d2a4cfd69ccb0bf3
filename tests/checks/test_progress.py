"""Progress survives restarts, crashes and damage, and is never lowered."""

import json
import os
from datetime import date
from pathlib import Path

import pytest

from qcourse import check
from qcourse.checks.judge import FAILED, NOT_WRITTEN, PASSED, Verdict
from qcourse.checks.progress import progress_file, read_progress, record


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "new folder" / "progress.json"
    monkeypatch.setenv("QCOURSE_PROGRESS", str(file))
    return file


def verdict(points: float, status: str = FAILED) -> Verdict:
    return Verdict("01.2", status, points, 3, 0, 1)


def test_check_records_and_the_best_stays(path: Path) -> None:
    check("01.1", lambda x, bits: x.abs().max() / (2 ** (bits - 1) - 1))
    today = date.today().isoformat()
    best = {"01.1": {"points": 1, "date": today, "edition": 2}}
    assert json.loads(path.read_text()) == best
    check("01.1", lambda x, bits: 0)
    assert read_progress() == best


def test_results_of_the_first_edition_count_for_the_same_exercises(path: Path) -> None:
    path.parent.mkdir()
    old = {"points": 2, "date": "2026-11-22"}
    new = {"points": 1, "date": "2026-12-01", "edition": 2}
    path.write_text(json.dumps({"02.1": old, "03.1": old, "13.5": old, "05.2": new, "04.2": old}))
    read = read_progress()
    assert {name: result["points"] for name, result in read.items()} == {
        "02.1": 2,
        "04.1": 2,
        "14.5": 2,
        "05.2": 2,  # the better of 05.2 now and 04.2 of the first edition
    }
    record(verdict(3, PASSED))
    assert read_progress() == {**read, "01.2": read_progress()["01.2"]}  # moved once only


def test_the_date_is_that_of_the_best(path: Path) -> None:
    path.parent.mkdir()
    path.write_text(
        '{"01.2": {"points": 3, "date": "2020-01-01"}, "99.9": {"points": 1, "date": "2020-01-02"}}'
    )
    record(verdict(3, PASSED))
    assert read_progress()["01.2"]["date"] == "2020-01-01"
    assert read_progress()["99.9"]["points"] == 1  # of a sheet that is not there any more


def test_a_try_counts_an_untouched_stub_does_not(path: Path) -> None:
    record(verdict(0, NOT_WRITTEN))
    assert not path.exists()
    record(verdict(0))
    assert read_progress()["01.2"]["points"] == 0
    record(verdict(3, PASSED))
    assert read_progress()["01.2"]["points"] == 3


def test_part_of_the_points_is_progress(path: Path) -> None:
    check("01.1", lambda x, bits: x.abs().max() / (2 ** (bits - 1) - 1) if bits != 8 else 0)
    # Two drawn cases of three: two thirds of half a point.
    assert read_progress()["01.1"]["points"] == 0.33
    record(verdict(1.25))
    record(verdict(1))
    assert read_progress()["01.2"]["points"] == 1.25
    record(verdict(3, PASSED))
    assert read_progress()["01.2"]["points"] == 3


def test_a_solution_sheet_is_not_progress(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "solutions").mkdir()
    monkeypatch.chdir(tmp_path / "solutions")
    record(verdict(3, PASSED))
    assert not path.exists()


@pytest.mark.parametrize(
    "damage", [b"{", b"\xff\xfe", b"[]", b'{"01.2": 3}', b'{"01.2": {"points": "3", "date": ""}}']
)
def test_a_damaged_file_is_kept_aside(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    for number in (1, 2):
        path.write_bytes(damage)
        with pytest.warns(UserWarning, match=f"kept as progress.damaged-{number}.json"):
            record(verdict(3, PASSED))
        assert path.with_name(f"progress.damaged-{number}.json").read_bytes() == damage
        assert read_progress()["01.2"]["points"] == 3


def test_a_file_that_cannot_be_written_is_a_warning_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="progress was not saved"):
        record(verdict(3, PASSED), tmp_path / "file" / "progress.json")


def test_a_crash_while_writing_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(verdict(0))
    old = path.read_text()

    def crash(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.warns(UserWarning, match="No space left on device"):
        record(verdict(3, PASSED))
    assert path.read_text() == old
    assert list(path.parent.iterdir()) == [path]


def test_without_the_variable_it_is_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOURSE_PROGRESS")
    assert progress_file().name == "progress.json"
    assert "qcourse" in progress_file().parts
