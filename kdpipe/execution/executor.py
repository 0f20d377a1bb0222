"""Performs one step inside a worker: opens its inputs, calls its stage, commits its draft."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from kdpipe.data.graders.judge import Code, Judge
from kdpipe.data.tasks import read_problems
from kdpipe.doctor.loss.check import unsound
from kdpipe.errors import PreflightError, StepError
from kdpipe.execution.context import StepContext
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.overlong import fitting
from kdpipe.execution.placement import Engines
from kdpipe.execution.probe import Probe, Problems
from kdpipe.execution.roles import Roles
from kdpipe.execution.trainers import Trainers
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import dtype_name, resolve_device, resolve_dtype
from kdpipe.pipeline.request import (
    STEPS,
    Assignment,
    Close,
    Examine,
    Noted,
    Perform,
    Performed,
    StepEvent,
    StepRequest,
    StepResult,
    Waiting,
    Warned,
)
from kdpipe.pipeline.runs import RunFolder
from kdpipe.recipe.place import place_of
from kdpipe.recipe.roles import STUDENT_ROLE
from kdpipe.recipe.schema import Recipe
from kdpipe.recipe.task import AnyGrader, PythonGrader
from kdpipe.stages.job import Job
from kdpipe.store.artifacts import Draft
from kdpipe.store.durable import append_line, file_digest
from kdpipe.store.environment import environment
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step
from kdpipe.workers.message import Nothing
from kdpipe.workers.pulse import Pulse
from kdpipe.workers.worker import Report


class Performer:
    """Called once for each step of a run, in a worker process."""

    talk = STEPS

    def __init__(self) -> None:
        self._executor: Executor | None = None

    def __call__(self, request: StepRequest, report: Report[StepEvent]) -> StepResult:
        """Performs a step that is not done, or examines its models, or ends what this process started."""
        match request:
            case Close():
                self.close()
                return Nothing()
            case Perform(assignment=found, anew=anew):
                executor = self._executor_of(found, report, is_trained=True)
                executor.keep_fitting(Inputs.of(found, report))
                return executor.perform(Inputs.of(found, report), anew=anew)
            case Examine(assignment=found, depth=depth):
                executor = self._executor_of(found, report, is_trained=depth != "full")
                teachers = [role for role in request.roles if role != STUDENT_ROLE]
                inputs = Inputs.of(found, report)
                if depth != "full" and getattr(found.recipe.task, "drop_overlong", False):
                    executor.keep_fitting(inputs)
                return executor.probe(inputs, teachers, missing=request.missing, depth=depth)

    def close(self) -> None:
        """Ends the processes of the roles, and lets go of everything."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.close()

    def _executor_of(self, found: Assignment, report: Report[StepEvent], *, is_trained: bool) -> Executor:
        """The one that is kept from the call before, unless the recipe is another one."""
        recipe = found.recipe
        if self._executor is None or self._executor.recipe != recipe:
            self.close()
            if recipe.runtime.threads is not None:
                torch.set_num_threads(recipe.runtime.threads)
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
            device = resolve_device(recipe.runtime.device)
            report.event(Noted(_hardware(recipe, device)))
            if is_trained:
                _refuse_unsound(recipe, report)
            problems = read_problems(recipe.task, found.folder, hub_folder=found.folders.get("data"))
            self._executor = Executor(recipe, device, *problems, logs=found.run / "logs")
        return self._executor


class Executor:
    """Performs the steps of a recipe; models, engines and the trainer stay in memory between steps."""

    def __init__(
        self, recipe: Recipe, device: torch.device, train: Problems, test: Problems, *, logs: Path
    ) -> None:
        cache = ModelCache(device)
        self.recipe = recipe
        self._device = device
        self._problems: tuple[Problems, Problems] = (train, test)
        self._engines = Engines(recipe, cache, logs=logs)
        self._roles = Roles(recipe, train, engines=self._engines, cache=cache)
        self._trainers = Trainers(recipe, cache)
        self.probe = Probe(self._roles, self._trainers, device, train, test)
        self._dtype_reported = False
        self._logs = logs
        self._judge: Judge | None = None
        self._is_fitted = False

    def keep_fitting(self, inputs: Inputs) -> None:
        """Leaves out problems that do not fit a model; raises PreflightError where they may not be left out."""
        if self._is_fitted:
            return
        self._is_fitted = True
        self._problems = fitting(inputs, self._roles, *self._problems)
        self.probe = replace(self.probe, train=self._problems[0], test=self._problems[1])

    def perform(self, inputs: Inputs, *, anew: bool) -> Performed:
        """Performs a step and publishes it; one that is published already is kept unless `anew`."""
        step, report = inputs.step, inputs.report
        entry = inputs.store.entry(step)
        with entry.locked(lambda: report.event(Waiting())):
            digests = inputs.digests()
            manifest = None if anew else entry.manifest()
            if manifest is not None and dict(manifest.inputs) == digests and entry.problem(manifest) is None:
                return Performed(reused=True, digest=manifest.payload_digest)
            if manifest is not None or anew:
                entry.discard()
            draft = Draft(entry, step, note=partial(_note, inputs))
            pulse = Pulse(report.event, report.stopping.is_set)
            self._report_other_dtype(inputs)
            started = time.time()
            job = Job(self.recipe.runtime, step.round, step.seed, *self._problems, draft, pulse)
            context = StepContext(inputs, job, self._engines, self._roles, self._trainers, self._judge_of)
            context.perform()
            self._report_unfinished(report)
            seconds = time.time() - started
            _write_speed(draft, step, pulse, seconds)
            manifest = draft.commit(inputs=digests, provenance=self._provenance(started))
            if context.trained is not None:
                self._trainers.publish(inputs, context.trained, manifest.payload_digest)
            return Performed(False, manifest.payload_digest, seconds, pulse.all_tokens)

    def close(self) -> None:
        """Ends the engines and their processes, and the connections to servers."""
        self._engines.close()
        if self._judge is not None:
            self._judge.close()
        self._roles.close()

    def _judge_of(self, inputs: Inputs, grader: AnyGrader) -> Judge:
        """What grades in a process of its own; it is kept, as long as its code is the same."""
        code = Code()
        if isinstance(grader, PythonGrader):
            path = place_of(grader.file, inputs.folder)
            fields: Any = inputs.step.document["fields"]
            if not path.is_file() or file_digest(path) != fields["task.grader"]["digest"]:
                raise StepError(
                    f"task.grader: {path} is not the file that it was when the run started",
                    hint="repeat the command: what it graded is graded again",
                )
            code = Code(str(path), grader.function)
        if self._judge is None:
            self._judge = Judge(code, log=self._logs / "grader.log")
        return self._judge

    def _report_unfinished(self, report: Report[StepEvent]) -> None:
        """Warns of texts that math-verify did not finish in the step."""
        if self._judge is not None and self._judge.unfinished:
            count, self._judge.unfinished = self._judge.unfinished, 0
            answers = f"{count} answer{'s'[: count != 1]}"
            report.event(Warned(f"task.grader: math-verify did not finish {answers}, which count as wrong"))

    def _report_other_dtype(self, inputs: Inputs) -> None:
        """Warns, once, where the student went so far in another dtype: `auto` is what a machine makes of it."""
        if self.recipe.student.dtype != "auto" or self._dtype_reported:
            return
        here = dtype_name(resolve_dtype("auto", self._device)[0])
        for step in inputs.steps.values():
            manifest = inputs.store.entry(step).manifest()
            fields: Any = step.document["fields"]
            # A teacher's may be from another student's run.
            if manifest is None or "dtype" not in (fields.get("student") or {}):
                continue
            if (there := manifest.provenance.get("dtype", here)) != here:
                text = (
                    f"{step.id} was computed in {there}, which dtype: auto was where it was made, and auto "
                    f"is {here} on this one: the run goes on, but its rounds do not compare; for a run in one dtype, "
                    f"start a new one with --set student.dtype={there}"
                )
                inputs.report.event(Warned(text))
                self._dtype_reported = True
                return

    def _provenance(self, started: float) -> dict[str, JsonValue]:
        dtype, why = resolve_dtype(self.recipe.student.dtype, self._device)
        return {
            **environment(),
            "device": str(self._device),
            "dtype": dtype_name(dtype),
            "dtype_reason": why,
            "threads": torch.get_num_threads(),
            "started": started,
            "finished": time.time(),
        }


def _note(inputs: Inputs, kind: str, fields: Mapping[str, JsonValue]) -> None:
    """Writes down what became of a draft, and warns of one that was damaged."""
    row: dict[str, JsonValue] = {"time": time.time(), "event": kind, "step": inputs.step.id, **fields}
    append_line(RunFolder(inputs.run).events_path, row)
    if kind == "damaged":
        inputs.report.event(Warned(f"{fields['problem']}; it is computed again"))


def _write_speed(draft: Draft, step: Step, pulse: Pulse, seconds: float) -> None:
    name = step.stage.replace("-", "_")
    if step.stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE) and step.subject:  # one of several in the round
        name += f"/{step.subject}"
    draft.metric(f"time/{name}_seconds", seconds)
    if pulse.all_tokens and seconds > 0:
        draft.metric(f"speed/{name}_tokens_per_second", pulse.all_tokens / seconds)


def _hardware(recipe: Recipe, device: torch.device) -> str:
    """Which device and dtype it is, and of a dtype that was picked, why."""
    dtype, why = resolve_dtype(recipe.student.dtype, device)
    threads = torch.get_num_threads()
    reason = f"\n  {why}" if recipe.student.dtype == "auto" else ""
    return f"student: {dtype_name(dtype)} on {device}, {threads} thread{'s'[: threads != 1]}{reason}"


def _refuse_unsound(recipe: Recipe, report: Report[StepEvent]) -> None:
    """Raises PreflightError where check-loss fails the KD part; warns only, with `reproduce`."""
    found = unsound(recipe)
    if not found:
        return
    text = "".join(f"\n  {line}" for line in found)
    if not recipe.reproduce:
        raise PreflightError(
            f"train.objective fails check-loss:{text}",
            hint="kdpipe check-loss shows the numbers; to run it all the same, say --set reproduce=true",
        )
    report.event(Warned(f"reproduce: true runs an objective that fails check-loss:{text}"))
