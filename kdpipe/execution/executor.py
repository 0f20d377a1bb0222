"""Performs one step inside a warm worker: opens its inputs, calls its stage, commits its draft."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from kdpipe.data.hidden import HiddenFile
from kdpipe.data.payload import GRADES_FILE, HIDDEN_FILE, REVERSE_KL_FILE, ROLLOUTS_FILE, SCORES_FILE
from kdpipe.data.rows import Problem, Rollout
from kdpipe.data.tables import read_rollouts, read_scores
from kdpipe.data.tasks import read_problems
from kdpipe.doctor.loss.check import unsound
from kdpipe.errors import PreflightError
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.patients import examine_patients
from kdpipe.execution.placement import Roles
from kdpipe.execution.trainers import Training
from kdpipe.execution.warm import Warm
from kdpipe.method.mixture import HiddenTeacher, RoundScores, TeacherScores, join_scores
from kdpipe.models.adapters import target_names
from kdpipe.models.cache import ModelCache
from kdpipe.models.devices import dtype_name, resolve_device, resolve_dtype
from kdpipe.models.folder import head_digest
from kdpipe.recipe.roles import (
    BASELINE_ROLE,
    ROLLOUT_ROLE,
    STUDENT,
    STUDENT_ROLE,
    Role,
    RoleKind,
    teacher_role,
)
from kdpipe.recipe.schema import ModelTeacher, Recipe, SelfTeacher, ServedTeacher, Sft, Student
from kdpipe.stages.evaluate import evaluate, graded_problems
from kdpipe.stages.job import Job
from kdpipe.stages.rollout import rollout
from kdpipe.stages.routing import check_records, teaches
from kdpipe.stages.scoring import TeacherHandle, output_head, swapped_head
from kdpipe.stages.sft import sft
from kdpipe.stages.teacher_score import teacher_score
from kdpipe.stages.teacher_text import write_texts
from kdpipe.stages.train import train
from kdpipe.store.artifacts import Draft
from kdpipe.store.durable import append_line
from kdpipe.store.environment import environment
from kdpipe.store.step import Stage
from kdpipe.training.local import LocalTrainer
from kdpipe.workers.pulse import Pulse
from kdpipe.workers.worker import CLOSE, Message, Report


class Performer:
    """Called once for each step of a run, in a worker process."""

    def __init__(self) -> None:
        self._warm: Warm | None = None

    def __call__(self, request: Message, report: Report) -> Message:
        """Performs a step unless another run has done it meanwhile; or examines its models; or ends what it started."""
        if request == CLOSE:
            self.close()
            return {}
        inputs = Inputs(request, report, self._warmed(request, report))
        return examine_patients(inputs) if "examine" in request else _Task(inputs).run()

    def close(self) -> None:
        """Ends the processes of the roles, and lets go of everything."""
        warm, self._warm = self._warm, None
        if warm is not None:
            warm.roles.close()
            for server in warm.servers.values():
                server.close()

    def _warmed(self, request: Mapping[str, Any], report: Report) -> Warm:
        recipe = Recipe.model_validate_json(json.dumps(request["recipe"]), strict=True)
        if self._warm is None or self._warm.recipe != recipe:
            self.close()
            if recipe.runtime.threads is not None:
                torch.set_num_threads(recipe.runtime.threads)
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
            device = resolve_device(recipe.runtime.device)
            report.event(kind="note", text=_hardware(recipe, device))
            if request.get("examine") != "full":  # nothing is trained on by the doctor
                _refuse_unsound(recipe, report)
            hub = request["folders"].get("data")
            problems = read_problems(
                recipe.task, Path(request["folder"]), hub_folder=Path(hub) if hub else None
            )
            check_records(recipe, *problems)
            cache = ModelCache(device)
            roles = Roles(recipe, cache, logs=Path(request["run"]) / "logs")
            self._warm = Warm(recipe, device, cache, *problems, roles)
        return self._warm


def _hardware(recipe: Recipe, device: torch.device) -> str:
    """Which device and dtype it is, and of a dtype that was picked, why."""
    dtype, why = resolve_dtype(recipe.student.dtype, device)
    threads = torch.get_num_threads()
    reason = f"\n  {why}" if recipe.student.dtype == "auto" else ""
    return f"student: {dtype_name(dtype)} on {device}, {threads} thread{'s'[: threads != 1]}{reason}"


def _refuse_unsound(recipe: Recipe, report: Report) -> None:
    """Raises PreflightError where check-loss fails the KD part; only warns where the recipe reproduces others."""
    found = unsound(recipe)
    if not found:
        return
    text = "".join(f"\n  {line}" for line in found)
    if not recipe.reproduce:
        raise PreflightError(
            f"train.objective fails check-loss:{text}",
            hint="kdpipe check-loss shows the numbers; to run it all the same, say --set reproduce=true",
        )
    report.event(kind="warning", text=f"reproduce: true runs an objective that fails check-loss:{text}")


class _Task:
    """One step: what it opens, what it trains, and the stage that it calls."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.training = Training(inputs)
        self.request = inputs.request
        self.report = inputs.report
        self.warm = inputs.warm
        self.recipe = inputs.recipe
        self.step = inputs.step
        self.entry = inputs.store.entry(inputs.step)

    def run(self) -> Message:
        with self.entry.locked(lambda: self.report.event(kind="waiting")):
            digests = self.inputs.digests()
            manifest = None if self.request["anew"] else self.entry.manifest()
            if (
                manifest is not None
                and dict(manifest.inputs) == digests
                and self.entry.problem(manifest) is None
            ):
                return {"reused": True, "digest": manifest.payload_digest, "seconds": 0.0, "tokens": 0}
            if manifest is not None or self.request["anew"]:
                self.entry.discard()
            draft = Draft(self.entry, self.step, note=self._note)
            pulse = Pulse(
                lambda fields: self.report.event(kind="progress", **fields), self.report.stopping.is_set
            )
            self._tell_of_another_dtype()
            started = time.time()
            trainer = self._perform(self.inputs.job(draft, pulse))
            seconds = time.time() - started
            self._write_speed(draft, pulse, seconds)
            manifest = draft.commit(inputs=digests, provenance=self._provenance(started))
            if trainer is not None:
                self.training.keep_warm(trainer, manifest.payload_digest)
            tokens = pulse.all_tokens
            return {"reused": False, "digest": manifest.payload_digest, "seconds": seconds, "tokens": tokens}

    def _perform(self, job: Job) -> LocalTrainer | None:
        match self.step.stage:
            case Stage.SFT:
                return self._sft(job)
            case Stage.ROLLOUT if self.step.subject:
                teacher = self.inputs.teacher(self.inputs.own_role(), self.recipe.rollout.engine)
                write_texts(job, teacher=teacher, student=self.inputs.text(STUDENT_ROLE))
            case Stage.ROLLOUT:
                student = self.inputs.open(STUDENT_ROLE, self.recipe.rollout.engine)
                rollout(job, student=student, given=self.inputs.texts())
            case Stage.TEACHER_SCORE:
                self._teacher_score(job)
            case Stage.TRAIN:
                return self._train(job)
            case Stage.EVALUATE:
                self._evaluate(job)
        return None

    def _teacher_score(self, job: Job) -> None:
        rows = read_rollouts(self.inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))
        role, engine, student = self.inputs.own_role(), self.recipe.teacher_score.engine, None
        teacher = self.inputs.teacher(role, engine)
        if self.recipe.keep.student_top_k:
            student = self.inputs.open(STUDENT_ROLE, engine, at=role)
        teacher_score(job, rollouts=rows, teacher=teacher, student=student)

    def _sft(self, job: Job) -> LocalTrainer:
        self.warm.roles.make_room()
        model = self.inputs.settings(self.inputs.own_role())
        assert not isinstance(model, SelfTeacher | ServedTeacher)
        if not isinstance(model, Student):
            job = replace(job, train=[problem for problem in job.train if teaches(model, problem)])
        resumed = job.draft.checkpoint()
        folder = self.inputs.base_folder(self.step.subject)
        dtype, _ = resolve_dtype(model.dtype, self.warm.device)
        settings = model.sft
        if resumed is not None:
            network = self.training.network(resumed[1] / "model", trust=model.trust_remote_code)
        elif folder is not None:
            network = self.training.network(folder, trust=model.trust_remote_code)
        else:
            assert not isinstance(model, ModelTeacher)
            assert model.scratch is not None
            network = self.training.scratch(model.scratch)
        if self.step.subject == STUDENT and self.recipe.student.lora is not None:
            target_names(network, self.recipe.student.lora)  # before it is trained for nothing
        text = self.inputs.open_text(folder, model.template, trust=model.trust_remote_code)
        trainer = LocalTrainer(
            network,
            (settings or Sft(steps=1)).optimizer,
            num_ids=text.num_ids,
            horizon=settings.steps if settings else 1,
            compute=dtype,
            gradient_checkpointing=self.recipe.runtime.gradient_checkpointing,
        )
        if resumed is not None:
            trainer.restore(resumed[1] / "trainer")
        done = resumed[0] if resumed else 0
        written = self.inputs.texts() if settings is not None and settings.text == "teacher" else None
        sft(job, settings=settings, text=text, trainer=trainer, resumed=done, written=written)
        return trainer

    def _train(self, job: Job) -> LocalTrainer:
        self.warm.roles.make_room()
        rows = read_rollouts(self.inputs.opened(ROLLOUT_ROLE, ROLLOUTS_FILE))
        scores = self._round_scores(job, rows) if self._has_scores() else None
        resumed = job.draft.checkpoint()
        trainer = self.training.student_trainer(resumed[1] if resumed else None)
        self.warm.cache.forget(trainer.model)  # its weights are about to change
        train(
            job,
            rollouts=rows,
            scores=scores,
            text=self.inputs.text(STUDENT_ROLE),
            trainer=trainer,
            resumed=resumed,
            average=self.training.average(),
        )
        return trainer

    def _has_scores(self) -> bool:
        return any(role.kind is RoleKind.SCORES for role in self.inputs.steps)

    def _round_scores(self, job: Job, rollouts: list[Rollout]) -> RoundScores:
        """What every teacher scored, in the order of their names, so that a mixture is summed in one order."""
        found = []
        for teacher in sorted(self.recipe.teachers, key=lambda teacher: teacher.name):
            role = teacher_role(self.recipe, teacher)
            scored = role.as_kind(RoleKind.SCORES)
            rows = read_scores(self.inputs.opened(scored, SCORES_FILE))
            hidden = self._hidden_teacher(job, role, scored) if self.recipe.keep.hidden else None
            found.append(TeacherScores(teacher.name, rows, hidden))
        weights = self.recipe.weights if self.recipe.is_mixed else None
        return join_scores(rollouts, found, weights=weights, round_number=self.step.round)

    def _hidden_teacher(self, job: Job, role: Role, scored: Role) -> HiddenTeacher:
        """The teacher's kept states with its output head, which is all that is read of its weights."""
        teacher = self.inputs.teacher(role, self.recipe.teacher_score.engine)
        head = output_head(job, teacher.model.source, num_ids=teacher.num_ids)
        file = HiddenFile(self.inputs.opened(scored, HIDDEN_FILE), head_sha256=head_digest(head))
        return HiddenTeacher(file, swapped_head(head, teacher.swap), teacher.temperature)

    def _evaluate(self, job: Job) -> None:
        baseline = None
        if BASELINE_ROLE in self.inputs.steps:
            baseline = self.inputs.opened(BASELINE_ROLE, GRADES_FILE, REVERSE_KL_FILE, folder=True)
        role, settings = self.inputs.own_role(), self.recipe.evaluate
        engine, against = settings.engine or self.recipe.rollout.engine, list[TeacherHandle]()
        if role == STUDENT_ROLE:
            model, problems = self.inputs.open(STUDENT_ROLE, engine), graded_problems(job, None)
            prompt = model.text.prompt
            if settings.reverse_kl_problems:
                scorer = self.recipe.teacher_score.engine
                roles = [teacher_role(self.recipe, teacher) for teacher in self.recipe.teachers]
                against = [self.inputs.teacher(role, scorer) for role in roles]
        else:
            teacher, student = self.inputs.teacher(role, engine), self.inputs.text(STUDENT_ROLE)
            model, problems = teacher.model, graded_problems(job, teacher.settings)

            def prompt(problem: Problem) -> list[int]:
                return teacher.prompt_ids(problem, student.prompt(problem))

        evaluate(
            job,
            subject=self.step.subject,
            model=model,
            prompt=prompt,
            problems=problems,
            against=against,
            baseline=baseline,
        )

    def _tell_of_another_dtype(self) -> None:
        """Warns, once, where the student went so far in another dtype: `auto` is what a machine makes of it."""
        if self.recipe.student.dtype != "auto" or self.warm.dtypes_told:
            return
        here = dtype_name(resolve_dtype("auto", self.warm.device)[0])
        for step in self.inputs.steps.values():
            manifest = self.inputs.store.entry(step).manifest()
            fields: Any = step.document["fields"]
            if manifest is None or "dtype" not in (
                fields.get("student") or {}
            ):  # a teacher's may be from another student's run
                continue
            if (there := manifest.provenance.get("dtype", here)) != here:
                self.report.event(
                    kind="warning",
                    text=f"{step.id} was computed in {there}, which dtype: auto was where it was made, and auto "
                    f"is {here} on this one: the run goes on, but its rounds do not compare; for a run in one dtype, "
                    f"begin it anew with --set student.dtype={there}",
                )
                self.warm.dtypes_told = True
                return

    def _note(self, kind: str, fields: Mapping[str, JsonValue]) -> None:
        row: dict[str, JsonValue] = {"time": time.time(), "event": kind, "step": self.step.id, **fields}
        append_line(Path(self.request["run"]) / "events.jsonl", row)
        if kind == "damaged":
            self.report.event(kind="warning", text=f"{fields['problem']}; it is made again")

    def _write_speed(self, draft: Draft, pulse: Pulse, seconds: float) -> None:
        name = self.step.stage.replace("-", "_")
        if (
            self.step.stage in (Stage.ROLLOUT, Stage.TEACHER_SCORE) and self.step.subject
        ):  # one of several in the round
            name += f"/{self.step.subject}"
        draft.metric(f"time/{name}_seconds", seconds)
        if pulse.all_tokens and seconds > 0:
            draft.metric(f"speed/{name}_tokens_per_second", pulse.all_tokens / seconds)

    def _provenance(self, started: float) -> dict[str, JsonValue]:
        dtype, why = resolve_dtype(self.recipe.student.dtype, self.warm.device)
        return {
            **environment(),
            "device": str(self.warm.device),
            "dtype": dtype_name(dtype),
            "dtype_reason": why,
            "threads": torch.get_num_threads(),
            "started": started,
            "finished": time.time(),
        }
