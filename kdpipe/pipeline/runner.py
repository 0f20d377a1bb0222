"""For each step of the plan: done? skip it. Else perform it in a warm worker, then link, mirror, retain.

Resume is not a mode: repeating a run surveys the store and goes on with the first step that is not done.
The parent process that runs this never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from kdpipe.errors import ArtifactError, Interrupted, RecipeError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.preflight import examine_round
from kdpipe.pipeline.progress import ProgressFile
from kdpipe.pipeline.project import Project, open_project, round_metrics
from kdpipe.pipeline.request import PERFORMER, open_worker, request_for
from kdpipe.pipeline.requirements import require, require_headroom, require_space
from kdpipe.pipeline.runs import RunFolder, droppable
from kdpipe.pipeline.signals import Stop, signals
from kdpipe.pipeline.status import inspect, must_restore
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.store.artifacts import Entry, linked_entry, tidy_if_free
from kdpipe.store.locks import run_lock
from kdpipe.store.step import Input, Stage, Step
from kdpipe.workers.worker import CLOSE, Message, Worker


class Display(Protocol):
    """What the runner tells whoever watches."""

    def begin(self, run: RunFolder, todo: int, reused: int) -> None: ...
    def step_begins(self, step: Step) -> None: ...
    def step_event(self, step: Step, event: Message) -> None: ...
    def step_ends(self, step: Step, result: Message) -> None: ...
    def round_ends(self, number: int, rounds: int, metrics: dict[str, float]) -> None: ...
    def tick(self) -> None: ...
    def warn(self, message: str) -> None: ...


class Mirror(Protocol):
    """The tracker as the runner sees it: told what changed, never waited for."""

    def nudge(self) -> None: ...
    def finish(self, status: str, *, hurry: Callable[[], bool]) -> str | None: ...


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
    """Performs what is not done; returns the project. Raises KdpipeError with what to do next.

    `report` is given the payload digests of the steps, by id, once all that was asked for is done.
    """
    folders = Sources(loaded, workspace).fetch()  # pins hub names, so that every fingerprint is known
    project = open_project(loaded, workspace)
    with run_lock(project.run.path), signals() as stop:
        project.run.write_recipe(loaded)
        job = _Run(project, request(project), folders, display, stop, performer)
        mirror = open_mirror(project)
        status = "FAILED"
        try:
            job.go(mirror)
            if report is not None and job.request.only is None:
                report(project, job.digests)
            status = "FINISHED"
        except Interrupted:
            status = "KILLED"
            job.worker.kill()
            raise
        finally:
            try:
                job.worker.stop(CLOSE)
            finally:
                if trouble := mirror.finish(status, hurry=stop.asked):
                    display.warn(
                        f"MLflow: not everything is mirrored yet: {trouble}; the next command goes on with it"
                    )
    return project


@dataclass(slots=True)
class _Run:
    """One command's work on a project; holds the warm worker."""

    project: Project
    request: Request
    folders: dict[str, Path]
    display: Display
    stop: Stop
    performer: str
    worker: Worker = field(init=False)
    progress: ProgressFile = field(init=False)
    digests: dict[str, str | None] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    examined: bool = False

    def __post_init__(self) -> None:
        log = self.project.run.path / "logs" / "worker.log"
        self.worker = open_worker(self.project, self.performer, log=log)
        self.progress = ProgressFile(self.project.run.path)
        self.progress.clear()

    def go(self, mirror: Mirror) -> None:
        """Performs every step that is not done, in order."""
        project, steps = self.project, steps_of(self.project, self.request)
        again = self.again = self._again(steps)
        states = {state.step.id: state for state in project.survey()}
        todo = sum(not states[step.id].done or step.id in again for step in steps)
        self.display.begin(project.run, todo, len(steps) - todo)
        if todo:
            require(project.recipe, self.display.warn)
            mirror.nudge()
        gated = False
        for step in steps:
            if step.round > 0 and not gated:
                gated = True
                require_headroom(project)
            state = inspect(project.store, step, self.digests)
            entry = project.store.entry(step)
            if state.verdict == "damaged" and step.id not in again:
                hint = f"rebuild it and what depends on it: repeat the run with --force {step.id}"
                raise ArtifactError(state.why, hint=state.hint or hint)
            if state.done and step.id not in again:
                manifest = entry.manifest()
                assert manifest is not None
                tidy_if_free(entry, manifest)
                entry.describe(step)
                project.run.link(step, entry)
            else:
                self._restore(step)
                self._preflight(step)
                self._perform(step, entry, anew=step.id in again or state.verdict == "stale")
                again.discard(step.id)
                if step.stage in (Stage.TRAIN, Stage.EVALUATE):  # only these change what is kept
                    self._retain()
                mirror.nudge()
            self.digests[step.id] = inspect(project.store, step, self.digests).digest
            self._tell_round(step, performed=not state.done)

    def _again(self, steps: Sequence[Step]) -> set[str]:
        """Steps to perform although they are done: forced ones, and those whose dropped files are needed."""
        forced = {self.project.plan.step(name).id for name in self.request.force}
        missing = forced - {step.id for step in steps}
        if missing:
            raise RecipeError(f"--force {sorted(missing)[0]}: this command does not run that step")
        states = self.project.survey()
        wanted = {step.id for step in steps}
        # A step whose input has to be made first may turn out to be done; if not, `_restore` sees to it.
        certain = {s.step.id for s in states if not s.done and not (s.verdict == "to do" and s.digest)}
        return forced | must_restore(states, certain & wanted | forced)

    def _restore(self, step: Step) -> None:
        """Performs again the steps whose dropped files `step` opens, where that was not foreseen."""
        project = self.project
        if not any(self._was_dropped(source) for source in step.inputs.values()):
            return
        states = project.survey()
        lost = must_restore(states, {step.id})
        for origin in [state.step for state in states if state.step.id in lost]:
            self._perform(origin, project.store.entry(origin), anew=True)
            self.digests[origin.id] = inspect(project.store, origin, self.digests).digest

    def _preflight(self, step: Step) -> None:
        """Examines student and teachers, quickly and once per command, before a round samples or scores."""
        is_due = step.round > 0 and step.stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE)
        if self.examined or not is_due or not self.project.recipe.runtime.preflight:
            return
        self.examined = True
        examine_round(
            self.project,
            self.folders,
            step.round,
            call=lambda request: self._examine(step, request),
            warn=self.display.warn,
        )

    def _was_dropped(self, source: Input) -> bool:
        manifest = self.project.store.entry(self.project.plan.step(source.step_id)).manifest()
        return manifest is not None and any(
            path.partition("/")[0] in source.opens for path in manifest.dropped
        )

    def _perform(self, step: Step, entry: Entry, *, anew: bool) -> None:
        project = self.project
        self.stop.check(step.id)
        require_space(project, self.folders, step)
        project.run.link(step, entry)
        project.run.event("step started", step=step.id)
        self.display.step_begins(step)
        request = {**request_for(project, self.folders, step), "anew": anew}
        try:
            result = self._call(step, request, self._tell)
        finally:
            self.progress.clear()
        if result is None:
            project.run.event("step stopped", step=step.id)
            self.stop.check(step.id)
        assert result is not None
        project.run.event("step done", step=step.id, reused=result.get("reused", False))
        self.display.step_ends(step, result)

    def _examine(self, step: Step, request: Message) -> Message:
        result = self._call(step, request, self.display.step_event)
        if result is None:
            self.stop.check(step.id)
        assert result is not None
        return result

    def _call(
        self, step: Step, request: Message, on_event: Callable[[Step, Message], None]
    ) -> Message | None:
        return self.worker.call(
            request,
            on_event=lambda event: on_event(step, event),
            stop=self.stop.asked,
            tick=self.display.tick,
        )

    def _tell(self, step: Step, event: Message) -> None:
        self.progress.note(step.id, event)
        self.display.step_event(step, event)

    def _retain(self) -> None:
        """Drops weights that no run keeps and no step ahead opens; only after what replaces them is durable."""
        found = droppable(self.project.run, self.project.workspace)
        candidates = [(folder, kind) for folder, kind in found if (folder / kind).exists()]
        awaited = self._awaited() if candidates else set()
        for folder, kind in candidates:
            if (folder, kind) in awaited:
                continue
            try:
                entry, _ = linked_entry(folder)
                with entry.locked(lambda: None):
                    freed = entry.drop(kind)
            except ArtifactError:  # what is damaged stays as it is, for the run that comes upon it to name
                continue
            if freed:
                self.project.run.event("dropped", entry=folder.name, payload=kind, bytes=freed)

    def _awaited(self) -> set[tuple[Path, str]]:
        """(entry, folder of its payload) that steps of the plan which are not done will open."""
        project = self.project
        steps = {step.id: step for step in project.plan.steps}
        pending = {state.step.id for state in project.survey() if not state.done} | self.again
        return {
            (project.store.entry(steps[source.step_id]).folder.resolve(), name)
            for step_id in pending
            for source in steps[step_id].inputs.values()
            for name in source.opens
        }

    def _tell_round(self, step: Step, *, performed: bool) -> None:
        """After the last step of a round: its line, unless nothing of it was done by this command."""
        rounds = self.project.recipe.rounds
        last = [other for other in self.project.plan.steps if other.round == step.round][-1]
        if step.id == last.id and step.round > 0 and performed:
            self.display.round_ends(step.round, rounds, round_metrics(self.project, step.round))
