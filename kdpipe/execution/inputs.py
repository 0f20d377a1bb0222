"""What a step reads: the entries of the steps before it, and where the weights of its models are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kdpipe.errors import StepError
from kdpipe.models.source import AdapterSource, ModelSource
from kdpipe.pipeline.request import Assignment, StepEvent
from kdpipe.recipe.roles import BASE_ROLE, STUDENT, Role, teacher_role
from kdpipe.recipe.schema import Recipe, SelfTeacher, Student, Teacher
from kdpipe.store.artifacts import Entry, Store
from kdpipe.store.stage import Stage
from kdpipe.store.step import Step
from kdpipe.workers.worker import Report


@dataclass(frozen=True, slots=True)
class Inputs:
    """A step with the steps that it reads; files of the store are opened only after they were checked.

    `folder` is the recipe's, `run` the run's. `folders` and `identities` are those of models that no step made, by
    name; `steps` are the steps that it reads, by role.
    """

    recipe: Recipe
    step: Step
    steps: Mapping[Role, Step]
    store: Store
    folder: Path
    run: Path
    folders: Mapping[str, Path]
    identities: Mapping[str, str]
    report: Report[StepEvent]

    @classmethod
    def of(cls, found: Assignment, report: Report[StepEvent]) -> Inputs:
        return cls(
            recipe=found.recipe,
            step=found.step,
            steps=found.inputs,
            store=Store(found.workspace),
            folder=found.folder,
            run=found.run,
            folders=found.folders,
            identities=found.identities,
            report=report,
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

    def settings(self, role: Role) -> Student | Teacher:
        for teacher in self.recipe.teachers:
            if role == teacher_role(self.recipe, teacher):
                return teacher
        return self.recipe.student

    def model(self, name: str) -> Student | Teacher:
        """The student, or the teacher of that name."""
        return next((one for one in self.recipe.teachers if one.name == name), self.recipe.student)

    def adapter(self, role: Role) -> Entry | None:
        """The entry of the student's adapter; None where the role's weights are whole."""
        step, student = self.steps.get(role), self.recipe.student
        if step is None or student.lora is None:
            return None
        is_warm = step.stage == Stage.SFT and step.subject == STUDENT and student.warmup is not None
        return self.store.entry(step) if is_warm or step.stage == Stage.TRAIN else None

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

    def source(self, role: Role) -> ModelSource:
        """Where the weights of the student or a teacher are; `check_weights` checks them."""
        settings = self.settings(role)
        entry, name = self.origin(role)
        folder = self.folders[name] if entry is None else entry.folder / self._weights_folder(role)
        digest = self.weights_digest(role)
        assert digest is not None
        source = ModelSource(
            folder, digest, settings.dtype, settings.trust_remote_code, quantization=settings.quantization
        )
        adapter = self.adapter(role)
        if adapter is not None:
            manifest = adapter.manifest()
            assert manifest is not None
            source = replace(source, adapter=AdapterSource(adapter.folder / "model", manifest.payload_digest))
        return source

    def check_weights(self, role: Role) -> None:
        """Raises ArtifactError where weights that a step made are not those that it published."""
        entry, _ = self.origin(role)
        if entry is not None:
            entry.opened(self._weights_folder(role))
        adapter = self.adapter(role)
        if adapter is not None:
            adapter.opened("model")

    def opened_weights(self, role: Role) -> Path:
        """The folder of a model's whole weights, after they were checked."""
        entry, name = self.origin(role)
        if entry is None:
            return self.folders[name]
        return entry.opened(self._weights_folder(role)) / self._weights_folder(role)

    def weights_digest(self, role: Role) -> str | None:
        """What identifies a model's weights; None for a student from nothing that the step does not open."""
        entry, name = self.origin(role)
        if entry is None:
            return self.identities.get(name)
        manifest, kind = entry.manifest(), self._weights_folder(role)
        if manifest is None:
            return None
        return manifest.payload_digest if kind == "model" else f"{manifest.payload_digest}/{kind}"

    def text_folder(self, role: Role) -> Path | None:
        """The folder of a model's tokenizer, checked; None for a scratch model that the step does not open."""
        entry, name = self.origin(role)
        if entry is None:
            return self.folders.get(name)
        kind, manifest = self._weights_folder(role), entry.manifest()
        files = [file.path for file in manifest.files] if manifest is not None else []
        inside = [path for path in files if path.startswith(f"{kind}/") and not path.endswith(".safetensors")]
        return entry.opened(*inside or [kind]) / kind

    def _weights_folder(self, role: Role) -> str:
        """Which folder of its entry holds the weights: a teacher may be the average beside the student."""
        return "ema" if "ema" in self.step.inputs[role].opens else "model"
