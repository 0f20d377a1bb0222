"""The models of a step as the doctor sees them; those that no step has made yet are stood in for."""

from __future__ import annotations

import tempfile
from pathlib import Path

from pydantic import JsonValue

from kdpipe.data.tasks.arithmetic import words
from kdpipe.doctor.case import Case
from kdpipe.doctor.examine import examine, sizes
from kdpipe.errors import KdpipeError
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.trainers import Training
from kdpipe.models.folder import write_model
from kdpipe.models.prompting import arithmetic_tokenizer
from kdpipe.recipe.roles import STUDENT_ROLE, Role
from kdpipe.recipe.schema import ModelTeacher, OwnTeacher, Student
from kdpipe.store.artifacts import Draft, Entry
from kdpipe.workers.pulse import Pulse
from kdpipe.workers.worker import Message


def examine_patients(inputs: Inputs) -> Message:
    """The doctor's findings on the models that the step opens, and with a full examination the estimate."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        place = Path(folder)
        stand_ins = [_stand_in(inputs, Role.parse(role), place) for role in inputs.request["missing"]]
        entry = Entry(place / "step", inputs.step.id, inputs.step.fingerprint)
        draft = Draft(entry, inputs.step, note=lambda _kind, _fields: None)
        job = inputs.job(draft, Pulse(lambda _fields: None, inputs.report.stopping.is_set))
        roles = [role for role in map(Role.parse, inputs.request["roles"]) if role != STUDENT_ROLE]
        engine = inputs.recipe.teacher_score.engine
        teachers = [(inputs.settings(role), inputs.open(role, engine)) for role in roles]
        case = Case(
            job=job,
            device=inputs.warm.device,
            student=inputs.open(STUDENT_ROLE, inputs.recipe.rollout.engine),
            teachers=[(settings, model) for settings, model in teachers if not isinstance(settings, Student)],
            stand_ins=dict(stand_ins),
            depth=inputs.request["examine"],
        )
        findings: list[JsonValue] = [dict(finding.to_json()) for finding in examine(case)]
        if case.depth == "quick":
            return {"findings": findings}
        try:
            return {"findings": findings, "estimate": dict(sizes(case).to_json())}
        except KdpipeError as error:  # the findings are not lost with it
            return {"findings": findings, "estimate": {"problem": error.message}}


def _stand_in(inputs: Inputs, role: Role, place: Path) -> tuple[str, str]:
    """Puts other weights in the place of those that a step has not made yet; returns whose, and what they are."""
    settings, step_id = inputs.settings(role), inputs.request["missing"][str(role)]
    origin = settings if isinstance(settings, OwnTeacher) else inputs.recipe.student
    if isinstance(origin, ModelTeacher) or origin.scratch is None:
        return settings.name, f"its weights before {step_id}, which is not done"
    weights = origin.name
    if weights not in inputs.request["folders"]:
        folder = place / weights
        write_model(Training(inputs).scratch(origin.scratch), arithmetic_tokenizer(words()), folder)
        inputs.request["folders"][weights] = str(folder)
        inputs.request["digests"][weights] = f"untrained {weights}"
    return settings.name, f"untrained weights: {step_id} is not done"
