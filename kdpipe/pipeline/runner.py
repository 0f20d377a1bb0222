"""The run: each step of the schedule is reused if done, else performed; then mirror and retention.

Resume is not a mode: repeating a run looks at the store and goes on with the first step that is not done.
The parent process that runs this never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from kdpipe.errors import ArtifactError, Interrupted, RecipeError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.project import Project, open_project, round_metrics
from kdpipe.pipeline.request import PERFORMER
from kdpipe.pipeline.requirements import key_uses, left_out, require, require_headroom
from kdpipe.pipeline.retention import Retention
from kdpipe.pipeline.schedule import Schedule, must_restore
from kdpipe.pipeline.signals import signals
from kdpipe.pipeline.status import State, inspect
from kdpipe.pipeline.step_worker import Display, StepWorker
from kdpipe.pipeline.task_data import open_data
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.store.artifacts import tidy_if_free
from kdpipe.store.locks import run_lock
from kdpipe.store.step import Step
from kdpipe.store.trial import try_workspace


class Mirror(Protocol):
    """The tracker as the runner sees it: nudged when something has changed, never waited for."""

    def nudge(self) -> None: ...
    def finish(self, status: str, *, patience: Callable[[], float]) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What to run: the whole plan, its first `rounds`, or one step with what it lacks."""

    rounds: int | None = None
    only: Step | None = None
    force: tuple[str, ...] = ()


def steps_of(project: Project, request: Request) -> tuple[Step, ...]:
    """The steps that `request` means, in running order."""
    if request.only is not None:
        return project.plan.ancestors(request.only)
    if request.rounds is None:
        return project.plan.steps
    return tuple(step for step in project.plan.steps if step.round <= request.rounds)


def run(
    loaded: LoadedRecipe,
    workspace: Path,
    request: Callable[[Project], Request],
    *,
    display: Display,
    open_mirror: Callable[[Project], Mirror],
    performer: str = PERFORMER,
    report: Callable[[Project, Mapping[str, str | None]], None] | None = None,
) -> Project:
    """The project after all that is not done was performed. Raises KdpipeError with what to do next.

    `report` is given the payload digests of the steps, by id, once all that was asked for is done.
    """
    folders = Sources(loaded, workspace).fetch(
        display.note
    )  # pins hub names, so that every fingerprint is known
    project = open_project(loaded, workspace)
    for lack in try_workspace(workspace):
        display.warn(lack)
    asked = request(project)
    if not _is_linked(project, steps_of(project, asked)):
        data = open_data(loaded.recipe, loaded.folder, folders.get("data"))
        for found in (data.form, data.references):
            if found is not None:
                display.note(found)
        for lack in data.warnings():
            display.warn(lack)
    with run_lock(project.run.path), signals() as stop:
        project.run.write_recipe(loaded)
        worker = StepWorker(project, folders, display, stop, performer=performer)
        mirror = open_mirror(project)
        status = "FAILED"
        try:
            digests = _Run(project, asked, worker, display, mirror).go()
            if report is not None and asked.only is None:
                report(project, digests)
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            worker.kill()
            raise
        finally:
            try:
                worker.close()
            finally:
                if trouble := mirror.finish(status, patience=stop.patience):
                    display.warn(f"MLflow: not everything is mirrored yet: {trouble}")
    return project


def _is_linked(project: Project, steps: Sequence[Step]) -> bool:
    """Whether these steps have their links: nothing is left but to rebuild, whose worker reads the data."""
    linked = {(link.round, link.name) for link in project.run.links()}
    return all((step.round, step.link_name) in linked for step in steps)


class _Run:
    """One command's way through the steps; `digests` has the payload digest of each that it has passed."""

    def __init__(
        self, project: Project, request: Request, worker: StepWorker, display: Display, mirror: Mirror
    ) -> None:
        self.project, self.worker, self.display, self.mirror = project, worker, display, mirror
        self.steps = steps_of(project, request)
        states = {state.step.id: state for state in project.states()}
        self.again = _performed_again(project, request, self.steps, states)
        self.before = {name: state.digest if state.done else None for name, state in states.items()}
        pending = {name for name, state in states.items() if not state.done} | self.again
        self.schedule = Schedule(project.plan, self.steps, pending)
        self.retention = Retention(project.run, project.workspace, self.schedule.awaits)
        self.digests: dict[str, str | None] = {}
        self.todo = [step for step in self.steps if step.id in pending]

    def go(self) -> Mapping[str, str | None]:
        """Performs every step that is not done; returns the payload digests by step id."""
        project = self.project
        self.display.begin(project.run, len(self.todo), len(self.steps) - len(self.todo))
        if self.todo:
            require(project.recipe, self.display.warn)
            for told in (*key_uses(project.recipe), *left_out(project.recipe)):
                self.display.note(told)
            self.worker.examine_servers(self.todo)
            self.mirror.nudge()
        is_gated = False
        while (step := self.schedule.next()) is not None:
            if step.round > 0 and not is_gated:
                is_gated = True
                require_headroom(project, self.display.warn)
            project.run.link(step, project.store.entry(step))  # from now on gc leaves it
            state = self._state(step)
            if state.done and step.id not in self.again:
                self._reuse(step)
            else:
                self._perform(step, state)
            if not state.done and step.round > 0 and step is project.plan.in_round(step.round)[-1]:
                metrics = round_metrics(project, step.round)
                self.display.round_ends(step.round, project.recipe.rounds, metrics)
        return self.digests

    def _reuse(self, step: Step) -> None:
        """Links a step that is done, and tidies what a kill right after its end has left."""
        entry = self.project.store.entry(step)
        manifest = entry.manifest()
        assert manifest is not None
        tidy_if_free(entry, manifest)
        entry.describe(step)
        self.retention.note(step, entry)
        self._finish(step)

    def _perform(self, step: Step, state: State) -> None:
        """Performs a step, after the done ones whose dropped files it opens; then weights nobody needs may go."""
        if state.verdict == "damaged" and step.id not in self.again:
            hint = f"rebuild it and what depends on it: repeat the run with --force {step.id}"
            raise ArtifactError(state.why, hint=state.hint or hint)
        origins = must_restore(self.project.plan, {step.id}, lambda source: self._state(source).dropped)
        for origin in self.schedule.sorted(origins):
            self.worker.perform(origin, anew=True)
            self.digests[origin.id] = self._state(origin).digest
            self.retention.note(origin, self.project.store.entry(origin))
        self.worker.examine(step)
        self.worker.perform(step, anew=step.id in self.again or state.verdict == "stale")
        self.again.discard(step.id)
        self._finish(step)
        self.retention.apply(step, self.project.store.entry(step))
        self.mirror.nudge()

    def _finish(self, step: Step) -> None:
        digest = self.digests[step.id] = self._state(step).digest
        self.schedule.finish(step, changed=self.before[step.id] not in (None, digest))

    def _state(self, step: Step) -> State:
        return inspect(self.project.store, step, self.digests)


def _performed_again(
    project: Project, request: Request, steps: Sequence[Step], states: Mapping[str, State]
) -> set[str]:
    """Steps to perform although they are done: forced ones, and those whose dropped files are needed."""
    forced = {project.plan.step(name).id for name in request.force}
    asked = {step.id for step in steps}
    if missing := forced - asked:
        raise RecipeError(f"--force {sorted(missing)[0]}: this command does not run that step")
    # A step whose input has to be made first may turn out to be done; if not, `_perform` sees to it.
    certain = {name for name, s in states.items() if not s.done and not (s.verdict == "to do" and s.digest)}

    def dropped(step: Step) -> Collection[str]:
        state = states[step.id]
        return state.dropped if state.done else ()

    return forced | must_restore(project.plan, certain & asked | forced, dropped)
