"""The models of a step as the doctor probes them; weights that no step has made yet are stood in for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import JsonValue

from kdpipe.data.rows import Problem
from kdpipe.data.tasks.arithmetic import words
from kdpipe.doctor.budget import SIZES, require_fit
from kdpipe.doctor.case import Case
from kdpipe.doctor.finding import FINDINGS
from kdpipe.doctor.teacher import examine
from kdpipe.errors import KdpipeError
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.roles import Roles
from kdpipe.execution.trainers import Trainers
from kdpipe.models.folder import write_model
from kdpipe.models.tokenizer import arithmetic_tokenizer
from kdpipe.pipeline.request import Depth, Examined, Found
from kdpipe.recipe.roles import STUDENT_ROLE, Role
from kdpipe.recipe.schema import ModelTeacher, Student
from kdpipe.recipe.teacher import OwnTeacher
from kdpipe.stages.job import Job
from kdpipe.store.artifacts import Draft, Entry
from kdpipe.workers.pulse import Pulse

Problems = Sequence[Problem]


@dataclass(frozen=True, slots=True)
class Probe:
    """Examines the student and the teachers of a step by the engines that would run them."""

    roles: Roles
    trainers: Trainers
    device: torch.device
    train: Problems
    test: Problems

    def __call__(
        self, inputs: Inputs, teachers: Sequence[Role], *, missing: Mapping[Role, str], depth: Depth
    ) -> Examined:
        """The findings, and with a full examination the estimate; `missing` are steps not done, by their role."""
        with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
            stand_ins = {}
            for role, step_id in missing.items():
                inputs, weights = self._stand_in(inputs, role, Path(folder))
                stand_ins[inputs.settings(role).name] = weights.format(step=step_id)
            recipe, step = inputs.recipe, inputs.step
            entry = Entry(Path(folder) / "step", step.id, step.fingerprint)
            draft = Draft(entry, step, note=lambda _kind, _fields: None)
            pulse = Pulse(lambda _fields: None, inputs.report.stopping.is_set)
            case = Case(
                recipe=recipe,
                job=Job(recipe.runtime, step.round, step.seed, self.train, self.test, draft, pulse),
                device=self.device,
                student=self.roles.open(inputs, STUDENT_ROLE, recipe.rollout.engine),
                teachers=[
                    (settings, self.roles.open(inputs, role, recipe.teacher_score.engine))
                    for role in teachers
                    if not isinstance(settings := inputs.settings(role), Student)
                ],
                stand_ins=stand_ins,
                depth=depth,
                folder=Path(folder),
            )
            if self.device.type == "cuda" and depth != "servers":
                require_fit(case.sizes())
            findings: list[dict[str, JsonValue]] = []
            for finding in examine(case):
                findings += FINDINGS.dump_python((finding,), mode="json")
                if depth == "full":
                    inputs.report.event(Found(findings[-1]))
            if depth != "full":
                return Examined(findings)
            try:
                return Examined(findings, SIZES.dump_python(case.sizes(), mode="json"))
            except KdpipeError as error:  # the findings are not lost with it
                return Examined(findings, {"problem": error.message})

    def _stand_in(self, inputs: Inputs, role: Role, place: Path) -> tuple[Inputs, str]:
        """Inputs with other weights in the place of those that no step has made yet, and what they are."""
        settings = inputs.settings(role)
        origin = settings if isinstance(settings, OwnTeacher) else inputs.recipe.student
        if isinstance(origin, ModelTeacher) or origin.scratch is None:
            return inputs, "its weights before {step}, which is not done"
        name = origin.name
        if name not in inputs.folders:
            model = self.trainers.scratch(inputs, origin.scratch)
            write_model(model, arithmetic_tokenizer(words()), place / name)
            folders = {**inputs.folders, name: place / name}
            identities = {**inputs.identities, name: f"untrained {name}"}
            inputs = replace(inputs, folders=folders, identities=identities)
        return inputs, "untrained weights: {step} is not done"
