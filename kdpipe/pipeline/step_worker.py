"""The warm worker of a run: performs its steps one after the other, and examines its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kdpipe.pipeline.preflight import examination, require_fit, server_examination
from kdpipe.pipeline.progress import ProgressFile
from kdpipe.pipeline.project import Project
from kdpipe.pipeline.request import (
    Close,
    Examine,
    Examined,
    Perform,
    Performed,
    StepEvent,
    StepRequest,
    StepResult,
    assignment_of,
    open_worker,
)
from kdpipe.pipeline.requirements import require_space
from kdpipe.pipeline.runs import RunFolder
from kdpipe.pipeline.signals import Stop
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step
from kdpipe.workers.pulse import Progressed


class Display(Protocol):
    """What is shown of a run as it goes on."""

    def begin(self, run: RunFolder, todo: int, reused: int) -> None: ...
    def step_begins(self, step: Step) -> None: ...
    def step_event(self, step: Step, event: StepEvent) -> None: ...
    def step_ends(self, step: Step, result: Performed) -> None: ...
    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None: ...
    def note(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...


class StepWorker:
    """Performs steps of a project whose models are in `folders`, until `stop` is asked for."""

    def __init__(
        self, project: Project, folders: Mapping[str, Path], display: Display, stop: Stop, *, performer: str
    ) -> None:
        self._project = project
        self._folders = folders
        self._display = display
        self._stop = stop
        self._worker = open_worker(project, performer, log=project.run.path / "logs" / "worker.log")
        self._progress = ProgressFile(project.run.path)
        self._progress.clear()
        self._has_examined = False

    def perform(self, step: Step, *, anew: bool) -> None:
        """Performs a step, with `anew` from nothing; raises Interrupted where a signal stops it."""
        project, run = self._project, self._project.run
        self._stop.check(step.id)
        require_space(project, self._folders, step)
        run.event("step started", step=step.id)
        self._display.step_begins(step)
        try:
            result = self._call(step, Perform(assignment_of(project, self._folders, step), anew))
        finally:
            self._progress.clear()
        if result is None:
            run.event("step stopped", step=step.id)
            self._stop.check(step.id)
        assert isinstance(result, Performed)
        run.event("step done", step=step.id, reused=result.reused)
        self._display.step_ends(step, result)

    def examine(self, step: Step) -> None:
        """Examines student and teachers, quickly and once, before a round samples or scores.

        Nothing while one of them is not made yet, nor a student without teachers.
        """
        is_due = step.round > 0 and step.stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE)
        if self._has_examined or not is_due or not self._project.recipe.runtime.preflight:
            return
        self._has_examined = True
        request = examination(self._project, self._folders, step.round, depth="quick")
        if not request.missing and len(request.roles) > 1:
            self._require_fit(f"preflight of round {step.round}", step, request)

    def examine_servers(self, steps: Sequence[Step]) -> None:
        """Asks the servers that the steps of a command read, before the first of these."""
        request = server_examination(self._project, self._folders, steps)
        if request is not None and self._project.recipe.runtime.preflight:
            self._require_fit("preflight of the servers", steps[0], request)

    def _require_fit(self, which: str, step: Step, request: Examine) -> None:
        result = self._call(step, request)
        if result is None:
            self._stop.check(step.id)
        assert isinstance(result, Examined)
        require_fit(which, result.findings, self._display.warn)

    def kill(self) -> None:
        """Ends the process at once."""
        self._worker.kill()

    def close(self) -> None:
        """Lets the process end what it has started, and end."""
        self._worker.stop(Close())

    def _call(self, step: Step, request: StepRequest) -> StepResult | None:
        def note(event: StepEvent) -> None:
            if isinstance(event, Progressed):
                self._progress.note(step.id, event)
            self._display.step_event(step, event)

        return self._worker.call(request, on_event=note, stop=self._stop.asked)
