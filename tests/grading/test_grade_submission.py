"""Grades: solutions earn all, stubs nothing, mistakes part; one cell costs no other exercise."""

import shutil
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch

from qcourse.checks.answers import Failure, capture
from qcourse.checks.exercise import Exercise
from qcourse.checks.judge import Verdict, judge
from qcourse.checks.registry import find_exercise, load_sheet, sheet_ids
from qcourse.course_files import master
from qcourse.grading import grade_submission as grading
from qcourse.grading.grade_submission import grade_exercise, grade_submission
from qcourse.grading.grades import (
    BUBBLEWRAP,
    NONE,
    ExerciseGrade,
    Limits,
    Submission,
    SubmissionGrade,
)
from qcourse.grading.intake import Found, read_submission
from qcourse.grading.sandbox import dialogue, host, mounts
from qcourse.grading.sandbox.attempt import Attempt
from qcourse.grading.sandbox.dialogue import WorkerGoneError
from qcourse.grading.sandbox.host import Sandbox, SandboxError

LIMITS = Limits(case_s=1.0, exercise_s=60.0, memory_mib=256)
EXERCISES = [exercise for sheet_id in sheet_ids() for exercise in load_sheet(sheet_id).exercises]
pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def solution(sheet_id: str = "01", **changes: str) -> Submission:
    """A sheet with all its solutions, but for cells given as e_01_2=source."""
    path = master(sheet_id)
    submission = read_submission(Found("ada", path.stem, path))
    cells = dict(submission.cells)
    for name, source in changes.items():
        cells[name.removeprefix("e_").replace("_", ".")] = source
    kept = {name: source for name, source in sorted(cells.items()) if source}
    return replace(submission, cells=kept)


def points(grade: SubmissionGrade) -> dict[str, float]:
    return {exercise.exercise: exercise.points for exercise in grade.exercises}


@pytest.mark.parametrize("sheet_id", sheet_ids())
def test_solutions_earn_everything_and_stubs_nothing(sheet_id: str) -> None:
    grade = grade_submission(solution(sheet_id), seed=2**40 + 7, limits=LIMITS)
    failed = [one for one in grade.exercises if one.reason]
    assert (grade.points, grade.problem) == (grade.max_points, None), failed
    ids = [one.id for one in load_sheet(sheet_id).exercises]
    assert [one.exercise for one in grade.exercises] == ids
    path = master(sheet_id).parents[1] / "exercises" / master(sheet_id).name
    grade = grade_submission(read_submission(Found("ada", path.stem, path)), seed=7, limits=LIMITS)
    assert {(one.points, one.reason) for one in grade.exercises} == {(0.0, "not written yet")}


def test_kernels_run_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    grading.close()
    monkeypatch.setattr(mounts, "LIBRARIES", ("torch", "numpy"))
    grade = grade_submission(solution("11"), seed=3, limits=LIMITS)
    grading.close()
    assert grade.points == grade.max_points


def test_a_grade_says_what_it_was_made_with() -> None:
    submission = solution()
    grade = grade_submission(submission, seed=3, limits=LIMITS)
    assert (grade.student, grade.sheet) == ("ada", "01_quantizer")
    assert (grade.seed, grade.backend) == (3, BUBBLEWRAP)
    assert (grade.submission_sha256, grade.limits["case_s"]) == (submission.sha256, 1.0)
    assert len(grade.environment) == 16
    assert grade.graded_at.endswith("+00:00")
    assert SubmissionGrade.from_dict(grade.to_dict()) == grade


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_a_known_mistake_is_named_and_earns_what_the_learner_s_own_check_shows(
    exercise: Exercise,
) -> None:
    cases = exercise.cases(torch.Generator().manual_seed(5))
    for mistake in exercise.mistakes:
        outputs = [capture(mistake.function, case.args) for case in cases]
        grade = grade_exercise(exercise, cases, outputs)
        assert grade.points == judge(exercise, cases, outputs).points <= exercise.points / 2
        assert f"Looks like: {mistake.name}. {mistake.advice}" in grade.reason


def test_a_reason_holds_no_expected_value(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "symmetric_scale(1) returned 2"
    verdict = Verdict("01.1", "not yet", 0.33, 1, 2, 6, said, "THE ANSWER", "a mistake", "Look.")
    monkeypatch.setattr(grading, "judge", lambda *args: verdict)
    grade = grade_exercise(find_exercise("01.1"), [], [])
    reason = f"2 of 6 cases right; {said}. Looks like: a mistake. Look."
    assert grade == ExerciseGrade("01.1", 0.33, 1, reason)


def test_part_of_the_drawn_cases_earns_part_of_half_of_the_points() -> None:
    part = """
def symmetric_scale(x, bits):
    return x.abs().max() / (2 ** (bits - 1) - 1) if bits < 8 else 0
"""
    grade = grade_submission(solution(e_01_1=part), seed=3, limits=LIMITS)
    # 2 of 3 drawn cases are right: not that of 8 bits.
    assert points(grade) == {"01.1": 0.33, "01.2": 3, "01.3": 3, "01.4": 3, "01.5": 2}
    said = "symmetric_scale(torch.tensor([-3.0, 1.0, 0.5]), 8) returned 0"
    assert said in grade.exercises[0].reason


def test_a_cell_that_is_missing_costs_what_needs_it() -> None:
    grade = grade_submission(solution(e_01_3=""), seed=3, limits=LIMITS)
    assert points(grade) == {"01.1": 1, "01.2": 3, "01.3": 0, "01.4": 0, "01.5": 2}
    assert grade.exercises[2].reason == "no cell defines affine_parameters"
    assert "name 'affine_parameters' is not defined (line 12:" in grade.exercises[3].reason


def test_the_error_of_a_cell_is_the_reason() -> None:
    grade = grade_submission(
        solution(e_01_1="import matplotlib\ndef symmetric_scale(:"), seed=3, limits=LIMITS
    )
    assert "raised SyntaxError: invalid syntax (<01.1>, line 2)" in grade.exercises[0].reason
    assert grade.points == 11


def test_a_function_that_is_there_counts_though_its_cell_fails_further_down() -> None:
    cell = solution().cells["01.1"] + "\nprint(symmetric_scale(torch.zeros(0), 4))"
    assert grade_submission(solution(e_01_1=cell), seed=3, limits=LIMITS).points == 12


def test_lines_of_ipython_are_left_out() -> None:
    cell = "%matplotlib inline\n!pip install torch\n" + solution().cells["01.1"]
    assert grade_submission(solution(e_01_1=cell), seed=3, limits=LIMITS).points == 12
    cell = solution().cells["01.1"].replace("    qmax =", '    """\n%s\n    """\n    qmax =')
    assert grade_submission(solution(e_01_1=cell), seed=3, limits=LIMITS).points == 12


def test_a_source_that_is_too_much_for_the_parser_costs_its_own_exercise() -> None:
    """Python's own compiler may crash on it, so it is compiled nowhere but in a worker."""
    for deep in ("-" * 300_000 + "1", "(" * 3000, "x" + ".y" * 300_000, "+".join("1" * 300_000)):
        cell = f"def symmetric_scale(x, bits):\n    return {deep}"
        grade = grade_submission(solution(e_01_1=cell), seed=3, limits=LIMITS)
        assert (grade.points, grade.problem) == (11, None)


def test_a_right_answer_does_not_need_torch() -> None:
    cell = """
import numpy as np
def symmetric_scale(x, bits):
    return np.abs(x.numpy()).max() / (2 ** (bits - 1) - 1)
"""
    assert grade_submission(solution(e_01_1=cell), seed=3, limits=LIMITS).points == 12


BREAKING = {
    "strikes at once": "import os\nos._exit(1)",
    "strikes when called": "import os\ndef symmetric_scale(x, bits):\n    os._exit(1)",
    "strikes later, from a thread": """
import os, threading
threading.Timer(0.01, os._exit, [1]).start()
def symmetric_scale(x, bits):
    return 0
""",
    "sends nonsense, from a thread": """
import os, threading
def strike():
    while True:
        for number in range(3, 20):
            try: os.write(number, b"nonsense\\n")
            except OSError: pass
threading.Thread(target=strike, daemon=True).start()
def symmetric_scale(x, bits):
    return 0
""",
    "takes all the time": """
import threading
threading.Thread(target=lambda: sum(iter(int, 1))).start()
while True: pass
""",
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_cell_takes_no_other_exercise_down(name: str) -> None:
    grade = grade_submission(solution(e_01_1=BREAKING[name]), seed=3, limits=LIMITS)
    assert points(grade) == {"01.1": 0, "01.2": 3, "01.3": 3, "01.4": 3, "01.5": 2}, grade.exercises


def test_a_cell_that_breaks_costs_those_that_need_it_and_says_so() -> None:
    cell = solution().cells["01.3"] + "\nimport os\nos._exit(4)"
    grade = grade_submission(solution(e_01_3=cell), seed=3, limits=LIMITS)
    assert points(grade) == {"01.1": 1, "01.2": 3, "01.3": 0, "01.4": 0, "01.5": 2}
    ended = "ended Python itself (exit status 4)"
    assert f"was never called, because its cell {ended}" in grade.exercises[2].reason
    assert f"needs the cell of 01.3, which {ended}" in grade.exercises[3].reason


def test_a_submission_has_an_end() -> None:
    loop = "while True: pass"
    cells = {f"e_01_{number}": loop for number in range(1, 6)}
    limits = replace(LIMITS, case_s=0.6, exercise_s=1.0)
    started = time.monotonic()
    grade = grade_submission(solution(**cells), seed=3, limits=limits)
    assert time.monotonic() - started < limits.submission_s(5)
    assert grade.points == 0
    assert grade.problem is None


def test_each_exercise_has_time_of_its_own() -> None:
    slow = (
        solution().cells["01.2"]
        + """
whole, times = quantize, []
def quantize(x, scale, bits):
    times.append(0)
    while len(times) > 6: pass
    time.sleep(0.4)
    return whole(x, scale, bits)
import time
"""
    )
    grade = grade_submission(solution(e_01_2=slow), seed=3, limits=replace(LIMITS, exercise_s=1.5))
    assert points(grade) == {"01.1": 1, "01.2": 0, "01.3": 3, "01.4": 3, "01.5": 2}
    said = "took longer than 1.5 s over all of its cases and was stopped"
    assert said in grade.exercises[1].reason


def test_needed_cells_are_found_by_name() -> None:
    cells = {
        "01.1": "import math as m\ndef one(): return local\nlocal = 3",
        "01.2": "def two(x):\n    local = 1\n"
        "    def inner(): return one() + local\n    return inner()",
        "01.3": "def three(x): return m.pi",
        "01.4": "def four(x): return [three(y) for y in x]",
        "01.5": "def five(one): return one",
        "01.6": "def broken(:",
    }
    sandbox = Sandbox(BUBBLEWRAP)
    attempt = Attempt(lambda: sandbox.worker(LIMITS), [], cells, LIMITS)
    needed = {name: attempt.needed(name) for name in cells}
    sandbox.close()
    assert needed == {
        "01.1": ["01.1"],
        "01.2": ["01.1", "01.2"],
        "01.3": ["01.1", "01.3"],
        "01.4": ["01.1", "01.3", "01.4"],
        "01.5": ["01.5"],
        "01.6": ["01.6"],
    }


def test_a_cell_whose_names_cannot_be_found_needs_itself() -> None:
    class Gone:
        def names(self, source: str, wall_s: float) -> None:
            raise WorkerGoneError("crashed")

        def close(self) -> str:
            return "-11"

    attempt = Attempt(Gone, [], {"01.1": "x = 1", "01.2": "y = x"}, LIMITS)  # type: ignore[arg-type]
    assert attempt.needed("01.2") == ["01.2"]


HOSTILE = {
    "a page of markup": "raise ValueError('<script>alert(1)</script>' * 100)",
    "odd characters": "raise ValueError('a\\x00b\\x1b[31m\\u202e\\ud800\\nc')",
    "an error without words": "raise type('E' * 500, (Exception,), "
    "{'__str__': lambda self: 1 / 0})",
    "a long text": "return 'x' * 1_000_000",
    "tuples in tuples": "x = ()\n    for _ in range(500): x = (x,)\n    return x",
    "a great many lists": "return [[]] * 200_000",
    "lists of lists of texts": "return [['a', 1], [2.0]]",
    "an integer of a million digits": "return 10 ** 1_000_000",
    "the largest integer": "return 2 ** 64 - 1",
    "infinite": "return float('inf')",
    "NaN": "return torch.full((3,), float('nan'))",
    "an empty array of many axes": "return torch.zeros([0] * 40)",
    "a quantized tensor": "return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)",
    "a sparse tensor": "return torch.eye(3).to_sparse()",
    "a tensor on no device": "return torch.ones(3, device='meta')",
    "complex numbers": "return torch.ones(3, dtype=torch.complex64)",
    "a lambda": "return lambda: 1",
    "half floats": "return torch.full((2, 2), 6e4, dtype=torch.float16) * 2",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOSTILE)
def test_odd_answers_are_judged_and_told_in_a_line(name: str) -> None:
    cell = f"import torch\ndef symmetric_scale(x, bits):\n    {HOSTILE[name]}"
    grade = grade_submission(solution(e_01_1=cell), seed=3, limits=LIMITS)
    assert (grade.points, grade.problem) == (11, None)
    reason = grade.exercises[0].reason
    assert reason.startswith("0 of 6 cases right; symmetric_scale(")
    assert reason.isprintable()
    assert len(reason) < 800
    assert SubmissionGrade.from_dict(grade.to_dict()) == grade


def test_a_fault_of_the_judge_costs_one_exercise_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(exercise: Exercise, *args: object) -> Verdict:
        if exercise.id == "01.2":
            raise RuntimeError("a reference went wrong")
        return Verdict(exercise.id, "passed", exercise.points, exercise.points, 1, 1)

    monkeypatch.setattr(grading, "judge", judge)
    grade = grade_submission(solution(), seed=3, limits=LIMITS)
    assert grade.points == 9
    assert grade.problem == "01.2: the judge itself failed: RuntimeError('a reference went wrong')"
    assert "reference" not in grade.exercises[1].reason


def test_the_seed_decides_the_cases_and_nothing_else_does() -> None:
    def but_time(grade: SubmissionGrade) -> SubmissionGrade:
        return replace(grade, graded_at="")

    wrong = solution(e_01_5="def code_entropy(codes):\n    return codes.float().sum()")
    one, again, other = (
        but_time(grade_submission(wrong, seed=seed, limits=LIMITS)) for seed in (3, 3, 4)
    )
    assert one == again
    drawn = {
        repr(find_exercise("01.5").cases(torch.Generator().manual_seed(seed))) for seed in (3, 4)
    }
    assert len(drawn) == 2
    assert other.seed == 4


def test_without_a_sandbox_the_grade_says_so() -> None:
    grade = grade_submission(solution(), seed=3, limits=LIMITS, backend=NONE)
    assert (grade.points, grade.backend) == (12, NONE)


def test_threads_take_turns() -> None:
    grades: dict[int, float] = {}

    def run(seed: int) -> None:
        grades[seed] = grade_submission(solution(), seed=seed, limits=LIMITS).points

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grades == dict.fromkeys(range(4), 12)


def test_a_sandbox_that_is_lost_is_started_anew() -> None:
    grading.check_backend(BUBBLEWRAP)
    sandbox_of(BUBBLEWRAP)._process.kill()
    assert grade_submission(solution(), seed=3, limits=LIMITS).points == 12


def sandbox_of(backend: str) -> Sandbox:
    (sandbox,) = (one for (_, its), one in grading._sandboxes.items() if its == backend)
    return sandbox


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_warm_python_that_is_ended_inside_is_started_anew(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel does so if memory is short; bubblewrap outside may notice late, or never."""
    monkeypatch.setattr(host, "WORKER_S", 1.0)
    monkeypatch.setattr(dialogue, "WORKER_S", 1.0)
    for _ in range(2 if number == signal.SIGKILL else 1):
        grading.check_backend(BUBBLEWRAP)
        below = psutil.Process(sandbox_of(BUBBLEWRAP)._process.pid).children(recursive=True)
        inside = next(process for process in below if process.name().startswith("python"))
        inside.send_signal(number)
        assert grade_submission(solution(), seed=3, limits=LIMITS).points == 12


def test_no_sandbox_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    grading.close()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxError, match="install bubblewrap"):
        grade_submission(solution(), seed=3, limits=LIMITS)


def test_a_failure_is_not_an_answer() -> None:
    exercise = find_exercise("01.1")
    cases = exercise.cases(torch.Generator().manual_seed(1))
    grade = grade_exercise(
        exercise, cases, [Failure(("ValueError",), "1 2 3 4 5 6 7 8 9")] * len(cases)
    )
    assert grade.points == 0
