"""All answers of one submission: each exercise in a worker of its own, with only the cells that its cell needs.

The idea: in a notebook all cells share one namespace, so one cell could spoil another exercise, at once or later from
a thread. Here each exercise gets a fresh worker, which runs the cells that define the names it uses and then its own,
and is asked for the cases. A copy of a warm Python costs a few hundredths of a second, so nothing is gained by sharing
one. Each exercise also has time of its own, by the clock.

`host.py` is asked for workers; `grade_submission.py` gets the answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qcourse.checks.answers import Failure, UnreadableError, changed_argument
from qcourse.checks.exercise import Case, Exercise
from qcourse.grading.grades import Limits
from qcourse.grading.sandbox.dialogue import Worker, WorkerGoneError
from qcourse.grading.sandbox.mounts import SandboxError


@dataclass
class Attempt:
    """One submission's run.

    Args:
        start: gives a fresh worker.
        given: the sheet's own cells.
        cells: exercise id -> source.
        limits: on one case and on one exercise.
    """

    start: Callable[[], Worker]
    given: Sequence[str]
    cells: Mapping[str, str]
    limits: Limits

    def outputs(self, cases: Mapping[Exercise, Sequence[Case]]) -> dict[str, list[Any]]:
        """The answers of each exercise that has a cell: one for each case, a Failure where there is none."""
        return {
            exercise.id: self._exercise(exercise, its_cases)
            for exercise, its_cases in cases.items()
            if exercise.id in self.cells
        }

    def needed(self, exercise_id: str) -> list[str]:
        """The exercises whose cells define what this one's cell uses, this one last."""
        chosen = [exercise_id]
        wanted = self._names[exercise_id][0]
        earlier = [other for other in self.cells if other < exercise_id]
        while more := [
            one for one in earlier if one not in chosen and wanted & self._names[one][1]
        ]:
            chosen += more
            wanted = wanted.union(*(self._names[one][0] for one in more))
        return sorted(chosen)

    @cached_property
    def _names(self) -> dict[str, tuple[set[str], set[str]]]:
        """What each cell uses and defines; nothing where not even that can be found out."""
        found: dict[str, tuple[set[str], set[str]]] = {}
        worker: Worker | None = None
        try:
            for exercise_id, source in self.cells.items():
                worker = worker or self.start()
                try:
                    found[exercise_id] = worker.names(source, self.limits.case_s)
                except WorkerGoneError:
                    found[exercise_id] = set(), set()
                    worker = None
        finally:
            if worker is not None:
                worker.close()
        return found

    def _exercise(self, exercise: Exercise, cases: Sequence[Case]) -> list[Any]:
        """The outputs of one exercise."""
        before = self.needed(exercise.id)[:-1]
        worker = self.start()
        until = time.monotonic() + self.limits.exercise_s
        try:
            self._prepare(worker)
            for earlier in before:
                try:
                    worker.run_cell(self.cells[earlier], f"<{earlier}>", self._wall_s(until))
                except WorkerGoneError as gone:
                    return [_nothing(f"needs the cell of {earlier}, which {gone}")] * len(cases)
            try:
                ran = worker.run_cell(
                    self.cells[exercise.id], f"<{exercise.id}>", self._wall_s(until)
                )
            except WorkerGoneError as gone:
                return [_nothing(f"was never called, because its cell {gone}")] * len(cases)
            return self._calls(worker, exercise, cases, ran, until)
        finally:
            worker.close()

    def _prepare(self, worker: Worker) -> None:
        """Run the sheet's own cells.

        Raises:
            SandboxError: the worker is gone, which is no student's doing.
        """
        try:
            for number, source in enumerate(self.given):
                worker.run_cell(source, f"<given {number + 1}>", self.limits.exercise_s)
        except WorkerGoneError as gone:
            raise SandboxError(
                f"no sandbox: a worker that ran the sheet's own cells {gone}"
            ) from gone

    def _calls(
        self, worker: Worker, exercise: Exercise, cases: Sequence[Case], ran: Any, until: float
    ) -> list[Any]:
        """The outputs of the calls; from where the worker is gone, the reason.

        Args:
            ran: True where the cell ran through, else the Failure that it ended in.
            until: when the exercise's time is over, by the monotonic clock.
        """
        outputs: list[Any] = []
        for case in cases:
            try:
                output, changed = worker.call(exercise.function, case.args, self._wall_s(until))
            except WorkerGoneError as gone:
                too_long = f"took longer than {self.limits.exercise_s:g} s over all of its cases and was stopped"
                outputs.append(_nothing(too_long if time.monotonic() >= until else str(gone)))
                break
            if changed is not None and type(output) is not Failure:
                output = changed_argument(exercise.reference, changed)
            if ran is not True and _is_missing(output, exercise.function):
                output = ran
            outputs.append(output)
        left = len(cases) - len(outputs)
        return outputs + [_nothing("was not called again")] * left

    def _wall_s(self, until: float) -> float:
        return min(self.limits.case_s, max(until - time.monotonic(), 0.001))


def _nothing(why: str) -> Failure:
    return Failure((UnreadableError.__name__,), why)


def _is_missing(output: Any, function: str) -> bool:
    if type(output) is not Failure:
        return False
    return (output.kinds[0], output.message) == (
        NameError.__name__,
        f"name '{function}' is not defined",
    )
