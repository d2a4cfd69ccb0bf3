"""The checks fail for the right reason: mistakes are named, forgeries refused, broken judges found.

One battery of assertions covers every exercise of every sheet. It must hold for the judge, and it
must NOT hold for any of the mutants below it, each of which is the judge with one line changed.
That shows that the battery can fail.
"""

import inspect
import sys
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from drawing import EXERCISES, drawn

from qcourse.checks import answers, compare, judge, points, words
from qcourse.checks.answers import Failure
from qcourse.checks.exercise import Exercise


def is_whole(right: object) -> bool:
    return np.asarray(right).dtype.kind in "iu"


def is_packed(right: object) -> bool:
    return np.asarray(right).dtype in (np.uint8, np.int32)


class AlwaysEqual:
    """Equal to everything, and of every shape and dtype."""

    shape = ()
    dtype = torch.float32
    ndim = 0

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


class AnyType(type):
    """The type of a type that is equal to every other."""

    def __eq__(cls, other: object) -> bool:
        return True

    __hash__ = type.__hash__


class OfAnyType(AlwaysEqual, metaclass=AnyType):
    pass


def sly_tuple(right: object) -> tuple:
    """Return a tuple that holds wrong values and whose iterator gives the right ones."""
    parts = list(np.atleast_1d(right))

    class SlyTuple(tuple):
        __slots__ = ()

        def __iter__(self) -> Any:
            return iter(parts)

        def __len__(self) -> int:
            return len(parts)

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None

    return SlyTuple([None] * len(parts))


class Sly(torch.Tensor):
    """A tensor that calls itself equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


def nan_in_first_place(right: object) -> np.ndarray:
    place = np.arange(np.size(right)).reshape(np.shape(right))
    return np.where(place == 0, np.nan, right)


def off_by_a_little(right: object) -> np.ndarray:
    change = 1 if is_whole(right) else 1e-2 * np.abs(right).max()
    return np.asarray(right) + change


FORGERIES = {
    "equal to everything": lambda right: AlwaysEqual(),
    "of any type": lambda right: OfAnyType(),
    "a tuple with an iterator of its own": sly_tuple,
    "a tensor subclass": lambda right: torch.tensor(right).as_subclass(Sly),
    "an array subclass": lambda right: np.ma.masked_array(right, mask=True),
    "None": lambda right: None,
    "a failure made by hand": lambda right: Failure(("ValueError",)),
    "one axis more": lambda right: np.asarray(right)[None],
    "text": lambda right: str(right),
    "truth values": lambda right: np.asarray(right).astype(bool),
    "NaN": lambda right: np.full(np.shape(right), np.nan),
    "NaN somewhere": nan_in_first_place,
    "infinite": lambda right: np.full(np.shape(right), np.inf),
    "off by a little": off_by_a_little,
    "floats for integers": lambda right: (
        np.asarray(right, dtype=np.float64) if is_whole(right) else None
    ),
    "64 bits for bytes and words": lambda right: (
        torch.tensor(right).long() if is_packed(right) else None
    ),
}
REFUSALS = {
    "an error that names everything": {"message": " ".join(map(str, range(100)))},
    "an error of another kind": {"kinds": ("TypeError", "Exception")},
    "an error that says nothing": {"message": "shape is invalid"},
}


def forged(forge: object, right: object) -> object:
    """Return the right answer with one part of it forged."""
    if isinstance(right, Failure):
        return forge(0)
    return (*right[:-1], forge(right[-1])) if isinstance(right, tuple) else forge(right)


def written_over(right: object, *args: object) -> object:
    """Return the right answer, and write into the arguments."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            arg.fill_(77)
    return right


def check_battery(
    exercise: Exercise,
    seed: int,
    judge: types.ModuleType = judge,
    answers: types.ModuleType = answers,
) -> None:
    """Assert everything that must hold for one exercise."""
    cases = drawn(exercise.id, seed)
    right = [answers.capture(exercise.reference, case.args) for case in cases]
    verdict = judge.judge(exercise, cases, right)
    assert (verdict.status, verdict.points) == ("passed", exercise.points)
    for mistake in exercise.mistakes:
        outputs = [answers.capture(mistake.function, case.args) for case in cases]
        verdict = judge.judge(exercise, cases, outputs)
        assert (verdict.status, verdict.mistake) == ("not yet", mistake.name), repr(verdict)
        assert 0 <= verdict.points <= exercise.points / 2, repr(verdict)
    for name, forge in FORGERIES.items():
        outputs = [answers.capture(forged, (forge, value)) for value in right]
        assert judge.judge(exercise, cases, outputs).status == "not yet", name
    if any(isinstance(arg, torch.Tensor) for arg in cases[0].args):
        pairs = zip(right, cases, strict=True)
        outputs = [answers.capture(written_over, (value, *case.args)) for value, case in pairs]
        assert judge.judge(exercise, cases, outputs).cases_right == 0, "arguments written over"
    if any(type(value) is answers.Failure for value in right):
        for name, changes in REFUSALS.items():
            outputs = list(right)
            for number, value in enumerate(right):
                if type(value) is answers.Failure:
                    outputs[number] = replace(value, **changes)
            assert judge.judge(exercise, cases, outputs).status == "not yet", name
    wrong = answers.capture(lambda: 1e9, ())
    verdict = judge.judge(exercise, cases, [*right[:-1], wrong])
    assert (verdict.status, verdict.cases_right, verdict.mistake) == ("not yet", len(cases) - 1, "")
    assert 0 < verdict.points <= exercise.points / 2, "nearly right"
    pairs = [*zip(right, cases, strict=True)]
    outputs = [value if case.by_hand else wrong for value, case in pairs]
    verdict = judge.judge(exercise, cases, outputs)
    hand_made = sum(case.by_hand for case in cases)
    assert (verdict.points, verdict.cases_right) == (0, hand_made), "a table"
    outputs = [value if type(value) is answers.Failure else wrong for value in right]
    assert judge.judge(exercise, cases, outputs).points == 0, "refusals only"


def check_all(exercises: list[Exercise], **modules: types.ModuleType) -> None:
    for exercise in exercises:
        check_battery(exercise, 0, **modules)


@pytest.mark.parametrize("seed", [0, 1, 2, 17, 2**40])
@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_solutions_pass_mistakes_are_named_forgeries_refused(exercise: Exercise, seed: int) -> None:
    check_battery(exercise, seed)


MUTANTS = {
    "a value is compared with itself": (
        judge,
        "difference(output, right, exercise.tolerance) for",
        "difference(output, output, 0.0) for",
    ),
    "shapes are not compared": (compare, "shape != expected.shape", "False"),
    "kinds are not compared": (compare, "numbers.dtype.kind not in accepted", "False"),
    "any value will do": (
        compare,
        "wrong = _wrong(numbers, expected, tolerance)",
        "wrong = np.array(False)",
    ),
    "one right value is enough": (compare, "if wrong.any()", "if wrong.all()"),
    "NaN equals anything": (compare, "np.isnan(answer) & np.isnan(expected)", "np.isnan(answer)"),
    "infinity is near": (compare, "(near & finite)", "(near | np.isinf(answer))"),
    "a tolerance of everything": (compare, "allowed = tolerance *", "allowed = 1e9 *"),
    "one right case is enough": (points, "if all(right)", "if any(right)"),
    "only the last case counts": (judge, "if all(right)", "if right[-1]"),
    "only the first case counts": (judge, "if all(right)", "if right[0]"),
    "a mistake need match one case only": (
        judge,
        "            return False\n    return True",
        "            continue\n        return True\n    return False",
    ),
    "no mistake is ever named": (judge, "return mistake.name, mistake.advice", 'return "", ""'),
    "refusals are not compared": (compare, "expected.kinds[0] in answer.kinds", "True"),
    "a refusal need not name its numbers": (compare, "named.issuperset(numbers)", "True"),
    "a refusal may name every number": (
        compare,
        "len(named.difference(numbers)) <= BESIDES",
        "True",
    ),
    "bytes may be of any width": (compare, "expected.dtype not in WIDTHS", "True"),
    "an answer will do for a refusal": (
        compare,
        'return Difference(f"returned {show(answer)}", wanted)',
        "return None",
    ),
    "parts of an answer are skipped": (
        compare,
        'if found:\n            return Difference(f"{found.got} as',
        'if False:\n            return Difference(f"{found.got} as',
    ),
    "hand-made cases earn points": (points, "if not case.by_hand", "if True"),
    "an answer that is nearly right earns nearly all": (points, "50 * points", "100 * points"),
    "refusals alone earn points": (points, "if not _differ(answers)", "if not answers"),
    "arguments may be written over": (answers, "if not _same(before, after)", "if False"),
    "subclasses are let in": (
        answers,
        "_is_one_of(kind, torch.Tensor, torch.nn.Parameter)",
        "isinstance(value, torch.Tensor)",
    ),
    "array subclasses are let in": (
        answers,
        "if type(value) is np.ndarray",
        "if isinstance(value, np.ndarray)",
    ),
    "tuples may say what is in them": (
        answers,
        "else tuple.__iter__",
        "else iter",
    ),
}


CHAIN = (answers, words, compare, points, judge)  # each imports from those before it


def with_mutant(module: types.ModuleType, old: str, new: str) -> dict[str, types.ModuleType]:
    """Return the modules of CHAIN made anew, with one text in one of them replaced.

    The text must be there exactly once.
    """
    assert inspect.getsource(module).count(old) == 1, f"{old!r} is not once in {module.__name__}"
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for original in CHAIN:
            source = inspect.getsource(original)
            fresh = types.ModuleType(original.__name__)
            fresh.__file__ = original.__file__
            patch.setitem(sys.modules, original.__name__, fresh)
            if original is module:
                source = source.replace(old, new)
            exec(compile(source, original.__file__, "exec"), fresh.__dict__)
            made[original.__name__.rpartition(".")[2]] = fresh
    return made


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_judge_is_found_out(name: str) -> None:
    made = with_mutant(*MUTANTS[name])
    with pytest.raises(AssertionError):
        check_all(EXERCISES, judge=made["judge"], answers=made["answers"])


def test_a_judge_made_anew_is_sound() -> None:
    made = with_mutant(judge, "PASSED =", "PASSED =")
    check_all(EXERCISES[:5], judge=made["judge"], answers=made["answers"])


def test_an_exercise_without_tolerance_for_rounding_is_found_out() -> None:
    with pytest.raises(AssertionError):
        check_all([replace(exercise, tolerance=0.5) for exercise in EXERCISES])


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_cases_are_drawn_anew_and_can_cross_to_another_process(exercise: Exercise) -> None:
    def allowed(value: object) -> bool:
        if isinstance(value, tuple):
            return all(map(allowed, value))
        return type(value) in (torch.Tensor, int, float, str, bool)

    first = drawn(exercise.id, 0)
    other = drawn(exercise.id, 1)
    again = tuple(exercise.cases(torch.Generator().manual_seed(0)))
    assert all(allowed(case.args) for case in first)
    assert repr(first) == repr(again) != repr(other)
    assert len(first) == len(other)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_each_exercise_has_two_mistakes_or_more_with_advice(exercise: Exercise) -> None:
    names = {mistake.name: mistake.advice for mistake in exercise.mistakes}
    assert len(names) >= 2
    assert all(advice.endswith((".", "?")) for advice in names.values())
    assert len({(mistake.name, mistake.advice) for mistake in exercise.mistakes}) == len(names)
