"""Performs one step inside a warm worker: opens its inputs, calls its stage, commits its draft.

Everything that stays warm between steps is held here: loaded models, the trainer with its optimizer, the
problems, the tokenizers.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from kdpipe.adapters import read_adapter, start_adapter, target_names
from kdpipe.check_loss import unsound
from kdpipe.checkpoints import (
    Average,
    ModelShelf,
    head_digest,
    open_model,
    read_trainer,
    require_targets,
    scratch_model,
    write_model,
)
from kdpipe.devices import resolve_device, resolve_dtype
from kdpipe.doctor import examine, sizes
from kdpipe.doctor_case import Case
from kdpipe.doctor_case import Model as Patient
from kdpipe.engine import AdapterSource, Engine, ModelSource
from kdpipe.engines.server import ServerEngine
from kdpipe.environment import environment
from kdpipe.errors import KdpipeError, PreflightError, StepError
from kdpipe.hidden import FILE as HIDDEN_FILE
from kdpipe.hidden import HiddenFile
from kdpipe.job import Job, Text, open_text
from kdpipe.plan import BASE, STUDENT, Input, Step, teacher_role
from kdpipe.prompting import arithmetic_tokenizer, num_ids_in_use
from kdpipe.pulse import Pulse
from kdpipe.recipe import EngineName, Lora, Recipe, Server, Sft, Student, Teacher
from kdpipe.roles import Roles
from kdpipe.routing import check_records, teaches
from kdpipe.rows import Problem, Rollout
from kdpipe.seeds import derive_seed
from kdpipe.signatures import require_same
from kdpipe.stages.evaluate import evaluate, graded_problems
from kdpipe.stages.held_out import Against
from kdpipe.stages.rollout import rollout
from kdpipe.stages.sft import sft
from kdpipe.stages.teacher_score import TeacherSide, output_head, swapped_head, teacher_score, teacher_side
from kdpipe.stages.teacher_text import write_texts
from kdpipe.stages.train import train
from kdpipe.store import Draft, Entry, Store, append_line
from kdpipe.tables import read_rollouts, read_scores
from kdpipe.tasks import read_problems
from kdpipe.tasks.arithmetic import words
from kdpipe.teachers import HiddenTeacher, RoundScores, TeacherScores, join_scores
from kdpipe.trainer import Trainer
from kdpipe.workers import CLOSE, Message, Report


@dataclass(slots=True)
class Warm:
    """What one worker keeps between steps; made anew when the recipe changes."""

    recipe: Recipe
    device: torch.device
    shelf: ModelShelf
    train: list[Problem]
    test: list[Problem]
    roles: Roles
    servers: dict[str, ServerEngine] = field(default_factory=dict)
    texts: dict[tuple[str, str], Text] = field(default_factory=dict)
    trainer: tuple[str, Trainer] | None = None
    lora_fits: bool = False


class Performer:
    """Called once for each step of a run, in a worker process."""

    def __init__(self) -> None:
        self._warm: Warm | None = None

    def __call__(self, request: Message, report: Report) -> Message:
        """Performs a step unless another run has done it meanwhile; or examines its models; or ends what it started."""
        if request == CLOSE:
            self.close()
            return {}
        task = _Task(request, report, self._warmed(request, report))
        return task.examine() if "examine" in request else task.run()

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
            shelf = ModelShelf(device)
            roles = Roles(recipe, shelf, logs=Path(request["run"]) / "logs")
            self._warm = Warm(recipe, device, shelf, *problems, roles)
        return self._warm


def _hardware(recipe: Recipe, device: torch.device) -> str:
    """Which device and dtype were picked, and why."""
    dtype, why = resolve_dtype(recipe.student.dtype, device)
    name = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"student: {name} on {device}, {threads} thread{'s'[: threads != 1]}\n  {why}"


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
    """One step: typed access to what its request says."""

    def __init__(self, request: Mapping[str, Any], report: Report, warm: Warm) -> None:
        self.request = request
        self.report = report
        self.warm = warm
        self.recipe = warm.recipe
        self.step = _step(request["step"])
        self.store = Store(Path(request["workspace"]))
        self.entry = self.store.entry(self.step)
        self.inputs = {role: _step(value) for role, value in request["inputs"].items()}

    def run(self) -> Message:
        with self.entry.locked(lambda: self.report.event(kind="waiting")):
            digests = self._input_digests()
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
            started = time.time()
            trainer = self._perform(self._job(draft, pulse))
            seconds = time.time() - started
            self._write_speed(draft, pulse, seconds)
            manifest = draft.commit(inputs=digests, provenance=self._provenance(started))
            if trainer is not None:
                self._keep_warm(trainer, manifest.payload_digest)
            tokens = pulse.all_tokens
            return {"reused": False, "digest": manifest.payload_digest, "seconds": seconds, "tokens": tokens}

    def examine(self) -> Message:
        """The doctor's findings on the models that the step opens, and with a full examination the estimate."""
        with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
            place = Path(folder)
            stand_ins = {role: self._stand_in(role, place) for role in self.request["missing"]}
            entry = Entry(place / "step", self.step.id, self.step.fingerprint)
            draft = Draft(entry, self.step, note=lambda _kind, _fields: None)
            job = self._job(draft, Pulse(lambda _fields: None, self.report.stopping.is_set))
            roles = [role for role in self.request["roles"] if role != STUDENT]
            engine = self.recipe.teacher_score.engine
            teachers = [(self._settings(role), self._examined(role, engine, stand_ins)) for role in roles]
            case = Case(
                job=job,
                device=self.warm.device,
                student=self._examined(STUDENT, self.recipe.rollout.engine, stand_ins),
                teachers=[(settings, model) for settings, model in teachers if isinstance(settings, Teacher)],
                depth=self.request["examine"],
            )
            findings: list[JsonValue] = [dict(finding.to_json()) for finding in examine(case)]
            if case.depth == "quick":
                return {"findings": findings}
            try:
                return {"findings": findings, "estimate": dict(sizes(case).to_json())}
            except KdpipeError as error:  # the findings are not lost with it
                return {"findings": findings, "estimate": {"problem": error.message}}

    def _examined(self, role: str, engine: EngineName, stand_ins: Mapping[str, str]) -> Patient:
        """The student or a teacher as the doctor sees it; its engine is opened when it is first asked."""
        settings, source = self._settings(role), self._source(role)
        is_here = not (isinstance(settings, Teacher) and settings.server is not None)
        return Patient(
            name=settings.name if isinstance(settings, Teacher) else STUDENT,
            source=source,
            text=self._text(role),
            open_engine=lambda: self._engine(engine, role),
            engine_name=engine if is_here else "server",
            is_here=is_here,
            stand_in=stand_ins.get(role, ""),
        )

    def _stand_in(self, role: str, place: Path) -> str:
        """Puts other weights in the place of those that a step has not made yet; returns what they are."""
        settings, step_id = self._settings(role), self.request["missing"][role]
        is_own = isinstance(settings, Teacher) and settings.self_ is None
        name = settings.name if isinstance(settings, Teacher) and is_own else STUDENT
        origin = settings if is_own else self.recipe.student
        if origin.scratch is None:
            return f"its weights before {step_id}, which is not done"
        if name not in self.request["folders"]:
            folder = place / name
            write_model(self._scratch(origin), arithmetic_tokenizer(words()), folder)
            self.request["folders"][name] = str(folder)
            self.request["digests"][name] = f"untrained {name}"
        return f"untrained weights: {step_id} is not done"

    def _perform(self, job: Job) -> Trainer | None:
        match self.step.stage:
            case "sft":
                return self._sft(job)
            case "rollout" if self.step.subject:
                role = self._own_role()
                engine = self._engine(self.recipe.rollout.engine, role)
                write_texts(
                    job,
                    teacher=self._teacher_side(job, role),
                    source=self._source(role, engine),
                    engine=engine,
                    student=self._text(STUDENT),
                )
            case "rollout":
                engine = self._engine(self.recipe.rollout.engine, STUDENT)
                rollout(
                    job,
                    text=self._text(STUDENT),
                    student=self._source(STUDENT, engine),
                    engine=engine,
                    given=self._texts(),
                )
            case "teacher-score":
                rows = read_rollouts(self._opened("rollout", "rollouts.parquet"))
                role = self._own_role()
                engine = self._engine(self.recipe.teacher_score.engine, role)
                teacher_score(
                    job,
                    rollouts=rows,
                    teacher=self._teacher_side(job, role),
                    source=self._source(role, engine),
                    engine=engine,
                    student=self._source(STUDENT, engine) if self.recipe.keep.student_top_k else None,
                )
            case "train":
                return self._train(job)
            case "evaluate":
                self._evaluate(job)
        return None

    # the stages that need more than a line

    def _sft(self, job: Job) -> Trainer:
        self.warm.roles.make_room()
        model = self._settings(self._own_role())
        if isinstance(model, Teacher):
            job = replace(job, train=[problem for problem in job.train if teaches(model, problem)])
        resumed = job.draft.checkpoint()
        folder = self._base_folder(self.step.subject)
        dtype, _ = resolve_dtype(model.dtype, self.warm.device)
        settings = model.sft
        if resumed is not None:
            network = self._open(resumed[1] / "model", trust=model.trust_remote_code)
        elif folder is not None:
            network = self._open(folder, trust=model.trust_remote_code)
        else:
            network = self._scratch(model)
        if self.step.subject == STUDENT and self.recipe.student.lora is not None:
            target_names(network, self.recipe.student.lora)  # before it is trained for nothing
        text = self._open_text(folder, model.template, trust=model.trust_remote_code)
        trainer = Trainer(
            network,
            (settings or Sft(steps=1)).optimizer,
            horizon=settings.steps if settings else 1,
            compute=dtype,
            gradient_checkpointing=self.recipe.runtime.gradient_checkpointing,
        )
        if resumed is not None:
            trainer.restore(*read_trainer(resumed[1] / "trainer"))
        done = resumed[0] if resumed else 0
        written = self._texts() if settings is not None and settings.text == "teacher" else None
        sft(job, settings=settings, text=text, trainer=trainer, dtype=dtype, resumed=done, written=written)
        return trainer

    def _train(self, job: Job) -> Trainer:
        self.warm.roles.make_room()
        rows = read_rollouts(self._opened("rollout", "rollouts.parquet"))
        scores = self._round_scores(job, rows) if self._has_scores() else None
        resumed = job.draft.checkpoint()
        trainer = self._student_trainer(resumed[1] if resumed else None)
        self.warm.shelf.forget(trainer.model)  # its weights are about to change
        dtype, _ = resolve_dtype(self.recipe.student.dtype, self.warm.device)
        train(
            job,
            rollouts=rows,
            scores=scores,
            text=self._text(STUDENT),
            trainer=trainer,
            dtype=dtype,
            resumed=resumed,
            average=self._average(),
        )
        return trainer

    def _average(self) -> Average | None:
        """The average of the students before this round; before the first it is the student that it starts with."""
        decay = self.recipe.ema_decay
        if decay is None:
            return None
        role, kind = ("ema", "ema") if "ema" in self.inputs else (STUDENT, "model")
        entry, name = self._origin(role)
        folder = entry.opened(kind) / kind if entry else self._base_folder(name)
        assert folder is not None
        return Average(decay, folder, self.warm.device, self.recipe.student.trust_remote_code)

    def _texts(self) -> list[Rollout]:
        """What the teachers wrote for this step to read."""
        roles = [role for role in self.inputs if role.partition(":")[0] == "text"]
        return [row for role in roles for row in read_rollouts(self._opened(role, "rollouts.parquet"))]

    def _has_scores(self) -> bool:
        return any(role.partition(":")[0] == "scores" for role in self.inputs)

    def _round_scores(self, job: Job, rollouts: list[Rollout]) -> RoundScores:
        """What every teacher scored, in the order of their names, so that a mixture is summed in one order."""
        found = []
        for teacher in sorted(self.recipe.teachers, key=lambda teacher: teacher.name):
            role = teacher_role(self.recipe, teacher)
            scored = role.replace("teacher", "scores", 1)
            rows = read_scores(self._opened(scored, "scores.parquet"))
            hidden = self._hidden_teacher(job, role, scored) if self.recipe.keep.hidden else None
            found.append(TeacherScores(teacher.name, rows, hidden))
        weights = self.recipe.weights if self.recipe.is_mixed else None
        return join_scores(rollouts, found, weights=weights, round_number=self.step.round)

    def _hidden_teacher(self, job: Job, role: str, scored: str) -> HiddenTeacher:
        """The teacher's kept states with its output head, which is all that is read of its weights."""
        side = self._teacher_side(job, role)
        head = output_head(job, self._source(role), num_ids=side.num_ids)
        file = HiddenFile(self._opened(scored, HIDDEN_FILE), head_sha256=head_digest(head))
        return HiddenTeacher(file, swapped_head(head, side.swap), side.temperature)

    def _evaluate(self, job: Job) -> None:
        baseline = None
        if "baseline" in self.inputs:
            baseline = self._opened("baseline", "grades.parquet", "reverse_kl.parquet", folder=True)
        role = self._own_role()
        engine = self._engine(self.recipe.evaluate.engine or self.recipe.rollout.engine, role)
        text, source, teacher = self._text(role), self._source(role, engine), None
        against, prompt = list[Against](), text.prompt
        if role == STUDENT:
            if self.recipe.evaluate.reverse_kl_problems:
                roles = [teacher_role(self.recipe, teacher) for teacher in self.recipe.teachers]
                scorer = self.recipe.teacher_score.engine
                for role in roles:
                    scoring = self._engine(scorer, role)
                    against.append(
                        Against(self._teacher_side(job, role), self._source(role, scoring), scoring)
                    )
        else:
            side = self._teacher_side(job, role)
            text, teacher = side.text, side.settings

            def prompt(problem: Problem) -> list[int]:
                return side.prompt_ids(problem, self._text(STUDENT).prompt(problem))

        evaluate(
            job,
            subject=self.step.subject,
            text=text,
            model=source,
            engine=engine,
            prompt=prompt,
            problems=graded_problems(job, teacher),
            against=against,
            baseline=baseline,
        )

    # inputs

    def _job(self, draft: Draft, pulse: Pulse) -> Job:
        return Job(
            self.recipe, self.step.round, self.step.seed, self.warm.train, self.warm.test, draft, pulse
        )

    def _input_digests(self) -> dict[str, str]:
        digests = {}
        for role, step in self.inputs.items():
            manifest = self.store.entry(step).manifest()
            if manifest is None:
                raise StepError(f"{self.step.id} needs {step.id}, which is not there", hint="repeat the run")
            digests[role] = manifest.payload_digest
        return digests

    def _opened(self, role: str, *names: str, folder: bool = False) -> Path:
        """The file of an input entry (or its folder), after its sha256 was checked."""
        root = self.store.entry(self.inputs[role]).opened(*names)
        return root if folder else root / names[0]

    def _base_folder(self, name: str) -> Path | None:
        """The folder of a model that no step made: local, or downloaded."""
        found = self.request["folders"].get(name)
        return None if found is None else Path(found)

    def _adapter(self, role: str) -> Entry | None:
        """The entry of the student's adapter; None where the role's weights are whole."""
        is_trained = role in self.inputs and self.inputs[role].stage == "train"
        if self.recipe.student.lora is None or not is_trained:
            return None
        return self.store.entry(self.inputs[role])

    def _origin(self, role: str) -> tuple[Entry | None, str]:
        """Where whole weights of the student or a teacher are: an entry, or the folder of a named model.

        Of a student with an adapter they are those below it.
        """
        if self._adapter(role) is not None:
            return (self.store.entry(self.inputs[BASE]) if BASE in self.inputs else None), STUDENT
        if role in self.inputs:
            return self.store.entry(self.inputs[role]), ""
        model = self._settings(role)
        return None, model.name if isinstance(model, Teacher) and model.self_ is None else STUDENT

    def _own_role(self) -> str:
        """The role of the model that the step is about."""
        if self.step.subject == STUDENT:
            return STUDENT
        teachers = self.recipe.teachers
        return next(
            (teacher_role(self.recipe, teacher) for teacher in teachers if teacher.name == self.step.subject),
            "teacher",
        )

    def _settings(self, role: str) -> Student | Teacher:
        """What the recipe says of the student or a teacher."""
        for teacher in self.recipe.teachers:
            if role == teacher_role(self.recipe, teacher):
                return teacher
        return self.recipe.student

    def _source(self, role: str, engine: Engine | None = None) -> ModelSource:
        """The student or a teacher as an engine loads it; checks weights from the store that it does not hold.

        Without an engine it is this process that opens them.
        """
        source = self._found_source(role, engine)
        settings = self._settings(role)
        if isinstance(settings, Teacher) and settings.server is not None:
            return source  # its weights are not here
        is_one_of_several = len(self.recipe.teachers) > 1 or source.folder.name == "ema"
        if self.recipe.student.lora is not None and isinstance(settings, Teacher):
            # The student itself as teacher is the network that samples and is trained: it is not dropped for others.
            is_one_of_several &= settings.self_ is None
        if role != STUDENT and is_one_of_several and source.digest != self._weights_digest(STUDENT):
            self.warm.shelf.take_turns(source.digest)
        return source

    def _weights_digest(self, role: str) -> str | None:
        """What identifies a model's weights; None for a student from nothing that the step does not open."""
        entry, name = self._origin(role)
        if entry is None:
            found: str | None = self.request["digests"].get(name)
            return found
        manifest, kind = entry.manifest(), self._weights_folder(role)
        if manifest is None:
            return None
        return manifest.payload_digest if kind == "model" else f"{manifest.payload_digest}/{kind}"

    def _weights_folder(self, role: str) -> str:
        """Which folder of its entry holds the weights: a teacher may be the average beside the student."""
        return "ema" if "ema" in self.step.inputs[role].opens else "model"

    def _found_source(self, role: str, engine: Engine | None) -> ModelSource:
        settings = self._settings(role)
        entry, name = self._origin(role)
        dtype, trust = settings.dtype, settings.trust_remote_code
        if entry is None:
            folder = self._base_folder(name)
            assert folder is not None
            source = ModelSource(folder, self.request["digests"][name], dtype, trust)
        else:
            digest, kind = self._weights_digest(role), self._weights_folder(role)
            assert digest is not None
            source = ModelSource(entry.folder / kind, digest, dtype, trust)
        adapter = self._adapter(role)
        if adapter is not None:
            manifest = adapter.manifest()
            assert manifest is not None
            made = AdapterSource(adapter.folder / "model", manifest.payload_digest)
            source = replace(source, adapter=made)
        if isinstance(settings, Teacher):
            source = replace(source, quantization=settings.quantization)
        if not self.warm.roles.holds(engine, source):
            if entry is not None:
                entry.opened(source.folder.name)
            if adapter is not None:
                adapter.opened("model")
        lora = self.recipe.student.lora
        if role == STUDENT and lora is not None and not self.warm.lora_fits:
            require_targets(source.folder, lora, trust_remote_code=trust)  # before anything is sampled
            self.warm.lora_fits = True
        return source

    def _text(self, role: str) -> Text:
        """The text side of the student or a teacher; kept, since a round changes no tokenizer."""
        settings = self._settings(role)
        entry, name = self._origin(role)
        key = (role, json.dumps(settings.template, sort_keys=True))
        if key not in self.warm.texts:
            # No folder: a scratch student, in a step that reads its text but opens none of its weights.
            folder = entry.folder / self._weights_folder(role) if entry else self._base_folder(name)
            if entry is not None:
                entry.opened(*self._text_files(entry, self._weights_folder(role)))
            template = settings.template or self.recipe.student.template
            self.warm.texts[key] = self._open_text(folder, template, trust=settings.trust_remote_code)
        return self.warm.texts[key]

    def _text_files(self, entry: Entry, kind: str) -> list[str]:
        """All that an entry holds of a model but the weights."""
        manifest = entry.manifest()
        files = manifest.files if manifest is not None else ()
        return [
            file.path
            for file in files
            if file.path.startswith(f"{kind}/") and not file.path.endswith(".safetensors")
        ] or [kind]

    def _teacher_side(self, job: Job, role: str) -> TeacherSide:
        settings = self._settings(role)
        assert isinstance(settings, Teacher)
        return teacher_side(job, settings, student=self._text(STUDENT), teacher=self._text(role))

    def _engine(self, name: EngineName, role: str) -> Engine:
        """The engine `name` for the model in `role`, kept warm between steps and rounds.

        A teacher behind a server has that for its engine, whatever the others have.
        """
        settings = self._settings(role)
        if isinstance(settings, Teacher) and settings.server is not None:
            return self._server_engine(settings, settings.server, role)
        return self.warm.roles.engine(name, role, tell=lambda text: self.report.event(kind="note", text=text))

    def _server_engine(self, teacher: Teacher, server: Server, role: str) -> Engine:
        if role not in self.warm.servers:
            settings = self.recipe.runtime.server
            bundle = (
                settings.ca_bundle and Path(self.request["folder"]) / Path(settings.ca_bundle).expanduser()
            )
            engine = ServerEngine(server, settings, ca_bundle=bundle or None)
            source = self._source(role)
            engine.load(source)
            who = f"teacher {teacher.name!r}"
            require_same(self.store.workspace, source.digest, who=who, scores=engine.signature)
            self.warm.servers[role] = engine
        return self.warm.servers[role]

    # models being trained

    def _open(self, folder: Path, *, trust: bool) -> Any:
        """A model to train: float32 masters, whatever it computes in."""
        return open_model(folder, dtype=torch.float32, device=self.warm.device, trust_remote_code=trust)

    def _scratch(self, model: Student | Teacher) -> Any:
        assert model.scratch is not None
        tokenizer = arithmetic_tokenizer(words())
        seed = self.step.seed if model.scratch.seed is None else model.scratch.seed
        network = scratch_model(
            model.scratch,
            num_ids=num_ids_in_use(tokenizer),
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
        )
        return network.to(self.warm.device)

    def _open_text(self, folder: Path | None, template: dict[str, JsonValue], *, trust: bool) -> Text:
        """The text side of the model in `folder`; None is a scratch model, with the task's own tokenizer."""
        if folder is not None:
            return open_text(folder, self.recipe, self.warm.train, template=template, trust=trust)
        from kdpipe.prompting import prompt_style

        tokenizer = arithmetic_tokenizer(words())
        style = prompt_style(self.recipe.task, self.warm.train, template)
        return Text(tokenizer, style, (tokenizer.eos_token_id,), num_ids_in_use(tokenizer))

    def _student_trainer(self, checkpoint: Path | None) -> Trainer:
        """The student with its optimizer: warm from the last round, from a checkpoint, or from disk."""
        recipe = self.recipe
        if recipe.student.lora is not None:
            return self._adapter_trainer(recipe.student.lora, checkpoint)
        entry, name = self._origin(STUDENT)
        manifest = entry.manifest() if entry else None
        warm, self.warm.trainer = self.warm.trainer, None
        if (
            checkpoint is None
            and warm is not None
            and manifest is not None
            and warm[0] == manifest.payload_digest
        ):
            return warm[1]
        opens = self.step.inputs[STUDENT].opens if entry else ()
        if entry is not None:
            entry.opened(*opens)
        folder = entry.folder if entry else self._base_folder(name)
        assert folder is not None
        weights = checkpoint / "model" if checkpoint else folder / "model" if entry else folder
        trainer = self._trainer(self._open(weights, trust=recipe.student.trust_remote_code))
        if checkpoint is not None:
            trainer.restore(*read_trainer(checkpoint / "trainer"))
        elif "trainer" in opens:
            trainer.restore(*read_trainer(folder / "trainer"))
        return trainer

    def _adapter_trainer(self, lora: Lora, checkpoint: Path | None) -> Trainer:
        """The student's adapter with its optimizer, on the network that also samples: nothing is there twice."""
        source, entry = self._source(STUDENT), self._adapter(STUDENT)
        model = self.warm.shelf.get(source)
        warm, self.warm.trainer = self.warm.trainer, None
        if (
            checkpoint is None
            and warm is not None
            and source.adapter is not None
            and warm[0] == source.adapter.digest
            and warm[1].model is model
        ):
            return warm[1]
        if entry is None:
            seed = self.recipe.seed if lora.seed is None else lora.seed
            start_adapter(model, lora, seed=derive_seed(seed, "lora"))
        if checkpoint is not None:
            read_adapter(model, checkpoint / "model")
        trainer = self._trainer(model)
        if checkpoint is not None:
            trainer.restore(*read_trainer(checkpoint / "trainer"))
        elif entry is not None:
            trainer.restore(*read_trainer(entry.opened("trainer") / "trainer"))
        return trainer

    def _trainer(self, model: Any) -> Trainer:
        """A student of the recipe with a fresh optimizer."""
        recipe, settings = self.recipe, self.recipe.train
        dtype, _ = resolve_dtype(recipe.student.dtype, self.warm.device)
        steps = settings.minibatches * settings.epochs
        return Trainer(
            model,
            settings.optimizer,
            horizon=(settings.optimizer.schedule_rounds or recipe.rounds) * steps,
            compute=dtype,
            gradient_checkpointing=recipe.runtime.gradient_checkpointing,
        )

    def _keep_warm(self, trainer: Trainer, digest: str) -> None:
        settings = self.recipe.student if self.step.subject == "" else self._settings(self._own_role())
        dtype, _ = resolve_dtype(settings.dtype, self.warm.device)
        if self.step.stage == "sft":
            trainer.model.requires_grad_(False)  # from here on it is only asked
        if self.step.stage == "train" and self.recipe.student.lora is not None:
            self.warm.shelf.put_adapter(digest, trainer.model)
        elif dtype == trainer.model.dtype:
            self.warm.shelf.put(digest, dtype, trainer.model)
        if self.step.stage == "train":
            self.warm.trainer = (digest, trainer)

    # what is noted

    def _note(self, kind: str, fields: Mapping[str, JsonValue]) -> None:
        row: dict[str, JsonValue] = {"time": time.time(), "event": kind, "step": self.step.id, **fields}
        append_line(Path(self.request["run"]) / "events.jsonl", row)
        if kind == "damaged":
            self.report.event(kind="warning", text=f"{fields['problem']}; it is made again")

    def _write_speed(self, draft: Draft, pulse: Pulse, seconds: float) -> None:
        name = self.step.stage.replace("-", "_")
        if (
            self.step.stage in ("rollout", "teacher-score") and self.step.subject
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
            "dtype": str(dtype).removeprefix("torch."),
            "dtype_reason": why,
            "threads": torch.get_num_threads(),
            "started": started,
            "finished": time.time(),
        }


def _step(value: Mapping[str, Any]) -> Step:
    inputs = {role: Input(found["step_id"], tuple(found["opens"])) for role, found in value["inputs"].items()}
    return Step(
        value["id"],
        value["stage"],
        value["round"],
        value["subject"],
        value["seed"],
        inputs,
        value["document"],
        value["fingerprint"],
    )
