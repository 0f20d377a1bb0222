"""The models of a run in their roles: each step opens a role once, as the handle that its stage asks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from kdpipe.data.rows import Problem
from kdpipe.doctor.sizing import trainer_bytes
from kdpipe.engines.handle import ModelHandle, Runs
from kdpipe.engines.protocol import Engine
from kdpipe.engines.server.engine import ServerEngine
from kdpipe.engines.server.signature import require_same
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.placement import Engines
from kdpipe.models.cache import ModelCache
from kdpipe.models.folder import reach_of
from kdpipe.models.prompting import Text, open_text, prompt_style
from kdpipe.models.source import ModelSource
from kdpipe.pipeline.request import Noted, Warned
from kdpipe.recipe.place import place_of
from kdpipe.recipe.roles import SERVER, STUDENT_ROLE, Role
from kdpipe.recipe.schema import Recipe, SelfTeacher, ServedTeacher, Student, Teacher
from kdpipe.recipe.section import PromptStyleName
from kdpipe.stages.scoring import TeacherHandle, as_teacher
from kdpipe.stages.settings.model import SupportSettings, TeacherSettings


class Roles:
    """Opens the student and the teachers; texts, engines and servers stay open from step to step.

    `train` are the problems that few-shot prompts take their examples from.
    """

    def __init__(
        self, recipe: Recipe, train: Sequence[Problem], *, engines: Engines, cache: ModelCache
    ) -> None:
        self._recipe = recipe
        self._train = train
        self._engines = engines
        self._cache = cache
        self._texts: dict[tuple[Role, str], Text] = {}
        self._servers: dict[Role, ServerEngine] = {}
        self._said: set[str] = set()
        self._lora_fits = recipe.student.lora is None

    def open(self, inputs: Inputs, role: Role, engine: Runs, *, at: Role | None = None) -> ModelHandle:
        """The student or a teacher, run by `engine`, or by the engine of another role `at`.

        A teacher behind a server has that for its engine, whatever the others have. Weights that the engine does not
        hold are checked; raises ArtifactError where they are not those that were published.
        """
        settings, source, place = inputs.settings(role), inputs.source(role), at or role
        if engine == "vllm" and not self._engines.trainer_bytes and self._engines.is_on_cuda:
            self._engines.trainer_bytes = trainer_bytes(self._recipe, inputs.folders)
        if isinstance(settings, ServedTeacher):
            open_server = partial(self._server, inputs, settings, role)
            return ModelHandle(settings.name, source, self.text(inputs, role), "server", open_server)
        assert engine != SERVER
        if not self._engines.holds(engine, place, source):
            inputs.check_weights(role)
        if isinstance(settings, Student):
            self._require_targets(inputs, source)
        elif self._takes_turns(inputs, settings, source):
            self._cache.take_turns(source.digest)
        open_engine = partial(
            self._engines.engine, engine, place, note=lambda text: inputs.report.event(Noted(text))
        )
        turns = self._engines.turns(engine, place)

        def warn(text: str) -> None:
            self._say(inputs, Warned(text))

        return ModelHandle(settings.name, source, self.text(inputs, role), engine, open_engine, turns, warn)

    def teacher(self, inputs: Inputs, role: Role, settings: TeacherSettings) -> TeacherHandle:
        """The teacher in `role`, run as `settings` say; raises PreflightError unless it fits the student."""
        return as_teacher(
            settings,
            self.open(inputs, role, settings.engine),
            student=self.text(inputs, STUDENT_ROLE),
            support=SupportSettings.of(self._recipe),
        )

    def text(self, inputs: Inputs, role: Role) -> Text:
        """The text side of the student or a teacher; kept, since a round changes no tokenizer."""
        settings = inputs.settings(role)
        key = (role, json.dumps(settings.template, sort_keys=True))
        if key not in self._texts:
            self._texts[key] = self.text_of(inputs, settings, inputs.text_folder(role))
        return self._texts[key]

    def text_of(
        self,
        inputs: Inputs,
        model: Student | Teacher,
        folder: Path | None,
        template: dict[str, JsonValue] | None = None,
    ) -> Text:
        """The text side of a model whose tokenizer is in `folder`; None has the task's own tokenizer.

        Without `template` its arguments are the model's, or else the student's.
        What a user should know of its chat template is told once.
        """
        own: PromptStyleName = "student" if isinstance(model, Student) else model.prompt_style
        if template is None:
            template = model.template or ({} if own == "plain" else self._recipe.student.template)
        style = prompt_style(self._recipe.task, self._train, template, own)
        text, name = open_text(folder, style, trust=model.trust_remote_code), model.name
        told: list[Noted | Warned] = [Noted(f"{name}: {note}") for note in text.notes]
        told += [Warned(f"{name}: {warning}") for warning in text.warnings]
        for event in told:
            self._say(inputs, event)
        return text

    def close(self) -> None:
        for server in self._servers.values():
            server.close()

    def _require_targets(self, inputs: Inputs, source: ModelSource) -> None:
        """Says what the adapter reaches; raises, before anything is sampled, where it does not fit."""
        if (lora := self._recipe.student.lora) is not None and not self._lora_fits:
            found = reach_of(source.folder, lora, trust_remote_code=source.trust_remote_code)
            said = f"student.lora: adapters on {found}"
            inputs.report.event(Noted(said) if found.layers == found.of_layers else Warned(said))
            self._lora_fits = True

    def _say(self, inputs: Inputs, event: Noted | Warned) -> None:
        if event.text not in self._said:
            self._said.add(event.text)
            inputs.report.event(event)

    def _takes_turns(self, inputs: Inputs, teacher: Teacher, source: ModelSource) -> bool:
        """Whether the cache holds one of such teachers at a time: of several, or of an average's rounds."""
        if self._recipe.student.lora is not None and isinstance(teacher, SelfTeacher):
            return False  # it is the network that samples and is trained: not dropped for others
        is_one_of_several = len(self._recipe.teachers) > 1 or source.folder.name == "ema"
        return is_one_of_several and source.digest != inputs.weights_digest(STUDENT_ROLE)

    def _server(self, inputs: Inputs, teacher: ServedTeacher, role: Role) -> Engine:
        """The engine that asks a teacher's servers, after their weights were compared with those of before."""
        if role not in self._servers:
            settings, source = self._recipe.runtime.server, inputs.source(role)
            bundle = settings.ca_bundle and place_of(settings.ca_bundle, inputs.folder)
            engine = ServerEngine(teacher.server, settings, ca_bundle=bundle or None)
            engine.load(source)
            who = f"teacher {teacher.name!r}"
            require_same(inputs.store.workspace, source.digest, who=who, scores=engine.signature)
            self._servers[role] = engine
        return self._servers[role]
