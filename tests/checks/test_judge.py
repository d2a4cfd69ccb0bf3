"""Verdicts as a learner reads them: passed, not written, a known mistake, a crash, odd answers."""

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from qcourse import check
from qcourse.checks.answers import Failure, UnreadableError, capture, plain, read
from qcourse.checks.compare import Difference, difference
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.judge import Verdict, judge
from qcourse.checks.registry import find_exercise, load_sheet, sheet_ids

DOUBLE = Exercise(
    id="99.1",
    title="Double",
    function="double",
    points=2,
    cases=lambda generator: [Case((torch.tensor([1.0, 2.0]),)), Case((torch.arange(40.0),))],
    reference=lambda x: 2 * x.double().numpy(),
    mistakes=(),
)


def verdict(function: object, exercise: Exercise = DOUBLE) -> Verdict:
    cases = exercise.cases(torch.Generator())
    return judge(exercise, cases, [capture(function, case.args) for case in cases])


def test_a_pass_is_one_line() -> None:
    assert repr(verdict(lambda x: x + x)) == "99.1 passed, 2 of 2 points"


def test_a_stub_is_not_written_yet() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not written yet")

    assert repr(verdict(double)) == "99.1 not written yet"


def test_a_function_that_calls_a_stub_is_written() -> None:
    def helper(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("not written yet")

    def double(x: torch.Tensor) -> torch.Tensor:
        return helper(x)

    assert "raised NotImplementedError: not written yet" in repr(verdict(double))


def test_a_nan_that_signals_is_wrong_and_no_warning() -> None:
    # torch.empty may hold such a NaN.
    garbage = torch.full((2,), 0x7F800001, dtype=torch.int32).view(torch.float32)
    wrong = verdict(lambda x: garbage.repeat(len(x) // 2))
    assert "returned [nan, nan]; expected [2.0, 4.0]" in repr(wrong)


def test_a_failing_case_shows_call_answer_and_expectation() -> None:
    wrong = verdict(lambda x: 3 * x)
    assert wrong.lines == [
        "99.1 not yet, 0 of 2 points (0 of 2 cases right)",
        "double(torch.tensor([1.0, 2.0])) returned [3.0, 6.0]; expected [2.0, 4.0]",
    ]
    assert (wrong.reason, wrong.expected) == (
        "double(torch.tensor([1.0, 2.0])) returned [3.0, 6.0]",
        "[2.0, 4.0]",
    )


def test_a_large_case_shows_the_first_place_that_differs() -> None:
    wrong = verdict(lambda x: torch.where(x < 38, 2 * x, 0))
    assert wrong.lines[1] == (
        "double(<float32 of shape (40,)>) returned 0.0 at [38] (2 of 40 values differ);"
        " expected 76.0"
    )


def test_a_matrix_names_the_row_and_the_column() -> None:
    small = Exercise(
        "99.3",
        "",
        "f",
        1,
        lambda generator: [Case((2,))],
        lambda n: np.arange(3 * n).reshape(n, 3),
        (),
    )
    assert verdict(lambda n: [[0, 1, 2], [3, 9, 9]], small).lines[1] == (
        "f(2) returned [[0, 1, 2], [3, 9, 9]] (row 1, column 1: 9);"
        " expected [[0, 1, 2], [3, 4, 5]] (row 1, column 1: 4)"
    )
    large = replace(small, cases=lambda generator: [Case((10,))])
    assert verdict(lambda n: torch.arange(3 * n).reshape(n, 3) % 28, large).lines[1] == (
        "f(10) returned 0 in row 9, column 1 (2 of 30 values differ); expected 28"
    )


def test_a_crash_shows_the_line_of_the_learner() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(7) * 2

    line = verdict(double).lines[1]
    assert "raised RuntimeError: shape '[7]' is invalid for input of size 2" in line
    assert ": return x.reshape(7) * 2); expected [2.0, 4.0]" in line


def test_html_is_the_same_and_escaped() -> None:
    html = verdict(lambda x: "<b>")._repr_html_()
    assert "99.1 not yet, 0 of 2 points" in html
    assert "&lt;b&gt;" in html
    assert "<b>'" not in html


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: None, "returned None (is a `return` missing?)"),
        (lambda x: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda x: exit(), "raised SystemExit"),
        (lambda x: (_ for _ in ()).throw(KeyError("k")), "raised KeyError: 'k'"),
        (lambda: 0, "raised TypeError"),
        (lambda x: [[1], [2, 3]], "returned lists that do not form an array"),
        (lambda x: [1, "2"], "returned lists that do not form an array"),
        (lambda x: x[None], "returned shape (1, 2); expected shape (2,)"),
        (lambda x: x > 0, "(bool); expected floats"),
        (lambda x: x + 0j, "returned a value of type Tensor"),
        (lambda x: x.to_sparse(), "raised TypeError"),
        (lambda x: 10**400, "returned a value of type int"),
        (lambda x: {"x": x}, "returned a dict"),
        (lambda x: {1.0, 2.0}, "returned a set"),
        (lambda x: np.array([1, "a"], dtype=object), "returned a value of type ndarray"),
        (lambda x: capture(lambda: 1 / 0, ()), "returned a value of type Failure"),
    ],
)
def test_odd_answers_fail_in_words(function: object, words: str) -> None:
    answer = verdict(function)
    assert answer.points == 0
    assert words in answer.lines[1]


def test_an_exception_that_cannot_be_written_out() -> None:
    class OddError(BaseException):
        def __str__(self) -> str:
            raise ValueError

    def double(x: torch.Tensor) -> torch.Tensor:
        raise OddError

    assert "raised OddError" in repr(verdict(double))


def test_a_learner_may_interrupt() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verdict(double)


def test_arguments_are_copies() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)

    cases = DOUBLE.cases(torch.Generator())
    outputs = [capture(double, case.args) for case in cases for _ in range(2)]
    assert np.array_equal(outputs[0], outputs[1])
    assert cases[0].args[0].tolist() == [1.0, 2.0]
    nested = Case((((torch.ones(2),),),))
    capture(lambda pair: pair[0].zero_(), nested.args[0])
    assert nested.args[0][0][0].tolist() == [1.0, 1.0]


def test_a_function_that_changes_its_argument_is_told_which() -> None:
    def double(values: torch.Tensor) -> torch.Tensor:
        values *= 2
        return values

    wrong = verdict(double)
    assert (wrong.status, wrong.cases_right) == ("not yet", 0)
    assert wrong.lines[1] == (
        "double(torch.tensor([1.0, 2.0])) changed its argument values in place;"
        " work on a copy of it; expected its arguments as they were"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda x, pair: pair[1].zero_(),
        lambda *args: args[1][1].resize_(3),
        lambda x, pair: pair[1].__setitem__(0, 5.0),
    ],
)
def test_arguments_within_tuples_are_watched_too(change: Callable) -> None:
    args = torch.tensor([float("nan")]), (1, torch.ones(2))

    def function(*args: object) -> int:
        change(*args)
        return 1

    assert capture(function, args).message.startswith("changed its argument number 2 in place")
    assert capture(lambda x, pair: 1, args) == 1  # NaN is what it was
    assert capture(lambda x, pair: 1, ("text", {}, [1])[:2]) == 1


def test_answers_are_copies_too() -> None:
    buffer = torch.zeros(2)
    outputs = [
        capture(lambda x: buffer.copy_(x), (torch.full((2,), value),)) for value in (1.0, 2.0)
    ]
    assert [output.tolist() for output in outputs] == [[1.0, 1.0], [2.0, 2.0]]


def test_raw_outputs_are_read_before_they_are_compared() -> None:
    class Equal:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None

    cases = DOUBLE.cases(torch.Generator())
    assert judge(DOUBLE, cases, [Equal(), Equal()]).points == 0
    assert judge(DOUBLE, cases, [2 * case.args[0] for case in cases]).points == 2


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int8]
)
def test_every_kind_of_number_can_be_read(dtype: torch.dtype) -> None:
    answer = torch.tensor([1, -2]).to(dtype).requires_grad_(dtype.is_floating_point)
    assert plain(answer).tolist() == [1, -2]


Pair = namedtuple("Pair", "low high")


class Sly(tuple):
    """A tuple that overrides its iterator, length, items and equality."""

    __slots__ = ()

    def __iter__(self) -> Iterator[int]:
        return iter((1, 3))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: object) -> int:
        return 3

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


@pytest.mark.parametrize(
    "answer",
    [
        torch.aminmax(torch.tensor([3, 1, 2])),
        torch.tensor([0, 0, 0, 1]).max(dim=0),
        torch.sort(torch.tensor([3, 1])).values.tolist(),
        Pair(1, torch.tensor(3)),
        [torch.nn.Parameter(torch.tensor(1.0)), np.float32(3)],
        Sly([1, 3]),
    ],
)
def test_kinds_of_tuples_and_parameters_are_answers(answer: object) -> None:
    assert difference(plain(answer), (1.0, 3.0), 0.0) is None


class SlyList(list):
    pass


class SlyParameter(torch.nn.Parameter):
    pass


@pytest.mark.parametrize(
    "answer",
    [SlyList([1, 3]), SlyParameter(torch.ones(2)), np.ma.ones(2), {1: 3}, {1}],
)
def test_other_subclasses_are_none(answer: object) -> None:
    with pytest.raises(
        UnreadableError,
        match=f"of type {type(answer).__name__}|returned a {type(answer).__name__};",
    ):
        plain(answer)


def test_only_the_contents_of_a_sly_tuple_count() -> None:
    assert plain(Sly([7, 8, 9])) == (7, 8, 9)
    assert plain(Sly([Pair(Sly([1]), 2)])) == (((1,), 2),)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (torch.tensor([1.0, 3.0]), "returned one array: [1.0, 3.0]"),
        (1.0, "returned one value: 1.0"),
        ((1.0, 3.0, 5.0), "returned a tuple of 3 values: (1.0, 3.0, 5.0)"),
        ((0,) * 30, "returned a tuple of 30 values"),
        ({1.0, 3.0}, "returned a set; give back numbers, lists, NumPy arrays or plain tensors"),
        ({"low": 1.0}, "returned a dict; give back numbers, lists, NumPy arrays or plain tensors"),
    ],
)
def test_another_number_of_results_says_what_was_wanted(answer: object, got: str) -> None:
    assert difference(read(answer), (1.0, 3.0), 0.0) == Difference(
        got, "a tuple of 2 values: (1.0, 3.0)"
    )


REFUSED = Failure(("ValueError",), "4 does not divide 6")


@pytest.mark.parametrize(
    "message",
    [
        "group_size=4 does not divide 6",
        "w of shape (5, 6): 6 columns make no groups of 4",
        "cannot split 6 inputs into groups of 4: 6 % 4 = 2",
        "expected in_features divisible by group_size, got torch.Size([5, 6]) and 4; divide 6",
        "6 / 4 = 1.5 groups",
        "4, 6",
    ],
)
def test_a_refusal_in_other_words_is_one(message: str) -> None:
    assert difference(Failure(("ValueError",), message), REFUSED, 0.0) is None


@pytest.mark.parametrize(
    "message",
    [
        "shape is invalid",
        "4",
        "shape '[5, -1, 4]' is invalid for input of size 30",
        "2 3 4 5 6 7",
        " ".join(map(str, range(100))),
    ],
)
def test_a_refusal_that_fits_many_cases_is_none(message: str) -> None:
    found = difference(Failure(("ValueError",), message), REFUSED, 0.0)
    assert found == Difference(
        f"raised ValueError: {message}", "a ValueError that names 4 and 6, and few other numbers"
    )


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        (1.0, 1.0 + 1e-7, True),
        (1.0, 1.0 + 1e-4, False),
        (np.array([0.0, 1.0]), np.array([1e-8, 1.0]), True),  # near 0, beside something of size 1
        (np.array([0.0, 1.0]), np.array([1e-6, 1.0]), False),
        (-1e-7, 0.0, True),  # all that is expected is 0: 1e-6
        (np.array([1e-5, 0.0]), np.zeros(2), False),
        (float("inf"), float("inf"), True),
        (1.0, float("inf"), False),
        (float("nan"), 1.0, False),
        (np.uint64(2**64 - 1), np.int64(-1), False),
        (np.array([255], np.uint8), np.array([-1], np.int8), False),
        (np.array([255], np.int64), np.array([255], np.uint8), False),
        ((255,), np.array([255], np.uint8), True),
        (np.zeros((2, 0)), np.zeros((2, 0)), True),
        (True, 1, False),
        (True, True, True),
        ("HOLDS", "HOLDS", True),
        ("HOLDS", "WRONG", False),
        ("1", 1, False),
        ((1, 2), (1, 2), True),
        ((1,), (1, 2), False),
        (np.array([1, 2]), (1, 2), False),
        ((1, (2, 3.0)), (1, (2, 3.0)), True),
        (Failure(("MyError", "ValueError")), Failure(("ValueError",)), True),
        (Failure(("TypeError", "Exception")), Failure(("ValueError", "Exception")), False),
        (
            Failure(("ValueError",), "(2, 5) by 2"),
            Failure(("ValueError",), "2 does not divide 5"),
            True,
        ),
        (
            Failure(("ValueError",), "size 10 by 2"),
            Failure(("ValueError",), "2 does not divide 5"),
            False,
        ),
    ],
)
def test_difference(answer: object, expected: object, same: bool) -> None:
    assert (difference(answer, expected, 1e-5) is None) is same


def test_a_difference_names_the_part_of_an_answer() -> None:
    assert difference((1, 3), (1, 2), 0.0) == Difference("returned 3 as value 2 of 2", "2")


@pytest.mark.parametrize(
    ("answer", "expected", "got", "wanted"),
    [
        (np.array([17.0]), np.array([17]), "returned [17.0] (float64)", "an integer dtype"),
        (np.array([17]), np.array([17], np.uint8), "returned int64: 8 bytes per value", "uint8"),
        (
            Failure(("ValueError",), "size 10"),
            Failure(("ValueError",), "2 does not divide 5"),
            "raised ValueError: size 10",
            "a ValueError that names 2 and 5, and few other numbers",
        ),
    ],
)
def test_a_difference_in_kind_is_said_in_words(
    answer: object, expected: object, got: str, wanted: str
) -> None:
    assert difference(answer, expected, 0.0) == Difference(got, wanted)


@pytest.mark.parametrize("outputs", [[], [1]])
def test_an_output_for_each_case(outputs: list) -> None:
    with pytest.raises(ValueError, match=f"outputs has {len(outputs)} answers for 2 cases"):
        judge(DOUBLE, DOUBLE.cases(torch.Generator()), outputs)


def test_a_reference_that_breaks_is_not_a_pass() -> None:
    broken = Exercise("99.2", "", "f", 1, DOUBLE.cases, lambda x: x.nothing, ())
    with pytest.raises(RuntimeError, match="went wrong"):
        verdict(lambda x: x.nothing, broken)


def test_check_wants_a_function_and_a_known_id() -> None:
    with pytest.raises(TypeError, match="must be your function quantize"):
        check("01.2", 3)
    with pytest.raises(ValueError, match=r"'01\.9' is unknown; did you mean '01\.5'"):
        check("01.9", print)
    with pytest.raises(ValueError, match=r"did you mean .*'01\.2'"):
        check("1.2", print)
    with pytest.raises(TypeError, match="must be a string"):
        check(print, "01.2")


def test_sheets_are_named_as_their_files() -> None:
    assert sheet_ids()[:2] == ["01", "02"]
    for sheet_id in sheet_ids():
        sheet = load_sheet(sheet_id)
        ids = [exercise.id for exercise in sheet.exercises]
        assert sheet.id == sheet_id
        assert ids == [f"{sheet_id}.{number}" for number in range(1, len(ids) + 1)]
        assert 3 <= len(ids) <= 5
        assert find_exercise(ids[0]) is sheet.exercises[0]
    assert load_sheet("1") is load_sheet("01")
