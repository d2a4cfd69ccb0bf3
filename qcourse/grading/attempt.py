"""All answers of one submission: its cells run in one worker as in the notebook, and apart once one of them breaks it.

The idea: cells share a namespace, so they run one after the other in one worker, and each exercise's function is
called on its cases as soon as its cell has run. Where a worker ends, hangs or sends what is no answer, every exercise
that is left is run in a worker of its own, with only the cells that define the names it uses: so no cell can take
another exercise down, not even with a thread that strikes later.

`sandbox.py` is asked for workers; `judge.py` gets the answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcourse.checks.answers import Failure, UnreadableError
from qcourse.checks.exercise import Case, Exercise
from qcourse.grading.dialogue import Worker, WorkerGoneError
from qcourse.grading.grades import Limits


@dataclass
class Attempt:
    """One submission's run.

    Args:
        start: gives a fresh worker.
        given: the sheet's own cells.
        cells: exercise id -> source.
        limits: on one case and on all of it.
    """

    start: Callable[[], Worker]
    given: Sequence[str]
    cells: Mapping[str, str]
    limits: Limits
    until: float = field(init=False)
    _known: dict[str, tuple[set[str], set[str]]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.until = time.monotonic() + self.limits.submission_s

    def outputs(self, cases: Mapping[Exercise, Sequence[Case]]) -> dict[str, list[Any]]:
        """The answers of each exercise that has a cell: one for each case, a Failure where there is none."""
        outputs: dict[str, list[Any]] = {}
        written = [exercise for exercise in cases if exercise.id in self.cells]
        together: Worker | None = self._fresh()
        try:
            for exercise in written:
                if together is not None:
                    outputs[exercise.id], whole = self._exercise(together, exercise, cases[exercise])
                    if whole:
                        continue
                    together.close()
                    together = None
                    if not set(self.cells).difference(self.needed(exercise.id)) & set(outputs):
                        continue  # it has run with nothing but what it needs already
                outputs[exercise.id] = self._alone(exercise, cases[exercise])
        finally:
            if together is not None:
                together.close()
        return outputs

    def needed(self, exercise_id: str) -> list[str]:
        """The exercises whose cells define what this one's cell uses, this one last."""
        chosen, wanted = [exercise_id], self._names(exercise_id)[0]
        earlier = [other for other in self.cells if other < exercise_id]
        while more := [one for one in earlier if one not in chosen and wanted & self._names(one)[1]]:
            chosen += more
            wanted = wanted.union(*(self._names(one)[0] for one in more))
        return sorted(chosen)

    def _names(self, exercise_id: str) -> tuple[set[str], set[str]]:
        """What a cell uses and defines; nothing where not even that can be found out."""
        if exercise_id not in self._known:
            worker = self.start()
            try:
                used, defined = worker.names(self.cells[exercise_id], self.limits.case_s)
                self._known[exercise_id] = set(used), set(defined)
            except WorkerGoneError:
                self._known[exercise_id] = set(), set()
            finally:
                worker.close()
        return self._known[exercise_id]

    def _fresh(self) -> Worker:
        worker = self.start()
        for number, source in enumerate(self.given):
            worker.run_cell(source, f"<given {number + 1}>", self.limits.submission_s)
        return worker

    def _alone(self, exercise: Exercise, cases: Sequence[Case]) -> list[Any]:
        worker = self._fresh()
        try:
            for earlier in self.needed(exercise.id)[:-1]:
                worker.run_cell(self.cells[earlier], f"<{earlier}>", self._wall_s())
            return self._exercise(worker, exercise, cases)[0]
        except WorkerGoneError as gone:
            return [_nothing(f"needs the cell of {earlier}, which {gone}")] * len(cases)
        finally:
            worker.close()

    def _exercise(self, worker: Worker, exercise: Exercise, cases: Sequence[Case]) -> tuple[list[Any], bool]:
        """The outputs, and whether the worker is still whole."""
        outputs: list[Any] = []
        try:
            ran = worker.run_cell(self.cells[exercise.id], f"<{exercise.id}>", self._wall_s())
        except WorkerGoneError as gone:
            return [_nothing(f"was never called, for its cell {gone}")] * len(cases), False
        try:
            for case in cases:
                output = worker.call(exercise.function, case.args, self._wall_s())
                outputs.append(ran if ran is not True and _is_missing(output, exercise.function) else output)
        except WorkerGoneError as gone:
            outputs.append(_nothing(str(gone)))
            left = len(cases) - len(outputs)
            return outputs + [_nothing("was not called again")] * left, False
        return outputs, True

    def _wall_s(self) -> float:
        return min(self.limits.case_s, self.until - time.monotonic())


def _nothing(why: str) -> Failure:
    return Failure((UnreadableError.__name__,), why)


def _is_missing(output: Any, function: str) -> bool:
    return type(output) is Failure and (output.kinds[0], output.message) == (
        NameError.__name__,
        f"name '{function}' is not defined",
    )
