"""The checks can fail, and fail for the right reason: mistakes are named, forgeries refused, broken judges found out.

One battery goes over every exercise of every sheet. It must hold for the judge as it is, and it must NOT hold for any
of the mutants below it, each of which is the judge with one line spoilt: so the battery itself is known to bite.
"""

import inspect
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

from qcourse.checks import answers, judge
from qcourse.checks.answers import Failure
from qcourse.checks.exercise import Case, Exercise
from qcourse.checks.registry import load_sheet, sheet_ids

EXERCISES = [exercise for sheet_id in sheet_ids() for exercise in load_sheet(sheet_id).exercises]


def cases_of(exercise: Exercise, seed: int) -> list[Case]:
    return exercise.cases(torch.Generator().manual_seed(seed))


def is_whole(right: object) -> bool:
    return np.asarray(right).dtype.kind in "iu"


def is_bytes(right: object) -> bool:
    return np.asarray(right).dtype == np.uint8


class AlwaysEqual:
    """Equal to everything, and of every shape and dtype."""

    shape, dtype, ndim = (), torch.float32, 0

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


class Sly(torch.Tensor):
    """A tensor that calls itself equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None


FORGERIES = {
    "equal to everything": lambda right: AlwaysEqual(),
    "a tensor subclass": lambda right: torch.tensor(right).as_subclass(Sly),
    "an array subclass": lambda right: np.ma.masked_array(right, mask=True),
    "None": lambda right: None,
    "a failure made by hand": lambda right: Failure(("ValueError",)),
    "one axis more": lambda right: np.asarray(right)[None],
    "text": lambda right: str(right),
    "truth values": lambda right: np.asarray(right).astype(bool),
    "NaN": lambda right: np.full(np.shape(right), np.nan),
    "NaN somewhere": lambda right: np.where(np.arange(np.size(right)).reshape(np.shape(right)) == 0, np.nan, right),
    "infinite": lambda right: np.full(np.shape(right), np.inf),
    "off by a little": lambda right: np.asarray(right) + (1 if is_whole(right) else 1e-2 * np.abs(right).max()),
    "floats for integers": lambda right: np.asarray(right, dtype=np.float64) if is_whole(right) else None,
    "64 bits for bytes": lambda right: torch.tensor(right).long() if is_bytes(right) else None,
}
REFUSALS = {
    "an error of another kind": {"kinds": ("TypeError", "Exception")},
    "an error that says nothing": {"message": "shape is invalid"},
}


def forged(forge: object, right: object) -> object:
    """The right answer with one part of it forged."""
    if isinstance(right, Failure):
        return forge(0)
    return (*right[:-1], forge(right[-1])) if isinstance(right, tuple) else forge(right)


def written_over(right: object, *args: object) -> object:
    """The right answer, by a function that writes into its arguments."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            arg.fill_(77)
    return right


def check_battery(
    exercise: Exercise, seed: int, judge: types.ModuleType = judge, answers: types.ModuleType = answers
) -> None:
    """Everything that must hold for one exercise; raises AssertionError where it does not."""
    cases = cases_of(exercise, seed)
    right = [answers.capture(exercise.reference, case.args) for case in cases]
    verdict = judge.judge(exercise, cases, right)
    assert (verdict.status, verdict.points) == ("passed", exercise.points)
    for mistake in exercise.mistakes:
        verdict = judge.judge(exercise, cases, [answers.capture(mistake.function, case.args) for case in cases])
        assert (verdict.status, verdict.points, verdict.mistake) == ("not yet", 0, mistake.name), repr(verdict)
    for name, forge in FORGERIES.items():
        outputs = [answers.capture(forged, (forge, value)) for value in right]
        assert judge.judge(exercise, cases, outputs).status == "not yet", name
    if any(isinstance(arg, torch.Tensor) for arg in cases[0].args):
        pairs = zip(right, cases, strict=True)
        outputs = [answers.capture(written_over, (value, *case.args)) for value, case in pairs]
        assert judge.judge(exercise, cases, outputs).cases_right == 0, "arguments written over"
    if any(type(value) is answers.Failure for value in right):
        for name, spoilt in REFUSALS.items():
            outputs = [replace(value, **spoilt) if type(value) is answers.Failure else value for value in right]
            assert judge.judge(exercise, cases, outputs).status == "not yet", name
    last_wrong = [*right[:-1], answers.capture(lambda: 1e9, ())]
    verdict = judge.judge(exercise, cases, last_wrong)
    assert (verdict.status, verdict.cases_right, verdict.mistake) == ("not yet", len(cases) - 1, "")


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
        "difference(*pair, exercise.tolerance)",
        "difference(pair[0], pair[0], 0.0)",
    ),
    "shapes are not compared": (judge, "answer.shape != expected.shape", "False"),
    "kinds are not compared": (judge, "kinds and answer.dtype.kind not in accepted", "False"),
    "any value will do": (judge, "wrong = _wrong(answer, expected, tolerance)", "wrong = np.array(False)"),
    "one right value is enough": (judge, "not wrong.any()", "not wrong.all()"),
    "NaN equals anything": (judge, "(np.isnan(answer) & np.isnan(expected))", "np.isnan(answer)"),
    "infinity is near": (judge, "(near & finite)", "(near | np.isinf(answer))"),
    "a tolerance of everything": (judge, "allowed = tolerance *", "allowed = 1e9 *"),
    "one right case is enough": (judge, "if right == count", "if right"),
    "only the last case counts": (judge, "if right == count", "if found[-1] is None"),
    "only the first case counts": (judge, "if right == count", "if found[0] is None"),
    "a mistake need match one case only": (judge, "if all(difference(output, wrong", "if any(difference(output, wrong"),
    "no mistake is ever named": (judge, "return mistake.name, mistake.advice", 'return "", ""'),
    "refusals are not compared": (judge, "expected.kinds[0] in answer.kinds", "True"),
    "a refusal need not name its numbers": (judge, "set(numbers) <= set(_numbers(answer))", "True"),
    "bytes may be of any width": (judge, "expected.dtype != np.uint8", "True"),
    "an answer will do for a refusal": (judge, 'return Difference(f"returned {show(answer)}", wanted)', "return None"),
    "parts of an answer are skipped": (
        judge,
        'if found:\n            return Difference(f"{found.got} as',
        'if False:\n            return Difference(f"{found.got} as',
    ),
    "arguments may be written over": (answers, "if not _same(before, after):", "if False:"),
    "subclasses are let in": (answers, "kind is torch.Tensor", "isinstance(value, torch.Tensor)"),
    "array subclasses are let in": (answers, "type(value) is np.ndarray", "isinstance(value, np.ndarray)"),
}


def mutant(module: types.ModuleType, old: str, new: str) -> types.ModuleType:
    """The module with one place of its source replaced, which must be there once."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {module.__name__}"
    spoilt = types.ModuleType(module.__name__)
    spoilt.__file__ = module.__file__
    exec(compile(source.replace(old, new), module.__file__, "exec"), spoilt.__dict__)
    return spoilt


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_judge_is_found_out(name: str) -> None:
    module, old, new = MUTANTS[name]
    spoilt = mutant(module, old, new)
    if module is answers:  # the judge reads every output once more, so it needs the spoilt reader too
        judging = mutant(judge, 'PASSED = "passed"', 'PASSED = "passed"')
        judging.capture, judging.Failure = spoilt.capture, spoilt.Failure
        broken = {"judge": judging, "answers": spoilt}
    else:
        broken = {"judge": spoilt}
    with pytest.raises(AssertionError):
        check_all(EXERCISES, **broken)


def test_an_exercise_without_tolerance_for_rounding_is_found_out() -> None:
    with pytest.raises(AssertionError):
        check_all([replace(exercise, tolerance=0.5) for exercise in EXERCISES])


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_cases_are_drawn_anew_and_can_cross_to_another_process(exercise: Exercise) -> None:
    def allowed(value: object) -> bool:
        if isinstance(value, tuple):
            return all(map(allowed, value))
        return type(value) in (torch.Tensor, int, float, str, bool)

    first, again, other = (cases_of(exercise, seed) for seed in (0, 0, 1))
    assert all(allowed(case.args) for case in first)
    assert repr(first) == repr(again) != repr(other)
    assert len(first) == len(other)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_each_exercise_has_two_to_five_mistakes_with_advice(exercise: Exercise) -> None:
    names = {mistake.name: mistake.advice for mistake in exercise.mistakes}
    assert 2 <= len(names) <= 5
    assert all(advice.endswith((".", "?")) for advice in names.values())
    assert len({(mistake.name, mistake.advice) for mistake in exercise.mistakes}) == len(names)
