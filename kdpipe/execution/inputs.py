"""What a step opens: files of the steps before it, its models' weights and texts, and the engines that ask them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from kdpipe.data.payload import ROLLOUTS_FILE
from kdpipe.data.rows import Rollout
from kdpipe.data.tables import read_rollouts
from kdpipe.engines.handle import ModelHandle
from kdpipe.engines.protocol import Engine
from kdpipe.engines.server.engine import ServerEngine
from kdpipe.engines.server.signature import require_same
from kdpipe.errors import StepError
from kdpipe.execution.warm import Warm
from kdpipe.models.folder import require_targets
from kdpipe.models.prompting import prompt_style
from kdpipe.models.source import AdapterSource, ModelSource
from kdpipe.models.text import Text, open_text
from kdpipe.pipeline.request import read_step
from kdpipe.recipe.roles import BASE_ROLE, STUDENT, STUDENT_ROLE, Role, RoleKind, teacher_role
from kdpipe.recipe.schema import EngineName, SelfTeacher, ServedTeacher, Student, Teacher
from kdpipe.stages.job import Job
from kdpipe.stages.scoring import TeacherHandle, as_teacher
from kdpipe.store.artifacts import Draft, Entry, Store
from kdpipe.store.step import Stage
from kdpipe.workers.pulse import Pulse
from kdpipe.workers.worker import Report


class Inputs:
    """Typed access to what the request for a step says; opens from the store only what it has checked."""

    def __init__(self, request: Mapping[str, Any], report: Report, warm: Warm) -> None:
        self.request = request
        self.report = report
        self.warm = warm
        self.recipe = warm.recipe
        self.step = read_step(request["step"])
        self.store = Store(Path(request["workspace"]))
        self.steps = {Role.parse(role): read_step(value) for role, value in request["inputs"].items()}

    def job(self, draft: Draft, pulse: Pulse) -> Job:
        """The step's work as its stage is handed it."""
        return Job(
            self.recipe, self.step.round, self.step.seed, self.warm.train, self.warm.test, draft, pulse
        )

    def digests(self) -> dict[str, str]:
        """The payload digest of every input; raises StepError where one is not there."""
        digests = {}
        for role, step in self.steps.items():
            manifest = self.store.entry(step).manifest()
            if manifest is None:
                raise StepError(f"{self.step.id} needs {step.id}, which is not there", hint="repeat the run")
            digests[str(role)] = manifest.payload_digest
        return digests

    def opened(self, role: Role, *names: str, folder: bool = False) -> Path:
        """The file of an input entry (or its folder), after its sha256 was checked."""
        root = self.store.entry(self.steps[role]).opened(*names)
        return root if folder else root / names[0]

    def texts(self) -> list[Rollout]:
        """What the teachers wrote for this step to read."""
        roles = [role for role in self.steps if role.kind is RoleKind.TEXT]
        return [row for role in roles for row in read_rollouts(self.opened(role, ROLLOUTS_FILE))]

    def base_folder(self, name: str) -> Path | None:
        """The folder of a model that no step made: local, or downloaded."""
        found = self.request["folders"].get(name)
        return None if found is None else Path(found)

    def adapter(self, role: Role) -> Entry | None:
        """The entry of the student's adapter; None where the role's weights are whole."""
        is_trained = role in self.steps and self.steps[role].stage == Stage.TRAIN
        if self.recipe.student.lora is None or not is_trained:
            return None
        return self.store.entry(self.steps[role])

    def origin(self, role: Role) -> tuple[Entry | None, str]:
        """Where whole weights of the student or a teacher are: an entry, or the folder of a named model.

        Of a student with an adapter they are those below it.
        """
        if self.adapter(role) is not None:
            return (self.store.entry(self.steps[BASE_ROLE]) if BASE_ROLE in self.steps else None), STUDENT
        if role in self.steps:
            return self.store.entry(self.steps[role]), ""
        model = self.settings(role)
        return None, STUDENT if isinstance(model, SelfTeacher) else model.name

    def own_role(self) -> Role:
        """The role of the model that the step is about."""
        if self.step.subject == STUDENT:
            return STUDENT_ROLE
        teachers = self.recipe.teachers
        return next(
            (teacher_role(self.recipe, teacher) for teacher in teachers if teacher.name == self.step.subject),
            Role(RoleKind.TEACHER),
        )

    def settings(self, role: Role) -> Student | Teacher:
        """What the recipe says of the student or a teacher."""
        for teacher in self.recipe.teachers:
            if role == teacher_role(self.recipe, teacher):
                return teacher
        return self.recipe.student

    def open(self, role: Role, engine: EngineName, *, at: Role | None = None) -> ModelHandle:
        """The student or a teacher, run by `engine`, or by the engine of another role `at`.

        A teacher behind a server has that for its engine, whatever the others have.
        """
        settings, place = self.settings(role), at or role
        if isinstance(settings, ServedTeacher):
            serve = partial(self._server_engine, settings, role)
            return ModelHandle(settings.name, self.source(role), self.text(role), "server", serve)
        source = self.source(role, lambda source: self.warm.roles.holds(engine, place, source))
        turns = self.warm.roles.turns(engine, place)
        return ModelHandle(
            settings.name, source, self.text(role), engine, partial(self.engine, engine, place), turns
        )

    def teacher(self, role: Role, engine: EngineName) -> TeacherHandle:
        """The teacher in `role`, run by `engine`; raises PreflightError where it does not fit the student."""
        settings = self.settings(role)
        assert not isinstance(settings, Student)
        return as_teacher(self.recipe, settings, self.open(role, engine), student=self.text(STUDENT_ROLE))

    def source(self, role: Role, is_held: Callable[[ModelSource], bool] | None = None) -> ModelSource:
        """Where the weights of the student or a teacher are, checked unless `is_held`: by this process, if not said."""
        source = self._found_source(role, is_held or self.warm.cache.holds)
        settings = self.settings(role)
        if isinstance(settings, ServedTeacher):
            return source  # its weights are not here
        is_one_of_several = len(self.recipe.teachers) > 1 or source.folder.name == "ema"
        if self.recipe.student.lora is not None and isinstance(settings, SelfTeacher):
            is_one_of_several = False  # it is the network that samples and is trained: not dropped for others
        if role != STUDENT_ROLE and is_one_of_several and source.digest != self._weights_digest(STUDENT_ROLE):
            self.warm.cache.take_turns(source.digest)
        return source

    def _weights_digest(self, role: Role) -> str | None:
        """What identifies a model's weights; None for a student from nothing that the step does not open."""
        entry, name = self.origin(role)
        if entry is None:
            found: str | None = self.request["digests"].get(name)
            return found
        manifest, kind = entry.manifest(), self._weights_folder(role)
        if manifest is None:
            return None
        return manifest.payload_digest if kind == "model" else f"{manifest.payload_digest}/{kind}"

    def _weights_folder(self, role: Role) -> str:
        """Which folder of its entry holds the weights: a teacher may be the average beside the student."""
        return "ema" if "ema" in self.step.inputs[role].opens else "model"

    def _found_source(self, role: Role, is_held: Callable[[ModelSource], bool]) -> ModelSource:
        settings = self.settings(role)
        entry, name = self.origin(role)
        dtype, trust = settings.dtype, settings.trust_remote_code
        if entry is None:
            folder = self.base_folder(name)
            assert folder is not None
            source = ModelSource(
                folder, self.request["digests"][name], dtype, trust, quantization=settings.quantization
            )
        else:
            digest, kind = self._weights_digest(role), self._weights_folder(role)
            assert digest is not None
            source = ModelSource(
                entry.folder / kind, digest, dtype, trust, quantization=settings.quantization
            )
        adapter = self.adapter(role)
        if adapter is not None:
            manifest = adapter.manifest()
            assert manifest is not None
            made = AdapterSource(adapter.folder / "model", manifest.payload_digest)
            source = replace(source, adapter=made)
        if not is_held(source):
            if entry is not None:
                entry.opened(source.folder.name)
            if adapter is not None:
                adapter.opened("model")
        lora = self.recipe.student.lora
        if role == STUDENT_ROLE and lora is not None and not self.warm.lora_fits:
            require_targets(source.folder, lora, trust_remote_code=trust)  # before anything is sampled
            self.warm.lora_fits = True
        return source

    def text(self, role: Role) -> Text:
        """The text side of the student or a teacher; kept, since a round changes no tokenizer."""
        settings = self.settings(role)
        entry, name = self.origin(role)
        key = (role, json.dumps(settings.template, sort_keys=True))
        if key not in self.warm.texts:
            # No folder: a scratch student, in a step that reads its text but opens none of its weights.
            folder = entry.folder / self._weights_folder(role) if entry else self.base_folder(name)
            if entry is not None:
                entry.opened(*self._text_files(entry, self._weights_folder(role)))
            template = settings.template or self.recipe.student.template
            self.warm.texts[key] = self.open_text(folder, template, trust=settings.trust_remote_code)
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

    def open_text(self, folder: Path | None, template: dict[str, JsonValue], *, trust: bool) -> Text:
        """The text side of the model in `folder`; None is a scratch model, with the task's own tokenizer."""
        return open_text(folder, prompt_style(self.recipe.task, self.warm.train, template), trust=trust)

    def engine(self, name: EngineName, role: Role) -> Engine:
        """The engine `name` for the model in `role`, kept warm between steps and rounds."""
        return self.warm.roles.engine(name, role, tell=lambda text: self.report.event(kind="note", text=text))

    def _server_engine(self, teacher: ServedTeacher, role: Role) -> Engine:
        if role not in self.warm.servers:
            settings = self.recipe.runtime.server
            bundle = (
                settings.ca_bundle and Path(self.request["folder"]) / Path(settings.ca_bundle).expanduser()
            )
            engine = ServerEngine(teacher.server, settings, ca_bundle=bundle or None)
            source = self.source(role)
            engine.load(source)
            who = f"teacher {teacher.name!r}"
            require_same(self.store.workspace, source.digest, who=who, scores=engine.signature)
            self.warm.servers[role] = engine
        return self.warm.servers[role]
