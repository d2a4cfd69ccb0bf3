"""All answers of one submission: each exercise in its own worker, with the cells that it needs.

The idea: in a notebook all cells share one namespace, so one cell could spoil another exercise, at
once or later from a thread. Here each exercise gets a fresh worker, which runs the cells that
define the names it uses, then its own cell, and is then asked for the cases. A copy of a warm
Python takes a few hundredths of a second, so sharing one would save nothing. Each exercise has its
own time limit, too.

`host.py` gives the workers; `grade_submission.py` gets the answers.
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
    """One run of a submission."""

    start: Callable[[], Worker]  # gives a fresh worker
    given: Sequence[str]  # the sheet's own cells
    cells: Mapping[str, str]  # exercise id -> source
    limits: Limits

    def outputs(self, cases: Mapping[Exercise, Sequence[Case]]) -> dict[str, list[Any]]:
        """Return one answer per case, or a Failure, for each exercise that has a cell."""
        found: dict[str, list[Any]] = {}
        for exercise, its_cases in cases.items():
            if exercise.id in self.cells:
                found[exercise.id] = self._exercise(exercise, its_cases)
        return found

    def needed(self, exercise_id: str) -> list[str]:
        """Return the exercises whose cells define what this one's cell uses, this one last."""
        chosen = [exercise_id]
        wanted, _ = self._names[exercise_id]
        earlier = [other for other in self.cells if other < exercise_id]
        # A chosen cell may use names of further cells, so repeat until nothing is added.
        while True:
            more = self._that_define(wanted, earlier, chosen)
            if not more:
                return sorted(chosen)
            chosen += more
            for other in more:
                used, _ = self._names[other]
                wanted = wanted | used

    def _that_define(
        self, wanted: set[str], earlier: Sequence[str], chosen: Sequence[str]
    ) -> list[str]:
        found: list[str] = []
        for other in earlier:
            _, defined = self._names[other]
            if other not in chosen and wanted & defined:
                found.append(other)
        return found

    @cached_property
    def _names(self) -> dict[str, tuple[set[str], set[str]]]:
        """The names that each cell uses and defines; none if not even that can be found out."""
        found: dict[str, tuple[set[str], set[str]]] = {}
        worker: Worker | None = None
        try:
            for exercise_id, source in self.cells.items():
                worker = worker or self.start()
                try:
                    found[exercise_id] = worker.names(source, self.limits.case_s)
                # Some sources crash the compiler, and with it the worker.
                except WorkerGoneError:
                    found[exercise_id] = (set(), set())
                    worker = None
        finally:
            if worker is not None:
                worker.close()
        return found

    def _exercise(self, exercise: Exercise, cases: Sequence[Case]) -> list[Any]:
        """Return the outputs of one exercise, from a worker of its own."""
        # The cells that this one needs, in the order of the sheet.
        earlier = self.needed(exercise.id)[:-1]
        # The exercise's time begins when its worker is ready.
        worker = self.start()
        until = time.monotonic() + self.limits.exercise_s
        try:
            self._run_given_cells(worker)
            for other in earlier:
                try:
                    self._run_cell(worker, other, until)
                except WorkerGoneError as gone:
                    return [_nothing(f"needs the cell of {other}, which {gone}")] * len(cases)
            try:
                ran = self._run_cell(worker, exercise.id, until)
            except WorkerGoneError as gone:
                return [_nothing(f"was never called, because its cell {gone}")] * len(cases)
            return self._calls(worker, exercise, cases, ran, until)
        finally:
            worker.close()

    def _run_given_cells(self, worker: Worker) -> None:
        """Run the sheet's own cells.

        Raises:
            SandboxError: the worker is gone, which no student has caused.
        """
        try:
            for number, source in enumerate(self.given):
                worker.run_cell(source, f"<given {number + 1}>", self.limits.exercise_s)
        except WorkerGoneError as gone:
            raise SandboxError(
                f"no sandbox: a worker that ran the sheet's own cells {gone}"
            ) from gone

    def _run_cell(self, worker: Worker, exercise_id: str, until: float) -> Any:
        return worker.run_cell(self.cells[exercise_id], f"<{exercise_id}>", self._wall_s(until))

    def _calls(
        self, worker: Worker, exercise: Exercise, cases: Sequence[Case], ran: Any, until: float
    ) -> list[Any]:
        """Return the outputs of the calls; once the worker is gone, the reason.

        Args:
            ran: True if the cell ran through, else the Failure that it ended in.
            until: when the exercise's time is over, by the monotonic clock.
        """
        outputs: list[Any] = []
        for case in cases:
            try:
                output, changed = worker.call(exercise.function, case.args, self._wall_s(until))
            except WorkerGoneError as gone:
                outputs.append(_nothing(self._why_gone(gone, until)))
                break
            # A function that changes its argument has failed, whatever it returns.
            if changed is not None and type(output) is not Failure:
                output = changed_argument(exercise.reference, changed)
            # The function is missing because its cell failed, so that failure is the answer.
            if ran is not True and _is_missing(output, exercise.function):
                output = ran
            outputs.append(output)
        left = len(cases) - len(outputs)
        return outputs + [_nothing("was not called again")] * left

    def _wall_s(self, until: float) -> float:
        """Return the time of the next step: one case's, or what is left of the exercise's."""
        left_s = until - time.monotonic()
        return min(self.limits.case_s, max(left_s, 0.001))

    def _why_gone(self, gone: WorkerGoneError, until: float) -> str:
        if time.monotonic() < until:
            return str(gone)
        total_s = self.limits.exercise_s
        return f"took longer than {total_s:g} s over all of its cases and was stopped"


def _nothing(why: str) -> Failure:
    return Failure((UnreadableError.__name__,), why)


def _is_missing(output: Any, function: str) -> bool:
    """Return whether an output says that the function is not defined."""
    if type(output) is not Failure:
        return False
    kind = output.kinds[0]
    return kind == NameError.__name__ and output.message == f"name '{function}' is not defined"
