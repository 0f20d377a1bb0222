"""The models of a step as the doctor sees them; those that no step has made yet are stood in for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from pydantic import JsonValue

from kdpipe.data.tasks.arithmetic import words
from kdpipe.doctor.case import Case
from kdpipe.doctor.case import Model as Patient
from kdpipe.doctor.examine import examine, sizes
from kdpipe.errors import KdpipeError
from kdpipe.execution.inputs import Inputs
from kdpipe.execution.trainers import Training
from kdpipe.models.folder import write_model
from kdpipe.models.prompting import arithmetic_tokenizer
from kdpipe.recipe.roles import SERVER, STUDENT, STUDENT_ROLE, Role
from kdpipe.recipe.schema import EngineName, Teacher
from kdpipe.store.artifacts import Draft, Entry
from kdpipe.workers.pulse import Pulse
from kdpipe.workers.worker import Message


def examine_patients(inputs: Inputs) -> Message:
    """The doctor's findings on the models that the step opens, and with a full examination the estimate."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-doctor-") as folder:
        place = Path(folder)
        stand_ins = {role: _stand_in(inputs, Role.parse(role), place) for role in inputs.request["missing"]}
        entry = Entry(place / "step", inputs.step.id, inputs.step.fingerprint)
        draft = Draft(entry, inputs.step, note=lambda _kind, _fields: None)
        job = inputs.job(draft, Pulse(lambda _fields: None, inputs.report.stopping.is_set))
        roles = [role for role in map(Role.parse, inputs.request["roles"]) if role != STUDENT_ROLE]
        engine = inputs.recipe.teacher_score.engine
        teachers = [(inputs.settings(role), _examined(inputs, role, engine, stand_ins)) for role in roles]
        case = Case(
            job=job,
            device=inputs.warm.device,
            student=_examined(inputs, STUDENT_ROLE, inputs.recipe.rollout.engine, stand_ins),
            teachers=[(settings, model) for settings, model in teachers if isinstance(settings, Teacher)],
            depth=inputs.request["examine"],
        )
        findings: list[JsonValue] = [dict(finding.to_json()) for finding in examine(case)]
        if case.depth == "quick":
            return {"findings": findings}
        try:
            return {"findings": findings, "estimate": dict(sizes(case).to_json())}
        except KdpipeError as error:  # the findings are not lost with it
            return {"findings": findings, "estimate": {"problem": error.message}}


def _examined(inputs: Inputs, role: Role, engine: EngineName, stand_ins: Mapping[str, str]) -> Patient:
    """The student or a teacher as the doctor sees it; its engine is opened when it is first asked."""
    settings, source = inputs.settings(role), inputs.source(role)
    is_here = not (isinstance(settings, Teacher) and settings.server is not None)
    return Patient(
        name=settings.name if isinstance(settings, Teacher) else STUDENT,
        source=source,
        text=inputs.text(role),
        open_engine=lambda: inputs.engine(engine, role),
        engine_name=engine if is_here else SERVER,
        is_here=is_here,
        stand_in=stand_ins.get(str(role), ""),
    )


def _stand_in(inputs: Inputs, role: Role, place: Path) -> str:
    """Puts other weights in the place of those that a step has not made yet; returns what they are."""
    settings, step_id = inputs.settings(role), inputs.request["missing"][str(role)]
    is_own = isinstance(settings, Teacher) and settings.self_ is None
    name = settings.name if isinstance(settings, Teacher) and is_own else STUDENT
    origin = settings if is_own else inputs.recipe.student
    if origin.scratch is None:
        return f"its weights before {step_id}, which is not done"
    if name not in inputs.request["folders"]:
        folder = place / name
        write_model(Training(inputs).scratch(origin), arithmetic_tokenizer(words()), folder)
        inputs.request["folders"][name] = str(folder)
        inputs.request["digests"][name] = f"untrained {name}"
    return f"untrained weights: {step_id} is not done"
