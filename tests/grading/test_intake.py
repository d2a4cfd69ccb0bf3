"""Intake: which files are taken, which are refused and why, which cell answers an exercise."""

import copy
import json
import os
import shutil
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcourse.checks.registry import find_exercise, load_sheet, sheet_ids
from qcourse.course_files import master
from qcourse.grading.grades import Submission
from qcourse.grading.intake import (
    Found,
    find_submissions,
    given_cells,
    read_submission,
    sheet_of,
)
from qcourse.grading.submitted_notebook import MOST_BYTES, IntakeError, code_cells, solution_of

SHEET = "01_quantizer"
ANSWER = "def symmetric_scale(x, bits):\n    return {}"


@pytest.fixture
def solved() -> dict[str, Any]:
    return json.loads(master("01").read_text(encoding="utf-8"))


@pytest.fixture
def stub() -> str:
    """The untouched cell of 01.1."""
    path = master("01").parents[1] / "exercises" / f"{SHEET}.ipynb"
    return dict(code_cells(path.read_bytes()))["01-1-solution"]


def cell(source: str, **marks: Any) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "source": source,
        "metadata": {},
        "outputs": [],
        "execution_count": None,
        **marks,
    }


def hand_in(
    folder: Path, notebook: Any, student: str = "ada", name: str = f"{SHEET}.ipynb"
) -> Path:
    path = folder / student / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(notebook if isinstance(notebook, bytes) else json.dumps(notebook).encode())
    return path


def read(path: Path) -> Submission:
    return read_submission(Found(path.parent.name, SHEET, path))


def reasons(folder: Path, sheet: str | None = None) -> dict[str, str]:
    return {problem.student: problem.reason for problem in find_submissions(folder, sheet)[1]}


def students(folder: Path, sheet: str | None = None) -> list[tuple[str, str]]:
    return [(found.student, found.sheet) for found in find_submissions(folder, sheet)[0]]


def test_notebooks_are_found_by_student_and_sheet(tmp_path: Path) -> None:
    for student, name in [
        ("zoe", "02_mine.ipynb"),
        ("zoe", "01.ipynb"),
        ("ada", "01_quantizer (1).ipynb"),
    ]:
        hand_in(tmp_path, b"", student, name)
    hand_in(tmp_path, b"", "bob/01_quantizer", "01_quantizer.ipynb")  # as nbgrader lays them out
    hand_in(tmp_path, b"", "bob/.ipynb_checkpoints", "01_quantizer-checkpoint.ipynb")
    hand_in(tmp_path, b"", ".git", "01_quantizer.ipynb")
    (tmp_path / "README.md").touch()
    (tmp_path / "ada" / "data.csv").touch()
    everything = [("ada", SHEET), ("bob", SHEET), ("zoe", SHEET), ("zoe", "02_granularity")]
    assert students(tmp_path) == everything
    assert students(tmp_path, "1") == students(tmp_path, "01") == everything[:3]
    assert reasons(tmp_path) == {}


@pytest.mark.parametrize(
    ("make", "sheet", "message"),
    [
        (lambda folder: folder.rmdir(), None, "There is no folder"),
        (lambda folder: None, None, "No submission is in"),
        (
            lambda folder: hand_in(folder, b"", name="02.ipynb"),
            "01",
            "No submission of sheet 01 is in",
        ),
        (lambda folder: hand_in(folder, b""), "99", "sheet='99' is unknown; the sheets are 01, 02"),
    ],
)
def test_a_folder_without_submissions_is_one_line(
    tmp_path: Path, make: Callable[[Path], Any], sheet: str | None, message: str
) -> None:
    folder = tmp_path / "submitted"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match=message) as caught:
        find_submissions(folder, sheet)
    assert "\n" not in str(caught.value)


def test_two_notebooks_for_one_sheet_are_a_problem_for_their_student_alone(tmp_path: Path) -> None:
    for student, name in [
        ("ada", "01_quantizer.ipynb"),
        ("ada", "01_quantizer-Copy1.ipynb"),
        ("bob", "01.ipynb"),
    ]:
        hand_in(tmp_path, b"", student, name)
    assert students(tmp_path) == [("bob", SHEET)]
    names = "01_quantizer-Copy1.ipynb, 01_quantizer.ipynb"
    said = f"2 notebooks for one sheet: {names}; keep the one that counts"
    assert reasons(tmp_path) == {"ada": said}


@pytest.mark.parametrize("name", ["a\nb", "a;b", 'a"b', " a", "a<b>", "=1+1", "a\tb"])
def test_names_that_a_gradebook_cannot_keep_are_refused(tmp_path: Path, name: str) -> None:
    hand_in(tmp_path, b"", name)
    assert students(tmp_path) == []
    (problem,) = find_submissions(tmp_path)[1]
    assert problem.reason.startswith("is a folder ")
    assert problem.reason.endswith("; rename it")
    assert problem.line.isprintable()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"), "01.ipynb").touch()
    (problem,) = find_submissions(tmp_path)[1]
    assert "U+DCFF in its name" in problem.reason
    assert problem.line.isprintable()
    assert problem.line.encode()


@pytest.mark.parametrize(
    "name", ["Müller, Ada"[:6], "O'Brien", "王小明", "ada.l@uni-x.edu", "Ada (2)", "a_b-c"]
)
def test_usual_names_are_kept(tmp_path: Path, name: str) -> None:
    hand_in(tmp_path, b"", name)
    assert students(tmp_path) == [(name, SHEET)]


@pytest.mark.parametrize(
    "name", ["Rene\u0301e", "अदिति", "สมชาย", "مُحَمَّد", "Nguyễn Văn A", "Smith, Zoë"]
)
def test_names_of_all_scripts_are_kept_in_their_composed_form(tmp_path: Path, name: str) -> None:
    hand_in(tmp_path, b"", name)
    assert students(tmp_path) == [(unicodedata.normalize("NFC", name), SHEET)]
    assert reasons(tmp_path) == {}


def test_one_name_in_two_forms_is_one_student_with_two_notebooks(tmp_path: Path) -> None:
    for name in ("Rene\u0301e", "Ren\u00e9e"):
        hand_in(tmp_path, b"", name)
    assert students(tmp_path) == []
    assert reasons(tmp_path)["Ren\u00e9e"].startswith("2 notebooks for one sheet")


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_file_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    hand_in(tmp_path, b"")
    os.close(os.open(os.fsencode(tmp_path / "ada") + b"/01_\xfc.ipynb", os.O_CREAT))
    (problem,) = find_submissions(tmp_path)[1]
    names = "01_quantizer.ipynb, 01_\\udcfc.ipynb"
    assert problem.reason == f"2 notebooks for one sheet: {names}; keep the one that counts"
    assert problem.line.encode().decode().isprintable()


def test_many_notebooks_for_one_sheet_are_not_all_named(tmp_path: Path) -> None:
    for number in range(1000):
        hand_in(tmp_path, b"", name=f"01 ({number:03}).ipynb")
    assert reasons(tmp_path)["ada"].startswith("1000 notebooks for one sheet: 01 (000).ipynb, ")
    assert len(reasons(tmp_path)["ada"]) < 200


def test_the_ending_may_be_in_capitals(tmp_path: Path) -> None:
    hand_in(tmp_path, b"", name="01_QUANTIZER.IPYNB")
    assert students(tmp_path) == [("ada", SHEET)]


def test_the_folder_of_one_student_is_no_class(tmp_path: Path) -> None:
    hand_in(tmp_path, b"")
    with pytest.raises(
        ValueError, match=r"ada holds 01_quantizer\.ipynb itself, .*; name the folder above"
    ) as caught:
        find_submissions(tmp_path / "ada")
    assert "\n" not in str(caught.value)


@settings(max_examples=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(min_size=1, max_size=40),
    st.sampled_from(["01.ipynb", "01_a.IPYNB", "x.ipynb", "notes"]),
)
def test_any_name_is_taken_or_told(tmp_path: Path, name: str, file: str) -> None:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    try:
        (folder / name.replace("/", "_").replace("\0", "_")).mkdir()
        (folder / name.replace("/", "_").replace("\0", "_") / file).touch()
    except (OSError, UnicodeEncodeError):  # no name for this file system, such as ".."
        return
    try:
        found, problems = find_submissions(folder)
    except ValueError:
        assert name.startswith(".") or "No submission" in str(sys.exc_info()[1])
        return
    assert len(found) + len(problems) == 1
    assert all(
        unicodedata.is_normalized("NFC", one.student) and len(one.student) <= 128 for one in found
    )
    assert all(problem.line.isprintable() for problem in problems)


def test_what_lies_in_the_wrong_place_is_named(tmp_path: Path) -> None:
    hand_in(tmp_path, b"", "ada", "notes.ipynb")
    (tmp_path / "01_quantizer.ipynb").touch()
    (tmp_path / "bob").mkdir()
    (tmp_path / "eve").symlink_to(tmp_path / "ada")
    assert students(tmp_path) == []
    found = reasons(tmp_path)
    assert found["ada"].startswith("belongs to no sheet: its name should begin with one of 01, 02")
    assert found["01_quantizer.ipynb"] == "is in no student's folder; put it into one"
    assert found["bob"] == "holds no notebook"
    assert found["eve"].startswith("is a symbolic link, which is not followed")
    # A notebook of no sheet is not reported when only sheet 01 is graded.
    assert "ada" not in reasons(tmp_path, "01")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(200 << 20)


def notebook(**changes: Any) -> bytes:
    return json.dumps(
        {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": []} | changes
    ).encode()


def writing(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.symlink_to("/etc/passwd"), "cannot be opened"),
        (lambda path: path.mkdir(), "is not a regular file"),
        (fifo, "is not a regular file"),
        (lambda path: path.touch(), "is empty"),
        (sparse, "is 200 MiB, more than 8; clear its outputs"),
        (writing(b" " * (MOST_BYTES + 1)), "more than 8"),
        (writing(b"not json"), "is not JSON"),
        (writing(b"\xff\xfe\x00"), "is not JSON"),
        (writing(b"[" * 100_000), "is not JSON"),
        (writing(b'{"cells": [}'), "is not JSON"),
        (writing(b"[]"), "nbformat is missing"),
        (writing(b"{}"), "nbformat is missing"),
        (writing(notebook(nbformat="4")), "nbformat is missing"),
        (writing(notebook(nbformat=3)), "is in nbformat 3; open it in JupyterLab and save it"),
        (
            writing(notebook(metadata={"kernelspec": {"language": "R", "name": "ir"}})),
            "is for a 'R' kernel",
        ),
        (writing(notebook(cells=None)), "its cells are missing"),
        (writing(notebook()), "holds no solution cell of sheet 01_quantizer"),
        (
            writing(notebook(cells=[1, None, {"cell_type": "code"}, cell("x = 1")])),
            "holds no solution cell",
        ),
        (
            writing(notebook(cells=[{"cell_type": "code", "source": [1, 2]}])),
            "holds no solution cell",
        ),
    ],
)
def test_what_is_no_notebook_is_one_line(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "ada" / "01.ipynb"
    path.parent.mkdir()
    make(path)
    with pytest.raises(IntakeError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = hand_in(tmp_path, b"x")
    path.chmod(0)
    with pytest.raises(IntakeError, match="Permission denied"):
        read(path)


def test_a_sheet_is_read(tmp_path: Path, solved: dict[str, Any]) -> None:
    path = hand_in(tmp_path, solved)
    submission = read(path)
    assert (submission.student, submission.sheet, submission.path) == ("ada", SHEET, path)
    assert [*submission.cells] == ["01.1", "01.2", "01.3", "01.4", "01.5"]
    assert "return x.abs().max() / qmax" in submission.cells["01.1"]
    assert len(submission.sha256) == 64
    solved["cells"].append(cell("pass"))
    assert read(hand_in(tmp_path, solved)).sha256 != submission.sha256


def changed(notebook: dict[str, Any], change: Callable[[list[Any]], Any]) -> dict[str, Any]:
    found = copy.deepcopy(notebook)
    cells = change(found["cells"])
    return found | ({"cells": cells} if cells is not None else {})


def without(*keys: str) -> Callable[[list[Any]], Any]:
    return lambda cells: [
        {key: value for key, value in one.items() if key not in keys} for one in cells
    ]


ACCIDENTS: dict[str, Callable[[list[Any]], Any]] = {
    "cells in the reverse order": lambda cells: cells[::-1],
    "every cell twice": lambda cells: cells + cells,
    "all but the solutions deleted": lambda cells: [
        one for one in cells if one["id"].endswith("-solution")
    ],
    "ids gone, as nbformat 4.4 has none": without("id"),
    "ids new": lambda cells: [one | {"id": f"a{number}"} for number, one in enumerate(cells)],
    "marks gone": lambda cells: [one | {"metadata": {}} for one in cells],
    "ids and marks gone": lambda cells: [
        one | {"metadata": {}, "id": f"a{number}"} for number, one in enumerate(cells)
    ],
    "marks unlocked and repriced": lambda cells: [
        one | {"metadata": {"nbgrader": {"grade_id": one["id"], "points": 999, "locked": False}}}
        for one in cells
    ],
    "checks rewritten": lambda cells: [
        one | {"source": "print('passed')"} if one["id"].endswith("-check") else one
        for one in cells
    ],
    "setup rewritten": lambda cells: [
        one | {"source": "torch = None"} if one["id"] == "01-setup" else one for one in cells
    ],
    "sources as one text": lambda cells: [
        one | {"source": "".join(one["source"])} for one in cells
    ],
    "scratch cells between": lambda cells: [
        both for one in cells for both in (one, cell("import os; os._exit(1)"))
    ],
}


@pytest.mark.parametrize("name", ACCIDENTS)
def test_what_else_a_student_changed_does_not_matter(
    name: str, tmp_path: Path, solved: dict[str, Any]
) -> None:
    expected = read(hand_in(tmp_path, solved)).cells
    found = changed(solved, ACCIDENTS[name])
    assert found != solved
    assert read(hand_in(tmp_path, found)).cells == expected


def chosen(*cells: tuple[str, str]) -> str | None:
    return solution_of(find_exercise("01.1"), cells)


def test_of_several_cells_the_last_marked_answer_counts(stub: str) -> None:
    mark = "01-1-solution"
    first, second, unmarked = (ANSWER.format(number) for number in range(3))
    assert "raise NotImplementedError" in stub
    assert chosen((mark, first), (mark, second)) == second
    assert chosen((mark, first), (mark, stub)) == first
    assert chosen((mark, first), ("", unmarked)) == first
    assert chosen((mark, stub), ("", unmarked), ("", "x = 1")) == unmarked
    assert chosen((mark, "x = 1"), ("", unmarked)) == unmarked
    assert chosen(("", first), ("", unmarked)) == unmarked
    assert chosen((mark, stub)) == stub
    assert chosen((mark, "x = 1")) == "x = 1"
    assert chosen(("", "x = 1"), ("01-2-solution", "def quantize(): pass")) is None
    assert chosen(("", "symmetric_scale = lambda x, bits: x")) is not None
    assert chosen(("", "if symmetric_scale == 1: pass")) is None


def test_an_answer_with_the_stub_left_below_it_is_an_answer(stub: str) -> None:
    answered = stub.replace("    raise", "    return 1\n    raise")
    assert chosen(("01-1-solution", answered), ("01-1-solution", stub)) == answered


def test_the_course_s_own_cells_come_from_the_course(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "solutions"
    fake.mkdir()
    shutil.copy(master("01"), fake / "01_aaa.ipynb")
    monkeypatch.chdir(tmp_path)
    assert master("01").parent != fake
    for sheet_id in sheet_ids():
        assert sheet_of(master(sheet_id)) == sheet_id
        cells = given_cells(sheet_id)
        assert cells
        for exercise in load_sheet(sheet_id).exercises:
            assert not [source for source in cells if f"def {exercise.function}" in source]
        assert not [source for source in cells if source.startswith("check(")]


def test_a_hundred_thousand_cells_with_one_mark_take_linear_time(
    tmp_path: Path, solved: dict[str, Any]
) -> None:
    times = []
    for count in (12_500, 100_000):
        many = [{"cell_type": "code", "source": "x", "id": "01-2-solution"}] * count
        path = hand_in(tmp_path, {**solved, "cells": [*solved["cells"], *many]})
        started = time.perf_counter()
        assert read(path).cells["01.2"] != "x"
        times.append(time.perf_counter() - started)
    assert times[1] < 40 * times[0]  # eight times the cells; by pairs it would be 64


def test_a_lone_surrogate_in_a_source_is_replaced(tmp_path: Path, solved: dict[str, Any]) -> None:
    solved["cells"].append(cell("def symmetric_scale(x, bits):\n    return '\ud800'"))
    source = read(hand_in(tmp_path, solved)).cells["01.1"]
    assert source.encode().decode() == source


SMALL = (
    st.none()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["code", "01-1-solution", "python"])
)
JSON = (
    SMALL
    | st.lists(SMALL, max_size=3)
    | st.dictionaries(st.sampled_from(["id", "nbgrader", "source"]), SMALL)
)
CELL = st.fixed_dictionaries(
    {"cell_type": st.sampled_from(["code", "markdown"])},
    optional={"source": JSON, "id": JSON, "metadata": JSON},
)
NOTEBOOK = st.fixed_dictionaries(
    {"nbformat": st.just(4) | SMALL, "cells": st.lists(CELL | JSON, max_size=4)},
    optional={"metadata": JSON},
)


@settings(max_examples=2000)
@given(JSON | NOTEBOOK, st.binary(max_size=3), st.integers(0, 60))
def test_any_notebook_is_read_or_refused(notebook: Any, new: bytes, place: int) -> None:
    exercise = find_exercise("01.1")
    data = json.dumps(notebook).encode()
    try:
        source = solution_of(exercise, code_cells(data[:place] + new + data[place:]))
    except IntakeError:
        return
    assert source is None or source.encode().decode() == source
