"""`qcourse grade`, `feedback`, `export` as a teacher calls them.

A stand-in grades: an answer is right if it holds the word "right".
"""

import errno
import json
import os
import shutil
import sqlite3
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import standins
from standins import SHEET, WORTH, write_notebook

from qcourse import cli
from qcourse.grading import jobs, processes, recorder
from qcourse.grading.book.gradebook import default_url, open_gradebook
from qcourse.grading.book.scores import Score, scores
from qcourse.grading.grades import Limits, SubmissionGrade
from qcourse.grading.jobs import Done, Job, Work

FILE = f"{SHEET}.ipynb"
# The real ones, which most tests here replace.
ON_THIS_MACHINE = processes.on_this_machine
GRADE_JOB = jobs.grade_job
CHECK_SANDBOX = jobs.check_sandbox
RIGHT = dict.fromkeys(WORTH, "# right")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A class of two, ada who has all and bob who has one exercise right, graded by a stand-in."""
    monkeypatch.setattr(jobs, "grade_job", standins.grade_by_words)
    monkeypatch.setattr(processes, "on_this_machine", standins.in_this_process)
    monkeypatch.setattr(jobs, "check_sandbox", lambda backend: None)
    hand_in(tmp_path, "ada", RIGHT)
    hand_in(tmp_path, "bob", {"01.2": "# right"})
    return tmp_path


def hand_in(folder: Path, student: str, answers: dict[str, str]) -> Path:
    functions = {"01.1": "symmetric_scale", "01.2": "quantize", "01.3": "affine_parameters"}
    functions |= {"01.4": "fake_quantize", "01.5": "code_entropy"}
    cells = {
        exercise: f"def {functions[exercise]}():\n    {text}\n    pass"
        for exercise, text in answers.items()
    }
    path = folder / "submitted" / student / FILE
    write_notebook(path, cells)
    return path


def grade(folder: Path, *options: str) -> int:
    return cli.main(["grade", str(folder / "submitted"), *options])


def held(folder: Path, url: str = "") -> list[Score]:
    with open_gradebook(url or default_url(folder / "graded")) as book:
        return scores(book)


def totals(folder: Path, url: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for one in held(folder, url):
        found[one.student] = found.get(one.student, 0) + one.points
    return found


def page_of(folder: Path, student: str) -> str:
    path = folder / "graded" / "feedback" / student / SHEET / f"{SHEET}.html"
    return path.read_text()


def seeds(folder: Path) -> dict[str, int]:
    found = (folder / "graded" / "results").glob("*/*.json")
    return {path.parent.name: json.loads(path.read_text())["grade"]["seed"] for path in found}


def test_grades_a_table_and_pages(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 3}
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["student", "01"],
        ["ada", "12"],
        ["bob", "3"],
        ["mean", "7.50"],
        ["of", "12"],
        [f"{SHEET}:", "2", "graded", "now,", "0", "graded", "before"],
    ]
    assert page_of(folder, "bob").count("<section") == 5
    marked = (folder / "graded" / "autograded" / "bob" / SHEET / FILE).read_text()
    assert "# right" in marked
    assert "asked with" in marked
    assert stat_mode(folder / "graded") == 0o700


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_what_is_written_is_its_owner_s_alone_also_in_an_open_folder(folder: Path) -> None:
    folder.chmod(0o755)
    before = os.umask(0o022)
    try:
        assert grade(folder, "--into", str(folder)) == 0
    finally:
        assert os.umask(before) == 0o022  # the run has put it back
    written = [path for path in folder.rglob("*") if not path.is_relative_to(folder / "submitted")]
    assert {path.name: oct(stat_mode(path)) for path in written if stat_mode(path) & 0o077} == {}
    assert stat_mode(folder) == 0o755


def test_the_folder_of_one_student_is_refused_and_nothing_is_made(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["grade", str(folder / "submitted" / "ada")]) == 2
    assert "looks like the folder of one student; name the folder above" in capsys.readouterr().err
    assert not (folder / "submitted" / "graded").exists()


def test_a_decomposed_name_and_capitals_are_graded(folder: Path) -> None:
    path = hand_in(folder, "Rene\u0301e", RIGHT)
    path.rename(path.with_name("01_QUANTIZER.IPYNB"))
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 3, "Ren\u00e9e": 12}


def test_one_page_is_one_page(folder: Path, capsys: pytest.CaptureFixture) -> None:
    grade(folder)
    shutil.rmtree(folder / "graded" / "feedback" / "ada")
    capsys.readouterr()
    assert cli.main(["feedback", str(folder / "graded")]) == 0
    assert capsys.readouterr().out.startswith("1 page written in ")


@pytest.mark.parametrize(
    "error",
    [ValueError("odd"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), KeyError(7)],
)
def test_whatever_keeping_one_grade_raises_the_others_are_kept(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_marked = recorder.write_marked

    def fails(into: Path, marked: SubmissionGrade, *rest: Any) -> None:
        if marked.student == "ada":
            raise error
        write_marked(into, marked, *rest)

    monkeypatch.setattr(recorder, "write_marked", fails)
    assert grade(folder) == 1
    assert f"ada/{FILE}: could not be graded ({type(error).__name__}: " in capsys.readouterr().out
    assert totals(folder)["bob"] == 3


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_second_run_grades_nothing_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    grade(folder)
    capsys.readouterr()

    def files() -> dict[Path, int]:
        left_out = ("run.json", "lock")
        paths = (folder / "graded").rglob("*")
        return {
            path: path.stat().st_mtime_ns
            for path in paths
            if path.is_file() and path.name not in left_out
        }

    before = files()
    assert grade(folder) == 0
    assert f"{SHEET}: 0 graded now, 2 graded before" in capsys.readouterr().out
    assert files() == before


def test_what_is_new_or_changed_is_graded_with_new_seeds(folder: Path) -> None:
    grade(folder)
    first = seeds(folder)
    assert first["ada"] == first["bob"]
    hand_in(folder, "bob", {"01.2": "# right", "01.3": "# right"})
    hand_in(folder, "eve", {})
    assert grade(folder) == 0
    second = seeds(folder)
    assert totals(folder) == {"ada": 12, "bob": 6, "eve": 0}
    assert second["ada"] == first["ada"] != second["bob"] == second["eve"]


def test_regrade_grades_all_anew(folder: Path) -> None:
    grade(folder)
    first = seeds(folder)
    assert grade(folder, "--regrade") == 0
    assert seeds(folder)["ada"] != first["ada"]
    assert seeds(folder)["bob"] == seeds(folder)["ada"]


def test_a_changed_check_is_graded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grade(folder)
    first = seeds(folder)
    monkeypatch.setattr(recorder, "sheet_version", lambda sheet: "another")
    grade(folder)
    assert not set(first.values()) & set(seeds(folder).values())


@pytest.mark.parametrize("options", [[], ["--regrade"]])
def test_a_run_cut_short_goes_on_as_it_was(
    folder: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    grade(folder) if options else None
    before = seeds(folder)
    for student in ("cy", "dan", "eve"):
        hand_in(folder, student, RIGHT)

    def stopped(waiting: Iterator, work: Work, workers: int) -> Iterator[Done]:
        yield from standins.in_this_process(islice(waiting, 2), work, workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "on_this_machine", stopped)
    assert grade(folder, *options) == 130
    assert "What was graded is kept" in capsys.readouterr().err
    begun = {
        student: seed for student, seed in seeds(folder).items() if before.get(student) != seed
    }
    assert len(begun) == 2
    monkeypatch.setattr(processes, "on_this_machine", standins.in_this_process)
    assert grade(folder) == 0
    assert f"{SHEET}: 3 graded now, 2 graded before" in capsys.readouterr().out
    assert set(seeds(folder).values()) == set(begun.values())
    assert totals(folder) == {"ada": 12, "bob": 3, "cy": 12, "dan": 12, "eve": 12}


def test_regrade_after_a_run_cut_short_grades_all_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(waiting: Iterator, work: Work, workers: int) -> Iterator[Done]:
        yield from standins.in_this_process(islice(waiting, 1), work, workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "on_this_machine", stopped)
    assert grade(folder) == 130
    first = seeds(folder)
    monkeypatch.setattr(processes, "on_this_machine", standins.in_this_process)
    assert grade(folder, "--regrade") == 0
    assert len(seeds(folder)) == 2
    assert not set(first.values()) & set(seeds(folder).values())


def test_a_gradebook_that_lags_is_brought_up_to_date(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("The gradebook refuses")

    monkeypatch.setattr(recorder, "record", full)
    assert grade(folder) == 2
    assert len(seeds(folder)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(jobs, "grade_job", standins.grade_by_words)
    monkeypatch.setattr(processes, "on_this_machine", standins.in_this_process)
    kept = seeds(folder)
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 3}
    assert seeds(folder).items() >= kept.items()
    (folder / "graded" / "gradebook.db").unlink()
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 3}


def test_another_gradebook_gets_what_was_graded_for_the_first(folder: Path, url: str) -> None:
    grade(folder)
    first = seeds(folder)
    assert grade(folder, "--db", url) == 0
    assert seeds(folder) == first
    assert totals(folder, url) == {"ada": 12, "bob": 3}


def test_manual_scores_survive_and_what_is_handed_in_anew_is_to_be_looked_at(folder: Path) -> None:
    grade(folder)
    with open_gradebook(default_url(folder / "graded")) as book:
        for student in ("ada", "bob"):
            one = book.find_grade("01-1-check", SHEET, SHEET, student)
            one.manual_score, one.needs_manual_grade = 0.5, False
        book.db.commit()
    hand_in(folder, "bob", {"01.2": "# right", "01.1": "# as wrong as before"})
    assert grade(folder) == 0
    ada = held(folder)[0]
    bob = held(folder)[5]
    assert (ada.points, ada.review) == (0.5, False)
    assert (bob.points, bob.auto_points, bob.review) == (0.5, 0.0, True)
    assert cli.main(["feedback", str(folder / "graded")]) == 0
    assert "01.1: 0.5 of 1, set by a person" in page_of(folder, "ada")


def test_the_mark_for_review_survives_a_run_cut_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new notebook has the same points and reasons, so only the files tell it was graded."""

    def without_words(job: Job, *, limits: Limits, backend: str) -> dict:
        found = standins.grade_by_words(job, limits=limits, backend=backend)
        return {**found, "exercises": [{**one, "reason": ""} for one in found["exercises"]]}

    def refused(*_: object, **__: object) -> None:
        raise OSError("The gradebook refuses")

    monkeypatch.setattr(jobs, "grade_job", without_words)
    assert grade(folder) == 0
    with open_gradebook(default_url(folder / "graded")) as book:
        one = book.find_grade("01-1-check", SHEET, SHEET, "bob")
        one.manual_score, one.needs_manual_grade = 0.5, False
        book.db.commit()
    hand_in(folder, "bob", {"01.2": "# right", "01.1": "# as wrong as before"})
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "record", refused)
        assert grade(folder) == 2
    assert grade(folder) == 0
    assert [one.review for one in held(folder)] == [False] * 5 + [True] + [False] * 4


def test_what_cannot_be_graded_is_a_line_each_and_marked_for_review(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "submitted" / "bob" / FILE).write_text("{")
    (folder / "submitted" / "eve").mkdir()
    (folder / "submitted" / "eve" / "notes.ipynb").write_text("{}")
    assert grade(folder) == 1
    out = capsys.readouterr().out
    lines = out.partition("Not graded, or not wholly (2):\n")[2].splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"bob/{FILE}", "eve/notes.ipynb"]
    assert "bob          0*" in out
    assert "mean       6.00" in out
    assert totals(folder) == {"ada": 12, "bob": 0}
    listed = (folder / "graded" / "problems.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in listed] == [
        ["student", "file"],
        ["eve", "notes.ipynb"],
        ["bob", FILE],
    ]
    said = "is not JSON, so it is not a notebook; hand it in again"
    assert page_of(folder, "bob").count(said) == 1
    assert cli.main(["export", str(folder / "graded"), "--format", "moodle"]) == 0
    assert '"eve","","","",""' in capsys.readouterr().out
    own = [one for one in held(folder) if one.student == "bob"]
    assert all(one.review and one.comment.startswith("is not JSON") for one in own)
    assert grade(folder) == 1
    hand_in(folder, "bob", RIGHT)
    shutil.rmtree(folder / "submitted" / "eve")
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 12}
    assert not any(one.review for one in held(folder))


def test_a_name_that_no_gradebook_keeps_is_a_line_and_no_more(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    odd = "a;b\nc"
    long = "x" * 129
    plain = "Zoë O'Neil-Sáez (2)"
    for name in (odd, long, plain):
        hand_in(folder, name, RIGHT)
    assert grade(folder) == 1
    lines = capsys.readouterr().out.partition("(2):\n")[2].splitlines()
    assert [line.split("/")[0] for line in lines] == ["a;b\\nc", long]
    assert totals(folder) == {"ada": 12, "bob": 3, plain: 12}


def test_a_job_without_a_grade_is_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def lost(waiting: Iterator, work: Work, workers: int) -> Iterator[Done]:
        first, second = waiting
        yield Done(first, work(first))
        yield Done(second, None, "the process that graded it died, twice")

    monkeypatch.setattr(processes, "on_this_machine", lost)
    assert grade(folder) == 1
    assert f"bob/{FILE}: the process that graded it died, twice" in capsys.readouterr().out
    assert {one.comment for one in held(folder) if one.student == "bob"} == {recorder.TOLD}
    monkeypatch.setattr(processes, "on_this_machine", standins.in_this_process)
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 3}


def test_a_grade_of_something_else_is_no_grade(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def swapped(waiting: Iterator, work: Work, workers: int) -> Iterator[Done]:
        first, second = waiting
        yield Done(first, work(second))
        yield Done(second, work(second))

    monkeypatch.setattr(processes, "on_this_machine", swapped)
    assert grade(folder) == 1
    out = capsys.readouterr().out
    assert f"ada/{FILE}: could not be graded (ValueError: grade=bob/01_quantizer is not of " in out
    assert totals(folder) == {"ada": 0, "bob": 3}


def test_what_was_graded_without_a_sandbox_is_graded_again_with_one(folder: Path) -> None:
    grade(folder, "--unsafe")
    first = seeds(folder)
    grade(folder, "--unsafe")
    assert seeds(folder) == first
    grade(folder)
    assert not set(first.values()) & set(seeds(folder).values())
    last = seeds(folder)
    grade(folder, "--unsafe")
    assert seeds(folder) == last


def test_no_workers_are_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(processes, "on_this_machine", ON_THIS_MACHINE)
    assert grade(folder, "--workers", "0") == 2
    assert capsys.readouterr().err == "workers=0 must be 1 or more\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sheet", "77"], "sheet='77' is unknown; the sheets are 01, 02"),
        (["--sheet", "02"], "No submission of sheet 02 is in "),
        (
            ["--db", "postgresql+psycopg2://teacher:secret@127.0.0.1:1/grades"],
            "teacher:***@127.0.0.1:1/grades refuses: ",
        ),
        (["--scheduler", "tcp://127.0.0.1:8786"], "must be tls://HOST:PORT"),
        (["--db", "grades"], "--db is not the address of a database"),
    ],
)
def test_what_stops_a_run_is_one_line(
    folder: Path, options: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    assert grade(folder, *options) == 2
    out = capsys.readouterr()
    assert said in out.err
    assert (out.err.count("\n"), out.out) == (1, "")


def test_no_folder_and_no_submissions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert grade(tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"There is no folder {tmp_path}")
    (tmp_path / "submitted").mkdir()
    assert grade(tmp_path) == 2
    assert capsys.readouterr().err.startswith("No submission is in ")
    assert list(tmp_path.iterdir()) == [tmp_path / "submitted"]


def test_a_full_disk_keeps_what_was_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fsync = os.fsync
    left = [9]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert grade(folder) == 3
    out = capsys.readouterr().out
    assert "ada" in out
    assert "Stopped half-way: " in out
    said = "cannot be written (No space left on device). Put that right, then run this again."
    assert said in out
    assert not list((folder / "graded").rglob("*.new"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert grade(folder) == 0
    assert totals(folder) == {"ada": 12, "bob": 3}


def test_two_runs_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def meanwhile(waiting: Iterator, work: Work, workers: int) -> Iterator[Done]:
        assert grade(folder) == 2
        yield from standins.in_this_process(waiting, work, workers)

    monkeypatch.setattr(processes, "on_this_machine", meanwhile)
    assert grade(folder) == 0
    said = f"Another run is at work on {folder / 'graded'}: wait for its end, or stop it.\n"
    assert capsys.readouterr().err == said


def test_damaged_results_are_graded_again(folder: Path) -> None:
    grade(folder)
    for text in ("", "[]", '{"version": "1", "recorded": [], "grade": {}}'):
        (folder / "graded" / "results" / "bob" / f"{SHEET}.json").write_text(text)
        (folder / "graded" / "run.json").write_text(text)
        assert grade(folder) == 0
        assert totals(folder) == {"ada": 12, "bob": 3}
        assert set(seeds(folder)) == {"ada", "bob"}


def test_export_to_a_file_and_to_the_terminal(folder: Path, capsys: pytest.CaptureFixture) -> None:
    grade(folder)
    capsys.readouterr()
    graded = str(folder / "graded")
    assert cli.main(["export", graded, "--format", "moodle"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[1:] == ['"ada","","","","12"', '"bob","","","","3"']
    canvas = ["--format", "canvas", "--sheet", "1", "--to", str(folder / "canvas.csv")]
    assert cli.main(["export", graded, *canvas]) == 0
    assert '"bob","","","bob","","3"' in (folder / "canvas.csv").read_text()
    assert (folder / "canvas.csv").read_bytes().startswith(b'"Student"')
    assert cli.main(["export", graded, "--to", str(folder / "all.csv")]) == 0
    assert (folder / "all.csv").read_bytes().startswith(b'\xef\xbb\xbf"student"')
    assert text.startswith('"username"')
    assert cli.main(["export", graded, "--sheet", "05"]) == 2
    assert cli.main(["export", str(folder)]) == 2
    assert capsys.readouterr().err == (
        "sheet='05' has no grades in this gradebook\n"
        f"There is no gradebook.db in {folder}: name what `qcourse grade` wrote.\n"
    )


def test_the_database_named_by_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOURSE_DB", f"sqlite:///{folder}/elsewhere.db")
    assert grade(folder) == 0
    with sqlite3.connect(folder / "elsewhere.db") as database:
        assert database.execute("SELECT count(*) FROM grade").fetchone() == (10,)
    assert not (folder / "graded" / "gradebook.db").exists()


def test_without_a_sandbox_nothing_is_graded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "grade_job", GRADE_JOB)
    monkeypatch.setattr(processes, "on_this_machine", ON_THIS_MACHINE)
    monkeypatch.setattr(jobs, "check_sandbox", CHECK_SANDBOX)
    monkeypatch.setenv("PATH", "/nowhere")
    assert grade(folder, "--workers", "1") == 2
    said = capsys.readouterr().err
    assert "install bubblewrap" in said
    assert "--unsafe" in said
    assert said.count("\n") == 1
    assert not (folder / "graded" / "results").exists()


def test_a_missing_package_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in ("nbgrader", "nbgrader.api"):
        monkeypatch.setitem(sys.modules, name, None)
    assert grade(folder) == 2
    assert capsys.readouterr().err.endswith(
        " is missing: install the course with pip install 'qcourse[grading]'.\n"
    )


def test_a_course_that_nbgrader_collects_for(folder: Path) -> None:
    """nbgrader's two small files lie beside each notebook; the course itself gets the grades."""
    from nbgrader.apps.api import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory
    from traitlets.config import Config

    for student in ("ada", "bob"):
        there = folder / "submitted" / student / SHEET
        there.mkdir()
        (folder / "submitted" / student / FILE).rename(there / FILE)
        (there / "timestamp.txt").write_text("2026-01-31 17:00:00.250000 UTC")
    (folder / "submitted" / "ada" / SHEET / "submission_secret.txt").write_text("a secret")
    (folder / "outside").write_text("not ada's")
    (folder / "submitted" / "bob" / SHEET / "submission_secret.txt").symlink_to(folder / "outside")
    assert grade(folder, "--into", str(folder)) == 0
    config = Config()
    config.CourseDirectory.root = str(folder)
    config.Exchange.root = str(folder / "exchange")
    api = NbGraderAPI(coursedir=CourseDirectory(config=config), config=config)
    found = {
        one["student"]: (one["autograded"], one["score"], one["timestamp"])
        for one in api.get_submissions(SHEET)
    }
    assert found == {
        "ada": (True, 12, "2026-01-31T17:00:00.250000"),
        "bob": (True, 3, "2026-01-31T17:00:00.250000"),
    }
    pages = folder / "feedback"
    assert (pages / "ada" / SHEET / "submission_secret.txt").read_text() == "a secret"
    assert sorted(path.name for path in (pages / "bob" / SHEET).iterdir()) == [
        f"{SHEET}.html",
        "timestamp.txt",
    ]
